"""The decoder with a LoRA beside its weights gives the logits of W + scale * alpha / rank * B A."""

from __future__ import annotations

from contextlib import closing
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lora_files import merged, random_pairs, write_adapter
from peers import LlamaCpp
from phi4edge import _core
from phi4edge.errors import InputError
from reference import Reference, log_probabilities, mean_divergence, relative_difference
from tiny_adapters import set_llama_cpp_adapter
from tiny_models import tiny_gguf

TOKENS = np.random.default_rng(9).integers(0, 290, 140).astype(np.int32)
NOISE = 5e-4  # a divergence that nobody can see
BASES: dict[str, dict[str, Any]] = {
    "fused": {"rotary_fraction": 0.75},
    "split attention": {"fused": False},
    "split, odd sizes": {"architecture": "llama", "hidden": 100, "vocab": 301, "heads": 5, "kv_heads": 1, "ffn": 130},
}
# type of A, type of B, rank: B has rows of `rank` values, so its type is one whose blocks fit.
PAIRS = [("F16", "F16", 7), ("BF16", "F32", 320), ("Q8_0", "F16", 7), ("Q8_0", "Q8_0", 320), ("Q5_0", "Q5_0", 320)]
PAIRS += [("Q4_0", "Q4_0", 320), ("IQ4_NL", "IQ4_NL", 320), ("Q4_K", "Q5_1", 32), ("Q6_K", "Q6_K", 256)]

Logits = npt.NDArray[np.float32]


def base_of(models: Path, name: str, file_type: str = "F32") -> Path:
    return tiny_gguf(models, file_type, **BASES[name])


@cache
def adapter_of(base: Path, type_a: str, type_b: str, rank: int, seed: int = 7) -> Path:
    path = base.with_name(f"{base.stem}.{type_a}.{type_b}.{rank}.{seed}.lora.gguf")
    architecture = base.stem.split("-")[1]
    return write_adapter(
        path, random_pairs(base, rank, seed=seed), type_a, type_b, alpha=2.0 * rank, architecture=architecture
    )


@cache
def exact(base: Path, adapter: Path, scale: float = 1.0) -> Logits:
    return merged(base, adapter, scale).logits(TOKENS.tolist())


def load(base: Path, n_threads: int = 2, isa: str = "") -> _core.Model:
    return _core.Model(_core.GgufFile(base), n_threads, isa)


def session_with(model: _core.Model, adapter: Path | None, scale: float = 1.0, kv_type: str = "f32") -> _core.Session:
    session = _core.Session(model, 512, kv_type)
    if adapter is not None:
        session.set_adapter(_core.Adapter(model, _core.GgufFile(adapter)), scale)
    return session


@pytest.mark.parametrize("rank", [1, 7, 32, 320])
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("isa", _core.isas())
def test_float_adapters_equal_merged_weights(isa: str, name: str, rank: int, models: Path) -> None:
    base = base_of(models, name)
    adapter = adapter_of(base, "F32", "F32", rank)
    expected = exact(base, adapter, 0.7)
    assert relative_difference(Reference(base).logits(TOKENS.tolist()), expected) > 0.1, "the adapter changes nothing"
    for n_threads in (1, 2):
        logits = session_with(load(base, n_threads, isa), adapter, 0.7).extend(TOKENS, "all")
        assert relative_difference(logits, expected) <= 1e-4


@pytest.mark.parametrize("parts", [("attn_qkv",), ("attn_output",), ("ffn_up",), ("ffn_down",), ("ffn_up", "attn_qkv")])
def test_an_adapter_may_change_some_of_the_matrices(parts: tuple[str, ...], models: Path, tmp_path: Path) -> None:
    base = base_of(models, "fused")
    pairs = random_pairs(base, 8, parts=parts)
    del pairs[f"blk.1.{parts[0]}.weight"]  # and in some of the layers
    adapter = write_adapter(tmp_path / "some.gguf", pairs, "F16")
    logits = session_with(load(base), adapter).extend(TOKENS, "all")
    assert relative_difference(logits, exact(base, adapter)) <= 1e-4


def test_separate_matrices_have_ranks_and_types_of_their_own(models: Path, tmp_path: Path) -> None:
    base = base_of(models, "split attention")
    pairs = random_pairs(base, 8, parts=["attn_q"]) | random_pairs(base, 96, parts=["attn_v"], gain=2.0)
    adapter = write_adapter(tmp_path / "q and v.gguf", pairs)
    logits = session_with(load(base), adapter).extend(TOKENS, "all")
    assert relative_difference(logits, exact(base, adapter)) <= 1e-4


@cache
def of_llama_cpp(base: Path, adapter: Path, scale: float) -> Logits:
    with closing(LlamaCpp(base)) as peer:
        set_llama_cpp_adapter(peer, adapter, scale)
        return log_probabilities(peer.logits(TOKENS.tolist()))


@pytest.mark.parametrize("base_type", ["F16", "Q4_K"])
@pytest.mark.parametrize(("type_a", "type_b", "rank"), PAIRS)
@pytest.mark.parametrize("isa", _core.isas())
def test_adapters_of_any_type_on_any_base_are_as_good_as_in_llama_cpp(
    isa: str, type_a: str, type_b: str, rank: int, base_type: str, models: Path
) -> None:
    base = base_of(models, "fused", base_type)
    adapter = adapter_of(base, type_a, type_b, rank)
    expected, theirs = log_probabilities(exact(base, adapter, 0.4)), of_llama_cpp(base, adapter, 0.4)
    ours = log_probabilities(session_with(load(base, isa=isa), adapter, 0.4, "i16").extend(TOKENS, "all"))
    our_divergence, their_divergence = mean_divergence(expected, ours), mean_divergence(expected, theirs)
    apart = mean_divergence(theirs, ours)
    print(
        f"{base_type} + {type_a}/{type_b}, rank {rank}: from exact, ours {our_divergence:.2e}, "
        f"llama.cpp {their_divergence:.2e}; from each other {apart:.2e}"
    )
    assert our_divergence <= max(their_divergence, NOISE)
    assert apart <= 5e-3


