"""Drafts change nothing but the number of steps: answers, log-probabilities, pieces and the sequence stay the same."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phi4edge
from nano_items import items
from peers import LlamaCpp, greedy
from phi4edge import _core
from phi4edge.drafts import Drafts, Repeats
from phi4edge.errors import Cancelled, InputError, UsageError
from phi4edge.expanded import Key
from phi4edge.session import Growth, Session
from processes import run
from tiny_models import PURE_FILE_TYPES, tiny_gguf

N_VOCAB = 359  # without unused ids, which are never chosen
BOUNDARY = 64
# A text over three letters repeats itself all the time, and goes on otherwise as often: drafts of every outcome.
THREE_LETTERS: dict[str, Any] = {"logit_bias": {ord("c") - 33 + i: 40.0 for i in range(3)}, "temperature": 1.0}


@pytest.fixture(scope="module")
def model(models: Path) -> Iterator[phi4edge.Model]:
    with phi4edge.load(tiny_gguf(models, "Q8_0", vocab=N_VOCAB), context=512, threads=1) as loaded:
        yield loaded


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each computation of an answer: the tokens that the sequence had before, and those of the draft."""
    found: list[tuple[int, int]] = []
    real = Session._prepared

    def prepared(self: Session, keys: Sequence[Any], n_rows: int | None = None) -> Sequence[Any]:
        found.append((len(self), len(keys) - 1))
        return real(self, keys, n_rows)

    monkeypatch.setattr(Session, "_prepared", prepared)
    return found


def told(answer: phi4edge.Generation) -> dict[str, Any]:
    """All that an answer says but its times, its drafts, and whether its media were encoded before."""
    usage = dataclasses.replace(answer.usage, drafted_tokens=0, accepted_tokens=0)
    return dataclasses.asdict(answer) | {"timings": None, "usage": usage, "encoders": None}


def both(model: phi4edge.Model, prompt: Any, draft_tokens: int = 7, **options: Any) -> phi4edge.Usage:
    """Asserts that an answer is the same with and without drafts; the usage of the one with."""
    seen = []
    for n_most in (0, draft_tokens):
        session = model.session()
        pieces = list(model.stream(prompt, session=session, draft_tokens=n_most, **options))
        assert model.last is not None
        seen.append((pieces, told(model.last), session.tokens))
    assert model.last is not None and seen[1] == seen[0]
    return model.last.usage


def random_prompt(seed: int, n_tokens: int = 40) -> list[int]:
    return np.random.default_rng(seed).integers(0, 300, n_tokens).tolist()  # type: ignore[no-any-return]


# --- the guesses


class Scan:
    """The same as Repeats, by looking at every position, the last first."""

    def __init__(self) -> None:
        self.keys: list[Key] = []
        self.at: int | None = None

    def add(self, key: Key) -> None:
        follows = isinstance(key, int) and self.at is not None and self.keys[self.at] == key
        self.keys.append(key)
        self.at = self.at + 1 if follows and self.at is not None else self.found()

    def found(self) -> int | None:
        for size in (3, 2):
            last = self.keys[-size:]
            if len(last) < size or not all(isinstance(key, int) for key in last):
                continue
            for at in range(len(self.keys) - 1, size - 1, -1):
                if self.keys[at - size : at] == last and isinstance(self.keys[at], int):
                    return at
        return None

    def continuation(self, n_most: int) -> list[Key]:
        text = list(self.keys)
        for i in range(n_most if self.at is not None else 0):
            key = text[self.at + i]  # type: ignore[operator]
            if not isinstance(key, int):
                break
            text.append(key)
        return text[len(self.keys) :]


@pytest.mark.parametrize("n_letters", [1, 2, 3, 6, 20])
@pytest.mark.parametrize("media_share", [0.0, 0.1])
def test_a_continuation_is_what_a_scan_of_the_whole_sequence_finds(n_letters: int, media_share: float) -> None:
    rng = np.random.default_rng(n_letters)
    n_found = 0
    for _ in range(6):
        repeats, scan = Repeats(), Scan()
        for row in range(80):
            key: Key = (b"image", row % 3) if rng.random() < media_share else int(rng.integers(n_letters))
            repeats.add(key)
            scan.add(key)
            n_most = int(rng.integers(1, 9))
            found = repeats.continuation(n_most)
            assert found == scan.continuation(n_most)
            n_found += bool(found)
    assert n_found > 20


def test_a_place_is_followed_while_the_text_goes_on_as_there() -> None:
    repeats = Repeats()
    for key in [1, 2, 3, 4, 5, 6, 9, 4, 5, 6, 7, 1, 2, 3, 4, 5, 6]:
        repeats.add(key)
    assert repeats.continuation(3) == [9, 4, 5]  # although 7 came after the last 4, 5, 6
    repeats.add(8)
    assert repeats.continuation(3) == []


