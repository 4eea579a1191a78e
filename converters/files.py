"""Files that are written once, front to back, with their SHA-256."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt

Item = TypeVar("Item")
Progress = Callable[[str, int, int], None]  # (name of the tensor, bytes of the source done, bytes in all)


@dataclass(frozen=True)
class Written:
    """What a part of a bundle became."""

    n_bytes: int
    sha256: str
    source_sha256: str  # of names, types, shapes and bytes of the tensors that were used


class HashedFile:
    """What is appended to a file, hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.n_bytes = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, data: npt.NDArray[Any] | bytes) -> None:
        view = memoryview(
            data if isinstance(data, bytes) else np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        )
        self._file.write(view)
        self._digest.update(view)
        self.n_bytes += len(view)

    def pad(self, alignment: int) -> None:
        self.write(b"\0" * (-self.n_bytes % alignment))


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; each is made in another thread while the caller works on the one before."""
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = worker.submit(next, items, None)
            yield item


@contextmanager
def hashed_file(path: Path) -> Iterator[HashedFile]:
    """A new file at ``path``; on the disk, not only in a cache, when the block ends without an exception."""
    with path.open("wb") as file:
        yield HashedFile(file)
        file.flush()
        os.fsync(file.fileno())
