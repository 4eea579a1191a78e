"""Files that are dropped into a chat: every way in which terminals write their paths, and texts that only look so."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from urllib.parse import quote

import pytest

from phi4edge.cli.dropped import SUFFIXES, take_files

KINDS = {"image", "audio", "video"}
NAMES = [
    "photo.jpg",
    "my photo.JPEG",
    "it's (1) & [2].png",
    'a "b" $c.webp',
    "é 漢.tiff",
    "100%#?.gif",
    "question.wav",
    "a clip.MP4",
]


def kind_of(name: str) -> str:
    return {"wav": "audio", "mp4": "video"}.get(name[-3:].lower(), "image")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_found_however_it_is_quoted(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.touch()
    path = str(file)
    escaped = re.sub(r"[^\w/.-]", r"\\\g<0>", path)
    written = [
        shlex.quote(path),
        "'" + path.replace("'", "'\\''") + "'",
        escaped,
        file.as_uri(),
        f"file://localhost{quote(path)}",
        *([f'"{path}"'] if '"' not in path else []),
    ]
    for form in written:
        expected = [(kind_of(name), path)]
        assert take_files(form, KINDS) == (expected, ""), form
        assert take_files(f" {form}\n", KINDS) == (expected, ""), form
        assert take_files(f"{form} What is this?", KINDS) == (expected, "What is this?"), form
        assert take_files(f"What's in {form} , say?", KINDS) == (expected, "What's in , say?"), form
        assert take_files(f"Don't guess:\n{form}", KINDS) == (expected, "Don't guess:"), form
    assert take_files(path, KINDS) == ([(kind_of(name), path)], "")  # nothing quoted


def test_several_files_are_found_in_their_order(tmp_path: Path) -> None:
    files = [tmp_path / name for name in NAMES]
    for file in files:
        file.touch()
    for text in (" ".join(shlex.quote(str(file)) for file in files), "\n".join(file.as_uri() for file in files)):
        found, rest = take_files(text, KINDS)
        assert [path for _, path in found] == [str(file) for file in files] and rest == ""


def test_a_path_may_be_relative_or_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert take_files("./a.png Look", KINDS) == ([("image", "a.png")], "Look")
    assert take_files("a.png", KINDS) == ([("image", "a.png")], "")
    assert take_files("~/a.png", KINDS) == ([("image", str(tmp_path / "a.png"))], "")


@pytest.mark.parametrize(
    "text",
    [
        "What is in photo.png?",  # with the question mark it is no path
        "missing.png",
        "See http://127.0.0.1/photo.png and https://x/photo.png",
        "file://elsewhere{folder}/photo.png",
        "file://[/photo.png",
        "data:image/png;base64,AAAA.png",
        "{folder}/folder.png",
        "{folder}/pipe.png",
        "{folder}/notes.txt",
        "xx{folder}/photo.png",
        "({folder}/photo.png)",
        "a\0{folder}/photo.png",
        "~nobody-of-this-name/photo.png",
        "/" + "a" * 5000 + ".png",
        "a" * 100_000 + ".png",
        "  two  blanks \n stay ",
        "'unfinished {folder}/photo.pn",
        "\\",
        "",
    ],
)
def test_everything_else_stays_text(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photo.png").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.chdir("/")
    text = text.replace("{folder}", str(tmp_path))
    assert take_files(text, KINDS) == ([], text)


def test_a_kind_that_the_model_does_not_take_stays_text(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    assert take_files(f"{tmp_path}/a.png", set()) == ([], f"{tmp_path}/a.png")
    assert take_files(f"{tmp_path}/a.png", {"audio"}) == ([], f"{tmp_path}/a.png")


def test_a_long_text_of_quotes_is_searched_in_time() -> None:
    for text in ("' " * 50_000, "'a " * 50_000, '"' * 100_000, "\\" * 100_001, "a\\ " * 50_000, "/x.png " * 20_000):
        assert take_files(text, KINDS) == ([], text)


def test_a_suffix_is_of_one_kind() -> None:
    ends = [end for kind in SUFFIXES.values() for end in kind]
    assert len(ends) == len(set(ends)) and all(end == end.lower() and end[0] == "." for end in ends)