def test_media_are_neither_matched_nor_guessed() -> None:
    rows: list[Key] = [(b"image", 0), (b"image", 1)]
    repeats = Repeats()
    for key in [5, 6, *rows, 7, 8, 9, *rows, 7, 8]:
        repeats.add(key)
    assert repeats.continuation(4) == [9]  # and then the image
    repeats.add((b"image", 0))
    repeats.add((b"image", 1))
    assert repeats.continuation(4) == []
    repeats.add(7)
    assert repeats.continuation(4) == []  # one token is not enough


def lengths(drafts: Drafts, text: Sequence[int]) -> list[int]:
    """Of the drafts proposed while the text is written, where there is one."""
    found = []
    for token in text:
        drafts.add(token)
        found.append(len(drafts.propose(100)))
    return [n for n in found if n]


def test_drafts_grow_while_they_are_right_and_stop_when_they_are_wrong() -> None:
    copied = list(range(100, 140))
    assert lengths(Drafts(copied, 7, ()), copied[:34]) == [3, 7, 7, 7, 7]
    drafts = Drafts([1, 2, 3] * 4, 7, ())
    assert lengths(drafts, [i for n in range(50, 80) for i in (n, 1, 2)]) == [3, 1]
    assert (drafts.n_proposed, drafts.n_right) == (4, 0)
    assert lengths(drafts, [*copied, *copied])[:3] == [1, 3, 7]  # after a guess that was only compared


def test_a_draft_is_never_longer_than_there_is_room_and_ends_before_an_end() -> None:
    for room in range(4):
        drafts = Drafts([1, 2, 3, 4, 5, 6, 1, 2], 7, ())
        drafts.add(3)
        assert drafts.propose(room) == [4, 5, 6][:room]
    drafts = Drafts([1, 2, 3, 4, 5, 6, 1, 2], 7, {5})
    drafts.add(3)
    assert drafts.propose(100) == [4]
    assert lengths(Drafts([1] * 9, 0, ()), [1] * 9) == []


# --- what it rests on


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("file_type", PURE_FILE_TYPES)
def test_a_token_gets_the_same_bits_however_many_are_computed_together(file_type: str, isa: str, models: Path) -> None:
    core = _core.Model(_core.GgufFile(tiny_gguf(models, file_type, rotary_fraction=0.75)), 1, isa)
    tokens = np.random.default_rng(2).integers(0, 512, 52).astype(np.int32)
    for kv_type in _core.kv_types() if file_type == "Q8_0" else ["i16"]:
        rows = {}
        for n_together in (1, 2, 4, 8, 17):
            session = _core.Session(core, 64, kv_type=kv_type)
            session.extend(tokens[:35], logits="none")
            steps = range(35, 52, n_together)
            rows[n_together] = np.concatenate([session.extend(tokens[at : at + n_together], "all") for at in steps])[
                :17
            ]
        for n_together, found in rows.items():
            np.testing.assert_array_equal(found, rows[1], err_msg=f"{n_together} together, {kv_type}")


# --- the answers

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "log-probabilities": {"logprobs": 3},
    "likely tokens": {"temperature": 0.4, "seed": 3, "top_k": 5, "logprobs": 1},
    "three letters": {**THREE_LETTERS, "seed": 1, "logprobs": 2},
    "nucleus": {**THREE_LETTERS, "seed": 2, "top_p": 0.8, "min_p": 0.05},
    "penalties": {**THREE_LETTERS, "seed": 4, "repetition_penalty": 1.2, "frequency_penalty": 0.1},
    "penalties of all tokens": {**THREE_LETTERS, "seed": 5, "presence_penalty": 2.0, "penalty_window": -1},
    "greedy with penalties": {"logit_bias": {70: 30.0, 71: 30.0}, "frequency_penalty": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_answers_are_the_same_with_and_without_drafts(options: dict[str, Any], model: phi4edge.Model) -> None:
    n_accepted = [both(model, random_prompt(seed), max_tokens=60, **options).accepted_tokens for seed in (0, 1)]
    assert sum(n_accepted) > 0


@pytest.mark.parametrize("draft_tokens", [1, 2, 12, 64])
def test_drafts_of_any_length_change_nothing(draft_tokens: int, model: phi4edge.Model) -> None:
    for options in (OPTIONS["three letters"], {"logit_bias": {70: 60.0}}):
        usage = both(model, random_prompt(2), draft_tokens, max_tokens=150, **options)
    assert usage.accepted_tokens > 150 * draft_tokens / (draft_tokens + 1) - 80


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 9, 30])
def test_the_longest_answer_is_no_longer(n_tokens: int, model: phi4edge.Model) -> None:
    usage = both(model, [70, 71, 72, 73] * 9, max_tokens=n_tokens, logit_bias={70: 60.0})
    assert usage.completion_tokens == n_tokens
    assert usage.drafted_tokens <= max(0, n_tokens - 2)  # all right, and no more than the answer may have


