"""Small random Phi-4-multimodal checkpoints: both encoders, all projectors and two LoRAs, in both layouts.

The weights are those of a model of transformers, which is the oracle too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peers import require
from tiny_checkpoints import Tensors, write_json, write_safetensors, write_tokenizer
from tiny_models import Array

MEDIA_LAYOUTS = ("phi4_multimodal", "phi4mm")
MEDIA = "model.embed_tokens_extend."
_LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_CRUMBS = ("global_img_feature_extensor", "sub_img_feature_extensor", "probe", ".b1", ".b2")  # vectors with many axes

# Names of transformers -> those of the original, by what stands in the middle.  "vision_speech" goes before "speech".
_ORIGINAL = (
    ("image_embed.img_projection_up.", "image_embed.img_projection.0."),
    ("image_embed.img_projection_down.", "image_embed.img_projection.2."),
    ("image_embed.global_img_feature_extensor", "image_embed.glb_GN"),
    ("image_embed.sub_img_feature_extensor", "image_embed.sub_GN"),
    ("audio_embed.up_proj_for_vision_speech.", "audio_embed.audio_projection.vision.0."),
    ("audio_embed.down_proj_for_vision_speech.", "audio_embed.audio_projection.vision.2."),
    ("audio_embed.up_proj_for_speech.", "audio_embed.audio_projection.speech.0."),
    ("audio_embed.down_proj_for_speech.", "audio_embed.audio_projection.speech.2."),
)
_ORIGINAL_AUDIO = (
    ("feed_forward_in.gate_up_proj.", "feed_forward_in.net.0.linear."),
    ("feed_forward_in.down_proj.", "feed_forward_in.net.2."),
    ("feed_forward_out.gate_up_proj.", "feed_forward_out.net.0.linear."),
    ("feed_forward_out.down_proj.", "feed_forward_out.net.2."),
    *((f"self_attn.{part}_proj.", f"self_attn.linear_{part}.") for part in "qkv"),
    ("self_attn.o_proj.", "self_attn.linear_out."),
)


@dataclass(frozen=True)
class MediaShape:
    """Sizes; the odd ones fit no block of a quantized format."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 96
    vocab: int = 512
    context: int = 2048
    original_context: int = 512
    vision_hidden: int = 40
    vision_ffn: int = 54
    vision_layers: int = 3
    vision_heads: int = 2
    crop_size: int = 112  # pixels; 8 x 8 patches
    audio_hidden: int = 48
    audio_ffn: int = 52
    audio_blocks: int = 2
    audio_heads: int = 2
    audio_channels: int = 8
    vision_rank: int = 8
    speech_rank: int = 10
    seed: int = 0

    @property
    def image_token(self) -> int:
        return self.vocab - 2

    @property
    def audio_token(self) -> int:
        return self.vocab - 1


def tiny_multimodal(
    directory: Path,
    layout: str = "phi4_multimodal",
    *,
    dtype: str = "F32",
    changes: Mapping[str, Array | None] | None = None,
    **sizes: Any,
) -> Path:
    """Writes a checkpoint; sizes are the fields of MediaShape, and ``changes`` replaces tensors or removes them."""
    shape = MediaShape(**sizes)
    directory.mkdir(parents=True, exist_ok=True)
    config = media_config(shape)
    tensors = media_tensors(shape)
    if layout == "phi4mm":
        tensors = {original_name(name): values for name, values in tensors.items()}
        for adapter in ("vision", "speech"):
            for name, values in lora_tensors(shape, adapter).items():
                tensors[name.removesuffix(".weight") + f".{adapter}.weight"] = values
        write_json(directory / "config.json", original_config(shape, config))
    else:
        write_json(directory / "config.json", config.to_dict())
        for adapter in ("vision", "speech"):
            _write_adapter(directory / f"{adapter}-lora", shape, adapter, dtype)
    for name, replacement in (changes or {}).items():
        if replacement is None:
            del tensors[name]
        else:
            tensors[name] = replacement
    write_safetensors(directory / "model.safetensors", tensors, dtype)
    write_json(directory / "preprocessor_config.json", _preprocessor_config(shape))
    write_tokenizer(directory, shape.vocab)
    _add_placeholders(directory / "tokenizer.json", shape)
    return directory


