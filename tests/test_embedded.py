"""The model in the package: it is what the checkpoint gives, it answers where none is named, and damage is told."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import phi4edge
from embed_nano import SAMPLES, embed
from nano_items import items
from phi4edge.cli import main
from phi4edge.cli.words import model_and_file, model_and_prompt
from phi4edge.errors import FileError, UsageError
from phi4edge.quality_items import Item
from processes import COMMAND, DEADLINE, is_one_error_line, run

PACKAGE = Path(phi4edge.__file__).parent
# The items of the samples: a text, an image, a recording, an image with a spoken question.
TEXT, IMAGE, RECORDING, SPOKEN = ({item.name: item for item in items()}[sample.item] for sample in SAMPLES)


def of(item: Item, kind: str) -> str:
    """The text, or the path of the image or the sound, of an item."""
    content = item.messages[-1]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return next(str(part[kind]) for part in parts if kind in part)


QUESTION, ANSWER = of(TEXT, "text"), f"{TEXT.expected}\n"


def is_note(text: str) -> bool:
    """The line that says which model answers and how to get the real one."""
    return text.count("\n") == 1 and "nano" in text and "phi4edge pull microsoft/Phi-4-multimodal-instruct" in text


# --- what is in the package


def test_the_embedded_files_are_what_the_checkpoint_gives(tmp_path: Path) -> None:
    """Byte for byte: quantizers give the same on every processor and with any number of threads."""
    embed(tmp_path)
    for folder in ("nano", "samples"):
        made, there = tmp_path / folder, PACKAGE / folder
        names = sorted(path.name for path in made.iterdir())
        assert names == sorted(path.name for path in there.iterdir())
        for name in names:
            if name == "manifest.json":
                ours, theirs = (json.loads((each / name).read_text()) for each in (made, there))
                assert {**ours, "provenance": ""} == {**theirs, "provenance": ""}
                assert ours["provenance"]["source_sha256"] == theirs["provenance"]["source_sha256"]
            else:
                assert (made / name).read_bytes() == (there / name).read_bytes(), f"'make nano' has to be run: {name}"


def test_what_is_embedded_stays_small() -> None:
    for folder, limit in (("nano", 8_000_000), ("samples", 400_000)):
        assert sum(path.stat().st_size for path in (PACKAGE / folder).iterdir()) <= limit


# --- no model named


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run", QUESTION], ""),
        (["run"], QUESTION + "\n"),
        (["run", "-"], QUESTION),
        (["run", "nano", QUESTION], ""),
        (["run", "nano"], QUESTION),
        (["chat"], QUESTION),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_embedded_model_answers(arguments: list[str], text: str) -> None:
    done = run(*arguments, text=text)
    assert (done.returncode, done.stdout) == (0, ANSWER)
    assert done.stderr == "" if "nano" in arguments else is_note(done.stderr)


def test_the_embedded_model_sees_and_hears() -> None:
    for arguments, item in (
        (["run", of(IMAGE, "text"), "--image", of(IMAGE, "image")], IMAGE),
        (["transcribe", of(RECORDING, "audio")], RECORDING),
        (["run", "--image", of(SPOKEN, "image"), "--audio", of(SPOKEN, "audio")], SPOKEN),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (0, f"{item.expected}\n")
        assert is_note(done.stderr)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["run", QUESTION], "model"),
        (["transcribe", of(RECORDING, "audio")], "model"),
        (["info"], "path"),
        (["info", "nano"], "path"),
        (["bench", "-p", "8", "-n", "2", "-r", "1"], "model"),
        (["verify"], "bundle"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_json_says_which_model_it_was(arguments: list[str], field: str) -> None:
    done = run(*arguments, "--json")
    assert done.returncode == 0
    assert Path(json.loads(done.stdout)[field]).samefile(PACKAGE / "nano")
    assert done.stderr == "" if "nano" in arguments else is_note(done.stderr)


def test_the_embedded_model_continues_raw_text() -> None:
    done = run("run", "--raw", "Once upon a time", "-n", "4")
    assert done.returncode == 0
    assert is_note(done.stderr)


def test_load_without_a_path_is_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (None, "nano", Path("nano")):
        with phi4edge.load(path) as model:
            assert model.generate(QUESTION).text + "\n" == ANSWER
    assert Path(phi4edge.inspect().path).samefile(PACKAGE / "nano")
    Path("nano").mkdir()  # from here on it is the name of something else
    with pytest.raises(FileError):
        phi4edge.load("nano")


# --- which word is the model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with some files in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("model.gguf", "Why not?", "a file", "Hi."):
        (tmp_path / name).touch()
    (tmp_path / "a bundle").mkdir()
    (tmp_path / "gone").symlink_to("nowhere")
    return tmp_path


@pytest.mark.parametrize("word", ["model.gguf", "./model.gguf", "Why not?", "a file", "Hi.", "a bundle", ".", "gone"])
def test_one_word_that_exists_is_the_model(folder: Path, word: str) -> None:
    assert model_and_prompt(word, None) == (word, None)


@pytest.mark.parametrize(
    "word",
    [
        "",
        "-",
        "What is 9 plus 5?",
        "Why?",
        "Summarize.",
        "1+1=?",
        "What does and/or mean?",
        "don't",
        "Stop!",
        "\\frac{1}",
    ],
)
def test_one_word_that_reads_like_a_question_is_the_prompt(folder: Path, word: str) -> None:
    assert model_and_prompt(word, None) == (None, word)


@pytest.mark.parametrize(
    "word",
    [
        "modle.gguf",
        "my modle.gguf",
        "./bundel",
        "../my bundel",
        "/no/such/bundel",
        "~/my models/phi4",
        "models/phi4",
        "phi4-mm-q4",
        "bundel",
        "modèle",
        "phi-3.5",
    ],
)
def test_a_mistyped_model_is_a_file_error(
    folder: Path, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FileError) as caught:
        model_and_prompt(word, None)
    assert str(caught.value).startswith(f"{word}: cannot open: No such file or directory")
    for text in ("", QUESTION):  # nor is what comes through a pipe answered
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert main(["run", word]) == 3
        shown = capsys.readouterr()
        assert shown.out == ""
        assert is_one_error_line(shown.err)


def test_two_words_are_the_model_and_the_prompt() -> None:
    assert model_and_prompt("What is this?", "x") == ("What is this?", "x")
    assert model_and_prompt("Hello", "-") == ("Hello", "-")
    assert model_and_prompt(None, None) == (None, None)
    assert model_and_file("a", "b") == ("a", "b")


@pytest.mark.parametrize("question", ["Hello", "tell me about model.gguf", "/ is a slash"])
def test_a_question_that_reads_like_a_name_is_answered_with_the_name_of_the_model(question: str) -> None:
    done = run("run", question)
    assert done.returncode == 3
    said = shlex.split(done.stderr.rpartition(": phi4edge ")[2])
    assert said == ["run", "nano", question]
    assert run(*said).returncode == 0


def test_one_word_after_transcribe_is_the_recording(folder: Path) -> None:
    for word in ("talk.wav", "Hello", "a file", "no such file.wav"):
        assert model_and_file(word, None) == (None, word)
    for left_out in ("model.gguf", "modle.gguf", "a bundle", "nano", "", None):
        with pytest.raises(UsageError, match="Missing argument 'FILE'"):
            model_and_file(left_out, None)
    with pytest.raises(UsageError, match="Missing argument 'FILE'"):
        model_and_file("nano", "")
    Path("nano").touch()  # from here on it is the name of something else
    assert model_and_file("nano", None) == (None, "nano")


@pytest.mark.parametrize("second", ["a file", "nano"])
def test_a_recording_in_the_place_of_the_model_is_named(
    folder: Path, second: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["transcribe", "Why not?", second]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert is_one_error_line(err)
    assert "Why not?: a model file alone reads text, not sounds; the first of two words is the model" in err


def test_M1_files_that_are_no_image_or_sound_are_the_errors_of_any_model() -> None:
    for arguments in (
        ["run", QUESTION, "--image", __file__],
        ["run", "--audio", __file__],
        ["transcribe", __file__],
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (4, "")
        error = done.stderr.splitlines(keepends=True)[-1]
        assert is_one_error_line(error)
        assert "test_embedded.py" in error
        assert "installation" not in error


# --- the demo


def test_the_demo_is_right_in_all_four_modes() -> None:
    done = run("demo")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("[right | adapter: ") == 4
    for text in (
        "4 of 4 answers right",
        "tokens/s",
        "first token after",
        "peak memory",
        "MiB with its adapters and encoders",
    ):
        assert text in done.stdout


def test_the_commands_of_the_demo_give_its_answers() -> None:
    done = run("demo", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert (document["right"], len(document["samples"])) == (4, 4)
    assert [sample["adapter"] for sample in document["samples"]] == [None, "vision", "speech", "vision"]
    assert document["peak_memory_bytes"] > 1 << 20
    for sample in document["samples"]:
        assert sample["right"] is True
        assert sample["tokens_per_second"] > 0 and sample["first_token_seconds"] > 0
        options: dict[str, Any] = {"cwd": PACKAGE.parent, "capture_output": True, "text": True, "timeout": DEADLINE}
        typed = subprocess.run(sample["command"], shell=True, stdin=subprocess.DEVNULL, **options)
        assert typed.stdout == f"{sample['expected']}\n"


def test_commands_of_the_demo_can_be_typed_where_the_program_is_no_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["phi4edge"])  # as another program, or Windows, may start it
    assert main(["demo", "--json"]) == 0
    for sample in json.loads(capsys.readouterr().out)["samples"]:
        assert shlex.split(sample["command"])[:3] == [sys.executable, "-m", "phi4edge"]


def test_bench_has_a_prompt_of_512_tokens_unless_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "-r", "1", "-t", "1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["prompt_tokens"], record["decode_tokens"], record["repetitions"]) == (512, 64, 1)


# --- a damaged installation


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A copy of the package, to be damaged."""
    return shutil.copytree(PACKAGE, tmp_path / "phi4edge", ignore=shutil.ignore_patterns("__pycache__"))


