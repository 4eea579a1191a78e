"""Recordings to text: the answers of one request a piece, true times, and output that is whole whatever happens."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import phi4edge
from phi4edge.audio_files import load_audio
from phi4edge.cli import main
from phi4edge.converters.convert import convert
from phi4edge.errors import FileError, InputError, UsageError
from phi4edge.generation import Generation, Usage
from phi4edge.transcription import LANGUAGES, Recording, Segment, as_subrip, prompt_for, transcribe
from processes import COMMAND, DEADLINE, ROOT, Terminal, is_one_error_line
from tiny_media import tiny_multimodal

RATE = 16000
ENERGY = ("--splitter", "energy")  # the sounds of these tests are no speech to others
Arguments = tuple[str, ...]


def babble(seconds: float, seed: int = 0) -> Any:
    """Noise with the rhythm of speech, at 16 kHz."""
    values = 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    return values * (0.05 + 0.95 * np.abs(np.sin(np.pi * 4 * np.arange(len(values)) / RATE)))


def write_talk(path: Path, *seconds: float, silence: float = 3.0) -> str:
    """Sounds that last so long, each with a silence before it, and one at the end."""
    quiet = np.zeros(round(silence * RATE))
    parts = [part for index, each in enumerate(seconds) for part in (quiet, babble(each, index))]
    soundfile.write(path, np.concatenate([*parts, quiet]), RATE, "PCM_16")
    return str(path)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("transcribe")
    convert(tiny_multimodal(path / "checkpoint"), path / "bundle", "F32", encoders="fp32", adapter_quant="F32")
    return path / "bundle"


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sounds at 3 to 7, 10 to 12 and 15 to 20.5 s of 23.5."""
    return write_talk(tmp_path_factory.mktemp("talk") / "talk.wav", 4, 2, 5.5)


@pytest.fixture
def model(bundle: Path) -> Iterator[phi4edge.Model]:
    with phi4edge.load(bundle, context=1024, kv_type="f32", threads=2) as loaded:
        yield loaded


@pytest.mark.parametrize("translate_to", [None, "fr"])
def test_a_segment_is_the_answer_to_its_piece(model: phi4edge.Model, talk: str, translate_to: str | None) -> None:
    asked = "Translate the audio to French." if translate_to else "Transcribe the audio clip into text."
    shown: list[str] = []
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "seed": 3}
    segments = []
    for segment in transcribe(
        model, talk, translate_to=translate_to, splitter="energy", on_text=shown.append, **options
    ):
        assert "".join(shown) == segment.answer.text
        shown.clear()
        segments.append(segment)
    np.testing.assert_allclose([(each.start, each.end) for each in segments], [(3, 7), (10, 12), (15, 20.5)], atol=0.21)
    samples = load_audio(talk)
    for segment in segments:
        piece = samples[round(segment.start * RATE) : round(segment.end * RATE)]
        parts = [{"type": "audio", "audio": (piece, RATE)}, {"type": "text", "text": asked}]
        alone = model.generate([{"role": "user", "content": parts}], session=model.session(), **options)
        assert segment.answer.tokens == alone.tokens
        assert segment.answer.adapter == alone.adapter == "speech"
        assert segment.answer.usage.prompt_tokens == alone.usage.prompt_tokens
        assert segment.text == " ".join(alone.text.split())
    assert len({segment.answer.tokens for segment in segments}) == 3


def test_sources_are_the_same_whatever_they_come_as(model: phi4edge.Model, talk: str) -> None:
    recording = Recording.read(talk, splitter="energy")
    assert recording.seconds == 23.5 and recording.splitter == "energy"
    assert sum(span.end - span.start for span in recording.spans) == len(recording.samples)
    expected = [each.answer.tokens for each in transcribe(model, recording, max_tokens=3)]
    for source in (Path(talk), Path(talk).read_bytes(), (load_audio(talk), RATE)):
        found = phi4edge.transcribe(model, source, splitter="energy", max_tokens=3)
        assert [each.answer.tokens for each in found] == expected
    with pytest.raises(UsageError, match="splitter"):
        transcribe(model, recording, splitter="energy")


