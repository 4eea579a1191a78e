"""The types of the KV cache: each gives the logits of exact attention over keys and values rounded to that type."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

import phi4edge
from peers import LlamaCpp
from phi4edge import _core
from phi4edge.cli.options import KvType
from phi4edge.errors import InputError, UsageError
from phi4edge.info import inspect
from reference import Floats, Reference, log_probabilities, mean_divergence, relative_difference, same_choices
from tiny_models import quantized_gguf, tiny_gguf

N_TOKENS = 150  # more than a block of 128 keys
TOKENS = np.random.default_rng(6).integers(0, 512, N_TOKENS).astype(np.int32)
Q8_0 = gguf.GGMLQuantizationType.Q8_0
BOUNDARY = 64  # of the LongRoPE model

# Heads of 64: as they are.  Of 80 and 24: a block of 32 is half full.  A window of 70: blocks of keys out of sight.
SHAPES: dict[str, dict[str, Any]] = {
    "heads of 64": {"rotary_fraction": 0.75},
    "heads of 80": {"head_dim": 80, "rotary_fraction": 0.75},
    "heads of 24": {"head_dim": 24, "heads": 6, "kv_heads": 1},
    "window": {"sliding_window": 70},
    "split, interleaved": {"architecture": "llama"},
}


def spreading(n: int) -> Floats:
    """Sylvester's matrix, orthonormal, for each part of the length that is the largest power of two in ``n``."""
    matrix = np.ones((1, 1))
    while n % (2 * len(matrix)) == 0:
        matrix = np.kron(matrix, np.array([[1, 1], [1, -1]]) / np.sqrt(2))
    return np.asarray(np.kron(np.eye(n // len(matrix)), matrix))


def rounded_to_q8_0(rows: Floats) -> Floats:
    """By the gguf package, in the basis that spreads outliers; rows are filled up to whole blocks with zeros."""
    n = rows.shape[-1]
    spread = rows @ spreading(n)
    padded = np.pad(spread, [(0, 0)] * (rows.ndim - 1) + [(0, -n % 32)]).astype(np.float32)
    rounded = gguf.quants.dequantize(gguf.quants.quantize(padded, Q8_0), Q8_0)[..., :n]
    return np.asarray(rounded @ spreading(n), rows.dtype)


def rounded_to_i16(rows: Floats, largest_code: float, largest_norm: float) -> Floats:
    """Integers with one scale a row: so that none is too large, nor the square root of the sum of their squares.

    A row of nothing but numbers below 2^-110 is zero.
    """
    largest = np.abs(rows).max(-1, keepdims=True)
    scale = np.maximum(largest / largest_code, np.sqrt((rows * rows).sum(-1, keepdims=True)) / largest_norm)
    rounded = np.rint(rows / np.where(largest == 0, 1, scale)) * scale
    return np.asarray(np.where(largest < 2.0**-110, 0, rounded))


def unchanged(rows: Floats) -> Floats:
    return rows


ROUNDING: dict[str, tuple[Callable[[Floats], Floats], Callable[[Floats], Floats]]] = {  # of keys, of values
    "i16": (
        partial(rounded_to_i16, largest_code=32767, largest_norm=46300),
        partial(rounded_to_i16, largest_code=8191, largest_norm=np.inf),
    ),
    "f32": (unchanged, unchanged),
    "q8_0": (rounded_to_q8_0, rounded_to_q8_0),
}
BOUND = {"i16": 1e-4, "f32": 1e-5, "q8_0": 1e-3}


def native(path: Path, isa: str = "", n_threads: int = 2) -> _core.Model:
    return _core.Model(_core.GgufFile(path), n_threads, isa)


def logits_of(model: _core.Model, kv_type: str, tokens: npt.NDArray[np.int32] = TOKENS, n_chunk: int = 512) -> Floats:
    session = _core.Session(model, N_TOKENS, kv_type)
    return np.concatenate([session.extend(tokens[at : at + n_chunk], "all") for at in range(0, len(tokens), n_chunk)])


@cache
def expected(path: Path, kv_type: str, n_tokens: int = N_TOKENS) -> Floats:
    return Reference(path, np.float64, *ROUNDING[kv_type]).logits(TOKENS[:n_tokens].tolist())


def test_every_type_is_tested_and_offered() -> None:
    assert set(_core.kv_types()) == set(ROUNDING) == {kind.value for kind in KvType}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("kv_type", ROUNDING)
def test_logits_equal_exact_attention_over_rounded_keys_and_values(
    kv_type: str, isa: str, shape: str, models: Path
) -> None:
    path = tiny_gguf(models, **SHAPES[shape])
    difference = relative_difference(logits_of(native(path, isa), kv_type), expected(path, kv_type))
    print(f"{kv_type} {isa} {shape}: {difference:.2e}")
    assert difference <= BOUND[kv_type]


@pytest.mark.parametrize("shape", ["heads of 80", "window"])
@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("kv_type", ROUNDING)
def test_threads_and_chunks_change_no_bit(kv_type: str, isa: str, shape: str, models: Path) -> None:
    path = tiny_gguf(models, **SHAPES[shape])
    whole = logits_of(native(path, isa, 1), kv_type)
    for n_threads, n_chunk in ((2, 512), (1, 16), (3, 7)):
        np.testing.assert_array_equal(logits_of(native(path, isa, n_threads), kv_type, n_chunk=n_chunk), whole)
    session = _core.Session(native(path, isa), N_TOKENS, kv_type)
    session.extend(TOKENS[:120], "none")
    for at in range(120, N_TOKENS):
        np.testing.assert_array_equal(session.extend(TOKENS[at : at + 1])[0], whole[at])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kv_type", ROUNDING)
def test_all_instruction_sets_agree(kv_type: str, shape: str, models: Path) -> None:
    path = tiny_gguf(models, **SHAPES[shape])
    scalar = logits_of(native(path, "scalar"), kv_type)
    for isa in _core.isas():
        difference = relative_difference(logits_of(native(path, isa), kv_type), scalar)
        print(f"{kv_type} {isa} {shape}: {difference:.2e}")
        assert difference <= BOUND[kv_type]  # a rounding may turn


@pytest.mark.parametrize("kv_type", ROUNDING)
def test_truncating_and_going_on_changes_no_bit(kv_type: str, models: Path) -> None:
    model = native(tiny_gguf(models, **SHAPES["heads of 80"]))
    other = np.concatenate([TOKENS[:133], TOKENS[::-1][:17]])
    session = _core.Session(model, N_TOKENS, kv_type)
    session.extend(TOKENS, "none")
    session.truncate(133)
    np.testing.assert_array_equal(session.extend(other[133:], "all"), logits_of(model, kv_type, other)[133:])


@pytest.mark.parametrize("kv_type", ROUNDING)
def test_keys_are_computed_again_across_the_longrope_boundary(kv_type: str, models: Path) -> None:
    path = tiny_gguf(models, rotary_fraction=0.75, original_context=BOUNDARY, context=512)
    session = _core.Session(native(path), 128, kv_type)
    for first, end in ((0, BOUNDARY), (BOUNDARY, BOUNDARY + 1), (BOUNDARY + 1, 90)):
        logits = session.extend(TOKENS[first:end], "all")
        assert relative_difference(logits, expected(path, kv_type, end)[first:]) <= 1e-3
    session.truncate(BOUNDARY - 1)
    logits = session.extend(TOKENS[BOUNDARY - 1 : BOUNDARY])
    assert relative_difference(logits, expected(path, kv_type, BOUNDARY)[-1:]) <= 1e-3


def test_sessions_of_one_model_may_differ_in_type(models: Path) -> None:
    model = native(tiny_gguf(models, **SHAPES["heads of 64"]))
    alone = {kv_type: logits_of(model, kv_type) for kv_type in ROUNDING}
    sessions = {kv_type: _core.Session(model, N_TOKENS, kv_type) for kv_type in ROUNDING}
    for first in range(0, N_TOKENS, 50):
        for kv_type, session in sessions.items():
            logits = session.extend(TOKENS[first : first + 50], "all")
            np.testing.assert_array_equal(logits, alone[kv_type][first : first + 50])
    assert relative_difference(alone["q8_0"], alone["f32"]) > 1e-4


# --- sizes


@pytest.mark.parametrize(
    ("kv_type", "shape", "row_bytes"),
    [
        ("i16", "heads of 64", 2 * 64 + 4),
        ("f32", "heads of 64", 256),
        ("q8_0", "heads of 64", 2 * 34),
        ("i16", "heads of 80", 2 * 80 + 4),
        ("i16", "heads of 24", 2 * 32 + 4),
        ("q8_0", "heads of 80", 3 * 34),
    ],
)
def test_the_size_is_that_of_the_numbers_and_scales(kv_type: str, shape: str, row_bytes: int, models: Path) -> None:
    path = tiny_gguf(models, **SHAPES[shape])
    per_token = 2 * 2 * (1 if shape == "heads of 24" else 2) * row_bytes  # keys and values, layers, KV heads
    with phi4edge.load(path, context=320, kv_type=kv_type, threads=1) as model:
        assert model.kv_bytes == 320 * per_token
        assert model.decode_bytes(100) - model.decode_bytes(0) == 100 * per_token
        assert _core.Session(native(path), 320, kv_type).kv_bytes == 320 * per_token
        assert _core.Session(native(path), 305, kv_type).kv_bytes == 320 * per_token  # whole panels of 16
    assert inspect(path, 320, kv_type).memory.kv_cache == 320 * per_token


@pytest.mark.parametrize("kv_type", ["q4_0", "Q8_0", "", "f8"])
def test_an_unknown_type_is_refused_with_the_list_of_those_there_are(kv_type: str, models: Path) -> None:
    path = tiny_gguf(models, **SHAPES["heads of 64"])
    with pytest.raises(UsageError, match=r"kv_type.*i16, f32, q8_0"):
        phi4edge.load(path, kv_type=kv_type)
    with pytest.raises(InputError, match=r"kv_type.*i16, f32, q8_0"):
        _core.Session(native(path), 16, kv_type)


# --- numbers at the edges


def scaled_gguf(source: Path, path: Path, keys: float, values: float) -> Path:
    """The same function with keys and values that many times as large: Q and the output matrix make up for it."""
    shutil.copy(source, path)
    n_q, n_kv = 256, 128
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if tensor.name.endswith("attn_qkv.weight"):
            tensor.data[:n_q] *= np.float32(1 / keys)
            tensor.data[n_q : n_q + n_kv] *= np.float32(keys)
            tensor.data[n_q + n_kv :] *= np.float32(values)
        if tensor.name.endswith("attn_output.weight"):
            tensor.data[:] *= np.float32(1 / values)
    return path


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize(
    ("kv_type", "power"), [("i16", -80), ("i16", 100), ("f32", 80), ("q8_0", -4), ("q8_0", 12), ("q8_0", 19)]
)
def test_large_and_small_numbers_are_as_exact_as_others(
    kv_type: str, power: int, isa: str, models: Path, tmp_path: Path
) -> None:
    path = tiny_gguf(models, rotary_fraction=0.75)
    scaled = scaled_gguf(path, tmp_path / "scaled.gguf", 2.0**power, 2.0**power)
    logits, plain = logits_of(native(scaled, isa), kv_type), logits_of(native(path, isa), kv_type)
    assert relative_difference(logits, plain) <= 1e-4  # but for what is near zero, the same bits


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize(("kv_type", "power"), [("i16", 127), ("q8_0", 24), ("q8_0", 100)])
@pytest.mark.parametrize("which", ["keys", "values"])
def test_numbers_too_large_for_the_type_are_noticed(
    which: str, kv_type: str, power: int, isa: str, models: Path, tmp_path: Path
) -> None:
    """127: about 1e38.  No type may turn them into something else that looks well."""
    scales = {"keys": 1.0, "values": 1.0, which: 2.0**power}
    path = scaled_gguf(tiny_gguf(models, rotary_fraction=0.75), tmp_path / "scaled.gguf", **scales)
    assert np.isnan(logits_of(native(path, isa), kv_type)[-1]).any()
    with (
        phi4edge.load(path, kv_type=kv_type, isa=isa) as model,
        pytest.raises(phi4edge.Phi4EdgeError, match="not a number"),
    ):
        model.generate(TOKENS[:5].tolist(), max_tokens=1)


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize(
    ("kv_type", "keys", "values"),
    [
        ("i16", 1.0, 2.0**-114),
        ("i16", 2.0**-114, 1.0),
        ("q8_0", 1.0, 2.0**-100),
        ("q8_0", 2.0**-100, 1.0),
        ("q8_0", 2.0**-20, 2.0**-20),
    ],
)
def test_numbers_too_small_for_a_scale_become_zero(
    kv_type: str, keys: float, values: float, isa: str, models: Path, tmp_path: Path
) -> None:
    path = scaled_gguf(tiny_gguf(models, rotary_fraction=0.75), tmp_path / "scaled.gguf", keys, values)
    assert relative_difference(logits_of(native(path, isa), kv_type), expected(path, kv_type)) <= BOUND[kv_type]


# --- sums of integers: none may leave its 32 bits

Doubles = npt.NDArray[np.float64]
HEAD = 64
ONES, SIGNS = np.ones(HEAD), np.resize([1.0, -1.0], HEAD)
PEAK = np.where(np.arange(HEAD) == 40, 1.0, 1e-4)
EVERY, RARE = (1.0, 0.0), (0.0, 1.0)  # the features of crafted_gguf()
AT = 73  # of the token that has the rare one
MARKED = int(TOKENS[AT])


def crafted_gguf(path: Path, models: Path, queries: Doubles, keys: Doubles, values: Doubles) -> Path:
    """A model all of whose heads have these queries, keys and values, [HEAD, 2], times two features of the token.

    The first is about the same for all tokens, the second zero for all but MARKED.
    """
    shutil.copy(tiny_gguf(models, rotary_fraction=1 / 16), path)
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if tensor.name == "token_embd.weight":
            tensor.data[:, 0] = 8
            tensor.data[:, 1] = np.where(np.arange(len(tensor.data)) == MARKED, 8, 0)
        if tensor.name.endswith("attn_norm.weight"):
            tensor.data[:2] = 1
        if tensor.name.endswith(("attn_output.weight", "ffn_down.weight")):  # no layer changes them
            tensor.data[:2] = 0
        if tensor.name.endswith("attn_qkv.weight"):
            tensor.data[:, :2] = np.concatenate([*[queries] * 4, *[keys] * 2, *[values] * 2])
            tensor.data[:, 2:] *= np.float32(1e-3)
    return path


def each(pattern: Doubles, feature: tuple[float, float], times: float = 1.0) -> Doubles:
    return np.asarray(times * np.outer(pattern, feature))


CRAFTED: dict[str, tuple[Doubles, Doubles, Doubles]] = {  # queries, keys, values
    "all at their largest": (each(ONES, EVERY), each(ONES, EVERY), each(ONES, EVERY)),
    "against each other": (each(ONES, EVERY), each(ONES, EVERY, -1), each(ONES, EVERY, -1)),
    "alternating signs": (each(SIGNS, EVERY), each(SIGNS, EVERY), each(SIGNS, EVERY)),
    "one large number": (each(PEAK, EVERY), each(PEAK, EVERY), each(PEAK, EVERY)),
    "one key has all the weight": (each(ONES, EVERY), each(ONES, RARE), each(ONES, RARE)),
    "one key has no weight": (each(ONES, EVERY), each(ONES, RARE, -1), each(ONES, EVERY)),
    "keys of zero": (each(ONES, EVERY), each(ONES, EVERY, 0), each(ONES, EVERY)),
    "values of zero": (each(ONES, EVERY), each(ONES, EVERY), each(ONES, EVERY, 0)),
    "one value far larger than the others": (
        each(ONES, EVERY, 0.1),
        each(SIGNS, EVERY),
        each(ONES, EVERY, 1e-4) + each(SIGNS, RARE),
    ),
    "one value of zero": (each(ONES, EVERY, 0.1), each(SIGNS, EVERY), each(ONES, EVERY) + each(ONES, RARE, -1)),
}


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("kv_type", ["i16", "q8_0"])
@pytest.mark.parametrize("case", CRAFTED)
def test_no_sum_overflows(case: str, kv_type: str, isa: str, models: Path, tmp_path: Path) -> None:
    path = crafted_gguf(tmp_path / "crafted.gguf", models, *CRAFTED[case])
    difference = relative_difference(logits_of(native(path, isa), kv_type), expected(path, kv_type))
    print(f"{case} {kv_type} {isa}: {difference:.2e}")
    assert difference <= BOUND[kv_type]


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("kv_type", ["i16", "q8_0"])
@pytest.mark.parametrize("which", ["keys", "values"])
def test_infinity_is_noticed_where_it_is_seen_and_nowhere_else(
    which: str, kv_type: str, isa: str, models: Path, tmp_path: Path
) -> None:
    infinite = each(ONES, RARE, 3e38)
    rows = {"queries": each(SIGNS, EVERY), "keys": each(ONES, EVERY), "values": each(ONES, EVERY)}
    plain = native(crafted_gguf(tmp_path / "plain.gguf", models, **rows), isa)
    rows[which] = rows[which] + infinite
    model = native(crafted_gguf(tmp_path / "infinite.gguf", models, **rows), isa)
    assert (TOKENS[:AT] != MARKED).all()
    before = logits_of(plain, kv_type, TOKENS[:AT])

    session = _core.Session(model, N_TOKENS, kv_type)
    logits = session.extend(TOKENS, "all")
    np.testing.assert_array_equal(logits[:AT], before)
    assert np.isnan(logits[AT:]).all(1).all()
    session.truncate(AT)
    others = np.resize(TOKENS[:AT], 60)
    np.testing.assert_array_equal(
        session.extend(others, "all"), logits_of(model, kv_type, np.concatenate([TOKENS[:AT], others]))[AT:]
    )


# --- a trained model


def test_eight_bits_cost_a_trained_model_no_more_than_in_llama_cpp(
    smollm2: Path, english: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file of F16 weights, whose products are exact: 8-bit activations would hide the difference.

    Both spread outliers over a head before rounding; llama.cpp can be told not to.
    """
    n_tokens = 256
    path = quantized_gguf(smollm2, "MOSTLY_F16", tmp_path / "smollm2-f16.gguf")
    rows: dict[str, Floats] = {}
    for kv_type in ("i16", "f32", "q8_0"):
        with phi4edge.load(path, context=n_tokens, kv_type=kv_type, threads=2) as model:
            tokens = model.tokenizer.encode(english)[:n_tokens]
            rows[kv_type] = log_probabilities(model.logits(tokens))
    for name in ("llama.cpp", "llama.cpp, not spread"):
        with closing(LlamaCpp(path, n_context=n_tokens, kv_type="Q8_0")) as peer:
            rows[name] = log_probabilities(peer.logits(tokens))
        monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    path.unlink()
    divergence = {name: mean_divergence(rows["f32"], row) for name, row in rows.items()}
    for name, row in rows.items():
        print(f"{name}: from f32 {divergence[name]:.2e}, same choice {same_choices(rows['f32'], row):.3f}")
    assert divergence["i16"] <= 1e-5
    assert divergence["q8_0"] <= divergence["llama.cpp"]
    assert divergence["q8_0"] <= 0.5 * divergence["llama.cpp, not spread"]
    assert divergence["q8_0"] <= 3e-4
    assert same_choices(rows["f32"], rows["q8_0"]) >= 0.97