def test_stop_texts_and_tokens_end_an_answer_within_a_draft(
    model: phi4edge.Model, steps: list[tuple[int, int]]
) -> None:
    prompt, options = random_prompt(7), {**THREE_LETTERS, "seed": 6, "max_tokens": 60}
    whole = model.generate(prompt, **options)
    n_within = 0
    for at in range(10, 40, 4):
        for stop in ({"stop": [whole.text[at : at + 9]]}, {"stop_tokens": [whole.tokens[0]], "logit_bias": {}}):
            both(model, prompt, **options | stop)
            n_before, n_draft = steps[-1]
            n_within += n_before + n_draft > len(prompt) + len(model.last.tokens)  # type: ignore[union-attr]
    assert n_within > 0


def test_the_answers_of_a_real_model_are_the_same_over_text_images_and_sounds() -> None:
    chosen = {item.family: item for item in items()}.values()
    n_accepted = 0
    with phi4edge.load(threads=1) as nano:
        endless = dict.fromkeys(nano.tokenizer.stop_ids, -100.0)
        for item in chosen:
            both(nano, item.messages, max_tokens=16, logprobs=1)
            n_accepted += both(nano, item.messages, max_tokens=32, logit_bias=endless).accepted_tokens
    assert len(chosen) > 3 and n_accepted > 0


def test_a_text_that_repeats_itself_takes_fewer_steps_and_is_what_llama_cpp_writes(
    models: Path, steps: list[tuple[int, int]]
) -> None:
    path = tiny_gguf(models, "F32", vocab=N_VOCAB)
    with phi4edge.load(path, context=256, threads=1) as model, closing(LlamaCpp(path, n_context=256)) as peer:
        prompt = random_prompt(0)
        theirs, _ = greedy(peer.extend, prompt, 80, frozenset())
        answer = model.generate(prompt, max_tokens=80)
        assert list(answer.tokens) == theirs
        n_steps = sum(n_before >= len(prompt) for n_before, _ in steps)
        assert n_steps == answer.timings.n_decoded - answer.usage.accepted_tokens < 50


# --- the sequence


@pytest.mark.parametrize("n_prompt", [30, 55, 62, 63, 64, 65])
def test_no_draft_makes_longrope_change_sides_early(n_prompt: int, models: Path, steps: list[tuple[int, int]]) -> None:
    path = tiny_gguf(models, "Q8_0", vocab=N_VOCAB, original_context=BOUNDARY, rotary_fraction=0.75)
    with phi4edge.load(path, context=200, threads=1) as model:
        both(model, ([70, 71, 72] * 30)[:n_prompt], max_tokens=40, logit_bias={70: 60.0}, logprobs=1)
    drafts = [(n_before, n_draft) for n_before, n_draft in steps if n_before >= n_prompt and n_draft]
    assert all(n_before + 1 + n_draft <= BOUNDARY or n_before > BOUNDARY for n_before, n_draft in drafts)
    assert any(n_before > BOUNDARY for n_before, _ in drafts)
    assert any(n_before < BOUNDARY for n_before, _ in drafts) == (n_prompt < 60)


def test_a_full_context_ends_the_answer_at_the_same_token(models: Path) -> None:
    with phi4edge.load(tiny_gguf(models, "Q8_0", vocab=N_VOCAB), context=BOUNDARY, threads=1) as small:
        usage = both(small, [70, 71, 72] * 10, max_tokens=1000, logit_bias={70: 60.0})
    assert usage.prompt_tokens + usage.completion_tokens == BOUNDARY
    assert usage.accepted_tokens > 20


def test_drafts_never_make_the_cache_grow(models: Path) -> None:
    core = _core.Model(_core.GgufFile(tiny_gguf(models, "Q8_0", vocab=N_VOCAB)), 1)
    session = Session(_core.Session(core, 16), core, Growth(40, 1 << 20, lambda: 50 << 20))
    session.extend(list(range(10)))
    assert session.draft_room() == 5
    session.step(10, [1, 2, 3, 4, 5])
    assert session._core.n_context == 16
    for token in (1, 2, 3, 4, 5):
        session.step(token)
    assert (len(session), session.draft_room()) == (16, 0)
    session.step(6)
    assert session._core.n_context > 16


