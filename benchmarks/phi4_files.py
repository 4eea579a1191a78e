"""The files of a checkpoint beside its tensors: configs, a made-up vocabulary as large as the real one."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.phi4_tensors import ADAPTERS, Shape, Vision
from phi4edge.converters.vocabulary import O200K

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# By their distance from <|endoftext|>.
_SPECIAL_TOKENS = {
    0: "<|endoftext|>",
    11: "<|endoftext10|>",
    12: "<|endoftext11|>",
    19: "<|endofprompt|>",
    20: "<|assistant|>",
    21: "<|end|>",
    22: "<|user|>",
    23: "<|system|>",
    24: "<|tool|>",
    25: "<|/tool|>",
    26: "<|tool_call|>",
    27: "<|/tool_call|>",
    28: "<|tool_response|>",
    29: "<|tag|>",
}
_TOOL_TOKENS = range(24, 29)  # those that are not "special"
_FIRST_STRIPPING = 20  # from here on they swallow the white space behind them


def write_files(directory: Path, shape: Shape, layout: str) -> None:
    """All but the tensors and the adapters."""
    write_json(directory / "config.json", config(shape, layout))
    write_json(directory / "tokenizer.json", _tokenizer(shape))
    roles = {f"{role}_token": "<|endoftext|>" for role in ("bos", "eos", "unk", "pad")}
    write_json(directory / "tokenizer_config.json", roles | {"tokenizer_class": "PreTrainedTokenizerFast"})
    (directory / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    ends = [shape.token(21), shape.token(0)]
    write_json(directory / "generation_config.json", {"bos_token_id": shape.token(0), "eos_token_id": ends})
    if layout != "phi3":
        write_json(directory / "preprocessor_config.json", _preprocessor_config(shape))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


# --- tokenizer


def _tokenizer(shape: Shape) -> dict[str, Any]:
    """Bytes, then words of growing length, each with the merge that makes it; as many as the real tokenizer has."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    tokens = [chr(byte) for byte in printable] + [chr(256 + row) for row in range(256 - len(printable))]
    n_words = shape.token(-1) - len(tokens)  # the id before <|endoftext|> stands for nothing
    letters = "Ġetaoinshrdlcumwfgypbvkjxqz"
    products = (itertools.product(letters, repeat=length) for length in itertools.count(2))
    words = ["".join(word) for word in itertools.islice(itertools.chain.from_iterable(products), n_words)]
    added = [
        {
            "id": shape.token(distance),
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": distance >= _FIRST_STRIPPING,
            "normalized": False,
            "special": distance not in _TOOL_TOKENS,
        }
        for distance, text in _SPECIAL_TOKENS.items()
    ]
    splits = [
        {"type": "Split", "pattern": {"Regex": O200K}, "behavior": "Removed", "invert": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {text: token for token, text in enumerate(tokens + words)},
            "merges": [[word[:-1], word[-1]] for word in words],
        },
    }


# --- configs

# fmt: off
_PHI4_LONG_FACTORS = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424,
    6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252,
    16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6,
    32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]
# fmt: on


