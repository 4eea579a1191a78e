"""The sampler against NumPy: each filter on its own, the distribution of what is drawn, and what must be refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from phi4edge import _core
from phi4edge.errors import InputError

Floats = npt.NDArray[np.float64]

# 1 - 1e-6 quantiles of chi-square by degrees of freedom, so that a correct sampler practically never fails.
CHI_SQUARE = {1: 23.93, 2: 27.63, 3: 30.66, 4: 33.38, 5: 35.89, 6: 38.26, 7: 40.52}


def sampler(n_vocab: int, **options: Any) -> Any:
    return _core.Sampler(_core.SamplerOptions(**options), n_vocab)


def random_logits(n_vocab: int, seed: int = 0, scale: float = 2.0) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(n_vocab) * scale).astype(np.float32)


def log_softmax(logits: npt.ArrayLike) -> Floats:
    values = np.asarray(logits, dtype=np.float64)
    shifted = values - values.max()
    result: Floats = shifted - np.log(np.exp(shifted).sum())
    return result


def expected_distribution(
    logits: npt.ArrayLike, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Floats:
    """The filters one after another on a sorted list: slow, and with nothing in common with the C++ passes."""
    values = np.asarray(logits, dtype=np.float64)
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    if top_k:
        order = order[:top_k]
    mass = np.exp(log_softmax(values[order]))
    kept, total = [], 0.0
    for token, probability in zip(order, mass, strict=True):
        kept.append(token)
        total += probability
        if total >= top_p:
            break
    kept = [token for token in kept if np.exp(values[token] - values[order[0]]) >= min_p]
    result = np.zeros(len(values))
    result[kept] = np.exp(log_softmax(values[kept] / temperature))
    return result


def draw(sampled: Any, logits: npt.ArrayLike, n_draws: int) -> npt.NDArray[np.int64]:
    values = np.asarray(logits, dtype=np.float32)
    return np.bincount([sampled.sample(values).token for _ in range(n_draws)], minlength=len(values))


def assert_follows(counts: npt.NDArray[np.int64], probabilities: Floats) -> None:
    """Chi-square test; tokens outside the support must not occur at all."""
    support = probabilities > 0
    assert counts[~support].sum() == 0
    expected = probabilities[support] * counts.sum()
    statistic = ((counts[support] - expected) ** 2 / expected).sum()
    assert support.sum() == 1 or statistic < CHI_SQUARE[int(support.sum()) - 1]


def test_greedy_takes_the_best_token() -> None:
    for n_vocab in (1, 2, 15, 16, 17, 1000, 200_064):
        logits = random_logits(n_vocab, seed=n_vocab)
        assert sampler(n_vocab).sample(logits).token == int(logits.argmax())


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    logits = np.zeros(100, np.float32)
    logits[[17, 40, 99]] = 3.0
    assert sampler(100).sample(logits).token == 17


@pytest.mark.parametrize("n_vocab", [1, 7, 1025, 200_064])
def test_logprobs_are_the_log_softmax_of_the_given_logits(n_vocab: int) -> None:
    logits = random_logits(n_vocab, seed=1, scale=6.0)
    sample = sampler(n_vocab, n_top=min(n_vocab, 20), temperature=0.7, top_k=3, logit_bias=[(0, 9.0)]).sample(logits)
    expected = log_softmax(logits)
    order = np.argsort(-logits, kind="stable")[:20]
    assert [token for token, _ in sample.top] == order.tolist()
    np.testing.assert_allclose([logprob for _, logprob in sample.top], expected[order], atol=1e-5)
    assert sample.logprob == pytest.approx(expected[sample.token], abs=1e-5)


def test_top_lists_equal_logits_by_id_and_minus_infinity_last() -> None:
    logits = np.array([-np.inf, 1, 2, 1, 2, -np.inf], np.float32)
    sample = sampler(6, n_top=99).sample(logits)
    assert [token for token, _ in sample.top] == [2, 4, 1, 3, 0, 5]
    assert sample.top[-1][1] == -np.inf


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.9, "min_p": 0.05}],
    ids=lambda filters: "+".join(filters) or "none",
)
def test_draws_follow_the_distribution(temperature: float, filters: dict[str, Any]) -> None:
    logits = np.array([0.1, 1.7, -0.4, 1.7, 0.9, 0.0, 1.2, -1.0], np.float32)
    counts = draw(sampler(8, temperature=temperature, seed=11, **filters), logits, 20_000)
    assert_follows(counts, expected_distribution(logits, temperature, **filters))


@pytest.mark.parametrize("seed", range(8))
def test_support_of_the_filters_equals_the_oracle(seed: int) -> None:
    generator = np.random.default_rng(seed)
    n_vocab = int(generator.integers(2, 60))
    logits = (generator.standard_normal(n_vocab) * 1.5).round(1).astype(np.float32)  # rounded: with ties
    filters: dict[str, Any] = {
        "top_k": int(generator.integers(0, n_vocab + 2)),
        "top_p": float(generator.uniform(0.05, 1.0)),
        "min_p": float(generator.uniform(0.0, 0.3)),
    }
    # At a huge temperature every token that is left is equally likely: 40 draws per token see all of them.
    counts = draw(sampler(n_vocab, temperature=1e6, seed=seed, **filters), logits, 40 * n_vocab)
    support = expected_distribution(logits, 1e6, **filters) > 0
    assert (counts > 0).tolist() == support.tolist()


def test_top_p_of_zero_and_min_p_of_one_leave_the_best_token() -> None:
    logits = random_logits(500)
    for options in ({"top_p": 0.0}, {"min_p": 1.0}, {"top_k": 1}):
        counts = draw(sampler(500, temperature=5.0, **options), logits, 50)
        assert counts[logits.argmax()] == 50


def test_top_p_keeps_half_of_a_flat_large_vocabulary() -> None:
    logits = np.zeros(200_064, np.float32)
    sampled = sampler(200_064, temperature=1.0, top_p=0.5, seed=5)
    tokens = [sampled.sample(logits).token for _ in range(60)]
    assert max(tokens) < 100_032 and min(tokens) < 30_000


@pytest.mark.parametrize(("n_vocab", "top_k"), [(200_064, 40), (200_064, 5000), (3000, 1500), (3000, 9000)])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_top_k_of_a_large_vocabulary(n_vocab: int, top_k: int, scale: float) -> None:
    logits = random_logits(n_vocab, seed=9, scale=scale)
    best = np.argsort(-logits, kind="stable")[:top_k].tolist()
    sampled = sampler(n_vocab, temperature=1e6, top_k=top_k, seed=5)
    drawn = [best.index(sampled.sample(logits).token) for _ in range(800)]  # ValueError: not among the best
    assert max(drawn) >= 0.97 * (len(best) - 1)
    assert len(set(drawn)) > 0.9 * len(best) * -np.expm1(-800 / len(best))


def penalised(logits: Floats, tokens: Sequence[int], repetition: float, presence: float, frequency: float) -> Floats:
    result = logits.copy()
    for token in set(tokens):
        result[token] = result[token] / repetition if result[token] > 0 else result[token] * repetition
        result[token] -= presence + frequency * tokens.count(token)
    return np.asarray(result)


@pytest.mark.parametrize("window", [-1, 0, 1, 3, 64])
def test_penalties_see_the_last_tokens_of_the_window(window: int) -> None:
    logits = np.array([1.5, 1.2, -0.5, 0.8, 0.2], np.float32)
    options = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.25}
    history = [0, 0, 2, 1, 0, 3, 0]
    sampled = sampler(5, temperature=1.0, seed=3, penalty_window=window, **options)
    for token in history:
        sampled.accept(token)
    seen = history if window < 0 else history[len(history) - min(window, len(history)) :]
    adjusted = penalised(logits.astype(np.float64), seen, 1.3, 0.4, 0.25)
    assert_follows(draw(sampled, logits, 20_000), expected_distribution(adjusted, 1.0))


def test_repetition_penalty_turns_greedy_away_from_a_repeated_token() -> None:
    sampled = sampler(3, repetition_penalty=2.0)
    logits = np.array([1.0, 0.9, -1.0], np.float32)
    assert sampled.sample(logits).token == 0
    sampled.accept(0)
    assert sampled.sample(logits).token == 1
    assert sampled.sample(logits).logprob == pytest.approx(log_softmax(logits)[1], abs=1e-5)


def test_logit_bias_shifts_and_bans() -> None:
    logits = np.array([0.5, 0.2, 0.1, 0.0], np.float32)
    sampled = sampler(4, temperature=1.0, seed=2, logit_bias=[(0, -float("inf")), (3, 1.5)])
    adjusted = np.array([-np.inf, 0.2, 0.1, 1.5])
    assert_follows(draw(sampled, logits, 20_000), expected_distribution(adjusted, 1.0))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_tokens_are_never_chosen(temperature: float) -> None:
    logits = np.array([1.0, 5.0, 0.0, 4.0], np.float32)
    counts = draw(sampler(4, temperature=temperature, forbidden=[3, 1]), logits, 200)
    assert counts[[1, 3]].sum() == 0


def test_same_seed_same_tokens_and_reset_starts_again() -> None:
    rows = [random_logits(1000, seed=row) for row in range(50)]

    def tokens(sampled: Any) -> list[int]:
        return [sampled.sample(row).token for row in rows]

    first = sampler(1000, temperature=1.0, top_p=0.95, seed=7)
    expected = tokens(first)
    assert tokens(sampler(1000, temperature=1.0, top_p=0.95, seed=7)) == expected
    assert tokens(first) != expected
    first.reset()
    assert tokens(first) == expected
    assert tokens(sampler(1000, temperature=1.0, top_p=0.95, seed=8)) != expected


def test_the_draws_of_a_seed_are_pinned() -> None:
    # Changing the generator or the order of the draw changes users' texts: then this test and the changelog change too.
    logits = np.arange(1000, dtype=np.float32) / 512
    sampled = sampler(1000, temperature=0.8, top_k=500, top_p=0.9, min_p=0.01, seed=2024)
    assert [sampled.sample(logits).token for _ in range(8)] == [886, 644, 754, 655, 952, 860, 668, 876]


@pytest.mark.parametrize("position", [0, 5, 16, 99])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_that_is_no_number_is_an_input_error(position: int, value: float, temperature: float) -> None:
    logits = random_logits(100)
    logits[position] = value
    with pytest.raises(InputError, match=f"the logit of token {position} is"):
        sampler(100, temperature=temperature, top_p=0.5).sample(logits)


def test_minus_infinity_is_allowed_unless_nothing_is_left() -> None:
    logits = np.full(100, -np.inf, np.float32)
    with pytest.raises(InputError, match="no token can be chosen"):
        sampler(100).sample(logits)
    logits[41] = -3.0
    for options in ({}, {"temperature": 1.0}, {"temperature": 1e-40}, {"temperature": 1e38, "top_k": 5, "top_p": 0.9}):
        sample = sampler(100, **options).sample(logits)
        assert (sample.token, sample.logprob) == (41, pytest.approx(0.0, abs=1e-6))
    with pytest.raises(InputError, match="no token can be chosen"):
        sampler(100, forbidden=[41]).sample(logits)


def test_extreme_finite_logits_are_no_problem() -> None:
    largest = np.finfo(np.float32).max
    logits = np.array([-largest, largest, 0.0, largest], np.float32)
    counts = draw(sampler(4, temperature=1.0, top_p=0.9, min_p=0.1), logits, 200)
    assert counts[[0, 2]].sum() == 0 and (counts[[1, 3]] > 50).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_k", -1),
        ("top_p", 1.1), ("top_p", float("nan")), ("min_p", -0.1), ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")), ("presence_penalty", float("nan")), ("frequency_penalty", float("inf")),
        ("penalty_window", -2), ("n_top", -1), ("logit_bias", [(10, 1.0)]), ("logit_bias", [(-1, 1.0)]),
        ("logit_bias", [(1, float("nan"))]), ("logit_bias", [(1, float("inf"))]), ("forbidden", [10]),
    ],
)  # fmt: skip
def test_an_option_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{field}"):
        sampler(10, **{field: value})


def test_options_are_read_and_written_by_name() -> None:
    options = _core.SamplerOptions(seed=2**64 - 1, logit_bias=[(1, 0.5)])
    options.top_k = 7
    assert (options.seed, options.top_k, options.logit_bias) == (2**64 - 1, 7, [(1, 0.5)])
    assert (options.temperature, options.top_p, options.penalty_window) == (0.0, 1.0, 64)


def test_wrong_shapes_and_tokens_are_input_errors() -> None:
    sampled = sampler(10)
    for logits in (np.zeros(9, np.float32), np.zeros(11, np.float32), np.zeros((1, 10), np.float32)):
        with pytest.raises(InputError, match="expected 10 logits"):
            sampled.sample(logits)
    for token in (-1, 10):
        with pytest.raises(InputError, match="not in the vocabulary"):
            sampled.accept(token)
    with pytest.raises(InputError, match="vocab_size"):
        sampler(0)