def test_silence_is_not_put_to_the_model(model: phi4edge.Model) -> None:
    assert list(transcribe(model, (np.zeros(40 * RATE, np.float32), RATE))) == []
    assert model.last is None


def test_leaving_early_and_progress(model: phi4edge.Model, talk: str) -> None:
    seen: list[tuple[int, int]] = []
    options: dict[str, Any] = {"splitter": "energy", "max_tokens": 2}
    for _ in transcribe(model, talk, progress=lambda done, total: seen.append((done, total)), **options):
        pass
    assert {total for _, total in seen} == {23} and seen == sorted(seen)
    assert {done for done, _ in seen} == {2, 9, 14, 23} and len(seen) > 8
    segments = transcribe(model, talk, **options)
    first = next(segments)
    segments.close()
    assert first.answer.tokens == next(transcribe(model, talk, **options)).answer.tokens


def test_prompts_are_those_of_the_original_model() -> None:
    assert prompt_for(None, None) == "Transcribe the audio clip into text."
    names = ("English", "Chinese", "German", "French", "Italian", "Japanese", "Spanish", "Portuguese")
    assert tuple(LANGUAGES.values()) == names
    for code, name in LANGUAGES.items():
        for written in (code, code.upper(), name, name.lower(), f" {name} "):
            assert prompt_for(written, None) == f"Translate the audio to {name}."
    assert prompt_for(None, "Write it down.") == "Write it down."
    for wrong in ("", "ru", "Klingon", "{0}", "en,fr"):
        with pytest.raises(UsageError, match=r"translate_to: .*zh \(Chinese\)"):
            prompt_for(wrong, None)
    for both in ("fr", "nonsense"):
        with pytest.raises(UsageError, match="prompt: "):
            prompt_for(both, "Write it down.")
    with pytest.raises(UsageError, match="prompt: is empty"):
        prompt_for(None, " ")


def test_what_is_wrong_is_said_before_the_first_piece(model: phi4edge.Model, bundle: Path, talk: str) -> None:
    with pytest.raises(UsageError, match="translate_to"):
        transcribe(model, talk, translate_to="ru")
    with pytest.raises(FileError, match=r"nowhere\.wav"):
        transcribe(model, "nowhere.wav")
    with pytest.raises(InputError, match="is empty"):
        transcribe(model, b"")
    with phi4edge.load(bundle, context=90, threads=2) as small:  # 2 s of sound fit, 5.5 s do not
        with pytest.raises(InputError, match=r"a piece of 5\.\d s .*the context holds 90"):
            transcribe(small, talk, splitter="energy")
        assert small.last is None
    with (
        phi4edge.load(bundle / "backbone.gguf", context=90, threads=2) as deaf,
        pytest.raises(InputError, match="a model file alone reads text, not sounds"),
    ):
        transcribe(deaf, talk)


# --- SubRip


def parse_subrip(text: str) -> list[tuple[float, float, str]]:
    """Start and end in seconds, and text; nothing but what the format allows."""
    clock = r"(\d\d):([0-5]\d):([0-5]\d),(\d\d\d)"
    entries: list[tuple[float, float, str]] = []
    position = 0
    while position < len(text):
        found = re.compile(rf"(\d+)\n{clock} --> {clock}\n([^\n]+)\n\n").match(text, position)
        assert found is not None, text[position:]
        assert int(found[1]) == len(entries) + 1
        first, last = (
            3600 * int(hours) + 60 * int(minutes) + int(seconds) + int(thousandths) / 1000
            for hours, minutes, seconds, thousandths in (found.groups()[1:5], found.groups()[5:9])
        )
        assert first < last and (not entries or entries[-1][1] <= first)
        assert "-->" not in found[10]
        entries.append((first, last, found[10]))
        position = found.end()
    return entries


