"""Files and recordings of a chat: what was attached stays as it was, and is not lost when there is no answer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import phi4edge
from conversations import RATE, sound
from phi4edge.cli import attachments
from phi4edge.cli.conversation import Conversation
from phi4edge.converters.convert import convert
from phi4edge.errors import FileError, InputError, OutOfMemoryError, UnsupportedError
from phi4edge.generation import GenerationConfig
from processes import PROMPT, Terminal
from test_media_cache import png, wav
from tiny_media import tiny_multimodal
from tiny_videos import grey, write_video

N_IMAGE, N_SOUND = 53, 13  # tokens of png() and of wav()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attachments")
    convert(tiny_multimodal(folder / "checkpoint"), folder / "bundle", "F32", encoders="fp32", adapter_quant="F32")
    return folder / "bundle"


@pytest.fixture
def model(bundle: Path) -> Iterator[phi4edge.Model]:
    with phi4edge.load(bundle, context=2048, kv_type="f32", threads=2) as loaded:
        yield loaded


def chat(model: phi4edge.Model, n_tokens: int = 4) -> Conversation:
    return Conversation(model, GenerationConfig(max_tokens=n_tokens), system="Be brief.", stats=False)


def usage(model: phi4edge.Model) -> phi4edge.Usage:
    assert model.last is not None
    return model.last.usage


def write_files(folder: Path) -> dict[str, Path]:
    files = {"image": folder / "a.png", "audio": folder / "q.wav", "video": folder / "c.mp4"}
    files["image"].write_bytes(png())
    files["audio"].write_bytes(wav())
    files["video"].write_bytes(write_video([grey(i) for i in range(12)]))
    return files


@pytest.mark.parametrize("change", ["gone", "overwritten"])
@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_an_answered_file_goes_on_working_when_it_is_gone_or_overwritten(
    model: phi4edge.Model, tmp_path: Path, kind: str, change: str
) -> None:
    file = write_files(tmp_path)[kind]
    seen: list[Any] = []
    for changes in (False, True):
        conversation = chat(model)
        conversation.handle(f"/{kind} {file}")
        conversation.handle("the cat")
        if changes and change == "gone":
            file.unlink()
        elif changes:
            file.write_bytes(b"something else")
        for text in ("the mat", "the hat", "/regen"):
            conversation.handle(text)
            assert model.last is not None
            seen.append((model.last.tokens, usage(model).image_tokens, usage(model).audio_tokens))
            if changes:
                model.release_encoders()  # what was computed is gone, and has to be computed again
                model.generate("another conversation", max_tokens=1)
    assert seen[:3] == seen[3:] and seen[0][1] + seen[0][2] > 0


@pytest.mark.parametrize("change", ["gone", "overwritten"])
def test_a_file_too_large_to_be_kept_is_missed_until_the_conversation_is_cleared(
    model: phi4edge.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(attachments, "HELD_BYTES", 1000)
    file = write_files(tmp_path)["audio"]
    conversation = chat(model)
    conversation.handle(f"{file} the cat")
    conversation.handle("the mat")
    assert usage(model).audio_tokens == N_SOUND
    if change == "gone":
        file.unlink()
    else:
        file.write_bytes(wav(seed=7))
        conversation.handle(f"/audio {file}")  # which is not what is missing
    for text in ("the hat", "/regen", "the hat"):
        with pytest.raises(FileError, match=r"q\.wav' of an earlier message is gone, or was changed; /clear forgets"):
            conversation.handle(text)
    conversation.handle("/clear")
    conversation.handle("the hat")
    assert usage(model).audio_tokens == (0 if change == "gone" else N_SOUND)


def test_a_large_file_that_changes_before_it_is_sent_is_dropped(
    model: phi4edge.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attachments, "HELD_BYTES", 1000)
    file = write_files(tmp_path)["audio"]
    conversation = chat(model)
    conversation.handle(f"/audio {file}")
    file.write_bytes(wav(seed=7))
    with pytest.raises(FileError, match=r"q\.wav: is gone, or was changed since it was attached"):
        conversation.handle("the cat")
    conversation.handle("the cat")
    assert usage(model).audio_tokens == 0


def test_ctrl_c_before_the_first_token_keeps_what_is_attached(
    model: phi4edge.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_files(tmp_path)["image"]
    conversation = chat(model)
    conversation.handle("the hat")  # an earlier answer is not taken for this one
    n_before = usage(model).prompt_tokens + usage(model).completion_tokens

    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(model, "stream", interrupted)
        conversation.handle(f"{file} the cat")
    conversation.handle("the mat")
    assert usage(model).image_tokens == N_IMAGE
    assert usage(model).prompt_tokens < n_before + N_IMAGE + 12  # one question, not two


def microphone(samples: Any, **broken: Exception) -> ModuleType:
    """In the place of ``sounddevice``, which needs hardware."""

    class InputStream:
        samplerate = float(RATE)

        def __init__(self, callback: Callable[..., None], **options: Any) -> None:
            if "opening" in broken:
                raise broken["opening"]
            self.callback = callback

        def start(self) -> None:
            if "starting" in broken:
                raise broken["starting"]
            for block in np.split(samples, 10):
                self.callback(block[:, np.newaxis], len(block), None, None)
            self.callback(np.zeros((1, 1), np.float32), 1, None, None)

        def stop(self) -> None:
            pass

        def close(self) -> None:
            pass

    module = ModuleType("sounddevice")
    module.InputStream = InputStream  # type: ignore[attr-defined]
    return module


def test_a_recording_survives_a_context_that_is_full_and_the_clear_that_it_takes(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", microphone(sound(1)[0]))
    with phi4edge.load(bundle, context=64, kv_type="f32", threads=2) as model:
        conversation = chat(model)
        conversation.handle("the cat " * 12)
        conversation.handle("/mic 1")
        for text in ("the mat " * 6, "/regen", "the mat " * 7):
            if text == "/regen":
                conversation.handle(text)  # which does not take it
                assert usage(model).audio_tokens == 0
                continue
            with pytest.raises(InputError, match=r"the context holds 64.*; /clear forgets the conversation"):
                conversation.handle(text)
        conversation.handle("/clear")
        assert "Still attached: recording 1; /clear once more drops it." in capsys.readouterr().err
        conversation.handle("\n")
        conversation.handle("")
        assert usage(model).audio_tokens == N_SOUND
        conversation.handle("/clear")
        conversation.handle("/mic 1")
        conversation.handle("/clear")
        conversation.handle("the cat")
        assert usage(model).audio_tokens == 0


def test_what_cannot_be_read_is_dropped_and_the_rest_stays(model: phi4edge.Model, tmp_path: Path) -> None:
    good = write_files(tmp_path)["image"]
    for name, data in (
        ("b.png", b"no picture"),
        ("b.wav", b"no sound"),
        ("b.mp4", b"no video"),
        ("c.png", png()[:-40]),
    ):
        bad = tmp_path / name
        bad.write_bytes(data)
        conversation = chat(model)
        with pytest.raises(InputError, match=rf"^{bad}: ") as raised:
            conversation.handle(f"{bad} {good} the cat")
        assert raised.value.field == ""
        conversation.handle("the mat")
        assert (usage(model).image_tokens, usage(model).audio_tokens) == (N_IMAGE, 0)


def test_a_file_that_cannot_be_opened_attaches_nothing(model: phi4edge.Model, tmp_path: Path) -> None:
    conversation = chat(model)
    with pytest.raises(FileError, match=r"nowhere\.png: there is no such file"):
        conversation.handle(f"/image {tmp_path}/nowhere.png")
    conversation.handle("the cat")
    assert usage(model).image_tokens == 0


def test_an_error_in_the_middle_of_an_answer_keeps_what_came(
    model: phi4edge.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_files(tmp_path)["image"]
    conversation = chat(model, 12)
    n_steps = 0
    step = phi4edge.Session.step

    def until_memory_ends(session: phi4edge.Session, *arguments: Any, **options: Any) -> Any:
        nonlocal n_steps
        n_steps += 1
        if n_steps == 5:  # the first token comes out of the prompt
            raise OutOfMemoryError("the KV cache of 4097 tokens needs more")
        return step(session, *arguments, **options)

    with monkeypatch.context() as context:
        context.setattr(phi4edge.Session, "step", until_memory_ends)
        with pytest.raises(OutOfMemoryError, match="4097 tokens"):
            conversation.handle(f"{file} the cat")
    shown = capsys.readouterr().out
    assert model.last is not None and len(model.last.tokens) == 5
    assert shown == model.last.text + "\n"
    n_before = usage(model).prompt_tokens
    conversation.handle("the mat")
    assert usage(model).image_tokens == N_IMAGE  # once
    assert usage(model).prompt_tokens > n_before + 5 and usage(model).cached_tokens >= n_before


def test_a_person_is_told_what_stays_and_what_goes(bundle: Path, tmp_path: Path) -> None:
    files = write_files(tmp_path)
    (tmp_path / "b.png").write_bytes(b"no picture")
    terminal = Terminal(["chat", str(bundle), "-n", "3", "--stats"], columns=200)
    try:
        terminal.expect(PROMPT)
        terminal.type(f"{files['image']} {tmp_path}/b.png the cat\r")
        terminal.expect(
            r"\[not attached any more: b\.png\]\s+\[still attached: a\.png\]\s+phi4edge: error: .*b\.png: is"
        )
        terminal.expect(PROMPT)
        terminal.type("the mat\r")
        terminal.expect(f"{N_IMAGE} image tokens")
        terminal.expect(PROMPT)
        terminal.type("\x04")
        assert terminal.wait() == 0
    finally:
        terminal.close()


# --- the microphone


@pytest.mark.parametrize("broken", ["opening", "starting"])
def test_a_microphone_that_cannot_be_opened_is_an_error(
    model: phi4edge.Model, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    device = microphone(sound(1)[0], **{broken: ValueError("No input device")})
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    with pytest.raises(UnsupportedError, match=r"no microphone can be opened \(No input device\)"):
        chat(model).handle("/mic 1")


def test_what_fails_after_the_microphone_was_opened_is_not_taken_for_it(
    model: phi4edge.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", microphone(sound(1)[0]))

    class Broken:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    monkeypatch.setattr(sys, "stdin", Broken())
    with pytest.raises(UnicodeDecodeError):
        chat(model).handle("/mic")
