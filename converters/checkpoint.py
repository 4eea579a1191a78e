"""Checkpoints on disk: config.json, and safetensors in one file or several, read row by row.

A safetensors file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, and the data.  The
whole header is checked before a tensor is read.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from phi4edge.errors import BundleError, FileError
from phi4edge.strict_json import parse_object, read_object

if TYPE_CHECKING:
    from typing_extensions import Self

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the format
_LARGEST_JSON = 64 << 20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Bytes per value.  F32, F16 and BF16 can be converted; the others may be there.
_DTYPES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
_DTYPES |= {"I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4}
_DTYPES |= {"I64": 8, "U64": 8, "F64": 8, "C64": 8}
FLOATS = frozenset(("F32", "F16", "BF16"))


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """Where a tensor of a checkpoint is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int  # of its first byte in the file
    n_bytes: int


class SafetensorsFile:
    """One open file.  Raises FileError, BundleError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)  # a pipe must not block us
        try:
            self._descriptor = os.open(path, flags)
        except OSError as error:
            raise FileError(f"cannot be read: {error.strerror}", path=str(path)) from error
        try:
            self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def read(self, offset: int, n_bytes: int) -> bytes:
        pieces = []
        while n_bytes > 0:
            try:
                piece = os.pread(self._descriptor, n_bytes, offset)
            except OSError as error:
                raise FileError(f"cannot be read: {error.strerror}", path=str(self.path)) from error
            if not piece:
                raise BundleError("became shorter while we read it", path=str(self.path))
            pieces.append(piece)
            offset += len(piece)
            n_bytes -= len(piece)
        return b"".join(pieces) if len(pieces) != 1 else pieces[0]

    def _read_header(self) -> dict[str, SourceTensor]:
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FileError("is not a regular file", path=str(self.path))
        size = status.st_size
        if size < 8:
            raise self._damaged(f"has only {size} bytes")
        length = int.from_bytes(self.read(0, 8), "little")
        if not 2 <= length <= _LONGEST_HEADER:
            raise self._damaged(f"a header of {length} bytes is impossible")
        if length > size - 8:
            raise self._damaged(f"its header ends at byte {length + 8}, past the end of the file ({size})")
        data = self.read(8, length)
        if not data.startswith(b"{"):
            raise self._damaged("its header does not begin with '{'")
        header = parse_object(data, str(self.path), "header")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._damaged("__metadata__ is not an object of strings")
        tensors = {name: self._entry(name, entry, 8 + length, size) for name, entry in header.items()}
        self._require_no_gaps(list(tensors.values()), 8 + length, size)
        return tensors

    def _entry(self, name: str, entry: Any, start: int, size: int) -> SourceTensor:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._damaged("is not described by dtype, shape and data_offsets", name)
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise self._damaged(f"dtype {dtype!r:.40} is unknown", name)
        if not isinstance(shape, list) or len(shape) > 8 or not all(_is_size(length) for length in shape):
            raise self._damaged(f"shape {shape!r:.80} is impossible", name)
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
            raise self._damaged(f"data_offsets {offsets!r:.80} are impossible", name)
        begin, end = offsets
        if not begin <= end <= size - start:
            raise self._damaged(f"its bytes {begin} to {end} are not in the file, which has {size - start}", name)
        expected = math.prod(shape) * _DTYPES[dtype]  # Python's integers do not wrap
        if end - begin != expected:
            raise self._damaged(f"{dtype} {shape} takes {expected} bytes, but it has {end - begin}", name)
        return SourceTensor(name, dtype, tuple(shape), self.path, start + begin, expected)

    def _require_no_gaps(self, tensors: list[SourceTensor], start: int, size: int) -> None:
        at = start
        for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.n_bytes)):
            if tensor.offset < at:
                raise self._damaged("overlaps the tensor before it", tensor.name)
            if tensor.offset > at:
                raise self._damaged(f"there is a hole of {tensor.offset - at} bytes before it", tensor.name)
            at += tensor.n_bytes
        if at != size:
            raise self._damaged(f"{size - at} bytes after the last tensor belong to none")

    def _damaged(self, problem: str, tensor: str = "") -> BundleError:
        field = f"tensor '{tensor[:200]}'" if tensor else ""
        return BundleError(problem, path=str(self.path), field=field, hint="download it again")


class Checkpoint:
    """A directory with config.json and safetensors; a context manager that keeps the files open."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            problem = "is not a directory" if self.directory.exists() else "does not exist"
            raise FileError(problem, path=str(self.directory), hint="give the directory of a checkpoint")
        self.config = self.read_json("config.json")
        self._files: dict[Path, SafetensorsFile] = {}
        self.tensors: dict[str, SourceTensor] = {}
        with ExitStack() as opened:  # closes what is open when a later file is wrong
            opened.callback(self.close)
            self._open_files()
            opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the directory; BundleError when it is missing or wrong."""
        path = self.directory / name
        if not path.exists():
            raise BundleError(f"has no {name}", path=str(self.directory), hint="a checkpoint of Hugging Face has one")
        return read_object(path, at_most=_LARGEST_JSON)

    def optional_json(self, name: str) -> dict[str, Any]:
        return self.read_json(name) if (self.directory / name).exists() else {}

    def raw(self, tensor: SourceTensor, first_row: int, n_rows: int) -> bytes:
        """The bytes of some rows; a vector is one row."""
        row_bytes = tensor.n_bytes // tensor.shape[0] if len(tensor.shape) > 1 else tensor.n_bytes
        return self._files[tensor.path].read(tensor.offset + first_row * row_bytes, n_rows * row_bytes)

    def array(self, tensor: SourceTensor) -> npt.NDArray[np.float32]:
        """All values of a tensor of a float type."""
        raw = self._files[tensor.path].read(tensor.offset, tensor.n_bytes)
        return to_float32(raw, tensor.dtype).reshape(tensor.shape)

    def _open_files(self) -> None:
        single, index = self.directory / SINGLE_FILE, self.directory / INDEX
        if single.exists():
            self._open(single)
        elif index.exists():
            self._open_shards(index)
        else:
            pickles = sorted(path.name for path in self.directory.iterdir() if path.suffix in _PICKLES)
            if pickles:
                raise BundleError(
                    f"pickle refused: {pickles[0]} may run any code when it is read",
                    path=str(self.directory),
                    hint="use a checkpoint in safetensors",
                )
            raise BundleError(f"has neither {SINGLE_FILE} nor {INDEX}", path=str(self.directory))
        if not self.tensors:
            raise BundleError("has no tensors", path=str(self.directory))

    def _open(self, path: Path) -> None:
        file = self._files[path] = SafetensorsFile(path)
        for name, tensor in file.tensors.items():
            if name in self.tensors:
                raise BundleError(
                    f"is in {self.tensors[name].path.name} too", path=str(path), field=f"tensor '{name[:200]}'"
                )
            self.tensors[name] = tensor

    def _open_shards(self, index: Path) -> None:
        places = read_object(index, at_most=_LARGEST_JSON).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
            raise BundleError("has no table of tensors and files", path=str(index), field="weight_map")
        for shard in sorted(set(places.values())):
            if Path(shard).name != shard or "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
                raise BundleError(f"'{shard[:200]}' is not the plain name of a safetensors file", path=str(index))
            if not (self.directory / shard).exists():
                raise BundleError(f"names {shard}, which is missing", path=str(index), hint="download it again")
            self._open(self.directory / shard)
        for name in sorted(places.keys() | self.tensors.keys()):
            found = self.tensors[name].path.name if name in self.tensors else "no file"
            if places.get(name) != found:
                raise BundleError(
                    f"is in {found} and not in {places.get(name, 'the index')}",
                    path=str(index),
                    field=f"tensor '{name[:200]}'",
                )


def to_float32(raw: bytes, dtype: str) -> npt.NDArray[np.float32]:
    """Little-endian F32, F16 or BF16 as numbers."""
    if dtype == "BF16":
        words: npt.NDArray[np.uint32] = np.frombuffer(raw, "<u2").astype(np.uint32)
        words <<= np.uint32(16)
        return words.view(np.float32)
    values: npt.NDArray[Any] = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[dtype])
    return values.astype(np.float32)


def row_pieces(n_rows: int, n_columns: int, values_at_once: int) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of pieces of about so many values."""
    step = max(1, values_at_once // max(1, n_columns))
    for first in range(0, n_rows, step):
        yield first, min(step, n_rows - first)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
