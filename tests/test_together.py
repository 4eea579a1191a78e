"""Several sequences computed together: each gets the logits that it gets alone, to the bit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lora_files import PARTS, merged, random_pairs, write_adapter
from phi4edge import _core
from phi4edge.errors import Cancelled, InputError
from reference import Reference, relative_difference
from tiny_models import tiny_gguf, tiny_transformers, transformers_logits

VOCAB = 359
SHAPE: dict[str, Any] = {"vocab": VOCAB, "rotary_fraction": 0.75}
BOUNDARY = 64
LONG: dict[str, Any] = {**SHAPE, "original_context": BOUNDARY, "context": 512}
# Shorter and longer than a tile of queries, a panel of keys, and what is computed at once.
LENGTHS = (1, 17, 40, 150)
TYPES = ["F32", "BF16", "Q8_0", "Q4_1", "Q2_K", "Q4_K", "Q6_K", "IQ4_XS"]

Tokens = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]
Prepare = Callable[[_core.Session, int], None]  # a new session, by its number


def tokens_of(seed: int, n: int) -> Tokens:
    return np.random.default_rng(seed).integers(0, VOCAB, n).astype(np.int32)


PROMPTS = [tokens_of(i, n) for i, n in enumerate(LENGTHS)]
# What each session gets in each step; of one token mostly, and of some.
STEPS = [[tokens_of(100 + 10 * step + i, 1) for i in range(4)] for step in range(5)]
STEPS += [[tokens_of(200 + i, n) for i, n in enumerate((3, 1, 20, 130))], [tokens_of(300 + i, 1) for i in range(4)]]


def load(path: Path, n_threads: int = 2, isa: str = "") -> _core.Model:
    return _core.Model(_core.GgufFile(path), n_threads, isa)


def sessions_of(model: _core.Model, prepare: Prepare | None = None, kv_type: str = "i16") -> list[_core.Session]:
    sessions = [_core.Session(model, 512, kv_type) for _ in PROMPTS]
    for i, (session, prompt) in enumerate(zip(sessions, PROMPTS, strict=True)):
        if prepare is not None:
            prepare(session, i)
        session.extend(prompt, "none")
    return sessions


def alone(sessions: list[_core.Session], which: str = "all") -> list[list[Logits]]:
    """Logits of each step, of each session."""
    return [[s.extend(t, which) for s, t in zip(sessions, step, strict=True)] for step in STEPS]


def together(sessions: list[_core.Session], which: str = "all") -> list[list[Logits]]:
    return [_core.extend_together(sessions, step, which) for step in STEPS]


def assert_same(one: list[list[Logits]], other: list[list[Logits]]) -> None:
    for rows, others in zip(one, other, strict=True):
        for row, its in zip(rows, others, strict=True):
            np.testing.assert_array_equal(row, its)


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("file_type", TYPES)
def test_sessions_together_get_the_bits_that_each_gets_alone(file_type: str, isa: str, models: Path) -> None:
    model = load(tiny_gguf(models, file_type, **SHAPE), isa=isa)
    assert_same(together(sessions_of(model)), alone(sessions_of(model)))


@pytest.mark.parametrize("kv_type", _core.kv_types())
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_so_it_is_with_any_threads_and_cache(n_threads: int, kv_type: str, models: Path) -> None:
    path = tiny_gguf(models, "Q4_K", **SHAPE, sliding_window=70)
    expected = alone(sessions_of(load(path, 1), kv_type=kv_type))
    assert_same(together(sessions_of(load(path, n_threads), kv_type=kv_type)), expected)


def test_caches_of_different_types_meet_in_a_step(models: Path) -> None:
    model = load(tiny_gguf(models, "F16", **SHAPE, head_dim=24, heads=6, kv_heads=1))

    def mixed() -> list[_core.Session]:
        sessions = [_core.Session(model, 512, kind) for kind in ("i16", "q8_0", "f32", "q8_0")]
        for session, prompt in zip(sessions, PROMPTS, strict=True):
            session.extend(prompt, "none")
        return sessions

    assert_same(together(mixed()), alone(mixed()))


@pytest.mark.parametrize("which", ["none", "last", "all"])
def test_the_choice_of_logits_is_for_each_session(which: str, models: Path) -> None:
    model = load(tiny_gguf(models, "Q4_K", **SHAPE))
    rows = together(sessions_of(model), which)
    assert [len(each) for each in rows[-2]] == {"none": [0] * 4, "last": [1] * 4, "all": [3, 1, 20, 130]}[which]
    assert_same(rows, alone(sessions_of(model), which))


@pytest.mark.parametrize("options", [{}, {"architecture": "llama"}, {"fused": False, "tied": False}])
def test_logits_are_those_of_exact_arithmetic(options: dict[str, Any], models: Path) -> None:
    path = tiny_gguf(models, **{**SHAPE, **options})
    reference = Reference(path)
    rows = together(sessions_of(load(path), kv_type="f32"), "last")
    for i, prompt in enumerate(PROMPTS):
        expected = reference.logits(np.concatenate([prompt, *(step[i] for step in STEPS)]).tolist())
        assert relative_difference(rows[-1][i], expected[-1:]) <= 1e-4


def adapters_of(path: Path, first_type: str = "Q8_0") -> list[Path]:
    """Of all matrices, of some of them, and of an odd rank; the latter two in F16."""
    found = []
    for seed, (rank, parts) in enumerate([(32, PARTS), (8, ("attn_qkv", "ffn_down")), (7, PARTS)]):
        pairs = random_pairs(path, rank, seed=seed, parts=parts)
        kind = first_type if seed == 0 else "F16"
        file = path.with_name(f"{path.stem}.{seed}.{kind}.together.gguf")
        if not file.exists():
            write_adapter(file, pairs, kind, alpha=2.0 * rank)
        found.append(file)
    return found


# Which adapter each of the four sessions has, and its scale.
MIXES: list[list[tuple[int | None, float]]] = [
    [(0, 1.0), (0, 1.0), (0, 1.0), (0, 1.0)],
    [(0, 1.0), (None, 1.0), (1, 0.5), (2, 2.0)],
    [(2, 1.0), (0, 1.0), (2, 1.0), (0, 1.0)],
    [(1, 1.0), (1, 0.5), (1, 1.0), (None, 1.0)],
    [(None, 1.0), (None, 1.0), (0, -1.0), (None, 1.0)],
]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("file_type", ["F32", "Q4_K"])
def test_each_adapter_meets_its_own_sessions_only(
    mix: list[tuple[int | None, float]], file_type: str, models: Path
) -> None:
    path = tiny_gguf(models, file_type, **SHAPE)
    model = load(path, n_threads=3)
    loaded = [_core.Adapter(model, _core.GgufFile(file)) for file in adapters_of(path)]

    def prepare(session: _core.Session, i: int) -> None:
        adapter, scale = mix[i]
        session.set_adapter(None if adapter is None else loaded[adapter], scale)

    assert_same(together(sessions_of(model, prepare)), alone(sessions_of(model, prepare)))


def test_logits_with_adapters_are_those_of_merged_weights(models: Path) -> None:
    path = tiny_gguf(models, **SHAPE)
    model, files = load(path), adapters_of(path, "F32")
    loaded = [_core.Adapter(model, _core.GgufFile(file)) for file in files]
    sessions = sessions_of(model, lambda session, i: session.set_adapter([*loaded, None][i]), "f32")
    rows = together(sessions, "last")[-1]
    for i, prompt in enumerate(PROMPTS):
        reference = Reference(path) if i == 3 else merged(path, files[i])
        expected = reference.logits(np.concatenate([prompt, *(step[i] for step in STEPS)]).tolist())
        assert relative_difference(rows[i], expected[-1:]) <= 1e-4


def test_an_adapter_that_changed_is_met_by_the_whole_sequence(models: Path) -> None:
    path = tiny_gguf(models, "Q8_0", **SHAPE)
    model = load(path)
    adapter = _core.Adapter(model, _core.GgufFile(adapters_of(path)[0]))
    both = [sessions_of(model), sessions_of(model)]
    for sessions in both:
        sessions[0].set_adapter(adapter)
        sessions[3].set_adapter(adapter, 0.5)
    assert_same(together(both[0]), alone(both[1]))


def test_sequences_cross_the_boundary_of_longrope_in_one_step(models: Path) -> None:
    """transformers computes the whole sequence with the factors of its length."""
    path = tiny_gguf(models, **LONG)
    model, peer = load(path), tiny_transformers(**LONG)
    lengths = (BOUNDARY - 1, 5, BOUNDARY, 130, BOUNDARY - 2)
    texts = [tokens_of(400 + i, n + 3) for i, n in enumerate(lengths)]
    sessions = [_core.Session(model, 512, "f32") for _ in texts]
    others = [_core.Session(model, 512, "f32") for _ in texts]
    for session, other, text, n in zip(sessions, others, texts, lengths, strict=True):
        session.extend(text[:n], "none")
        other.extend(text[:n], "none")
    for step in range(3):
        tokens = [text[n + step : n + step + 1] for text, n in zip(texts, lengths, strict=True)]
        rows = _core.extend_together(sessions, tokens)
        for i, (row, text, n) in enumerate(zip(rows, texts, lengths, strict=True)):
            expected = transformers_logits(peer, text[: n + step + 1])[-1:]
            assert relative_difference(row, expected) <= 1e-4
            np.testing.assert_array_equal(row, others[i].extend(tokens[i]))


def test_embeddings_and_appended_tokens_are_computed_in_the_same_step(models: Path) -> None:
    path = tiny_gguf(models, "Q4_K", **SHAPE)
    model = load(path)
    rows = np.random.default_rng(1).standard_normal((140, model.config.hidden_size)).astype(np.float32)

    def prepared() -> list[_core.Session]:
        sessions = sessions_of(model)
        sessions[1].append_embeddings(rows)
        sessions[2].append(tokens_of(8, 30))
        sessions[3].extend_embeddings(rows[:9], "none")
        return sessions

    assert_same(together(prepared()), alone(prepared()))


def test_sums_of_squares_are_those_of_each_session(models: Path) -> None:
    model = load(tiny_gguf(models, "Q8_0", **SHAPE))

    def collecting() -> list[_core.Session]:
        sessions = sessions_of(model)
        for session in sessions[1:]:
            session.collect_input_squares(True)
        sessions[2].append(tokens_of(9, 5))  # which do not count
        return sessions

    one, other = collecting(), collecting()
    together(one)
    alone(other)
    assert one[0].input_squares() == {}
    for session, its in zip(one[1:], other[1:], strict=True):
        expected = its.input_squares()
        assert session.input_squares().keys() == expected.keys()
        for name, (sums, n_tokens) in session.input_squares().items():
            assert n_tokens == expected[name][1]
            np.testing.assert_allclose(sums, expected[name][0], rtol=1e-12)


@pytest.fixture
def model(models: Path) -> Iterator[_core.Model]:
    yield load(tiny_gguf(models, "Q4_K", **SHAPE))


def assert_as_before(model: _core.Model, sessions: list[_core.Session]) -> None:
    """They have their prompts, and go on as if nothing had been."""
    assert [session.n_tokens for session in sessions] == list(LENGTHS)
    assert_same(together(sessions), alone(sessions_of(model)))


def test_a_step_that_is_cancelled_changes_none_of_them(model: _core.Model) -> None:
    sessions = sessions_of(model)
    with pytest.raises(Cancelled):
        _core.extend_together(sessions, STEPS[0], "last", lambda done, total: False)

    def fail(done: int, total: int) -> None:
        raise KeyError(total)

    with pytest.raises(KeyError, match=r"^154$"):
        _core.extend_together(sessions, STEPS[5], "last", fail)
    assert_as_before(model, sessions)


@pytest.mark.parametrize("which", range(4))
def test_any_of_them_can_be_cancelled_from_another_thread(which: int, model: _core.Model) -> None:
    sessions = sessions_of(model)
    waiting = [_core.Session(model, 4096) for _ in sessions]
    prompt = tokens_of(7, 4000)

    def cancel(done: int, total: int) -> bool:
        canceller = threading.Thread(target=waiting[which].cancel)
        canceller.start()
        canceller.join()
        return True

    with pytest.raises(Cancelled):
        _core.extend_together([*sessions, *waiting], [*STEPS[0], *[prompt] * 4], "last", cancel)
    assert [session.n_tokens for session in waiting] == [0] * 4
    assert_as_before(model, sessions)


def test_progress_counts_the_tokens_of_all(model: _core.Model) -> None:
    calls: list[tuple[int, int]] = []
    sessions = sessions_of(model)
    sessions[1].append(tokens_of(8, 30))
    _core.extend_together(sessions, STEPS[5], "last", lambda done, total: calls.append((done, total)))
    assert calls[-1] == (184, 184) and calls == sorted(calls)


def test_what_does_not_fit_or_exist_is_named_and_changes_nothing(model: _core.Model) -> None:
    sessions = sessions_of(model)
    wrong: list[tuple[int, Tokens, str]] = [
        (2, np.array([VOCAB], np.int32), r"sessions\[2\]: token 359 at position 0 is not in 0\.\.358"),
        (3, np.array([1, -1], np.int32), r"sessions\[3\]: token -1 at position 1"),
        (3, tokens_of(1, 400), r"sessions\[3\]: the sequence would have 550 tokens, and the context holds 512"),
        (0, tokens_of(1, 513), "513 tokens do not fit a context of 512"),
        (1, np.zeros((1, 1), np.int32), "one dimension"),
    ]
    for i, tokens, problem in wrong:
        with pytest.raises(InputError, match=problem):
            _core.extend_together(sessions, [*STEPS[0][:i], tokens, *STEPS[0][i + 1 :]])
    with pytest.raises(InputError, match="4 sessions have tokens for 3"):
        _core.extend_together(sessions, STEPS[0][:3])
    with pytest.raises(InputError, match="expected none, last or all"):
        _core.extend_together(sessions, STEPS[0], "some")
    with pytest.raises(InputError, match=r"sessions\[1\] is none"):
        _core.extend_together([sessions[0], None], STEPS[0][:2])  # type: ignore[list-item]
    assert _core.extend_together([], []) == []
    assert_as_before(model, sessions)


def test_sessions_that_cannot_go_together_are_refused(model: _core.Model, models: Path) -> None:
    sessions = sessions_of(model)
    with pytest.raises(InputError, match="a session is there twice"):
        _core.extend_together([*sessions, sessions[1]], [*STEPS[0], STEPS[0][1]])
    stranger = _core.Session(load(tiny_gguf(models, "Q4_K", **SHAPE)), 512)
    with pytest.raises(InputError, match="not all of one model"):
        _core.extend_together([*sessions, stranger], [*STEPS[0], STEPS[0][0]])
    assert stranger.n_tokens == 0
    assert_as_before(model, sessions)


def test_a_session_in_use_is_refused_and_the_others_stay(model: _core.Model) -> None:
    sessions = sessions_of(model)
    errors: list[InputError] = []

    def nested(done: int, total: int) -> None:
        for call in (lambda: _core.extend_together(sessions, STEPS[0]), lambda: sessions[0].extend(STEPS[0][0])):
            try:
                call()
            except InputError as error:
                errors.append(error)

    expected = alone(sessions_of(model))[0]
    for got, row in zip(_core.extend_together(sessions, STEPS[0], "all", nested), expected, strict=True):
        np.testing.assert_array_equal(got, row)
    assert {error.problem for error in errors} == {"this session is in use"} and len(errors) >= 2
    other = _core.Session(model, 512)

    def use_the_others(done: int, total: int) -> None:
        with pytest.raises(InputError, match="in use"):
            _core.extend_together([*sessions, other], [*STEPS[1], STEPS[1][0]])

    other.extend(PROMPTS[0], "none", use_the_others)
    assert [session.n_tokens for session in sessions] == [n + 1 for n in LENGTHS]


def test_sessions_go_together_beside_others_in_their_own_threads(model: _core.Model) -> None:
    expected = alone(sessions_of(model))
    results: dict[int, list[list[Logits]]] = {}

    def run(i: int) -> None:
        results[i] = together(sessions_of(model))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    for rows in results.values():
        assert_same(rows, expected)
