"""The trained weights as a checkpoint of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

from nano.joint_stage import joined
from nano.network import ALPHA, CROP, LORA_TARGETS, PATCH, RANK, new_network
from nano.tokens import CHAT_TEMPLATE, Tokens
from peers import require

_IMAGE: Final = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "dynamic_hd": 36,
    "image_mean": [0.5] * 3,
    "image_processor_type": "Phi4MultimodalImageProcessor",
    "image_std": [0.5] * 3,
    "patch_size": PATCH,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": CROP, "width": CROP},
}
_AUDIO: Final = {
    "audio_compression_rate": 8,
    "audio_downsample_rate": 1,
    "audio_feat_stride": 1,
    "feature_extractor_type": "Phi4MultimodalFeatureExtractor",
    "feature_size": 80,
    "hop_length": 160,
    "n_fft": 512,
    "padding_side": "right",
    "padding_value": 0.0,
    "preemphasis": 0.97,
    "sampling_rate": 16000,
    "win_length": 400,
}
_PROCESSOR: Final = {"processor_class": "Phi4MultimodalProcessor"}
_ADAPTER: Final = {
    "base_model_name_or_path": "phi4mm-nano",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": RANK,
    "target_modules": LORA_TARGETS,
    "task_type": "CAUSAL_LM",
}


def export(work: Path) -> None:
    """Writes WORK/checkpoint, in bfloat16; nothing of a former one is left."""
    save_file = require("safetensors.torch").save_file
    tokens = Tokens(work / "tokenizer.json")
    network = new_network(tokens)
    adapters = joined(network, work)
    part = work / "checkpoint.part"
    shutil.rmtree(part, ignore_errors=True)
    network.bfloat16().save_pretrained(part)
    tokens.tokenizer.save_pretrained(part)
    (part / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _write(part / "preprocessor_config.json", _IMAGE | _AUDIO | _PROCESSOR)
    audio = _AUDIO | {"return_attention_mask": True}
    _write(part / "processor_config.json", {"audio_processor": audio, "image_processor": _IMAGE} | _PROCESSOR)
    config = network.config
    ends = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write(part / "generation_config.json", ends | {"do_sample": False})
    for name, state in adapters.items():
        folder = part / f"{name}-lora"
        folder.mkdir()
        tensors = {f"base_model.model.{key}": value.bfloat16().contiguous() for key, value in state.items()}
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        _write(folder / "adapter_config.json", _ADAPTER)
    done = work / "checkpoint"
    shutil.rmtree(done, ignore_errors=True)
    part.rename(done)


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