@pytest.mark.parametrize(("type_a", "type_b", "rank"), [("F32", "F32", 7), ("Q8_0", "Q8_0", 320)])
@pytest.mark.parametrize("isa", _core.isas())
def test_chunks_change_nothing_and_threads_no_bit(isa: str, type_a: str, type_b: str, rank: int, models: Path) -> None:
    base = base_of(models, "fused", "F32" if type_a == "F32" else "Q4_K")
    adapter = adapter_of(base, type_a, type_b, rank)
    tolerance = 1e-5 if type_a == "F32" else 1e-3
    results = []
    for n_threads, n_chunk in ((1, 16), (2, 3), (3, 1)):
        model = load(base, n_threads, isa)
        results.append(session_with(model, adapter).extend(TOKENS, "all"))
        session = session_with(model, adapter)
        chunks = [session.extend(TOKENS[at : at + n_chunk], "all") for at in range(0, len(TOKENS), n_chunk)]
        assert relative_difference(np.concatenate(chunks), results[-1]) <= tolerance
    for one, other in pairwise(results):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("base_type", ["F32", "Q4_K"])
def test_interleaved_sessions_have_each_its_own_adapter(base_type: str, models: Path) -> None:
    base = base_of(models, "fused", base_type)
    adapters = [None, adapter_of(base, "Q8_0", "Q8_0", 320), adapter_of(base, "F16", "F16", 7)]
    model = load(base)
    pieces = np.split(TOKENS, [40, 41, 42, 100, 101])
    alone = []
    for adapter in adapters:
        session = session_with(model, adapter)
        alone.append([session.extend(piece, "all") for piece in pieces])
    sessions = [session_with(model, adapter) for adapter in adapters]
    for row, piece in enumerate(pieces):
        for session, expected in zip(sessions, alone, strict=True):
            np.testing.assert_array_equal(session.extend(piece, "all"), expected[row])


@pytest.mark.parametrize("base_type", ["F32", "Q4_K"])
def test_a_change_of_adapter_computes_again_and_leaves_no_trace(base_type: str, models: Path) -> None:
    base = base_of(models, "fused", base_type)
    path = adapter_of(base, "Q8_0", "Q8_0", 32)
    model = load(base)
    adapter = _core.Adapter(model, _core.GgufFile(path))
    head, tail = TOKENS[:128], TOKENS[128:]  # as the decoder's own batches, so that not one bit may differ
    session = _core.Session(model, 512, "f32")
    session.extend(head, "none")
    for scale in (1.0, 0.5, 0.0):
        session.set_adapter(adapter, scale)
        assert session.n_reusable(140) == 0 or scale == 0.0
        fresh = session_with(model, path, scale)
        fresh.extend(head, "none")
        np.testing.assert_array_equal(session.extend(tail, "all"), fresh.extend(tail, "all"))
        session.truncate(len(head))
    never = _core.Session(model, 512, "f32")
    never.extend(head, "none")
    session.set_adapter(None)
    np.testing.assert_array_equal(session.extend(tail, "all"), never.extend(tail, "all"))
    assert session.n_reusable(140) == 140


def test_an_adapter_set_and_taken_back_costs_nothing(models: Path) -> None:
    base = base_of(models, "fused")
    model = load(base)
    session = _core.Session(model, 512)
    session.extend(TOKENS[:100], "none")
    session.set_adapter(_core.Adapter(model, _core.GgufFile(adapter_of(base, "F32", "F32", 7))), 1.0)
    session.set_adapter(None)
    assert session.n_reusable(101) == 100


def test_longrope_and_an_adapter_together(models: Path) -> None:
    base = tiny_gguf(models, original_context=64, rotary_fraction=0.75)
    adapter = adapter_of(base, "F32", "F32", 7)
    model = load(base)
    session = session_with(model, adapter)
    first, second = session.extend(TOKENS[:60], "all"), session.extend(TOKENS[60:], "all")
    expected = merged(base, adapter)
    assert relative_difference(first, expected.logits(TOKENS[:60].tolist())) <= 1e-4
    assert relative_difference(second, expected.logits(TOKENS.tolist())[60:]) <= 1e-4


def test_what_cannot_be_set_is_refused_and_changes_nothing(models: Path) -> None:
    base = base_of(models, "fused")
    model, other = load(base), load(base)
    path = adapter_of(base, "F32", "F32", 7)
    session = session_with(model, path, 0.7)
    adapter = _core.Adapter(model, _core.GgufFile(path))
    for scale in (np.nan, np.inf, -np.inf):
        with pytest.raises(InputError, match="finite"):
            session.set_adapter(adapter, scale)
    with pytest.raises(InputError, match="too large"):
        session.set_adapter(adapter, 1e300)
    with pytest.raises(InputError, match="another model"):
        session.set_adapter(_core.Adapter(other, _core.GgufFile(path)))

    def change(done: int, total: int) -> bool:
        session.set_adapter(None)
        return True

    with pytest.raises(InputError, match="in use"):
        session.extend(TOKENS, "all", change)
    assert relative_difference(session.extend(TOKENS, "all"), exact(base, path, 0.7)) <= 1e-4
