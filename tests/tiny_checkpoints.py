"""Small checkpoints made on the spot, in the three layouts that are converted; written without safetensors or torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from phi4edge.converters.vocabulary import O200K
from tiny_models import (
    CHAT_TEMPLATE,
    MERGE_TEXT,
    SPECIAL_TOKENS,
    Array,
    TinyShape,
    _transformers_name,
    _transformers_weights,
    byte_characters,
    learn_merges,
)

LAYOUTS = ("phi3", "phi4_multimodal", "phi4mm")
Tensors = dict[str, Array]


def tiny_checkpoint(
    directory: Path,
    layout: str = "phi3",
    *,
    dtype: str = "F32",
    n_shards: int = 1,
    changes: Mapping[str, Array | None] | None = None,
    **options: Any,
) -> Path:
    """Writes a checkpoint; options are the fields of TinyShape, and ``changes`` replaces tensors or removes them."""
    shape = TinyShape(**options)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = tiny_tensors(shape, layout)
    for name, tensor in (changes or {}).items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    if n_shards == 1:
        write_safetensors(directory / "model.safetensors", tensors, dtype)
    else:
        places: dict[str, str] = {}
        for shard in range(n_shards):
            file = f"model-{shard + 1:05}-of-{n_shards:05}.safetensors"
            part = dict(list(tensors.items())[shard::n_shards])
            write_safetensors(directory / file, part, dtype)
            places |= dict.fromkeys(part, file)
        write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    write_json(directory / "config.json", tiny_config(shape, layout))
    write_tokenizer(directory, shape.vocab)
    return directory


def tiny_tensors(shape: TinyShape, layout: str) -> Tensors:
    """The weights of ``tiny_gguf`` of the same shape under the names of a layout, with what else that layout holds."""
    tensors = {_transformers_name(name): rows for name, rows in _transformers_weights(shape).items()}
    if layout == "phi3":
        return tensors
    tensors["model.embed_tokens_extend.image_embed.img_processor.head.probe"] = np.ones((1, 1, 8), np.float32)
    if layout == "phi4_multimodal":
        return tensors
    renamed: Tensors = {}
    for name, rows in tensors.items():
        if not name.endswith("_proj.weight"):
            renamed[name] = rows
            continue
        stem = name.removesuffix(".weight")
        renamed[f"{stem}.base_layer.weight"] = rows
        for adapter in ("vision", "speech"):
            renamed[f"{stem}.lora_A.{adapter}.weight"] = np.ones((4, rows.shape[1]), np.float32)
            renamed[f"{stem}.lora_B.{adapter}.weight"] = np.ones((rows.shape[0], 4), np.float32)
    return renamed


def tiny_config(shape: TinyShape, layout: str, *, rope_type: str = "longrope") -> dict[str, Any]:
    """config.json in the old spelling; tiny_transformers(...).save_pretrained() writes the new one."""
    config: dict[str, Any] = {
        "model_type": layout,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": shape.rope_base,
        "partial_rotary_factor": shape.rotary_fraction,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": 0,
        "eos_token_id": [0, 1],
    }
    if layout == "phi4mm":
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_phi4mm.Phi4MMForCausalLM"}
    if shape.original_context:
        short, long = shape.factors
        config["original_max_position_embeddings"] = shape.original_context
        config["rope_scaling"] = {"type": rope_type, "short_factor": short.tolist(), "long_factor": long.tolist()}
    return config


def write_tokenizer(directory: Path, n_vocab: int) -> None:
    """The vocabulary of ``tiny_gguf``; the special tokens stand behind the learned ones."""
    merges = learn_merges(MERGE_TEXT, min(96, n_vocab - 256 - len(SPECIAL_TOKENS)))
    tokens = byte_characters() + [left + right for left, right in merges]
    added = [
        {"id": len(tokens) + place, "content": text, "special": place < 5} for place, text in enumerate(SPECIAL_TOKENS)
    ]
    splits = [{"type": "Split", "pattern": {"Regex": O200K}}, {"type": "ByteLevel"}]
    tokenizer = {
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "model": {
            "type": "BPE",
            "vocab": {text: token for token, text in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }
    write_json(directory / "tokenizer.json", tokenizer)
    write_json(
        directory / "tokenizer_config.json", {f"{role}_token": "<|endoftext|>" for role in ("bos", "eos", "pad", "unk")}
    )
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def safetensors_bytes(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def write_safetensors(path: Path, tensors: Mapping[str, Array], dtype: str = "F32") -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    pieces = []
    at = 0
    for name, rows in tensors.items():
        piece = as_dtype(rows, dtype).tobytes()
        header[name] = {"dtype": dtype, "shape": list(rows.shape), "data_offsets": [at, at + len(piece)]}
        pieces.append(piece)
        at += len(piece)
    path.write_bytes(safetensors_bytes(json.dumps(header).encode(), b"".join(pieces)))


def as_dtype(rows: Array, dtype: str) -> npt.NDArray[Any]:
    if dtype == "BF16":  # cut, not rounded: good enough for weights that are random anyway
        return (rows.view(np.uint32) >> 16).astype(np.uint16)
    return rows.astype({"F32": np.float32, "F16": np.float16, "I32": np.int32}[dtype])
