"""LoRA adapters made on the spot as GGUF files, and the exact answer with one merged into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from phi4edge import _core
from reference import Reference

Array = npt.NDArray[np.float32]
Pairs = dict[str, tuple[Array, Array]]  # GGUF name of the matrix -> A [rank, n_columns], B [n_rows, rank]
PARTS = ("attn_qkv", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def random_pairs(base: Path, rank: int, *, parts: Sequence[str] = PARTS, gain: float = 0.5, seed: int = 7) -> Pairs:
    """For the matrices of a file that are named in ``parts``; B A x is about ``gain`` times as large as x."""
    rng = np.random.default_rng(seed)
    pairs: Pairs = {}
    for tensor in gguf.GGUFReader(base).tensors:
        if tensor.name.startswith("blk.") and tensor.name.split(".")[2] in parts:
            n_columns, n_rows = (int(size) for size in tensor.shape)
            a = rng.standard_normal((rank, n_columns)) / np.sqrt(n_columns)
            b = gain * rng.standard_normal((n_rows, rank)) / np.sqrt(rank)
            pairs[tensor.name] = a.astype(np.float32), b.astype(np.float32)
    return pairs


def write_adapter(
    path: Path, pairs: Pairs, type_a: str = "F32", type_b: str = "", *, alpha: float = 16.0, architecture: str = "phi3"
) -> Path:
    """As llama.cpp's own tool writes them; B has the type of A if none is given."""
    formats = {entry.name: entry.type_id for entry in _core.formats()}
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, (a, b) in pairs.items():
        for suffix, values, kind in ((".lora_a", a, type_a), (".lora_b", b, type_b or type_a)):
            raw_type = GGMLQuantizationType(formats[kind])
            blocks = values if kind == "F32" else _core.quantize(raw_type, values)
            writer.add_tensor(name + suffix, blocks, raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def merged(base: Path, adapter: Path, scale: float = 1.0) -> Reference:
    """W + scale * alpha / rank * B A, all dequantized by the gguf package."""
    reference = Reference(base)
    reader = gguf.GGUFReader(adapter)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    for name in {name.rpartition(".")[0] for name in tensors}:
        a, b = tensors[name + ".lora_a"], tensors[name + ".lora_b"]
        reference.weights[name] = reference.weights[name] + np.float32(scale * alpha / len(a)) * (b @ a)
    return reference
