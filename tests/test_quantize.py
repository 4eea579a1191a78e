"""Our quantizers: at least as close as llama.cpp's, for every format, and finite whatever comes in."""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from peers import llama_cpp
from phi4edge import _core
from phi4edge.errors import InputError
from tiny_models import smollm2_path

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

FORMATS = {f.name: f for f in _core.formats()}
QUANTIZED = [name for name, f in FORMATS.items() if not f.is_float]
# Tensors of a trained model.  Its file is Q4_1 and Q8_0, so that some formats can be all but exact.
TRAINED = ("token_embd", "blk.0.attn_v", "blk.7.ffn_down", "blk.12.attn_q", "blk.29.ffn_up")


@cache
def matrix(kind: str) -> Floats:
    """Weights of one kind, float32 [rows, columns of a multiple of 256]."""
    rng = np.random.default_rng(5)
    shape = (48, 1024)
    if kind == "gaussian":
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)
    if kind == "student":
        return (0.02 * rng.standard_t(3, shape)).astype(np.float32)
    if kind == "outliers":
        return (0.02 * rng.standard_normal(shape) * np.where(rng.random(shape) < 0.003, 30, 1)).astype(np.float32)
    tensor = next(t for t in gguf.GGUFReader(smollm2_path()).tensors if t.name == f"{kind}.weight")
    rows = gguf.quants.dequantize(tensor.data[:80], tensor.tensor_type)
    return np.ascontiguousarray(rows[:, : rows.shape[1] // 256 * 256], np.float32)


def importance_of(n_columns: int) -> Floats:
    return np.exp(np.random.default_rng(6).normal(0, 1.5, n_columns)).astype(np.float32)


def quantize(name: str, rows: Floats, importance: Floats | None = None, n_threads: int = 1) -> Bytes:
    return _core.quantize(FORMATS[name].type_id, rows, n_threads, importance)


def dequantize(name: str, blocks: Bytes) -> npt.NDArray[np.float64]:
    """By the gguf package, so that it is what others read."""
    return np.asarray(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name]), np.float64)