def test_a_draft_is_no_part_of_the_sequence_and_gives_the_logits_of_its_tokens(model: phi4edge.Model) -> None:
    text = random_prompt(3)
    expected = model.logits(text)
    session = model.session()
    session.extend(text[:20])
    for guess in ([], [1, 2, 3], text[21:24], [*text[21:23], 1], text[21:28]):
        session.truncate(20)
        for at in range(20, 30):
            row = session.step(text[at], guess if at == 20 else [])
            np.testing.assert_array_equal(row, expected[at])
            assert session.tokens == tuple(text[: at + 1])
    with pytest.raises(InputError):
        session.step(1, [N_VOCAB])
    assert session.tokens == tuple(text[:30])


def test_what_changes_the_sequence_forgets_the_draft(model: phi4edge.Model) -> None:
    text = random_prompt(4)
    session = model.session()
    session.extend(text[:20])
    session.step(text[20], text[21:26])
    session.truncate(10)
    session.extend(text[30:31])
    np.testing.assert_array_equal(session.step(text[21]), model.logits([*text[:10], text[30], text[21]])[-1])


def test_an_answer_that_is_left_within_a_draft_leaves_the_same_sequence(model: phi4edge.Model) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "logit_bias": {70: 60.0}, "logprobs": 1}
    for n_pieces in range(1, 14):
        seen = []
        for n_most in (0, 7):
            session = model.session()
            pieces = model.stream([70, 71, 72] * 9, session=session, draft_tokens=n_most, **options)
            given = [next(pieces) for _ in range(n_pieces)]
            between = session.tokens
            pieces.close()
            assert model.last is not None and model.last.finish_reason == "cancelled"
            seen.append((given, between, told(model.last), session.tokens))
        assert seen[1] == seen[0]


def test_cancelling_and_overtaking_within_a_draft_take_effect_at_the_next_token(model: phi4edge.Model) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "logit_bias": {70: 60.0}}
    prompt = [70, 71, 72] * 9
    for n_pieces in range(1, 9):
        session = model.session()
        pieces = model.stream(prompt, session=session, **options)
        given = [next(pieces) for _ in range(n_pieces)]
        session.cancel()
        with pytest.raises(Cancelled):
            next(pieces)
        written = [token for piece in given for token in piece.tokens]
        assert session.tokens == (*prompt, *written[:-1])

        pieces = model.stream(prompt, session=session, **options)
        given = [next(pieces) for _ in range(n_pieces)]
        second = model.generate([5, 6, 7], session=session, max_tokens=3)
        with pytest.raises(UsageError, match="another answer"):
            next(pieces)
        assert session.tokens == (5, 6, 7, *second.tokens[:-1])


def test_the_next_turn_finds_the_same_in_the_cache(model: phi4edge.Model) -> None:
    turns = []
    for n_most in (0, 7):
        session, prompt, answers = model.session(), random_prompt(5), []
        for _ in range(3):
            answer = model.generate(
                prompt, session=session, max_tokens=30, draft_tokens=n_most, seed=1, **THREE_LETTERS
            )
            answers.append((told(answer), session.tokens))
            prompt = [*prompt, *answer.tokens, *random_prompt(6, 5)]
        turns.append(answers)
    assert turns[1] == turns[0]
    assert turns[1][2][0]["usage"].cached_tokens > 90


# --- the command line


def test_the_command_line_turns_drafts_off_and_tells_of_them(models: Path) -> None:
    path = str(tiny_gguf(models, "Q8_0", vocab=N_VOCAB))
    command = ("run", path, "--raw", "the cat sat on the mat the cat sat", "-n", "60", "-t", "1", "--json", "--stats")
    on, off = run(*command), run(*command, "--draft-tokens", "0")
    with_drafts, without = json.loads(on.stdout), json.loads(off.stdout)
    assert with_drafts["tokens"] == without["tokens"]
    usage = with_drafts["usage"]
    line = f"drafts  {usage['drafted_tokens']} tokens guessed, {usage['accepted_tokens']} of them right\n"
    assert usage["accepted_tokens"] > 0 and line in on.stderr
    assert without["usage"]["drafted_tokens"] == 0 and "drafts" not in off.stderr
    refused = run(*command, "--draft-tokens", "65")
    error = json.loads(refused.stdout)["error"]
    assert refused.returncode == 2 and error["field"] == "--draft-tokens" and "0 to 64" in error["message"]


def test_the_benchmark_compares_equal_answers_and_sees_copies(model: phi4edge.Model) -> None:
    benchmark: Any = importlib.import_module("benchmarks.drafts")
    options = argparse.Namespace(forced=True, n_tokens=100, draft_tokens=7, rounds=1)
    for name, case in benchmark.CASES.items():
        result = benchmark.as_case(benchmark.compare(model, case, options))
        assert result["n_decoded"] == 99
        assert (result["accepted"] > 50) == (name != "new")