def test_subtitles_are_valid_subrip() -> None:
    def segment(start: float, end: float, text: str) -> Segment:
        return Segment(start, end, Generation(text, (), "stop", Usage(0, 0, 0)))

    said = ["one\n\n2\n00:00:01,000 --> 00:00:02,000\nthree", " a\r\n\x85\u2028 b ", "c"]
    times = [(0.0, 59.9996), (59.9999, 3599.9994), (3600.0, 7199.5)]
    text = "".join(
        as_subrip(segment(*time, each), i + 1) for i, (time, each) in enumerate(zip(times, said, strict=True))
    )
    assert parse_subrip(text) == [
        (0.0, 60.0, "one 2 00:00:01,000 -> 00:00:02,000 three"),
        (60.0, 3599.999, "a b"),
        (3600.0, 7199.5, "c"),
    ]


# --- the command


@pytest.fixture
def heard(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """What a command that succeeds prints, and what it says besides."""

    def hear(*arguments: str) -> tuple[str, str]:
        assert main(["transcribe", *ENERGY, *arguments]) == 0
        out, err = capsys.readouterr()
        return out, err

    return hear


def test_text_subtitles_and_json_tell_the_same(bundle: Path, talk: str, heard: Callable[..., tuple[str, str]]) -> None:
    arguments = (str(bundle), talk, "-n", "9", "--translate-to", "German")
    told, err = heard(*arguments, "--json")
    document = json.loads(told)
    assert (told.count("\n"), err) == (1, "")
    assert (document["model"], document["file"], document["splitter"]) == (str(bundle), talk, "energy")
    assert (document["task"], document["language"]) == ("translate", "German")
    assert document["prompt"] == "Translate the audio to German."
    assert document["seconds"] == 23.5 and document["adapter"] == {"name": "speech", "scale": 1.0}
    segments, silences = document["segments"], document["silences"]
    assert [each["finish_reason"] for each in segments] == ["length"] * 3
    assert all(len(each["tokens"]) == 9 for each in segments)
    assert document["usage"]["completion_tokens"] == 27
    assert document["usage"]["audio_tokens"] == sum(each["usage"]["audio_tokens"] for each in segments) > 100
    parts = sorted((each["start"], each["end"]) for each in segments + silences)  # the whole recording, once
    assert parts[0][0] == 0 and parts[-1][1] == 23.5
    assert [end for _, end in parts[:-1]] == [start for start, _ in parts[1:]]
    assert document["text"] == " ".join(each["text"] for each in segments)
    assert document["timings"]["real_time_factor"] * 23.5 == pytest.approx(document["timings"]["seconds"])

    lines, err = heard(*arguments, "--stats")
    assert lines == "".join(f"{each['text']}\n" for each in segments)
    assert "speech  23.5 s, " in err and "adapter speech" in err and "tokens/s" in err
    subtitles, err = heard(*arguments, "--srt")
    assert err == ""
    for (start, end, text), segment in zip(parse_subrip(subtitles), segments, strict=True):
        assert text == segment["text"]
        assert (start, end) == pytest.approx((segment["start"], segment["end"]), abs=5e-4)


def test_silence_gives_no_text_and_says_so_in_json(
    bundle: Path, tmp_path: Path, heard: Callable[..., tuple[str, str]]
) -> None:
    file = write_talk(tmp_path / "silence.wav", silence=31)
    for options in ((), ("--srt",)):
        assert heard(str(bundle), file, *options) == ("", "")
    document = json.loads(heard(str(bundle), file, "--json")[0])
    assert document["segments"] == [] and document["text"] == ""
    assert document["silences"] == [{"start": 0.0, "end": 31.0}]
    assert heard(str(bundle), file, "--stats")[1].startswith("speech  31.0 s, 31.0 s of it silent; pieces: 0 ")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("BUNDLE", "TALK", "--json", "--srt"), 2, "--srt"),
        (("BUNDLE", "TALK", "--translate-to", "ru"), 2, "--translate-to: 'ru' is not a language"),
        (("BUNDLE", "TALK", "--translate-to", "fr", "--prompt", "Write."), 2, "--prompt: "),
        (("BUNDLE", "TALK", "--splitter", "loud"), 2, "--splitter: "),
        (("BUNDLE", "TALK", "--max-tokens", "0"), 2, "--max-tokens"),
        (("BUNDLE", "TALK", "--temperature", "-1"), 2, "--temperature"),
        (("BUNDLE",), 2, "FILE"),
        (("BUNDLE", "nowhere.wav"), 3, "nowhere.wav"),
        (("nowhere", "TALK"), 3, "nowhere"),
        (("BUNDLE", "DAMAGED"), 4, "damaged.flac"),
        (("BUNDLE", __file__), 4, "test_transcribe.py"),
        (("BUNDLE", "TALK", "--adapter", "nobody"), 2, "--adapter"),
        (("BACKBONE", "TALK"), 4, "a model file alone reads text, not sounds"),
        (("BUNDLE", "TALK", "--context", "60"), 4, "the context holds 60"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else None,
)
def test_M7_M8_a_wrong_recording_or_option_is_one_line(
    bundle: Path,
    talk: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: Arguments,
    code: int,
    says: str,
) -> None:
    damaged = tmp_path / "damaged.flac"
    soundfile.write(damaged, babble(20), RATE)
    damaged.write_bytes(damaged.read_bytes()[:-20_000])
    names = {"BUNDLE": bundle, "TALK": talk, "DAMAGED": damaged, "BACKBONE": bundle / "backbone.gguf"}
    words = [str(names.get(argument, argument)) for argument in arguments]
    if "--json" not in words:
        assert main(["transcribe", *ENERGY, *words]) == code
        out, err = capsys.readouterr()
        assert out == "" and is_one_error_line(err) and says in err, err
    assert main(["transcribe", *ENERGY, *words, "--json"]) == code
    out, err = capsys.readouterr()
    assert err == "" and set(json.loads(out)) == {"error"}


