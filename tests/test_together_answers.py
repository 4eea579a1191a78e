"""Requests answered together: each as if it were alone, whatever the others are and whatever happens to them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pty
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import phi4edge
from nano_items import items, theirs
from phi4edge.answer import Answer
from phi4edge.errors import Cancelled, FileError, InputError, OutOfMemoryError, Phi4EdgeError, UsageError
from phi4edge.generation import Generation, GenerationConfig, Piece
from phi4edge.quality_items import Item, families
from phi4edge.session import Session
from phi4edge.together import Together, Work
from processes import COMMAND, ROOT, is_one_error_line, run

ITEMS = items()
STORY = "Once upon a time there was"  # the model does not know it, and goes on for long


@pytest.fixture(scope="module")
def model(nano_bundle: Path) -> Iterator[phi4edge.Model]:
    with phi4edge.load(nano_bundle, context=1024, kv_type="f32", threads=2) as loaded:
        yield loaded


def some_of_each_family(n: int) -> list[Item]:
    """Mixed, so that neighbours need different adapters."""
    each = [[item for item in ITEMS if item.family == family][:n] for family in families(ITEMS)]
    return [item for column in zip(*each, strict=True) for item in column]


def outcome(answer: object) -> tuple[object, ...]:
    """What an answer says, without its timings and what was in a cache."""
    assert isinstance(answer, Generation), answer
    usage = answer.usage.prompt_tokens, answer.usage.completion_tokens
    return answer.text, answer.tokens, answer.finish_reason, usage, answer.logprobs, answer.adapter, answer.warnings


def never(model: phi4edge.Model) -> dict[int, float]:
    """A bias by which an answer does not end before it must."""
    return dict.fromkeys(model.tokenizer.stop_ids, -100.0)


@pytest.mark.parametrize("at_once", [3, 8])
def test_answers_to_texts_images_and_sounds_are_those_of_transformers(model: phi4edge.Model, at_once: int) -> None:
    chosen = some_of_each_family(4)
    answers = model.generate_together([item.messages for item in chosen], at_once=at_once, max_tokens=64)
    for item, answer in zip(chosen, answers, strict=True):
        assert isinstance(answer, Generation), answer
        assert (*answer.tokens, *model.tokenizer.encode("<|end|>", special=True)) == theirs()[item.name].tokens
        assert (answer.finish_reason, answer.adapter) == ("stop", item.adapter)
        assert answer.usage.prompt_tokens == theirs()[item.name].n_prompt_tokens


def requests_of_all_kinds(model: phi4edge.Model) -> list[Any]:
    image = next(item.messages for item in ITEMS if item.adapter == "vision")
    return [
        STORY,
        {"prompt": STORY, "temperature": 0.9, "seed": 5, "max_tokens": 40},
        {"prompt": STORY, "temperature": 0.9, "seed": 6, "logprobs": 2, "adapter": "speech", "adapter_scale": 0.5},
        {"prompt": image, "max_tokens": 3, "max_crops": 1},
        {"prompt": model.encode(STORY), "stop": ["e"], "repetition_penalty": 1.3},
        [{"role": "user", "content": STORY}],
        {"prompt": image, "adapter": "none", "stop_tokens": [5]},
    ]


@pytest.mark.parametrize("at_once", [1, 2, 7])
def test_every_request_has_its_own_options(model: phi4edge.Model, at_once: int) -> None:
    requests = requests_of_all_kinds(model)
    config = GenerationConfig(max_tokens=12)
    answers = model.generate_together(requests, config, at_once=at_once)
    for request, answer in zip(requests, answers, strict=True):
        options = dict(request) if isinstance(request, dict) else {"prompt": request}
        assert outcome(answer) == outcome(model.generate(options.pop("prompt"), config, **options))


def test_pieces_come_as_they_are_written_and_add_up(model: phi4edge.Model) -> None:
    twenty: dict[str, Any] = {"max_tokens": 20, "logit_bias": never(model)}
    texts, tokens, order = ["", ""], [0, 0], []
    for index, event in model.together([STORY, {"prompt": STORY, "temperature": 1.0, "seed": 1}], **twenty):
        order.append(index)
        if isinstance(event, Piece):
            texts[index] += event.text
            tokens[index] += len(event.tokens)
        else:
            assert isinstance(event, Generation) and event.text == texts[index]
            assert len(event.tokens) == tokens[index] == event.usage.completion_tokens
            assert event.timings.n_decoded == 19 and event.timings.decode_seconds > 0
    changes = sum(one != other for one, other in itertools.pairwise(order))
    assert changes > 10, "one was answered after the other"


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "a number": (7, InputError, "must be text"),
    "nothing": ([], InputError, "the prompt is empty"),
    "no prompt": ({"max_tokens": 3}, InputError, "prompt: the request has none"),
    "an unknown option": ({"prompt": STORY, "max_token": 3}, UsageError, "did you mean max_tokens"),
    "an option without a name": ({"prompt": STORY, 3: 3}, UsageError, "must have a name"),
    "a session": ({"prompt": STORY, "session": None}, UsageError, "no such option"),
    "a wrong value": ({"prompt": STORY, "temperature": -1.0}, UsageError, "temperature"),
    "a wrong config": ({"prompt": STORY, "config": 3}, UsageError, "GenerationConfig"),
    "an unknown adapter": ({"prompt": STORY, "adapter": "legal"}, UsageError, "there is no adapter 'legal'"),
    "too long": ({"prompt": [9] * 1024}, InputError, "the prompt has 1024 tokens and the context holds 1024"),
    "a file that is not there": (
        [{"role": "user", "content": [{"type": "image", "image": "no such file.png"}]}],
        FileError,
        "no such file.png",
    ),
    "no image": (
        [{"role": "user", "content": [{"type": "image", "image": b"GIF89a"}]}],
        InputError,
        "image",
    ),
}


def test_what_is_wrong_with_one_is_told_in_its_place(model: phi4edge.Model) -> None:
    good = {"prompt": STORY, "max_tokens": 9}
    requests = [good, *itertools.chain.from_iterable((wrong, good) for wrong, _, _ in WRONG.values())]
    answers = model.generate_together(requests, at_once=3)
    expected = outcome(model.generate(STORY, max_tokens=9))
    assert all(outcome(answer) == expected for answer in answers[::2])
    for (name, (_, kind, problem)), error in zip(WRONG.items(), answers[1::2], strict=True):
        assert isinstance(error, kind) and str(error).count("\n") == 0, (name, error)
        assert problem in str(error), (name, error)


@pytest.mark.parametrize(
    ("requests", "options", "problem"),
    [
        (STORY, {}, "requests: must be several prompts, got str"),
        ({"prompt": STORY}, {}, "requests: must be several prompts, got dict"),
        (None, {}, "requests: must be several prompts, got NoneType"),
        ([STORY], {"at_once": 0}, "at_once: must be an integer from 1 to 128, got 0"),
        ([STORY], {"at_once": 129}, "at_once"),
        ([STORY], {"at_once": True}, "at_once"),
        ([STORY], {"at_once": "4"}, "at_once"),
    ],
)
def test_what_is_no_list_of_requests_is_refused(
    model: phi4edge.Model, requests: Any, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UsageError) as caught:
        model.generate_together(requests, **options)
    assert problem in str(caught.value)


def test_no_requests_have_no_answers(model: phi4edge.Model) -> None:
    assert model.generate_together([]) == [] and list(model.together(iter([]))) == []


def test_requests_are_read_when_there_is_room(model: phi4edge.Model) -> None:
    n_read = 0

    def endless() -> Iterator[Any]:
        nonlocal n_read
        while True:
            n_read += 1
            yield {"prompt": STORY, "max_tokens": 2 + n_read % 3}

    n_done = 0
    for _, event in model.together(endless(), at_once=3):
        n_done += isinstance(event, Generation)
        assert n_read <= n_done + 3
        if n_done == 10:
            break
    assert model.generate(STORY, max_tokens=3).usage.completion_tokens == 3


def test_one_can_be_cancelled_and_the_others_go_on(model: phi4edge.Model) -> None:
    expected = outcome(model.generate(STORY, max_tokens=30))
    together = model.together([STORY] * 4, at_once=3, max_tokens=30)
    ends: dict[int, object] = {}
    n_pieces = 0
    for index, event in together:
        if not isinstance(event, Piece):
            ends[index] = event
        n_pieces += isinstance(event, Piece) and index == 1
        if n_pieces == 3:
            together.cancel(1)
            together.cancel(3)  # which has not begun
    assert isinstance(ends[1], Cancelled) and isinstance(ends[3], Cancelled)
    assert outcome(ends[0]) == outcome(ends[2]) == expected
    together.cancel(77)
    together.cancel()


def test_all_can_be_cancelled(model: phi4edge.Model) -> None:
    together = model.together([STORY] * 5, at_once=2, max_tokens=30)
    ends: list[tuple[int, object]] = []
    for index, event in together:
        together.cancel()
        if not isinstance(event, Piece):
            ends.append((index, event))
    assert [index for index, _ in ends] == [0] and isinstance(ends[0][1], Cancelled)


def test_another_thread_can_cancel_them(model: phi4edge.Model) -> None:
    begun = threading.Event()
    answers: list[object] = []

    def requests() -> Iterator[Any]:
        endless = {"prompt": STORY, "max_tokens": 900, "logit_bias": never(model)}
        yield {"prompt": STORY, "max_tokens": 2}
        yield endless
        begun.set()  # the first has ended, and this one is under way
        yield endless
        yield from [STORY] * 2

    def work() -> None:
        answers.extend(model.generate_together(requests(), at_once=2))

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(60)
    model.cancel()
    thread.join(60)
    assert not thread.is_alive()
    assert len(answers) == 5 and isinstance(answers[0], Generation)
    assert sum(isinstance(answer, Cancelled) for answer in answers) >= 2
    assert model.generate(STORY, max_tokens=3).usage.completion_tokens == 3


def test_the_conversation_of_the_model_stays_as_it_is(model: phi4edge.Model) -> None:
    stream = model.stream(STORY, max_tokens=20)
    begun = [next(stream)]
    model.generate_together([STORY, "the end"], max_tokens=5)
    text = "".join(piece.text for piece in [*begun, *stream])
    assert model.last is not None and model.last.text == text
    before = model.last
    assert outcome(model.generate_together([STORY], max_tokens=20)[0]) == outcome(before)
    assert model.last is before


def test_a_prompt_that_begins_as_the_one_before_is_not_computed_again(model: phi4edge.Model) -> None:
    system = {"role": "system", "content": "the cat sat on the mat " * 10}
    requests = [[system, {"role": "user", "content": text}] for text in ("one", "two", "three")]
    first, *others = model.generate_together(requests, at_once=1, max_tokens=2)
    assert isinstance(first, Generation) and first.usage.cached_tokens == 0
    for other in others:
        assert isinstance(other, Generation) and other.usage.cached_tokens > 50


def test_an_answer_ends_where_the_context_does(nano_bundle: Path) -> None:
    with phi4edge.load(nano_bundle, context=64, threads=1) as small:
        prompts = [{"prompt": [9] * n, "max_tokens": 500, "logit_bias": never(small)} for n in (63, 10, 50)]
        answers = small.generate_together(prompts)
    for answer, n in zip(answers, (63, 10, 50), strict=True):
        assert isinstance(answer, Generation) and answer.finish_reason == "length"
        assert len(answer.tokens) == 64 - n


@pytest.mark.parametrize("n_fit", [0, 1, 2])
def test_requests_wait_while_there_is_no_memory_for_another_sequence(model: phi4edge.Model, n_fit: int) -> None:
    made: list[Session] = []

    def limited() -> Session:
        if len(made) == n_fit:
            raise OutOfMemoryError("no memory for another KV cache")
        made.append(model.session())
        return made[-1]

    work = Work(model._answer, limited, model._begin, 0.0)
    answers = Together([STORY] * 5, work, 4, {"max_tokens": 6}).results()
    if n_fit == 0:
        assert all(isinstance(answer, OutOfMemoryError) for answer in answers)
        return
    assert {outcome(answer) for answer in answers} == {outcome(model.generate(STORY, max_tokens=6))}
    made.clear()
    together = Together([STORY] * 5, work, 4, {"max_tokens": 6, "logit_bias": never(model)})
    assert all(isinstance(event, Piece) for _, (_, event) in zip(range(4), together, strict=False))
    together.cancel()  # while one waits
    assert [index for index, event in together if isinstance(event, Cancelled)] == list(range(n_fit + 1))


def test_caches_that_are_idle_do_not_keep_a_request_from_its_memory(model: phi4edge.Model) -> None:
    made: list[Session] = []
    n_begun = 0

    def session() -> Session:
        made.append(model.session())
        return made[-1]

    def begin(session: Session, turn: object, answer: Answer) -> Piece | None:
        nonlocal n_begun
        n_begun += 1
        if n_begun > 2 and session in made[:2]:  # the third does not fit beside what these have
            raise OutOfMemoryError("the KV cache does not fit")
        return model._begin(session, turn, answer)

    work = Work(model._answer, session, begin, 0.0)
    answers = Together([STORY] * 3, work, 2, {"max_tokens": 3}).results()
    assert {outcome(answer) for answer in answers} == {outcome(model.generate(STORY, max_tokens=3))}


HOSTILE = [
    ({"prompt": STORY, "self": 1}, "self"),
    ({"prompt": [{"role": "user", "content": [{"type": "image", "image": "\ud800"}]}]}, ""),
    ({"prompt": STORY, "adapter_scale": 10**400}, "adapter_scale"),
    ({"prompt": STORY, "adapter_scale": float("nan")}, "adapter_scale"),
    ({"prompt": STORY, "logit_bias": {"x": 1.0}}, "logit_bias"),
]


@pytest.mark.parametrize(("request_", "field"), HOSTILE, ids=lambda value: None if isinstance(value, dict) else value)
def test_a_request_that_makes_no_sense_is_its_own_error_alone(
    model: phi4edge.Model, request_: dict[str, Any], field: str
) -> None:
    bad, good = model.generate_together([request_, STORY], max_tokens=2)
    assert isinstance(bad, Phi4EdgeError) and (not field or bad.field == field)
    assert isinstance(good, Generation)


def test_a_closed_model_says_so_in_the_place_of_every_request(nano_bundle: Path) -> None:
    model = phi4edge.load(nano_bundle, context=256, threads=1)
    together = model.together([STORY] * 3, at_once=1, max_tokens=4)
    ends = []
    for _, event in together:
        if not isinstance(event, Piece):
            ends.append(event)
        if len(ends) == 1:
            model.close()
    assert isinstance(ends[0], Generation)
    assert [str(end) for end in ends[1:]] == ["the model was closed; load it again"] * 2
    with pytest.raises(UsageError, match="closed"):
        model.together([STORY])


# --- phi4edge run --prompts


def write_lines(path: Path, *lines: object) -> str:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def test_a_file_of_prompts_gives_a_line_for_each_in_order(
    model: phi4edge.Model, nano_bundle: Path, tmp_path: Path
) -> None:
    messages = next(item.messages for item in ITEMS if item.adapter is None)
    file = write_lines(
        tmp_path / "requests.jsonl",
        {"prompt": STORY, "max_tokens": 12},
        "",
        {"prompt": STORY, "temperature": 0.9, "seed": 3},
        "no JSON",
        {"prompt": messages},
        {"prompt": STORY, "max_token": 1},
        [1],
    )
    done = run("run", str(nano_bundle), "--prompts", file, "--together", "2", "-n", "5", "-t", "1", "--stats")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    expected = [
        model.generate(STORY, max_tokens=12),
        model.generate(STORY, max_tokens=5, temperature=0.9, seed=3),
        model.generate(messages, max_tokens=5),
    ]
    assert [answers[i]["tokens"] for i in (0, 1, 3)] == [list(answer.tokens) for answer in expected]
    assert [answers[i]["error"]["field"] for i in (2, 4, 5)] == ["line 4", "max_token", "line 7"]
    assert done.returncode == InputError.exit_code
    stats, problem = done.stderr.splitlines()
    assert stats.startswith(f"6 requests, {sum(len(answer.tokens) for answer in expected)} tokens of answers, ")
    assert problem.startswith("phi4edge: 3 of 6 requests failed; the first: ") and "line 4" in problem


def test_answers_go_to_the_file_while_the_terminal_shows_how_far_they_are(
    model: phi4edge.Model, nano_bundle: Path, tmp_path: Path
) -> None:
    request = {"prompt": STORY, "logit_bias": never(model)}
    file = write_lines(tmp_path / "requests.jsonl", *[request | {"seed": i} for i in range(150)])
    command = [*COMMAND, "run", str(nano_bundle), "--prompts", file, "-n", "200", "-t", "1", "--temperature", "1"]
    master, slave = pty.openpty()
    with (tmp_path / "answers.jsonl").open("wb") as answers:
        done = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=answers,
            stderr=slave,
            cwd=ROOT,
            env=os.environ | {"TERM": "xterm"},
        )
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while data := os.read(master, 65536):
                shown += data
    os.close(master)
    assert done.wait(60) == 0
    assert b"Answering" in shown and b'"text"' not in shown
    assert len([json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]) == 150


def test_a_file_with_a_byte_order_mark_and_a_bias_is_answered(
    model: phi4edge.Model, nano_bundle: Path, tmp_path: Path
) -> None:
    token = model.generate(STORY, max_tokens=1).tokens[0]
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps({"prompt": STORY, "logit_bias": {str(token): -100}}), encoding="utf-8-sig")
    done = run("run", str(nano_bundle), "--prompts", str(file), "-n", "1", "-t", "1")
    assert done.returncode == 0, done.stderr
    expected = model.generate(STORY, max_tokens=1, logit_bias={token: -100.0})
    assert json.loads(done.stdout)["tokens"] == list(expected.tokens) != [token]


def test_more_lines_than_anybody_writes_are_refused_before_they_are_kept(nano_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text("x\n" * 100_001)
    done = run("run", str(nano_bundle), "--prompts", str(file))
    assert (done.returncode, done.stdout) == (4, "") and is_one_error_line(done.stderr)
    assert "has more than 100000 lines" in done.stderr


@pytest.mark.parametrize(
    ("lines", "arguments", "code", "problem"),
    [
        ([], (), 4, "has no requests"),
        (None, (), 3, "cannot be read"),
        ([{"prompt": STORY}], ("--together", "0"), 2, "--together: is 0, expected 1 to 128"),
        ([{"prompt": STORY}], ("--raw",), 2, "--prompts: the prompts are in the file"),
        ([{"prompt": STORY}], ("--system", "Be short."), 2, "--prompts: the prompts are in the file"),
        ([{"prompt": STORY}], ("the cat",), 2, "--prompts: the prompts are in the file"),
    ],
)
def test_a_file_that_cannot_be_answered_is_one_error(
    lines: list[Any] | None, arguments: tuple[str, ...], code: int, problem: str, nano_bundle: Path, tmp_path: Path
) -> None:
    file = str(tmp_path / "missing.jsonl") if lines is None else write_lines(tmp_path / "requests.jsonl", *lines)
    done = run("run", str(nano_bundle), *arguments, "--prompts", file, "-t", "1")
    assert (done.returncode, done.stdout) == (code, "")
    assert is_one_error_line(done.stderr) and problem in done.stderr


def test_together_without_prompts_is_refused(nano_bundle: Path) -> None:
    done = run("run", str(nano_bundle), "hi", "--together", "2")
    assert done.returncode == 2 and "--together: there are no --prompts" in done.stderr