def media_model(shape: MediaShape) -> Any:
    """The Phi4MultimodalForCausalLM with these weights, without LoRAs; float32.

    Eager attention: without a masked patch, transformers 5.23 runs its default attention of the vision tower causally.
    """
    torch, transformers = require("torch"), require("transformers")
    model = transformers.Phi4MultimodalForCausalLM._from_config(media_config(shape), attn_implementation="eager")
    rng = np.random.default_rng(shape.seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name != "lm_head.weight":  # tied
                tensor.copy_(torch.from_numpy(_random_values(rng, name, tuple(tensor.shape))))
    return model.float().eval()


def media_tensors(shape: MediaShape) -> Tensors:
    """All weights under the names of transformers."""
    state = media_model(shape).state_dict()
    return {name: tensor.numpy().copy() for name, tensor in state.items() if name != "lm_head.weight"}


def lora_tensors(shape: MediaShape, adapter: str) -> Tensors:
    """model.layers.N.<linear>.lora_[AB].weight of "vision" or "speech"; alpha is twice the rank."""
    rng = np.random.default_rng([shape.seed, adapter == "speech"])
    rank = shape.vision_rank if adapter == "vision" else shape.speech_rank
    head = shape.hidden // shape.heads
    sizes = (
        ((shape.heads + 2 * shape.kv_heads) * head, shape.hidden),
        (shape.hidden, shape.hidden),
        (2 * shape.ffn, shape.hidden),
        (shape.hidden, shape.ffn),
    )
    tensors = {}
    for layer in range(shape.layers):
        for linear, (n_rows, n_columns) in zip(_LINEARS, sizes, strict=True):
            name = f"model.layers.{layer}.{linear}.lora_"
            tensors[f"{name}A.weight"] = _normal(rng, (rank, n_columns), 1 / math.sqrt(n_columns))
            tensors[f"{name}B.weight"] = _normal(rng, (n_rows, rank), 0.3 / math.sqrt(rank))
    return tensors


def original_name(name: str) -> str:
    """What Microsoft's own files call a tensor of transformers' model."""
    if name.startswith("model.layers.") and name.endswith("_proj.weight"):
        return name.removesuffix(".weight") + ".base_layer.weight"
    if not name.startswith(MEDIA):
        return name
    for old, new in _ORIGINAL + (_ORIGINAL_AUDIO if "audio_embed.encoder.encoders." in name else ()):
        name = name.replace(old, new)
    return name


def media_config(shape: MediaShape) -> Any:
    """The Phi4MultimodalConfig."""
    n_pairs = int(shape.hidden // shape.heads * 0.75) // 2
    long_factors = np.geomspace(1, 16, n_pairs).tolist()
    return require("transformers").Phi4MultimodalConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        original_max_position_embeddings=shape.original_context,
        tie_word_embeddings=True,
        partial_rotary_factor=0.75,
        rope_theta=10000.0,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * n_pairs, "long_factor": long_factors},
        bos_token_id=0,
        eos_token_id=[0, 1],
        pad_token_id=0,
        architectures=["Phi4MultimodalForCausalLM"],
        vision_config={
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_ffn,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": shape.vision_heads,
            "image_size": shape.crop_size,
            "crop_size": shape.crop_size,
            "image_token_id": shape.image_token,
        },
        audio_config={
            "hidden_size": shape.audio_hidden,
            "intermediate_size": shape.audio_ffn,
            "num_blocks": shape.audio_blocks,
            "num_attention_heads": shape.audio_heads,
            "ext_pw_out_channel": shape.audio_hidden,
            "depthwise_separable_out_channel": shape.audio_hidden,
            "nemo_conv_channels": shape.audio_channels,
            "bias_max_distance": 500,
            "audio_token_id": shape.audio_token,
        },
    )


