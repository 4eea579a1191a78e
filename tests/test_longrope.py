"""LongRoPE: one set of factors for the whole sequence, chosen by its length, as transformers does in a full forward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import phi4edge
from phi4edge import _core
from reference import Reference, relative_difference
from tiny_models import tiny_gguf, tiny_transformers, transformers_logits

BOUNDARY = 64
# 359: a vocabulary without unused ids, which generation never chooses.
OPTIONS: dict[str, Any] = {"vocab": 359, "rotary_fraction": 0.75, "original_context": BOUNDARY, "context": 512}
TOKENS = np.random.default_rng(3).integers(0, 359, 160).astype(np.int32)
TOLERANCE = 1e-4


@cache
def peer() -> Any:
    return tiny_transformers(**OPTIONS)


@cache
def expected(n_tokens: int) -> npt.NDArray[np.float32]:
    """transformers' logits for the first n tokens, from a full forward: float32 [n_tokens, vocab]."""
    return transformers_logits(peer(), TOKENS[:n_tokens])


@pytest.fixture
def session(models: Path) -> Iterator[_core.Session]:
    model = _core.Model(_core.GgufFile(tiny_gguf(models, **OPTIONS)), 2)
    yield _core.Session(model, 256, kv_type="f32")


def test_the_factors_of_the_test_model_matter() -> None:
    short, long = expected(BOUNDARY)[: BOUNDARY - 1], expected(BOUNDARY + 1)[: BOUNDARY - 1]
    assert relative_difference(long, short) > 0.05


@pytest.mark.parametrize("n_tokens", [1, 63, 64, 65, 100, 160])
def test_a_prompt_of_any_length_equals_a_full_forward(n_tokens: int, models: Path) -> None:
    path = tiny_gguf(models, **OPTIONS)
    assert relative_difference(Reference(path).logits(TOKENS[:n_tokens].tolist()), expected(n_tokens)) < 1e-5
    with phi4edge.load(path, kv_type="f32") as model:
        assert relative_difference(model.logits(TOKENS[:n_tokens].tolist()), expected(n_tokens)) <= TOLERANCE


def test_the_context_size_does_not_choose_the_factors(models: Path) -> None:
    for context in (BOUNDARY, BOUNDARY + 1, 400):
        with phi4edge.load(tiny_gguf(models, **OPTIONS), context=context, kv_type="f32") as model:
            assert relative_difference(model.logits(TOKENS[:50].tolist()), expected(50)) <= TOLERANCE


@pytest.mark.parametrize("chunks", [(40, 24), (40, 25), (64, 1), (64, 36), (63, 1, 1, 35), (20,) * 5, (70, 30)])
def test_the_last_chunk_equals_a_full_forward(chunks: tuple[int, ...], session: _core.Session) -> None:
    start = 0
    for n_tokens in chunks:
        end = start + n_tokens
        logits = session.extend(TOKENS[start:end], logits="all")
        assert relative_difference(logits, expected(end)[start:]) <= TOLERANCE
        start = end


def test_growing_token_by_token_across_the_boundary_equals_full_forwards(session: _core.Session) -> None:
    session.extend(TOKENS[:58], logits="none")
    for end in range(59, 72):
        logits = session.extend(TOKENS[end - 1 : end])
        assert relative_difference(logits, expected(end)[-1:]) <= TOLERANCE, end


def test_chunks_without_logits_cross_the_boundary_too(session: _core.Session) -> None:
    for start in range(0, 99, 9):
        session.extend(TOKENS[start : start + 9], logits="none")
    assert relative_difference(session.extend(TOKENS[99:100]), expected(100)[-1:]) <= TOLERANCE


@pytest.mark.parametrize("kept", [1, 50, 63, 64, 65, 80])
def test_truncating_back_across_the_boundary_equals_a_fresh_start(kept: int, session: _core.Session) -> None:
    session.extend(TOKENS[:100], logits="none")
    session.truncate(kept)
    assert session.n_tokens == kept
    for end in range(kept + 1, kept + 4):
        logits = session.extend(TOKENS[end - 1 : end])
        assert relative_difference(logits, expected(end)[-1:]) <= TOLERANCE, end


def test_going_back_and_forth_across_the_boundary_leaves_no_trace(session: _core.Session) -> None:
    for _ in range(2):
        session.extend(TOKENS[session.n_tokens : 70], logits="none")
        session.truncate(60)
        assert relative_difference(session.extend(TOKENS[60:62]), expected(62)[-1:]) <= TOLERANCE
    assert relative_difference(session.extend(TOKENS[62:90]), expected(90)[-1:]) <= TOLERANCE


def test_embedding_rows_cross_the_boundary_too(session: _core.Session, models: Path) -> None:
    rows = Reference(tiny_gguf(models, **OPTIONS)).embedding[TOKENS].astype(np.float32)
    session.extend_embeddings(rows[:40], logits="none")
    session.extend(TOKENS[40:60], logits="none")
    assert relative_difference(session.extend_embeddings(rows[60:66]), expected(66)[-1:]) <= TOLERANCE
    session.truncate(50)
    assert relative_difference(session.extend(TOKENS[50:51]), expected(51)[-1:]) <= TOLERANCE


@pytest.mark.parametrize("isa", _core.isas())
def test_generation_across_the_boundary_equals_full_forwards(isa: str, models: Path) -> None:
    with phi4edge.load(tiny_gguf(models, **OPTIONS), kv_type="f32", isa=isa) as model:
        answer = model.generate(TOKENS[:60].tolist(), max_tokens=10)
    tokens = TOKENS[:60].tolist()
    for token in answer.tokens:
        logits = transformers_logits(peer(), tokens)[-1]
        assert logits[token] >= logits.max() - 1e-3
        tokens.append(token)
    assert len(tokens) > BOUNDARY + 1
