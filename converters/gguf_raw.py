"""GGUF files below the level of the gguf package: metadata entries that keep their bytes, tensors row by row, headers.

An entry of the metadata is copied as it is, so that integers keep their width and nothing unknown to us is lost.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from phi4edge import _core
from phi4edge.converters.checkpoint import to_float32
from phi4edge.errors import BundleError, FileError

if TYPE_CHECKING:
    from typing_extensions import Self

FLOATS = ("F32", "F16", "BF16")

_LONGEST_HEADER = 1 << 30  # bytes
_VERSION, _DEFAULT_ALIGNMENT = 3, 32
# Numbers of the types of values, and the bytes of those of one size.
_U32, _STRING, _ARRAY = 4, 8, 9
_FIXED_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class GgufRows:
    """A GGUF file, or all shards of one, of which rows are read.  The decoder's own reader checked it before.

    Raises FileError, BundleError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = _core.GgufFile(path)
        self.paths = [Path(shard) for shard in self.file.paths]
        # Of tensors, in bytes; a power of two.
        self.alignment = int(self.file.metadata.get("general.alignment", _DEFAULT_ALIGNMENT))
        self._descriptors: list[int] = []
        try:
            for shard in self.paths:
                self._descriptors.append(_open(shard))
            self._states = [_state(descriptor) for descriptor in self._descriptors]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def raw(self, tensor: _core.TensorInfo, first_row: int, n_rows: int) -> bytes:
        """The bytes of some rows, as they are in the file."""
        row_bytes = tensor.n_bytes // n_rows_of(tensor.shape)
        return self._read(tensor.shard, tensor.offset + first_row * row_bytes, n_rows * row_bytes)

    def entries(self) -> list[tuple[str, bytes]]:
        """Keys of the metadata in the order of the file, each with all bytes of its entry."""
        ends = [tensor.offset for tensor in self.file.tensors if tensor.shard == 0]
        size = min(ends) if ends else os.fstat(self._descriptors[0]).st_size
        if size > _LONGEST_HEADER:
            raise BundleError(f"a header of {size} bytes is impossible", path=str(self.paths[0]))
        header = self._read(0, 0, size)
        try:
            return _entries(header)
        except (struct.error, KeyError) as error:  # it was valid when it was opened
            raise _changed(self.paths[0]) from error

    def require_unchanged(self) -> None:
        """BundleError when a file was written to since it was opened: what was read may be of two versions."""
        for path, descriptor, state in zip(self.paths, self._descriptors, self._states, strict=True):
            if _state(descriptor) != state:
                raise _changed(path)

    def _read(self, shard: int, offset: int, n_bytes: int) -> bytes:
        pieces = []
        while n_bytes > 0:
            try:
                piece = os.pread(self._descriptors[shard], n_bytes, offset)
            except OSError as error:
                raise FileError(f"cannot be read: {error.strerror}", path=str(self.paths[shard])) from error
            if not piece:
                raise BundleError("became shorter while we read it", path=str(self.paths[shard]))
            pieces.append(piece)
            offset += len(piece)
            n_bytes -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A line of the directory of a file that will be written."""

    name: str
    shape: tuple[int, ...]  # as in a GGUF file: the row length first
    type_name: str

    @property
    def n_bytes(self) -> int:
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[self.type_name]]
        return self.shape[0] // block_values * block_bytes * n_rows_of(self.shape)


def header(entries: Sequence[bytes], tensors: Sequence[NewTensor], alignment: int = _DEFAULT_ALIGNMENT) -> bytes:
    """All that comes before the data, padded; the data follow in this order, each tensor padded to the alignment."""
    out = bytearray(b"GGUF" + struct.pack("<IQQ", _VERSION, len(tensors), len(entries)))
    for entry in entries:
        out += entry
    offset = 0
    for tensor in tensors:
        out += _string(tensor.name) + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        out += struct.pack("<IQ", GGMLQuantizationType[tensor.type_name], offset)
        offset += tensor.n_bytes + -tensor.n_bytes % alignment
    return bytes(out + bytes(-len(out) % alignment))


def entry(key: str, value: int | str | Sequence[str]) -> bytes:
    """An entry of the metadata: an unsigned integer of 32 bits, a text, or a list of texts."""
    if isinstance(value, int):
        return _string(key) + struct.pack("<II", _U32, value)
    if isinstance(value, str):
        return _string(key) + struct.pack("<I", _STRING) + _string(value)
    return _string(key) + struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))


def n_rows_of(shape: Sequence[int]) -> int:
    n_rows = 1
    for size in shape[1:]:
        n_rows *= size
    return n_rows


def dequantize(raw: bytes, tensor: _core.TensorInfo, n_rows: int) -> npt.NDArray[np.float32]:
    """Rows as numbers, float32 [n_rows, n_columns]; the type must be one that the decoder reads."""
    n_columns = tensor.shape[0]
    if tensor.type_name in FLOATS:
        return to_float32(raw, tensor.type_name).reshape(n_rows, n_columns)
    blocks: npt.NDArray[np.uint8] = np.frombuffer(raw, np.uint8)
    return _core.dequantize(tensor.type_id, blocks, n_rows * n_columns).reshape(n_rows, n_columns)


def _entries(data: bytes) -> list[tuple[str, bytes]]:
    (n_entries,) = struct.unpack_from("<Q", data, 16)
    at, found = 24, []
    for _ in range(n_entries):
        value = _string_end(data, at) + 4
        (kind,) = struct.unpack_from("<I", data, value - 4)
        end = _value_end(data, value, kind)
        if end > len(data):
            raise struct.error("past the end")
        found.append((data[at + 8 : value - 4].decode("ascii", "replace"), data[at:end]))
        at = end
    return found


def _value_end(data: bytes, at: int, kind: int) -> int:
    if kind == _STRING:
        return _string_end(data, at)
    if kind != _ARRAY:
        return at + _FIXED_BYTES[kind]
    kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if kind != _STRING:
        return at + int(count) * _FIXED_BYTES[kind]  # arrays of arrays are refused when a file is opened
    for _ in range(count):
        at = _string_end(data, at)
    return at


def _string_end(data: bytes, at: int) -> int:
    (length,) = struct.unpack_from("<Q", data, at)
    return at + 8 + int(length)


def _string(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(encoded)) + encoded


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror}", path=str(path)) from error


def _state(descriptor: int) -> tuple[Any, ...]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _changed(path: Path) -> BundleError:
    return BundleError("was changed while we read it", path=str(path), hint="try again when nobody writes to it")
