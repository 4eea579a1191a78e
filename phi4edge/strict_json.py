"""JSON from files that nobody vouches for: bounded, UTF-8, no key twice, one object or one list."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from phi4edge.errors import BundleError, FileError


def read_object(path: Path, *, at_most: int) -> dict[str, Any]:
    """The JSON object in a file of at most so many bytes.  Raises FileError, BundleError."""
    return parse_object(read_bytes(path, at_most=at_most), str(path))


def read_list(path: Path, *, at_most: int) -> list[Any]:
    """The JSON list in a file of at most so many bytes.  Raises FileError, BundleError."""
    value = _parsed(read_bytes(path, at_most=at_most), str(path), "")
    if not isinstance(value, list):
        raise BundleError("is not a JSON list", path=str(path))
    return value


def read_bytes(path: Path, *, at_most: int) -> bytes:
    """A whole regular file.  A pipe or a device in its place would block us, and is refused."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FileError("is not a regular file", path=str(path))
            if status.st_size > at_most:
                raise BundleError(
                    f"has {status.st_size} bytes, more than the {at_most} expected at most", path=str(path)
                )
            return file.read(at_most)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"cannot be read: {error.strerror}", path=str(path)) from error
    except ValueError as error:
        if isinstance(error, BundleError):
            raise
        raise FileError("cannot be read: no file has such a name", path=repr(str(path))) from error


def parse_object(data: bytes, path: str, field: str = "") -> dict[str, Any]:
    """The JSON object in ``data``; BundleError for anything else, with the place in ``path`` and ``field``."""
    value = _parsed(data, path, field)
    if not isinstance(value, dict):
        raise BundleError("is not a JSON object", path=path, field=field)
    return value


def _parsed(data: bytes, path: str, field: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key '{key[:80]}' comes twice")
            found[key] = value
        return found

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except UnicodeDecodeError as error:
        raise BundleError(f"is not UTF-8 at byte {error.start}", path=path, field=field) from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"is not the JSON we expect: {error}", path=path, field=field) from error
