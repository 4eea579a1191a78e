"""What was read and encoded lately, so that the next turn of a conversation need not do it again.

>>> cache = Latest(2, len)
>>> for word in ("a", "b", "a", "c"):
...     cache.put(word, word)
>>> cache.get("b") is None, cache.get("c")
(True, 'c')
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from phi4edge.media_source import file_state, is_path

if TYPE_CHECKING:
    from phi4edge.prompt import MediaPart

Value = TypeVar("Value")

# A file that changes twice within one step of the file system's clock looks the same; the coarsest step is 2 s (FAT).
_CLOCK_STEP = 2_000_000_000  # nanoseconds


class Latest(Generic[Value]):
    """The latest values by their keys, as many as have ``room`` in all by their ``size``."""

    def __init__(self, room: int, size: Callable[[Value], int]) -> None:
        self._room = room
        self._size = size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable) -> Value | None:
        try:
            self._values.move_to_end(key)
            return self._values[key]
        except KeyError:  # another thread may take it out between the two
            return None

    def put(self, key: Hashable, value: Value) -> None:
        if self._size(value) > self._room:
            return
        self._values[key] = value
        self._values.move_to_end(key)
        while sum(self._size(each) for each in list(self._values.values())) > self._room:
            self._values.popitem(last=False)


def source_key(source: Any) -> Hashable | None:
    """Equal for sources that hold the same; None for what cannot be told without reading it.

    Of a path, the file is not opened.  Bytes, data URLs and samples count by a digest.
    """
    if is_path(source):
        state = file_state(source)
        return None if state is None or time.time_ns() - state.modified < _CLOCK_STEP else (os.fspath(source), state)
    if isinstance(source, str):
        return digest_of("url", source.encode("utf-8", "surrogatepass"))
    if isinstance(source, bytes):
        return digest_of("file", source)
    if _is_plain(source):
        return digest_of("pixels", source)
    if type(source) is tuple and len(source) == 2 and _is_plain(source[0]) and isinstance(source[1], (int, float)):
        return digest_of("samples", source[0]), source[1]
    return None


def part_key(part: MediaPart, branch: str | None, max_crops: int | None) -> Hashable | None:
    """Of a part and all else that decides what comes out when it is read; None where :func:`source_key` is."""
    if max_crops is not None and type(max_crops) is not int:  # 1.0 is equal to 1, and an error
        return None
    key = source_key(part.source)
    return None if key is None else (part.kind, part.n_items, key, branch, max_crops)


def digest_of(label: str, *data: bytes | npt.NDArray[Any]) -> bytes:
    """Of bytes, and of arrays with their types and shapes; 32 bytes."""
    digest = hashlib.blake2b(label.encode(), digest_size=32)
    for each in data:
        if isinstance(each, np.ndarray):
            digest.update(f"{each.dtype} {each.shape}".encode())
            digest.update(np.ascontiguousarray(each).data)
        else:
            digest.update(each)
    return digest.digest()


def _is_plain(array: Any) -> bool:
    """Whether the bytes of an array are all there is to it."""
    return type(array) is np.ndarray and array.dtype.kind in "iuf"