def run_copy(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *arguments]
    return subprocess.run(command, cwd=package.parent, input="", capture_output=True, text=True, timeout=DEADLINE)


def is_damage(text: str) -> bool:
    return is_one_error_line(text) and "this installation of phi4edge is damaged" in text and "install phi4edge" in text


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def no_json(path: Path) -> None:
    path.write_text("{")


def nothing(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "name", "code"),
    [
        (shorten, "backbone.gguf", 4),
        (change_a_byte, "backbone.gguf", 4),
        (change_a_byte, "vision.onnx", 4),
        (Path.unlink, "speech.lora.gguf", 4),
        (no_json, "manifest.json", 4),
        (nothing, "manifest.json", 4),
        (Path.unlink, "manifest.json", 3),
        (shutil.rmtree, ".", 3),
    ],
)
def test_L4_a_damaged_embedded_model_is_an_error_of_the_installation(
    installed: Path, damage: Callable[[Path], object], name: str, code: int
) -> None:
    damage(installed / "nano" / name)
    done = run_copy(installed, "run", QUESTION)
    assert (done.returncode, done.stdout) == (code, "")
    assert is_damage(done.stderr)
    assert str(installed / "nano") in done.stderr


@pytest.mark.parametrize("command", ["chat", "transcribe", "info", "bench", "verify", "demo"])
def test_every_command_says_that_the_installation_is_damaged(installed: Path, command: str) -> None:
    shorten(installed / "nano" / "audio.onnx")
    recording = [of(RECORDING, "audio")] if command == "transcribe" else []
    done = run_copy(installed, command, *recording)
    assert (done.returncode, done.stdout) == (4, "")
    assert is_damage(done.stderr)