@pytest.fixture(scope="module")
def endless(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that writes for minutes."""
    file = write_talk(tmp_path_factory.mktemp("talk") / "long.wav", *[6.0] * 60, silence=2.5)
    return ["transcribe", str(bundle), file, "--context", "1024", "--max-tokens", "400", *ENERGY]


@pytest.mark.parametrize(
    ("option", "number", "code"),
    [((), signal.SIGINT, 130), ((), signal.SIGTERM, 143), (("--srt",), signal.SIGINT, 130)],
    ids=["text", "text-term", "srt"],
)
def test_U6_what_was_heard_before_a_signal_is_whole(
    endless: list[str], option: Arguments, number: signal.Signals, code: int
) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([*COMMAND, *endless, *option], cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.read(1) if not option else "".join(process.stdout.readline() for _ in range(4))
        process.send_signal(number)
        out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, err) == (code, "")
    assert (first + out).endswith("\n")
    if option:
        assert 1 <= len(parse_subrip(first + out)) < 60


def test_U6_json_that_was_interrupted_has_what_was_heard(endless: list[str]) -> None:
    with closing(Terminal([*endless, "--json"])) as terminal:
        terminal.expect(r"Listening[^\r\n]*[ m][1-9]\d+/512")  # not the first piece any more
        terminal.type("\x03")
        assert terminal.wait() == 130
        found = re.search(r'\{"model.*\}', terminal.shown)
        assert found is not None, terminal.shown
    document = json.loads(found[0])
    assert document["error"]["code"] == "cancelled"
    assert 1 <= len(document["segments"]) < 60
    assert all(each["finish_reason"] != "cancelled" for each in document["segments"])


def test_a_terminal_sees_lines_and_a_hint_when_a_piece_is_cut(bundle: Path, talk: str) -> None:
    with closing(Terminal(["transcribe", str(bundle), talk, "--max-tokens", "3", *ENERGY])) as terminal:
        assert terminal.wait() == 0
        assert len(re.findall(r"\[the piece from \d+\.\d s on is cut; --max-tokens", terminal.shown)) == 3
