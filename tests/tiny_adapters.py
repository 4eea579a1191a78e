"""Small LoRA adapters made on the spot: in PEFT's folders, between the weights of a checkpoint, and in llama.cpp."""

from __future__ import annotations

import ctypes
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from peers import LlamaCpp, require
from tiny_checkpoints import Tensors, tiny_checkpoint, write_json, write_safetensors
from tiny_models import Array, TinyShape, tiny_transformers

PREFIX = "base_model.model."
_B_GAIN = 0.2  # with an alpha of twice the rank, what is added is about as large as the weights of the tiny model
# The linears of a decoder layer and what they are called in GGUF.
STEMS = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def lora_tensors(shape: TinyShape, rank: int, *, prefix: str = PREFIX, label: str = "", seed: int = 0) -> Tensors:
    """A pair for every linear of every layer, strong enough to change what a tiny model says; label: ".vision"."""
    rng = np.random.default_rng(seed)
    n_q, n_kv = shape.heads * shape.size_per_head, shape.kv_heads * shape.size_per_head
    sizes = {  # rows and columns of the weights
        "self_attn.qkv_proj": (n_q + 2 * n_kv, shape.hidden),
        "self_attn.o_proj": (shape.hidden, n_q),
        "mlp.gate_up_proj": (2 * shape.ffn, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.ffn),
    }
    tensors: Tensors = {}
    for layer in range(shape.layers):
        for linear, (n_rows, n_columns) in sizes.items():
            stem = f"{prefix}model.layers.{layer}.{linear}"
            tensors[f"{stem}.lora_A{label}.weight"] = _random(rng, rank, n_columns)
            tensors[f"{stem}.lora_B{label}.weight"] = _B_GAIN * _random(rng, n_rows, rank)
    return tensors


def gguf_name(name: str) -> str:
    """A tensor of PEFT's in llama.cpp's adapter format."""
    match = re.search(r"layers\.(\d+)\.(\w+\.\w+)\.lora_([AB])", name)
    assert match
    return f"blk.{match[1]}.{STEMS[match[2]]}.weight.lora_{match[3].lower()}"


def peft_config(rank: int, **changes: Any) -> dict[str, Any]:
    """adapter_config.json with an alpha of twice the rank; a change to None removes a field."""
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", "target_modules": [*STEMS]}
    return {name: value for name, value in (config | changes).items() if value is not None}


def write_adapter_folder(
    directory: Path, tensors: Mapping[str, Array], config: Mapping[str, Any], dtype: str = "F32"
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "adapter_model.safetensors", tensors, dtype)
    write_json(directory / "adapter_config.json", config)
    return directory


def tiny_multimodal(directory: Path, layout: str, ranks: Mapping[str, int], **options: Any) -> Path:
    """A checkpoint of a multimodal layout; in either, the same adapters ("vision" -> rank).  Options of TinyShape."""
    shape = TinyShape(**options)
    inline: dict[str, Array | None] = {}
    for seed, (name, rank) in enumerate(ranks.items()):
        if layout == "phi4mm":
            inline |= lora_tensors(shape, rank, prefix="", label=f".{name}", seed=seed)
        else:
            tensors = lora_tensors(shape, rank, prefix="", seed=seed)
            write_adapter_folder(directory / f"{name}-lora", tensors, peft_config(rank))
    tiny_checkpoint(directory, layout, changes=inline, **options)
    if layout == "phi4mm":
        config = json.loads((directory / "config.json").read_text())
        config |= {f"{name}_lora": {"r": rank, "lora_alpha": 2 * rank, "dp": 0.0} for name, rank in ranks.items()}
        write_json(directory / "config.json", config)
    return directory


def peft_model(directory: Path, lora: Mapping[str, Any], **options: Any) -> Any:
    """``tiny_transformers`` of the same options with a random LoRA that PEFT made and saved to the directory."""
    torch, peft = require("torch"), require("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(**({"target_modules": [name.split(".")[1] for name in STEMS]} | dict(lora)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT uses of transformers, and patterns that fit no module
        model = peft.get_peft_model(tiny_transformers(**options), config).eval()
    rng = np.random.default_rng(0)
    for name, weights in model.named_parameters():
        if ".lora_" in name:
            values = _random(rng, *weights.shape) * (_B_GAIN if ".lora_B." in name else 1.0)
            weights.data = torch.from_numpy(values)
    model.save_pretrained(directory)
    return model


def take_values_of_file(model: Any, path: Path) -> None:
    """Gives a model of :func:`peft_model` the adapter of a GGUF file, each value as the gguf package decodes it."""
    torch, reader = require("torch"), gguf.GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in reader.tensors}
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A") or not module.lora_A:
            continue
        a, b = (tensors.pop(gguf_name(f"{name}.lora_{matrix}")) for matrix in "AB")
        strength = alpha / a.shape[0] / module.scaling["default"]  # the file has one alpha, PEFT one for each module
        module.lora_A["default"].weight.data = torch.from_numpy(np.array(a, np.float32))
        module.lora_B["default"].weight.data = torch.from_numpy(np.array(b * strength, np.float32))
    assert not tensors


def set_llama_cpp_adapter(peer: LlamaCpp, path: Path, scale: float = 1.0) -> None:
    """Has llama.cpp add an adapter of ours from now on; RuntimeError when it does not take it."""
    api, model, context = peer._api, peer._model, peer._context
    adapter = api.llama_adapter_lora_init(model, str(path).encode())
    if not adapter:
        raise RuntimeError(f"llama.cpp does not load {path}")
    status = api.llama_set_adapters_lora(
        context, (api.llama_adapter_lora_p_ctypes * 1)(adapter), 1, (ctypes.c_float * 1)(scale)
    )
    if status != 0:
        raise RuntimeError(f"llama_set_adapters_lora returned {status}")


def _random(rng: np.random.Generator, n_rows: int, n_columns: int) -> Array:
    """Keeps the size of its input."""
    return np.asarray(rng.standard_normal((n_rows, n_columns)) / np.sqrt(n_columns), np.float32)
