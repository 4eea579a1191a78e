"""The cache changes nothing: any way of feeding a sequence gives the logits of feeding it at once."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from phi4edge import _core
from phi4edge.errors import Cancelled, InputError
from reference import Reference, relative_difference
from tiny_models import PURE_FILE_TYPES, tiny_gguf

N_TOKENS = 75
TOKENS = np.random.default_rng(4).integers(0, 512, N_TOKENS).astype(np.int32)
TYPES = ["F32", "F16", "Q8_0", "Q4_1", "Q4_K", "Q6_K", "IQ4_XS"]

Logits = npt.NDArray[np.float32]


def tolerance(file_type: str) -> float:
    """Of the range. Quantized activations may round otherwise when a sum before them was added in another order."""
    return 1e-5 if file_type in ("F32", "F16", "BF16") else 1e-3


def native(models: Path, file_type: str = "F32", n_threads: int = 2, isa: str = "") -> _core.Model:
    return _core.Model(_core.GgufFile(tiny_gguf(models, file_type, rotary_fraction=0.75)), n_threads, isa)


def session_of(model: _core.Model, n_context: int = 128) -> _core.Session:
    return _core.Session(model, n_context, kv_type="f32")


def in_chunks(session: _core.Session, n_chunk: int) -> Logits:
    chunks = [session.extend(TOKENS[at : at + n_chunk], logits="all") for at in range(0, N_TOKENS, n_chunk)]
    return np.concatenate(chunks)


@pytest.mark.parametrize("file_type", TYPES)
@pytest.mark.parametrize("isa", _core.isas())
def test_any_chunking_gives_the_same_logits(file_type: str, isa: str, models: Path) -> None:
    model = native(models, file_type, isa=isa)
    whole = session_of(model).extend(TOKENS, logits="all")
    for n_chunk in (1, 2, 3, 7, 16):
        assert relative_difference(in_chunks(session_of(model), n_chunk), whole) <= tolerance(file_type), n_chunk


@pytest.mark.parametrize("kv_type", _core.kv_types())
def test_long_prompts_equal_token_by_token_decoding(kv_type: str, models: Path) -> None:
    model = native(models)
    tokens = np.random.default_rng(5).integers(0, 512, 600).astype(np.int32)
    at_once = _core.Session(model, 600, kv_type=kv_type).extend(tokens)
    session = _core.Session(model, 600, kv_type=kv_type)
    for token in tokens:
        last = session.extend(np.array([token], np.int32))
    assert relative_difference(last, at_once) <= (1e-5 if kv_type == "f32" else 1e-3)


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("file_type", PURE_FILE_TYPES)
def test_the_number_of_threads_changes_no_bit(file_type: str, isa: str, models: Path) -> None:
    results = []
    for n_threads in (1, 2, 3, 4):
        session = session_of(native(models, file_type, n_threads, isa))
        prompt = session.extend(TOKENS[:70], logits="all")
        steps = [session.extend(TOKENS[at : at + 1]) for at in range(70, N_TOKENS)]
        results.append(np.concatenate([prompt, *steps]))
    for one, other in pairwise(results):
        np.testing.assert_array_equal(one, other)


def test_the_same_call_gives_the_same_bits(models: Path) -> None:
    model = native(models, "Q4_K")
    np.testing.assert_array_equal(
        session_of(model).extend(TOKENS, logits="all"), session_of(model).extend(TOKENS, logits="all")
    )


@pytest.mark.parametrize("file_type", TYPES)
def test_embedding_rows_equal_their_tokens(file_type: str, models: Path) -> None:
    model = native(models, file_type)
    rows = Reference(tiny_gguf(models, file_type, rotary_fraction=0.75)).embedding[TOKENS].astype(np.float32)
    expected = session_of(model).extend(TOKENS, logits="all")
    logits = session_of(model).extend_embeddings(rows, logits="all")
    assert relative_difference(logits, expected) <= tolerance(file_type)


def test_tokens_and_embedding_rows_mix_in_one_sequence(models: Path) -> None:
    model = native(models)
    rows = Reference(tiny_gguf(models, rotary_fraction=0.75)).embedding[TOKENS].astype(np.float32)
    expected = session_of(model).extend(TOKENS, logits="all")
    session = session_of(model)
    mixed = [
        session.extend(TOKENS[:10], logits="all"),
        session.extend_embeddings(rows[10:33], logits="all"),
        session.extend(TOKENS[33:34], logits="all"),
        session.extend_embeddings(rows[34:35], logits="all"),
        session.extend(TOKENS[35:], logits="all"),
    ]
    assert relative_difference(np.concatenate(mixed), expected) <= 1e-5
    session.truncate(20)
    session.extend_embeddings(rows[20:30], logits="none")
    assert relative_difference(session.extend(TOKENS[30:40]), expected[39:40]) <= 1e-5


def test_appended_inputs_are_computed_with_the_next_extension(models: Path) -> None:
    model = native(models)
    rows = Reference(tiny_gguf(models, rotary_fraction=0.75)).embedding[TOKENS].astype(np.float32)
    expected = session_of(model).extend(TOKENS, logits="all")
    session = session_of(model)
    session.append(TOKENS[:10])
    session.append_embeddings(rows[10:33])
    assert (session.n_tokens, session.n_reusable(40)) == (33, 0)
    steps: list[tuple[int, int]] = []
    session.extend(TOKENS[33:40], progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (40, 40) and session.n_reusable(41) == 40
    session.append(TOKENS[40:50])
    session.truncate(45)  # of which 40 are computed
    assert session.n_reusable(46) == 40
    assert relative_difference(session.extend(TOKENS[45:], logits="all"), expected[45:]) <= 1e-5
    for wrong in ([512], [-1]):
        with pytest.raises(InputError, match=r"is not in 0\.\.511"):
            session.append(np.array(wrong, np.int32))
    with pytest.raises(InputError, match="context holds 128"):
        session.append(np.zeros(54, np.int32))
    assert session.n_tokens == N_TOKENS


def test_an_extension_that_is_cancelled_keeps_what_was_appended(models: Path) -> None:
    session = session_of(native(models))
    session.append(TOKENS[:70])
    with pytest.raises(Cancelled):
        session.extend(TOKENS[70:], progress=lambda done, total: False)
    assert session.n_tokens == 70
    expected = session_of(native(models)).extend(TOKENS)
    assert relative_difference(session.extend(TOKENS[70:]), expected) <= 1e-5


@pytest.mark.parametrize("kv_type", _core.kv_types())
def test_a_context_that_grows_keeps_what_was_computed(kv_type: str, models: Path) -> None:
    model = native(models)
    expected = _core.Session(model, 128, kv_type=kv_type).extend(TOKENS, logits="all")
    session = _core.Session(model, 10, kv_type=kv_type)
    session.extend(TOKENS[:9])
    for n_context, end in ((11, 11), (40, 33), (40, 39), (75, 75)):
        session.grow(n_context)
        n_before = session.n_tokens
        assert (session.n_context, session.n_reusable(end)) == (n_context, n_before)
        logits = session.extend(TOKENS[n_before:end], logits="all")
        assert relative_difference(logits, expected[n_before:end]) <= 1e-5
    for n_context in (74, 0, -1, 1 << 25):
        with pytest.raises(InputError, match="context of"):
            session.grow(n_context)
    assert session.n_context == 75 and session.n_tokens == 75


def test_the_choice_of_logits_only_chooses_rows(models: Path) -> None:
    model = native(models)
    whole = session_of(model).extend(TOKENS, logits="all")
    last = session_of(model).extend(TOKENS, logits="last")
    none = session_of(model).extend(TOKENS, logits="none")
    assert whole.shape == (N_TOKENS, 512) and last.shape == (1, 512) and none.shape == (0, 512)
    assert whole.dtype == np.float32
    assert relative_difference(last, whole[-1:]) <= 1e-6


@pytest.mark.parametrize("kept", [0, 1, 17, 40, 74, 75])
def test_truncating_and_extending_equals_a_fresh_start(kept: int, models: Path) -> None:
    model = native(models, "Q4_K")
    other = np.concatenate([TOKENS[:kept], TOKENS[::-1][: 100 - kept]])
    session = session_of(model)
    session.extend(TOKENS, logits="none")
    session.truncate(kept)
    assert session.n_tokens == kept
    logits = session.extend(other[kept:], logits="all")
    fresh = session_of(model)
    fresh.extend(other[:kept], logits="none")
    assert relative_difference(logits, fresh.extend(other[kept:], logits="all")) <= 1e-6


def test_two_sessions_of_one_model_do_not_disturb_each_other(models: Path) -> None:
    model = native(models)
    expected = session_of(model).extend(TOKENS, logits="all")
    one, two = session_of(model), session_of(model)
    two.extend(TOKENS[::-1].copy(), logits="none")
    first = one.extend(TOKENS[:30], logits="all")
    two.truncate(5)
    second = one.extend(TOKENS[30:], logits="all")
    assert relative_difference(np.concatenate([first, second]), expected) <= 1e-5


def test_sessions_in_different_threads_give_the_same_logits(models: Path) -> None:
    model = native(models)
    expected = session_of(model).extend(TOKENS, logits="all")
    results: dict[int, Logits] = {}

    def run(row: int) -> None:
        results[row] = in_chunks(session_of(model), 5 + row)

    threads = [threading.Thread(target=run, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for logits in results.values():
        assert relative_difference(logits, expected) <= 1e-5


def test_a_cancelled_prompt_changes_nothing_and_the_session_goes_on(models: Path) -> None:
    model = native(models)
    long_prompt = np.resize(TOKENS, 2000).astype(np.int32)
    session = session_of(model, 2048)
    session.extend(TOKENS[:20], logits="none")
    with pytest.raises(Cancelled):
        session.extend(long_prompt, progress=lambda done, total: False)
    assert session.n_tokens == 20
    expected = session_of(model).extend(TOKENS, logits="all")
    assert relative_difference(session.extend(TOKENS[20:], logits="all"), expected[20:]) <= 1e-5


def test_cancelling_from_another_thread_stops_a_prompt(models: Path) -> None:
    model = native(models)
    session = session_of(model, 2048)
    session.extend(TOKENS[:20], logits="none")

    def cancel(done: int, total: int) -> bool:
        canceller = threading.Thread(target=session.cancel)
        canceller.start()
        canceller.join()
        return True

    with pytest.raises(Cancelled):
        session.extend(np.resize(TOKENS, 2000).astype(np.int32), progress=cancel)
    assert session.n_tokens == 20
    expected = session_of(model).extend(TOKENS, logits="all")
    assert relative_difference(session.extend(TOKENS[20:], logits="all"), expected[20:]) <= 1e-5


def test_progress_counts_up_to_the_number_of_tokens(models: Path) -> None:
    calls: list[tuple[int, int]] = []

    def note(done: int, total: int) -> bool:
        calls.append((done, total))
        return True

    session_of(native(models), 2048).extend(np.resize(TOKENS, 2000).astype(np.int32), progress=note)
    assert calls and {total for _, total in calls} == {2000}
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] <= 2000


def test_too_many_tokens_change_nothing(models: Path) -> None:
    session = session_of(native(models), 32)
    session.extend(TOKENS[:30], logits="none")
    with pytest.raises(InputError, match="32"):
        session.extend(TOKENS[30:33])
    for token in (-1, 512):
        with pytest.raises(InputError, match=str(token)):
            session.extend(np.array([TOKENS[30], token], np.int32))
    assert session.n_tokens == 30
    assert session.extend(TOKENS[30:32]).shape == (1, 512)