def llama_cpp_quantize(name: str, rows: Floats, importance: Floats | None) -> Bytes:
    """What llama_model_quantize calls for the rows of a tensor."""
    folder = Path(str(llama_cpp().__file__)).parent / "lib"
    chunk = ctypes.CDLL(str(next(folder.glob("libggml-base.*")))).ggml_quantize_chunk
    floats = ctypes.POINTER(ctypes.c_float)
    chunk.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, floats]
    chunk.restype = ctypes.c_size_t
    n_rows, n_columns = rows.shape
    out = np.zeros((n_rows, n_columns // FORMATS[name].block_values * FORMATS[name].block_bytes), np.uint8)
    weights = None if importance is None else importance.ctypes.data_as(floats)
    n_bytes = chunk(FORMATS[name].type_id, rows.ctypes.data_as(floats), out.ctypes.data, 0, n_rows, n_columns, weights)
    assert n_bytes == out.nbytes
    return out


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("kind", ["gaussian", "student", "outliers", *TRAINED])
@pytest.mark.parametrize("name", FORMATS)
def test_the_error_is_at_most_that_of_llama_cpp(name: str, kind: str, weighted: bool) -> None:
    rows = matrix(kind)
    importance = importance_of(rows.shape[1]) if weighted else None

    def error(blocks: Bytes) -> float:
        squares = (dequantize(name, blocks) - rows) ** 2
        return float((squares if importance is None else squares * importance).sum())

    ours, theirs = error(quantize(name, rows, importance)), error(llama_cpp_quantize(name, rows, importance))
    power = float((rows.astype(np.float64) ** 2).sum())
    assert ours <= theirs + 1e-13 * power, ours / theirs  # both may be exact but for the rounding of floats


@pytest.mark.parametrize("name", FORMATS)
def test_importance_lowers_the_error_that_it_weighs(name: str) -> None:
    if FORMATS[name].is_float:
        return
    rows, importance = matrix("gaussian"), importance_of(1024)
    plain, weighted = (dequantize(name, quantize(name, rows, w)) - rows for w in (None, importance))
    assert (weighted**2 * importance).sum() < (plain**2 * importance).sum()
    assert (weighted**2).sum() >= (plain**2).sum()


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_do_not_depend_on_threads_or_neighbours(name: str) -> None:
    rows, importance = matrix("student")[:37], importance_of(1024)
    alone = np.concatenate([quantize(name, row[None], importance) for row in rows])
    for n_threads in (1, 2, 5):
        np.testing.assert_array_equal(quantize(name, rows, importance, n_threads), alone)


@pytest.mark.parametrize("name", QUANTIZED)
def test_C12_bytes_do_not_depend_on_the_instruction_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student = matrix("student")
    matrices = [student, np.abs(student), np.round(50 * student), matrix("outliers"), *odd_rows(512).values()]
    found = {}
    for isa in _core.isas():
        monkeypatch.setenv("PHI4EDGE_ISA", isa)
        digest = hashlib.sha256()
        for rows in matrices:
            for importance in (None, importance_of(rows.shape[1])):
                digest.update(quantize(name, rows, importance).tobytes())
        found[isa] = digest.hexdigest()
    assert len(set(found.values())) == 1, found


def odd_rows(n_columns: int) -> dict[str, Floats]:
    rng = np.random.default_rng(8)
    noise = rng.standard_normal((2, n_columns))
    spike = np.zeros((2, n_columns))
    spike[:, 5] = 1e38
    return {
        case: np.asarray(rows, np.float32)
        for case, rows in {
            "zero": np.zeros((2, n_columns)),
            "negative zero": np.full((2, n_columns), -0.0),
            "constant": np.full((2, n_columns), 0.25),
            "negative constant": np.full((2, n_columns), -0.25),
            "1e38": 1e38 * np.sign(noise),
            "largest": np.full((2, n_columns), np.finfo(np.float32).max),
            "smallest": np.full((2, n_columns), np.finfo(np.float32).min),
            "spike": spike + noise,
            "lonely spike": spike,
            "subnormal": 1e-41 * noise,
            "tiny": 1e-7 * noise,
            "least half": 6e-8 * np.sign(noise),
            "every size": noise * 10.0 ** np.linspace(-44, 38, n_columns),
        }.items()
    }


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("case", odd_rows(32))
@pytest.mark.parametrize("name", FORMATS)
def test_C10_odd_values_stay_finite_and_are_no_worse_than_zero(name: str, case: str, weighted: bool) -> None:
    rows = odd_rows(512)[case]
    importance = importance_of(512) if weighted else None
    if importance is not None:
        importance[::3], importance[:32], importance[256:] = 0, 1e38, 0
    restored = dequantize(name, quantize(name, rows, importance))
    assert np.isfinite(restored).all()
    if importance is None:
        assert ((restored - rows) ** 2).sum() <= 1.000001 * (rows.astype(np.float64) ** 2).sum()
    if case == "constant" and name != "BF16":
        assert np.abs(restored - 0.25).max() <= 0.01


@pytest.mark.parametrize("name", FORMATS)
def test_C10_values_that_are_not_finite_are_an_error_that_names_the_first_row(name: str) -> None:
    rows = np.ones((50, 256), np.float32)
    rows[40, 3], rows[33, 255], rows[17, 9] = np.inf, -np.inf, np.nan
    for n_threads in (1, 3):
        with pytest.raises(InputError, match="row 17 "):
            quantize(name, rows, n_threads=n_threads)


def test_shapes_that_do_not_fit_are_errors() -> None:
    with pytest.raises(InputError, match="blocks of 256"):
        quantize("Q4_K", np.ones((2, 288), np.float32))
    with pytest.raises(InputError, match="two dimensions"):
        quantize("Q8_0", np.ones(32, np.float32))
    with pytest.raises(InputError, match="64 columns"):
        quantize("Q8_0", np.ones((2, 64), np.float32), np.ones(32, np.float32))
    with pytest.raises(InputError, match="type number 99"):
        _core.quantize(99, np.ones((2, 64), np.float32))
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(InputError, match="column 7 "):
            quantize("Q8_0", np.ones((2, 64), np.float32), np.where(np.arange(64) == 7, bad, 1).astype(np.float32))
    assert quantize("Q8_0", np.ones((0, 64), np.float32)).shape == (0, 68)


def test_halves_round_as_numpy_does() -> None:
    rows = matrix("student")
    np.testing.assert_array_equal(quantize("F32", rows), rows.view(np.uint8))
    np.testing.assert_array_equal(quantize("F16", rows), rows.astype(np.float16).view(np.uint8))
    np.testing.assert_array_equal(
        quantize("BF16", rows), gguf.quants.quantize(rows, gguf.GGMLQuantizationType.BF16).view(np.uint8)
    )
