"""Where an image, a sound or a video comes from: a path, bytes, or a data URL.  Nothing is ever fetched.

>>> data_of("data:image/gif;base64,R0lGODlh", "image")
b'GIF89a'
>>> data_of("photo.jpg", "image") is None  # a path
True

A text that begins like a URL is never a path; a file of such a name is "./data:x", or a Path.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from phi4edge.errors import FileError, InputError

if TYPE_CHECKING:
    from phi4edge.prompt import MediaPart

MAX_DATA_BYTES: Final = 64 << 20  # that a data URL may hold
# Kind -> bytes that all files of a request may have, known before any of them is read.  Images are read as a whole;
# the others block by block: of sounds, this is two hours of 24 bits in stereo at 48 kHz.
MAX_TOTAL_BYTES: Final = {"image": 128 << 20, "audio": 2 << 30, "video": 8 << 30}

NOUNS: Final = {"image": "images", "audio": "sounds", "video": "videos"}
_URL: Final = re.compile(r"data:|[a-z][a-z0-9+.-]+://", re.IGNORECASE)  # C:\ and C:// are drives
_LONGEST_HEADER: Final = 256  # characters of a data URL before its comma
_HINT: Final = "give a path, bytes or a data URL"


def is_path(source: Any) -> bool:
    """Whether a source names a file."""
    return isinstance(source, os.PathLike) or (isinstance(source, str) and not _URL.match(source))


class FileState(NamedTuple):
    """What changes when a file is replaced or written to; times in nanoseconds."""

    device: int
    inode: int
    n_bytes: int
    modified: int
    changed: int  # on Windows, when it was made


def file_state(path: str | os.PathLike[str]) -> FileState | None:
    """None when there is no such file, or nothing can be told about it."""
    try:
        found = Path(path).stat()
    except (OSError, TypeError, ValueError):
        return None
    return FileState(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def path_of(source: str | os.PathLike[str]) -> Path:
    """The path of a source that names a file.  Raises FileError when it is bytes, or has a NUL."""
    path = os.fspath(source)
    if not isinstance(path, str) or "\0" in path:
        raise FileError("cannot be read: is not a path", path=repr(path)[:80])
    return Path(path)


def data_of(source: Any, kind: str) -> bytes | None:
    """What a data URL holds; None for all that is no URL.

    kind: "image", "audio" or "video", with which the type in the URL has to begin.

    Raises InputError for other URLs, and for a data URL that is not base64, of another type, or too large.
    """
    if is_path(source) or not isinstance(source, str):
        return None
    if source[:5].lower() != "data:":
        raise InputError(f"{source[:80]!r} is a URL, and nothing is fetched", field=kind, hint=_HINT)
    comma = source.find(",", 0, _LONGEST_HEADER)
    if comma < 0:
        raise InputError("is a data URL without a comma after its type", field=kind, hint=_HINT)
    mime, *parameters = source[5:comma].lower().split(";")
    if not mime.startswith(f"{kind}/"):
        raise InputError(f"is a data URL of type {mime[:40]!r}, expected {kind}/...", field=kind)
    if parameters[-1:] != ["base64"]:
        raise InputError("is a data URL that is not base64", field=kind, hint=f"write data:{mime[:40]};base64,...")
    n_bytes = (len(source) - comma - 1) * 3 // 4 - source[-2:].count("=")
    if n_bytes > MAX_DATA_BYTES:
        raise InputError(f"is a data URL of {n_bytes} bytes, more than {MAX_DATA_BYTES}", field=kind, hint=_HINT)
    try:
        if source.find("=", comma, -2) >= 0:  # Python's decoder would take more of them at the end
            raise ValueError("padding")
        return base64.b64decode(source[comma + 1 :], validate=True)
    except ValueError as error:
        raise InputError("is a data URL whose base64 is damaged", field=kind, hint="encode it again") from error


def check_total(parts: Iterable[MediaPart]) -> None:
    """InputError when the files of a request are too large together; nothing is read for that."""
    totals = dict.fromkeys(MAX_TOTAL_BYTES, 0)
    for part in parts:
        if part.kind in totals:
            totals[part.kind] += _n_bytes(part.source)
    for kind, n_bytes in totals.items():
        if n_bytes > MAX_TOTAL_BYTES[kind]:
            raise InputError(
                f"the {NOUNS[kind]} have {n_bytes} bytes together, and {MAX_TOTAL_BYTES[kind]} are allowed",
                hint="give fewer, or smaller ones",
            )


def _n_bytes(source: Any) -> int:
    """Of a file as it is stored or written in a URL; 0 for what is decoded already, and for what is no file."""
    if is_path(source):
        state = file_state(source)
        return 0 if state is None else state.n_bytes
    return len(source) if isinstance(source, (bytes, str)) else 0
