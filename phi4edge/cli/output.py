"""What the user sees: answers on standard output, everything else on standard error, and never a broken terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def prepare_streams() -> None:
    """Makes the three standard streams usable whatever we were started with.

    A closed one becomes the null device: otherwise the next file opened, such as the model, would take its number and
    receive what is meant for the terminal.  Characters that the stream's encoding lacks are replaced.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - until we exit
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def discard_stdout() -> None:
    """Sends what is still buffered for a reader that left to the null device, so that nothing complains at exit."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError):  # not a real file: nothing will be flushed to it
        pass


def write_text(text: str) -> None:
    """Writes a part of an answer at once.  No control characters reach a terminal: text must not move its cursor."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_json(value: Any) -> None:
    """Writes one JSON document on one line.  Infinities and NaN, which JSON lacks, become null."""
    ascii_only = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    sys.stdout.write(json.dumps(_plain(value), ensure_ascii=ascii_only, allow_nan=False) + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """One line on standard error.  A reader of standard error that left is no reason to stop."""
    try:
        sys.stderr.write(one_line(text) + "\n")
        sys.stderr.flush()
    except OSError:
        pass


def warn(text: str) -> None:
    note(f"phi4edge: warning: {text}")


def hint(text: str) -> None:
    """A line for a person who watches; silent in scripts and pipes."""
    if sys.stderr.isatty():
        note(text)


def is_terminal(stream: TextIO) -> bool:
    """Whether we may move the cursor on this stream."""
    return stream.isatty() and os.environ.get("TERM", "") != "dumb"


def printable(text: str) -> str:
    """``text`` with every control character but tab and newline shown as U+FFFD, and without carriage returns."""
    if text.isprintable():
        return text
    return "".join(_shown(character) for character in text if character != "\r")


def one_line(text: str) -> str:
    """``text`` on one line: newlines and control characters, e.g. of a hostile file name, are escaped."""
    if text.isprintable():
        return text
    return "".join(c if unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") else ascii(c)[1:-1] for c in text)


def bytes_text(n_bytes: float) -> str:
    """``1536`` as ``"1.5 KiB"``."""
    for unit in _UNITS[:-1]:
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} {_UNITS[-1]}"


def _shown(character: str) -> str:
    is_control = unicodedata.category(character) == "Cc" and character not in "\t\n"
    return "\ufffd" if is_control else character


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if _has_surrogates(value) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
