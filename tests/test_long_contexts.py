"""More keys than a segment has: threads then share a head by segments where rows are few, and no bit changes."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from phi4edge import _core
from reference import Floats, Reference, relative_difference
from tiny_models import tiny_gguf

N_SEGMENT = 1024  # keys
N_TOKENS = 2 * N_SEGMENT + 60
N_SHORT = 20  # of another sequence
TOKENS = np.random.default_rng(7).integers(0, 512, N_TOKENS).astype(np.int32)
KV_TYPES = {"i16": 1e-4, "f32": 1e-5, "q8_0": 5e-3}  # how far logits may be from exact ones
# The last tokens see: three segments; two, the first of them in part; one or two, which depends on the token.
WINDOWS = {"all": 0, "two": 1500, "a segment": N_SEGMENT}
# Seconds each with scalar kernels.
CASES = [(isa, window) for isa in _core.isas() for window in WINDOWS if isa != "scalar" or window == "two"]


def path_of(models: Path, window: str) -> Path:
    return tiny_gguf(models, layers=1, context=4096, rotary_fraction=0.75, sliding_window=WINDOWS[window])


@cache
def exact(path: Path) -> Floats:
    return Reference(path, np.float64).logits(TOKENS.tolist())


def extend(session: _core.Session, chunks: list[int]) -> Floats:
    """Logits of all tokens from the end of the first chunk on."""
    session.extend(TOKENS[: chunks[0]], "none")
    return np.concatenate([session.extend(TOKENS[first:end], "all") for first, end in pairwise(chunks)])


@pytest.mark.parametrize(("isa", "window"), CASES)
@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_single_tokens_have_the_bits_of_a_prompt_and_are_exact(
    kv_type: str, isa: str, window: str, models: Path
) -> None:
    path = path_of(models, window)
    first = N_TOKENS - 70  # in the second segment; the third begins after ten tokens

    def run(n_threads: int, step: int) -> Floats:
        session = _core.Session(_core.Model(_core.GgufFile(path), n_threads, isa), N_TOKENS, kv_type)
        return extend(session, [first, *range(first + step, N_TOKENS, step), N_TOKENS])

    prompt = run(1, N_TOKENS)
    for n_threads, step in ((2, 1), (3, 8), (1, 5)):
        np.testing.assert_array_equal(run(n_threads, step), prompt)
    difference = relative_difference(prompt, exact(path)[first:])
    print(f"{kv_type} {isa} {window}: {difference:.2e}")
    assert difference <= KV_TYPES[kv_type]


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_sequences_of_other_lengths_change_nothing(kv_type: str, models: Path) -> None:
    model = _core.Model(_core.GgufFile(path_of(models, "two")), 2)

    def session_of(n_tokens: int) -> _core.Session:
        session = _core.Session(model, N_TOKENS, kv_type)
        session.extend(TOKENS[:n_tokens], "none")
        return session

    lengths = (N_SHORT, N_TOKENS - 1, N_SEGMENT + 1)
    alone = [session_of(n).extend(TOKENS[-1:])[0] for n in lengths]
    together = _core.extend_together([session_of(n) for n in lengths], [TOKENS[-1:]] * len(lengths))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(np.asarray(other).reshape(-1), one)
