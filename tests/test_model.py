"""The Python interface on a real small model: streaming, stopping, caching, cancelling."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import phi4edge
import processes
from phi4edge import _core
from phi4edge.errors import Cancelled, FileError, InputError, OutOfMemoryError, UnsupportedError, UsageError
from phi4edge.session import Growth, Session
from tiny_models import tiny_gguf

QUESTION = "Name three colours."


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Iterator[phi4edge.Model]:
    with phi4edge.load(smollm2, context=512, threads=2) as loaded:
        yield loaded


def test_pieces_add_up_to_the_answer(model: phi4edge.Model) -> None:
    pieces = list(model.stream(QUESTION, max_tokens=24))
    answer = model.last
    assert answer is not None
    assert "".join(piece.text for piece in pieces) == answer.text
    assert tuple(token for piece in pieces for token in piece.tokens) == answer.tokens
    assert answer.text == model.tokenizer.decode(answer.tokens)
    assert answer.usage.completion_tokens == len(answer.tokens)
    assert model.generate(QUESTION, max_tokens=24).text == answer.text


def test_an_answer_is_the_likeliest_continuation_by_the_logits(model: phi4edge.Model) -> None:
    answer = model.generate(QUESTION, max_tokens=12, logprobs=2)
    prompt = model.encode(QUESTION)
    logits = model.logits([*prompt, *answer.tokens])[len(prompt) - 1 : -1].astype(np.float64)
    assert answer.tokens == tuple(logits.argmax(axis=1))
    logprobs = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    for row, step in zip(logprobs, answer.logprobs, strict=True):
        assert step.logprob == pytest.approx(row[step.token], abs=1e-3)
        assert [token for token, _ in step.top] == list(np.argsort(-row, kind="stable")[:2])


def test_a_follow_up_reuses_the_cache_and_changes_nothing(model: phi4edge.Model, smollm2: Path) -> None:
    first = model.generate(QUESTION, max_tokens=16)
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And three more?"},
    ]
    second = model.generate(messages, max_tokens=16)
    assert second.usage.cached_tokens > 10
    with phi4edge.load(smollm2, context=512, threads=1) as fresh:
        assert fresh.generate(messages, max_tokens=16).tokens == second.tokens


def test_the_same_seed_gives_the_same_text_with_any_number_of_threads(model: phi4edge.Model, smollm2: Path) -> None:
    def run(some: phi4edge.Model, seed: int) -> str:
        return some.generate(QUESTION, max_tokens=24, temperature=1.0, seed=seed).text

    assert run(model, 1) == run(model, 1) != run(model, 2)
    with phi4edge.load(smollm2, context=512, threads=1) as other:
        assert run(other, 1) == run(model, 1)


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(model: phi4edge.Model) -> None:
    whole = model.generate(QUESTION, max_tokens=32).text
    stop = whole[10:14]
    answer = model.generate(QUESTION, max_tokens=32, stop=[stop])
    assert answer.finish_reason == "stop"
    assert answer.text == whole[: whole.index(stop)]


def test_stop_tokens_end_the_answer(model: phi4edge.Model) -> None:
    tokens = model.generate(QUESTION, max_tokens=8).tokens
    answer = model.generate(QUESTION, max_tokens=8, stop_tokens=[tokens[3]])
    assert answer.tokens == tokens[: tokens.index(tokens[3])]
    assert answer.finish_reason == "stop"


def test_max_tokens_and_the_context_both_end_with_length(smollm2: Path) -> None:
    with phi4edge.load(smollm2, context=64, threads=2) as small:
        prompt = small.encode(QUESTION)
        answer = small.generate(prompt, max_tokens=3)
        assert (answer.finish_reason, len(answer.tokens)) == ("length", 3)
        bias = dict.fromkeys(small.tokenizer.stop_ids, -100.0)
        answer = small.generate(prompt, max_tokens=1000, logit_bias=bias)
        assert answer.finish_reason == "length"
        assert len(prompt) + len(answer.tokens) == 64


def test_a_prompt_that_does_not_fit_names_both_numbers(model: phi4edge.Model) -> None:
    with pytest.raises(InputError, match=r"600.*512"):
        model.stream([5] * 600)


@pytest.mark.parametrize(
    "prompt", ["", [], [{"role": "user", "content": ""}], [10**9], [-1], [1.5], [{"role": "user"}]]
)
def test_a_prompt_that_makes_no_sense_is_an_input_error(model: phi4edge.Model, prompt: object) -> None:
    with pytest.raises(InputError):
        model.generate(prompt, max_tokens=1)  # type: ignore[arg-type]
    assert model.generate(QUESTION, max_tokens=2).tokens


def test_an_answer_left_early_is_told_and_harms_nothing(model: phi4edge.Model) -> None:
    whole = model.generate(QUESTION, max_tokens=16)
    pieces = model.stream(QUESTION, max_tokens=16)
    first = next(pieces)
    pieces.close()
    assert model.last is not None
    assert model.last.finish_reason == "cancelled"
    assert model.last.text == first.text
    assert model.generate(QUESTION, max_tokens=16).tokens == whole.tokens


def test_progress_counts_the_prompt_and_may_cancel(model: phi4edge.Model) -> None:
    prompt = list(range(1000, 1400))
    seen: list[tuple[int, int]] = []
    for _ in model.stream(prompt, max_tokens=1, progress=lambda done, total: seen.append((done, total))):
        pass
    assert seen[-1] == (400, 400)
    with pytest.raises(Cancelled):
        list(model.stream(prompt[::-1], max_tokens=1, progress=lambda done, total: False))
    with pytest.raises(ZeroDivisionError):
        list(model.stream(prompt[::-1], max_tokens=1, progress=lambda done, total: bool(1 // 0)))
    assert model.generate(QUESTION, max_tokens=2).tokens


def test_another_thread_can_cancel_a_long_prefill(model: phi4edge.Model) -> None:
    session = model.session()
    caught: list[Cancelled] = []

    def work() -> None:
        try:
            while True:
                session.extend(list(range(500)))
                session.clear()
        except Cancelled as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        session.cancel()
        time.sleep(0.01)
    thread.join()
    assert caught
    session.clear()
    assert session.extend([1, 2, 3]).shape == (1, model.config.vocab_size)


def test_sessions_of_one_model_run_in_threads_of_their_own(model: phi4edge.Model) -> None:
    prompts = [list(range(first, first + 40)) for first in (100, 2000, 30000)]
    expected = [model.logits(prompt)[-1] for prompt in prompts]
    results: dict[int, np.ndarray] = {}

    def work(i: int) -> None:
        session = model.session()
        for token in prompts[i][:-1]:
            session.extend([token], logits="none")
        results[i] = session.extend(prompts[i][-1:])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(3):
        np.testing.assert_array_equal(results[i], expected[i])


def test_loading_says_what_is_wrong_before_it_reads_weights(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path)
    with pytest.raises(FileError, match="nowhere"):
        phi4edge.load(tmp_path / "nowhere.gguf")
    with pytest.raises(UsageError, match="context"):
        phi4edge.load(path, context=0)
    with pytest.raises(UsageError, match="kv_type"):
        phi4edge.load(path, kv_type="q3")
    with pytest.raises(UnsupportedError, match="scalar"):
        phi4edge.load(path, isa="z80")
    with pytest.raises(OutOfMemoryError, match="context"):
        phi4edge.load(path, context=1 << 24, kv_type="f32")
    with pytest.raises(Cancelled):
        phi4edge.load(path, progress=lambda done, total: False)


def test_a_closed_model_says_so(tmp_path: Path) -> None:
    model = phi4edge.load(tiny_gguf(tmp_path))
    model.close()
    with pytest.raises(UsageError, match="closed"):
        model.generate("hi")


def test_an_answer_that_another_one_overtook_says_so_instead_of_mixing_them(model: phi4edge.Model) -> None:
    pieces = model.stream(QUESTION, max_tokens=16)
    next(pieces)
    whole = model.generate("Count to five.", max_tokens=8)
    with pytest.raises(UsageError, match="another answer"):
        list(pieces)
    assert model.last is not None
    assert model.last.tokens == whole.tokens


def test_a_session_in_use_refuses_a_second_call(model: phi4edge.Model) -> None:
    session = model.session()
    other = model.session()
    for nested in (lambda: session.truncate(0), lambda: session.extend([1]), lambda: other.extend([1])):

        def progress(done: int, total: int, nested: Callable[[], object] = nested) -> None:
            nested()

        with pytest.raises(InputError, match=r"in use|at work"):
            session.extend(list(range(300)), progress=progress)
        assert session.tokens == ()


def test_a_session_takes_arrays_and_keeps_count(model: phi4edge.Model) -> None:
    session = model.session()
    session.extend([1, 2])
    session.extend(np.array([5, 6]))  # type: ignore[arg-type]
    assert session.tokens == (1, 2, 5, 6)
    with pytest.raises(InputError):
        session.extend([2**32 + 5])


def test_the_last_piece_has_the_tokens_that_gave_no_text(model: phi4edge.Model) -> None:
    whole = model.generate(QUESTION, max_tokens=32).text
    stop = whole[8:13]
    pieces = list(model.stream(QUESTION, max_tokens=32, stop=[stop], logprobs=1))
    assert model.last is not None
    assert tuple(token for piece in pieces for token in piece.tokens) == model.last.tokens
    assert tuple(step for piece in pieces for step in piece.logprobs) == model.last.logprobs


def test_what_does_not_make_an_answer_leaves_no_old_one_behind(model: phi4edge.Model) -> None:
    model.generate(QUESTION, max_tokens=2)
    with pytest.raises(InputError):
        model.stream([5] * 600)
    assert model.last is None


def test_a_context_of_impossible_size_is_refused(model: phi4edge.Model, smollm2: Path) -> None:
    for context in (-1, 2**24 + 1, 2**58, 2**62):
        with pytest.raises(UsageError, match="context"):
            phi4edge.load(smollm2, context=context, check_memory=False)


@pytest.mark.parametrize("isa", phi4edge.isas())
@pytest.mark.parametrize("name", ["blk.0.ffn_down.weight", "blk.0.ffn_up.weight", "blk.0.attn_qkv.weight"])
def test_a_weight_that_is_not_a_number_is_noticed_and_not_answered_over(tmp_path: Path, name: str, isa: str) -> None:
    path = tiny_gguf(tmp_path, type="Q8_0")
    tensor = next(t for t in phi4edge.inspect(path).tensors if t.name == name)
    assert tensor.type_name == "Q8_0"
    data = bytearray(path.read_bytes())
    offset = next(t.offset for t in _core.GgufFile(path).tensors if t.name == name)
    data[offset : offset + 2] = b"\x00\x7e"
    path.write_bytes(data)
    with phi4edge.load(path, isa=isa) as damaged, pytest.raises(InputError, match="not a number"):
        damaged.generate([1, 2, 3], max_tokens=4)


def test_longrope_crossings_are_counted_as_computed(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path, original_context=32)
    with phi4edge.load(path, context=128) as crossing:
        crossing.generate(list(range(20)), max_tokens=1)
        answer = crossing.generate(list(range(50)), max_tokens=1)
        assert answer.usage.cached_tokens == 0
        again = crossing.generate(list(range(51)), max_tokens=1)
        assert again.usage.cached_tokens == 50


def test_without_a_context_the_cache_grows_with_the_conversation(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path, context=20_000)
    prompt = np.random.default_rng(1).integers(0, 256, 4090).tolist()
    with phi4edge.load(path, threads=2) as growing, phi4edge.load(path, context=6000, threads=2) as fixed:
        assert (growing.context, fixed.context) == (20_000, 6000)
        answer = growing.generate(prompt, max_tokens=40)
        assert len(answer.tokens) == 40 and answer.tokens == fixed.generate(prompt, max_tokens=40).tokens
        longer = [*prompt, *answer.tokens[:-1], *prompt[:600]]
        second = growing.generate(longer, max_tokens=5)
        assert second.usage.cached_tokens == len(prompt) + 39
        assert second.tokens == fixed.generate(longer, max_tokens=5).tokens
        with pytest.raises(InputError, match="context holds 20000"):
            growing.generate(prompt * 5)
    core = _core.Model(_core.GgufFile(path), 1)
    session = Session(_core.Session(core, 16), core, Growth(1000, 1 << 20, lambda: 50 << 20))
    session.extend(prompt[:50], logits="none")
    with pytest.raises(OutOfMemoryError, match="60 tokens needs 60 MiB of memory, but 50 MiB are available"):
        session.extend(prompt[50:60])
    assert len(session) == 50


def test_an_answer_is_cancelled_between_two_tokens_too(model: phi4edge.Model) -> None:
    pieces = model.stream(QUESTION, max_tokens=50)
    next(pieces)
    model.cancel()
    with pytest.raises(Cancelled):
        next(pieces)
    assert model.last is not None and model.last.finish_reason == "cancelled"
    assert model.generate(QUESTION, max_tokens=3).finish_reason == "length"


def test_logits_of_another_prompt_end_an_answer_on_the_same_session(model: phi4edge.Model) -> None:
    session = model.session()
    pieces = model.stream(QUESTION, max_tokens=50, session=session)
    next(pieces)
    model.next_logits("Something else", session=session)
    with pytest.raises(UsageError, match="another answer"):
        next(pieces)


LIMITED = """
import resource, sys
import phi4edge
from phi4edge import _core
with phi4edge.load(sys.argv[1], threads=1, kv_type="f32") as model:
    session = model.session()
    need = 4500 * model.decode_bytes(1) - 4500 * model.decode_bytes(0)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + need * 5 // 4 + (1 << 20),) * 2)
    session.reserve(4500)
    try:
        session.reserve(18_000)
    except phi4edge.OutOfMemoryError as error:
        print(error)
    try:
        sessions = [model.session() for _ in range(3)]
    except phi4edge.OutOfMemoryError as error:
        print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit of the address space works on Linux alone")
def test_the_cache_grows_as_far_as_the_memory_is_enough(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path, context=20_000, layers=8, heads=8, kv_heads=8, head_dim=128)
    done = subprocess.run([sys.executable, "-c", LIMITED, path], capture_output=True, text=True, cwd=processes.ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(re.match(r"the KV cache of \d+ tokens needs \d+ MiB", line) for line in lines)