def config(shape: Shape, layout: str) -> dict[str, Any]:
    """config.json with the values of the real model where the shape is the real one."""
    n_factors = shape.rotary_dims // 2
    is_real = n_factors == len(_PHI4_LONG_FACTORS)
    long_factors = _PHI4_LONG_FACTORS if is_real else np.geomspace(1.0, 48.0, n_factors).round(6).tolist()
    scaling = {"type": "longrope", "short_factor": [1.0] * n_factors, "long_factor": long_factors}
    end = shape.token(0)
    common: dict[str, Any] = {
        "model_type": layout,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "max_position_embeddings": shape.context,
        "original_max_position_embeddings": shape.original_context,
        "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-5,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    if layout == "phi4_multimodal":
        rope = {key: common[key] for key in ("original_max_position_embeddings", "partial_rotary_factor")}
        rope |= {"rope_theta": 10000.0, "rope_type": "longrope", **scaling}
        parts = {"vision_config": _vision_config(shape), "audio_config": _audio_config(shape)}
        return common | {"architectures": ["Phi4MultimodalForCausalLM"], "rope_parameters": rope} | parts
    common |= {"rope_theta": 10000.0, "rope_scaling": scaling, "attention_bias": False, "mlp_bias": False}
    common |= {"lm_head_bias": False, "full_attn_mod": 1, "interpolate_factor": 1}
    if layout == "phi3":
        return common | {"architectures": ["Phi3ForCausalLM"]}
    return common | _original_config(shape)


def _vision_config(shape: Shape) -> dict[str, Any]:
    vision = shape.vision
    return {
        "model_type": "phi4_multimodal_vision",
        "hidden_size": vision.hidden,
        "intermediate_size": vision.ffn,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "num_channels": 3,
        "image_size": vision.image,
        "crop_size": vision.image,
        "patch_size": vision.patch,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "feature_layer": -2,
        "image_token_id": shape.token(11),
    }


_AUDIO_CONSTANTS = {
    "activation": "swish",
    "conv_activation": "swish",
    "conv_glu_type": "swish",
    "chunk_size": -1,
    "left_chunk": 18,
    "kernel_size": 3,
    "time_reduction": 8,
    "depthwise_multiplier": 1,
    "dropout_rate": 0.0,
}


def _audio_config(shape: Shape) -> dict[str, Any]:
    audio = shape.audio
    return _AUDIO_CONSTANTS | {
        "model_type": "phi4_multimodal_audio",
        "hidden_size": audio.hidden,
        "intermediate_size": audio.ffn,
        "num_blocks": audio.blocks,
        "num_attention_heads": audio.heads,
        "input_size": audio.mels,
        "ext_pw_out_channel": audio.hidden,
        "depthwise_separable_out_channel": audio.hidden,
        "nemo_conv_channels": audio.channels,
        "bias_max_distance": audio.bias_distance,
        "bias_symmetric": False,
        "downsample_rate": 1,
        "feature_layer": -2,
        "audio_token_id": shape.token(12),
    }


def _original_config(shape: Shape) -> dict[str, Any]:
    """Microsoft's keys, its spelling mistakes included."""
    audio = shape.audio
    audio_config = _AUDIO_CONSTANTS | {
        "activation_checkpointing": "",
        "attention_dim": audio.hidden,
        "attention_heads": audio.heads,
        "batch_norm": False,
        "bias_in_glu": True,
        "causal": True,
        "cnn_layer_norm": True,
        "depthwise_seperable_out_channel": audio.hidden,
        "encoder_embedding_config": {"input_size": audio.mels},
        "ext_pw_kernel_size": 1,
        "ext_pw_out_channel": audio.hidden,
        "input_layer": "nemo_conv",
        "input_size": audio.mels,
        "linear_units": audio.ffn,
        "nemo_conv_settings": {"conv_channels": audio.channels},
        "num_blocks": audio.blocks,
        "relative_attention_bias_args": {"t5_bias_max_distance": audio.bias_distance, "type": "t5"},
    }
    image_layer = {
        "crop_size": shape.vision.image,
        "embedding_cls": "tune_image",
        "hd_transform_order": "sub_glb",
        "image_token_compression_cls": "avg_pool_2d",
        "projection_cls": "mlp",
        "use_hd_transform": True,
        "with_learnable_separator": True,
    }
    audio_layer = {
        "compression_rate": 8,
        "downsample_rate": 1,
        "embedding_cls": "audio",
        "projection_cls": "mlp",
        "use_conv_downsample": False,
        "use_qformer": False,
    }
    targets = r"layers.*((self_attn\.(qkv_proj|o_proj))|(mlp\.(gate_up|down)_proj))"
    loras = {
        f"{adapter}_lora": {"dp": dropout, "layer": targets, "lora_alpha": 2 * rank, "r": rank}
        for adapter, dropout, rank in zip(ADAPTERS, (0.0, 0.01), shape.ranks, strict=True)
    }
    return {
        "architectures": ["Phi4MMForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_phi4mm.Phi4MMForCausalLM"},
        "audio_processor": {"config": audio_config, "name": "cascades"},
        "embd_layer": {
            "audio_embd_layer": audio_layer,
            "embedding_cls": "image_audio",
            "image_embd_layer": image_layer,
        },
        # Microsoft's code knows the one tower that there is; a smaller one must be described.
        "img_processor": None if shape.vision == Vision() else _vision_config(shape),
    } | loras


def adapter_config(shape: Shape, adapter: str) -> dict[str, Any]:
    rank = shape.ranks[ADAPTERS.index(adapter)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0 if adapter == "vision" else 0.01,
        "target_modules": r"model\.layers\.\d+\.(self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj)",
        "bias": "none",
        "inference_mode": True,
    }


def _preprocessor_config(shape: Shape) -> dict[str, Any]:
    return {
        "processor_class": "Phi4MultimodalProcessor",
        "image_processor_type": "Phi4MultimodalImageProcessor",
        "dynamic_hd": 36,
        "size": {"height": shape.vision.image, "width": shape.vision.image},
        "patch_size": shape.vision.patch,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "rescale_factor": 1 / 255,
        "feature_extractor_type": "Phi4MultimodalFeatureExtractor",
        "feature_size": shape.audio.mels,
        "sampling_rate": 16000,
        "n_fft": 512,
        "win_length": 400,
        "hop_length": 160,
        "preemphasis": 0.97,
        "audio_compression_rate": 8,
        "audio_downsample_rate": 1,
        "audio_feat_stride": 1,
    }