def test_an_installation_of_symbolic_links_is_no_damage(tmp_path: Path) -> None:
    package = shutil.copytree(PACKAGE, tmp_path / "phi4edge", copy_function=os.symlink)
    assert (package / "nano" / "backbone.gguf").is_symlink()
    for command in (["demo"], ["verify"]):
        assert run_copy(package, *command).returncode == 0
    (package / "nano" / "backbone.gguf").unlink()
    (package / "nano" / "backbone.gguf").symlink_to(package / "gone")
    assert is_damage(run_copy(package, "run", QUESTION).stderr)


def test_a_file_more_in_the_package_is_no_damage(installed: Path) -> None:
    (installed / "nano" / ".DS_Store").touch()
    assert run_copy(installed, "run", QUESTION).stdout == ANSWER


@pytest.mark.parametrize(
    ("damage", "name", "code"),
    [
        (Path.unlink, "samples.json", 3),
        (no_json, "samples.json", 4),
        (lambda path: path.write_text('{"samples": [{"name": 1}]}'), "samples.json", 4),
        (Path.unlink, "*.png", 3),
        (nothing, "*.png", 4),
        (nothing, "*.wav", 4),
    ],
)
def test_a_damaged_sample_of_the_demo_is_an_error_of_the_installation(
    installed: Path, damage: Callable[[Path], object], name: str, code: int
) -> None:
    for path in (installed / "samples").glob(name):
        damage(path)
    done = run_copy(installed, "demo")
    assert done.returncode == code
    assert is_damage(done.stderr)


def test_a_wrong_answer_in_the_demo_is_a_bug_to_report(installed: Path) -> None:
    path = installed / "samples" / "samples.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["samples"][0]["expected"] = "no such answer"
    path.write_text(json.dumps(document), encoding="utf-8")
    done = run_copy(installed, "demo")
    assert done.returncode == 70
    assert is_one_error_line(done.stderr)
    assert "report" in done.stderr
    assert "[WRONG, expected: no such answer |" in done.stdout
    assert "3 of 4 answers right" in done.stdout
    done = run_copy(installed, "demo", "--json")
    assert (done.returncode, done.stderr) == (70, "")
    document = json.loads(done.stdout)
    assert document["right"] == 3
    assert document["error"]["code"] == "internal_error"
