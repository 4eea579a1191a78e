"""Adapter files that are wrong: one line that says where and what, and a model that goes on as before."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from gguf_builder import Key, Tensor, build
from lora_files import Pairs, random_pairs, write_adapter
from phi4edge import _core
from phi4edge.errors import BundleError, Cancelled, OutOfMemoryError
from tiny_models import tiny_gguf

RANK = 4
KEYS: dict[str, Key] = {
    "general.architecture": ("general.architecture", "str", "phi3"),
    "general.type": ("general.type", "str", "adapter"),
    "adapter.type": ("adapter.type", "str", "lora"),
    "adapter.lora.alpha": ("adapter.lora.alpha", "f32", 8.0),
}
# The tiny model has a hidden size of 256 and an FFN of 768: its attn_output is 256 x 256, its ffn_down 256 x 768.
A, B = "blk.0.ffn_down.weight.lora_a", "blk.0.ffn_down.weight.lora_b"


def file_bytes(
    keys: dict[str, Key | None] | None = None, shapes: dict[str, tuple[int, ...] | None] | None = None
) -> bytes:
    """A valid adapter with some of its keys and tensor shapes replaced; None leaves one out.  All weights are 0."""
    kept = [key for key in {**KEYS, **(keys or {})}.values() if key is not None]
    sizes = {A: (768, RANK), B: (RANK, 256), **(shapes or {})}
    tensors = [Tensor(name, shape) for name, shape in sizes.items() if shape is not None]
    built = build(kept, tensors)
    return built.data[: built.data_start] + bytes(len(built.data) - built.data_start)


def alpha(kind: str, value: object) -> dict[str, Key | None]:
    return {"adapter.lora.alpha": ("adapter.lora.alpha", kind, value)}


def text(key: str, value: str) -> dict[str, Key | None]:
    return {key: (key, "str", value)}


WRONG: dict[str, tuple[Callable[[], bytes], str]] = {
    "a model": (lambda: file_bytes(text("general.type", "model")), "general.type: is 'model', expected 'adapter'"),
    "no type": (lambda: file_bytes({"general.type": None}), "general.type: .*adapter"),
    "a type that is a number": (lambda: file_bytes({"general.type": ("general.type", "u32", 1)}), "general.type: "),
    "another kind": (lambda: file_bytes(text("adapter.type", "control_vector")), "adapter.type: is 'control_vector'"),
    "no kind": (lambda: file_bytes({"adapter.type": None}), "adapter.type: .*lora"),
    "another base": (lambda: file_bytes(text("general.architecture", "llama")), "needs base 'llama', got .*'phi3'"),
    "no alpha": (lambda: file_bytes({"adapter.lora.alpha": None}), "adapter.lora.alpha: the key is missing"),
    "alpha of 0": (lambda: file_bytes(alpha("f32", 0.0)), "adapter.lora.alpha: is 0, expected more than 0"),
    "alpha below 0": (lambda: file_bytes(alpha("f32", -1.0)), "adapter.lora.alpha: is -1"),
    "alpha is NaN": (lambda: file_bytes(alpha("f32", np.nan)), "adapter.lora.alpha: expected a finite number"),
    "alpha is infinite": (lambda: file_bytes(alpha("f32", np.inf)), "adapter.lora.alpha: expected a finite number"),
    "alpha is enormous": (lambda: file_bytes(alpha("f64", 1e300)), "adapter.lora.alpha: .*too large"),
    "alpha is a text": (lambda: file_bytes(alpha("str", "16")), "adapter.lora.alpha: expected a number"),
    "alpha is a truth": (lambda: file_bytes(alpha("bool", True)), "adapter.lora.alpha: expected a number"),
    "alpha is a list": (lambda: file_bytes(alpha("[f32]", [16.0])), "adapter.lora.alpha: expected a number"),
    "only A": (lambda: file_bytes(shapes={B: None}), f"{A}.*counterpart {B} is missing"),
    "only B": (lambda: file_bytes(shapes={A: None}), f"{B}.*counterpart {A} is missing"),
    "nothing": (lambda: file_bytes(shapes={A: None, B: None}), "tensors: the adapter has none"),
    "two ranks": (lambda: file_bytes(shapes={B: (RANK + 1, 256)}), f"{B}.*rank {RANK + 1}.* has {RANK}"),
    "A turned round": (lambda: file_bytes(shapes={A: (RANK, 768)}), f"{A}.*shape .*768 columns and 256 rows"),
    "B turned round": (lambda: file_bytes(shapes={B: (256, RANK)}), f"{B}.*rank 256"),
    "A for a wider base": (lambda: file_bytes(shapes={A: (8192, RANK)}), f"{A}.*8192.*768 columns"),
    "B for a wider base": (lambda: file_bytes(shapes={B: (RANK, 3072)}), f"{B}.*3072.*256 rows"),
    "a rank of 0": (lambda: file_bytes(shapes={A: (768, 0)}), f"{A}.*dimension 1 is 0"),
    "an absurd rank": (
        lambda: file_bytes(shapes={A: (768, 20_000), B: (20_000, 256)}),
        f"{A}.*rank 20000, expected at most",
    ),
    "a layer too many": (
        lambda: file_bytes(shapes={A.replace("0", "2"): (768, RANK)}),
        r"blk.2.ffn_down.*does not have",
    ),
    "a head": (lambda: file_bytes(shapes={"output.weight.lora_a": (256, RANK)}), r"output.weight.*does not have"),
    "split matrices": (
        lambda: file_bytes(shapes={"blk.0.attn_q.weight.lora_a": (256, RANK)}),
        r"attn_q.*does not have",
    ),
    "a norm": (lambda: file_bytes(shapes={"blk.0.attn_norm.weight": (256,)}), r"attn_norm.*lora_a or .lora_b"),
    "cut off": (lambda: file_bytes()[:-40], "short"),
    "nothing but its name": (lambda: b"", "truncated header"),
}


def logits(model: _core.Model) -> np.ndarray:
    return np.asarray(_core.Session(model, 64).extend(np.arange(20, dtype=np.int32)))


@pytest.mark.parametrize("name", WRONG)
def test_L1_L2_a_wrong_file_is_told_in_one_line_and_the_model_goes_on(name: str, models: Path, tmp_path: Path) -> None:
    model = _core.Model(_core.GgufFile(tiny_gguf(models)), 2)
    before = logits(model)
    make, message = WRONG[name]
    path = tmp_path / "wrong.gguf"
    path.write_bytes(make())
    with pytest.raises(BundleError, match=message) as caught:
        _core.Adapter(model, _core.GgufFile(path))
    line = str(caught.value)
    assert "\n" not in line and str(path) in line and caught.value.hint
    np.testing.assert_array_equal(logits(model), before)


def test_the_file_that_the_others_are_made_of_is_right(models: Path, tmp_path: Path) -> None:
    model = _core.Model(_core.GgufFile(tiny_gguf(models)), 2)
    path = tmp_path / "right.gguf"
    path.write_bytes(file_bytes())
    session = _core.Session(model, 64)
    session.set_adapter(_core.Adapter(model, _core.GgufFile(path)))
    np.testing.assert_array_equal(session.extend(np.arange(20, dtype=np.int32)), logits(model))  # its weights are 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("kind", "row", "column"), [("F32", 2, 100), ("F16", 0, 767), ("Q8_0", 3, 32)])
def test_a_weight_that_is_not_a_number_is_named(
    kind: str, row: int, column: int, value: float, models: Path, tmp_path: Path
) -> None:
    pairs: Pairs = random_pairs(tiny_gguf(models), RANK, parts=["ffn_down"])
    path = write_adapter(tmp_path / "nan.gguf", pairs, kind, "F32")
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == A)
    data = bytearray(path.read_bytes())
    if kind == "Q8_0":  # the scale of a block of 32, of 34 bytes
        struct.pack_into("<e", data, tensor.data_offset + (row * 768 + column) // 32 * 34, value)
    else:
        size, code = (4, "<f") if kind == "F32" else (2, "<e")
        struct.pack_into(code, data, tensor.data_offset + size * (row * 768 + column), value)
    path.write_bytes(data)
    model = _core.Model(_core.GgufFile(tiny_gguf(models)), 2)
    with pytest.raises(BundleError, match=rf"{re.escape(A)}.*row {row}, column {column} is NaN or infinite"):
        _core.Adapter(model, _core.GgufFile(path))


def test_L3_a_file_that_shrinks_after_it_was_opened_is_told(models: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a.gguf", random_pairs(tiny_gguf(models), RANK))
    file = _core.GgufFile(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(BundleError, match="became shorter"):
        _core.Adapter(_core.Model(_core.GgufFile(tiny_gguf(models)), 2), file)


def test_too_little_memory_and_a_cancelled_load_are_told(models: Path, tmp_path: Path) -> None:
    model = _core.Model(_core.GgufFile(tiny_gguf(models)), 2)
    file = _core.GgufFile(write_adapter(tmp_path / "a.gguf", random_pairs(tiny_gguf(models), RANK)))
    n_bytes = _core.Adapter(model, file).n_bytes
    with pytest.raises(OutOfMemoryError, match="the adapter needs"):
        _core.Adapter(model, file, n_bytes - 1)
    with pytest.raises(Cancelled):
        _core.Adapter(model, file, progress=lambda done, total: False)
    assert _core.Adapter(model, file, n_bytes).n_bytes == n_bytes