def original_config(shape: MediaShape, config: Any) -> dict[str, Any]:
    """config.json as Microsoft writes it; ``img_processor`` has the sizes, which the real model's code holds itself."""
    native = config.to_dict()
    rope = native.pop("rope_parameters")
    vision, audio = native.pop("vision_config"), native.pop("audio_config")
    return {
        **native,
        "model_type": "phi4mm",
        "architectures": ["Phi4MMForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_phi4mm.Phi4MMForCausalLM"},
        "rope_theta": 10000.0,
        "rope_scaling": {key: rope[key] for key in ("type", "short_factor", "long_factor")},
        "img_processor": vision,
        "embd_layer": {
            "embedding_cls": "image_audio",
            "image_embd_layer": {"crop_size": shape.crop_size, "hd_transform_order": "sub_glb"},
            "audio_embd_layer": {"compression_rate": 8, "downsample_rate": 1},
        },
        "audio_processor": {
            "name": "cascades",
            "config": {
                "attention_dim": shape.audio_hidden,
                "attention_heads": shape.audio_heads,
                "linear_units": shape.audio_ffn,
                "num_blocks": shape.audio_blocks,
                "nemo_conv_settings": {"conv_channels": shape.audio_channels},
                "relative_attention_bias_args": {"type": "t5", "t5_bias_max_distance": 500},
                "depthwise_seperable_out_channel": shape.audio_hidden,
                "ext_pw_out_channel": shape.audio_hidden,
                **{key: audio[key] for key in ("activation", "conv_activation", "conv_glu_type", "input_size")},
                **{key: audio[key] for key in ("chunk_size", "left_chunk", "kernel_size", "time_reduction")},
            },
        },
        "vision_lora": {"r": shape.vision_rank, "lora_alpha": 2 * shape.vision_rank, "dp": 0.0, "layer": "layers.*"},
        "speech_lora": {"r": shape.speech_rank, "lora_alpha": 2 * shape.speech_rank, "dp": 0.01, "layer": "layers.*"},
    }


def _random_values(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    """Nothing stays zero or one, as fresh weights are, so that leaving something out is seen."""
    if name.endswith("global_mean"):  # of log-mel energies
        return _normal(rng, shape, 1.0, 18.0)
    if name.endswith("global_invstd"):
        return _normal(rng, shape, 0.03, 0.3)
    if "norm" in name and name.endswith(".weight"):
        return _normal(rng, shape, 0.25, 1.0)
    if len(shape) < 2 or name.endswith(_CRUMBS):
        return _normal(rng, shape, 0.3)
    return _normal(rng, shape, 0.6 / math.sqrt(math.prod(shape[1:])))


def _normal(rng: np.random.Generator, shape: tuple[int, ...], deviation: float, mean: float = 0.0) -> Array:
    return (mean + deviation * rng.standard_normal(shape)).astype(np.float32)


def _write_adapter(directory: Path, shape: MediaShape, adapter: str, dtype: str) -> None:
    """As PEFT writes it."""
    rank = shape.vision_rank if adapter == "vision" else shape.speech_rank
    directory.mkdir(exist_ok=True)
    tensors = {f"base_model.model.{name}": values for name, values in lora_tensors(shape, adapter).items()}
    write_safetensors(directory / "adapter_model.safetensors", tensors, dtype)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "target_modules": r"model\.layers\.\d+\.(self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj)",
        "bias": "none",
        "inference_mode": True,
    }
    write_json(directory / "adapter_config.json", config)


def _preprocessor_config(shape: MediaShape) -> dict[str, Any]:
    return {
        "image_processor_type": "Phi4MultimodalImageProcessor",
        "feature_extractor_type": "Phi4MultimodalFeatureExtractor",
        "processor_class": "Phi4MultimodalProcessor",
        "dynamic_hd": 36,
        "size": {"height": shape.crop_size, "width": shape.crop_size},
        "patch_size": 14,
        "sampling_rate": 16000,
        "audio_compression_rate": 8,
    }


def _add_placeholders(path: Path, shape: MediaShape) -> None:
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    for token, text in ((shape.image_token, "<|endoftext10|>"), (shape.audio_token, "<|endoftext11|>")):
        tokenizer["added_tokens"].append({"id": token, "content": text, "special": True})
    write_json(path, tokenizer)
