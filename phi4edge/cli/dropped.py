"""Files in what was typed in a chat.  Terminals paste a dropped file as its path, quoted in one of many ways.

>>> take_files("What is written here? '/tmp/my photo.jpg'", {"image"})  # doctest: +SKIP
([("image", "/tmp/my photo.jpg")], "What is written here?")
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Kind of a part -> how the names of its files end.
SUFFIXES: dict[str, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    "audio": (".wav", ".flac", ".mp3", ".ogg", ".opus", ".oga", ".m4a", ".aac", ".aiff", ".aif", ".au", ".caf", ".wma"),
    "video": (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".flv", ".ogv", ".mpg", ".mpeg"),
}

# A word in single quotes, in double ones, or with a backslash before each special character, between white space.
_WORD = re.compile(r"""(?<!\S)(?:'[^']*'(?:(?:\\'|"'")'[^']*')*|"[^"]*"|(?:\\.|[^\s\\])+|\S+)(?!\S)[ \t]*""")
_ESCAPE = re.compile(r"\\(.)")
_DRIVE = re.compile(r"/[A-Za-z]:")  # how the path of a Windows file begins in a URL
_LONGEST = 8192  # characters of a path


def take_files(text: str, kinds: Collection[str]) -> tuple[list[tuple[str, str]], str]:
    """(Kind, path) of the files that are named by whole words of a text, or by all of it; and the text without them.

    Only existing regular files whose suffix is one of these kinds count; everything else stays text as it is.
    """
    whole = _file(text.strip(), kinds)
    if whole is not None:  # dropped where nothing is quoted, with its blanks
        return [whole], ""
    found: list[tuple[str, str]] = []

    def taken(match: re.Match[str]) -> str:
        file = _file(match.group().rstrip(" \t"), kinds)
        if file is None:
            return match.group()
        found.append(file)
        return ""

    rest = _WORD.sub(taken, text)
    return found, rest.strip() if found else text


def missing_files(text: str) -> list[str]:
    """Words of what was left that read like paths of images, sounds or videos."""
    ends = tuple(end for kind in SUFFIXES.values() for end in kind)
    words = (match.group().rstrip(" \t") for match in _WORD.finditer(text))
    paths = (word for word in words if "/" in word and "://" not in word)
    return [word for word in paths if any(path.lower().endswith(ends) for path in _readings(word))]


def _file(word: str, kinds: Collection[str]) -> tuple[str, str] | None:
    for path in _readings(word):
        kind = next((kind for kind, ends in SUFFIXES.items() if kind in kinds and path.lower().endswith(ends)), None)
        if kind is None or len(path) > _LONGEST:
            continue
        try:
            file = Path(path).expanduser()
            if file.is_file():
                return kind, str(file)
        except (OSError, RuntimeError, ValueError):  # too long a name; a home that is not known; a NUL
            continue
    return None


def _readings(word: str) -> Iterator[str]:
    """The paths that a word may mean: a backslash is part of it on Windows, and quotes a blank elsewhere."""
    yield word
    if word[:7].lower() == "file://":
        yield from _of_url(word)
    elif word[:1] == word[-1:] == "'" and len(word) > 1:
        yield word[1:-1].replace("'\\''", "'").replace("'\"'\"'", "'")
    elif word[:1] == word[-1:] == '"' and len(word) > 1:
        yield word[1:-1]
    elif "\\" in word:
        yield _ESCAPE.sub(r"\1", word)


def _of_url(url: str) -> Iterator[str]:
    try:
        parts = urlsplit(url)
    except ValueError:
        return
    if parts.netloc in ("", "localhost") and not parts.query and not parts.fragment:
        path = unquote(parts.path)
        yield path[1:] if _DRIVE.match(path) else path
