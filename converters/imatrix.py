"""Importance matrices: for each weight matrix how large its inputs are, column by column, on a text that is typical.

The error of a weight counts as often as its input is large, so quantization weighs columns by their mean square.
Files are those of llama.cpp, in GGUF: ``<matrix>.in_sum2``, the sums of squares, and ``<matrix>.counts``, the tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from phi4edge import _core
from phi4edge.bundle import backbone_of
from phi4edge.converters.files import hashed_file
from phi4edge.converters.gguf_raw import NewTensor, entry, header
from phi4edge.converters.new_file import new_file, require_writable
from phi4edge.errors import BundleError, InputError, UsageError

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LARGEST_FILE = 1 << 30  # bytes
_ALIGNMENT = 32
_TOKENS_AT_ONCE = 64  # logits come with each step, and a vocabulary is large

Progress = Callable[[int, int], bool | None]  # (tokens done, tokens in all)


@dataclass(frozen=True)
class InputSquares:
    """Of one matrix."""

    sums: npt.NDArray[np.float64]  # [n_columns], of the squares of each input
    n_tokens: int


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix.  ``matrices`` has GGUF names: "blk.0.attn_qkv.weight"."""

    matrices: Mapping[str, InputSquares]
    chunk_size: int  # tokens of a piece of text that was read at once
    n_chunks: int
    datasets: Sequence[str] = field(default_factory=tuple)
    path: str = ""  # of the file, for errors

    def importance(self, tensor_name: str, n_columns: int) -> npt.NDArray[np.float32] | None:
        """Mean squares of the inputs, float32 [n_columns]; None when the matrix is not known or was never used.

        A head that was tied to the embedding when its inputs were counted is found under either name.
        Raises BundleError when the matrix has another number of columns.
        """
        found = self.matrices.get(tensor_name)
        if found is None and tensor_name == "output.weight":
            found = self.matrices.get("token_embd.weight")
        if found is None or found.n_tokens == 0:
            return None
        if len(found.sums) != n_columns:
            raise self._of_another_model(
                f"has {len(found.sums)} columns, expected {n_columns}", f"tensor '{tensor_name}'"
            )
        return (found.sums / found.n_tokens).astype(np.float32)

    def require_model(self, n_columns: Mapping[str, int]) -> None:
        """BundleError when it knows none of the matrices: names and their columns."""
        if all(self.importance(name, columns) is None for name, columns in n_columns.items()):
            raise self._of_another_model("knows none of the model's matrices")

    def _of_another_model(self, problem: str, where: str = "") -> BundleError:
        return BundleError(
            f"{problem}: it is of another model", path=self.path, field=where, hint="compute one with phi4edge imatrix"
        )


def collect_imatrix(
    model: str | os.PathLike[str],
    tokens_of: Callable[[Mapping[str, Any]], Sequence[Sequence[int]]],
    *,
    chunk_size: int = 512,
    dataset: str = "",
    n_threads: int = 1,
    isa: str = "",
    loading: Progress | None = None,
    progress: Progress = lambda done, total: None,
) -> Imatrix:
    """Runs a model over pieces of a text, each a sequence of its own, and adds up the squares of all inputs.

    tokens_of: the model's metadata to pieces of at most ``chunk_size`` token ids.
    The head is among the matrices, also a tied one, which is then called token_embd.weight: under that name llama.cpp
    asks for the importance of a matrix that is both, and so do we.

    Raises FileError, BundleError, InputError, UsageError, OutOfMemoryError, UnsupportedError, Cancelled.
    """
    file = _core.GgufFile(backbone_of(model))
    config = _core.read_config(file)
    pieces = tokens_of(file.metadata)
    total = sum(map(len, pieces))
    if total == 0:
        raise InputError("there is no text", hint="give a text of some thousand words")
    if chunk_size > config.context_length:
        raise UsageError(f"the model was made for {config.context_length} tokens", field="context", hint="give less")
    # A sequence that outgrows the original context of LongRoPE has other factors from its first token on.
    step = chunk_size if 0 < config.rope.original_context < chunk_size else _TOKENS_AT_ONCE
    logits_bytes = step * config.vocab_size * 4
    _core.require_memory(_core.memory_need(file, chunk_size, "f32"), max(0, _core.available_memory() - logits_bytes))
    session = _core.Session(_core.Model(file, n_threads, isa, loading), chunk_size, "f32")
    session.collect_input_squares(True)
    done = 0
    for piece in pieces:
        session.truncate(0)
        ids = np.asarray(piece, np.int32)
        for first in range(0, len(ids), step):
            progress(done, total)
            session.extend(ids[first : first + step], "all")
            done += len(ids[first : first + step])
    progress(done, total)
    matrices = {name: InputSquares(sums, n_tokens) for name, (sums, n_tokens) in session.input_squares().items()}
    for name, squares in matrices.items():
        if not np.isfinite(squares.sums).all():
            raise BundleError("its inputs are not finite", path=file.paths[0], field=f"tensor '{name}'")
    return Imatrix(matrices, chunk_size, len(pieces), (dataset,) if dataset else ())


def write_imatrix(target: str | os.PathLike[str], imatrix: Imatrix, *, force: bool = False) -> int:
    """Writes a file that llama.cpp reads too; the number of its bytes.  Raises UsageError, FileError, DiskError."""
    target = Path(target)
    require_writable(target, (), force=force)
    tensors, data = [], []
    for name in sorted(imatrix.matrices):
        squares = imatrix.matrices[name]
        tensors += [
            NewTensor(name + _SUMS, (len(squares.sums), 1), "F32"),
            NewTensor(name + _COUNTS, (1, 1), "F32"),
        ]
        data += [squares.sums.astype("<f4"), np.array([squares.n_tokens], "<f4")]
    entries = [
        entry("general.type", "imatrix"),
        entry("imatrix.datasets", list(imatrix.datasets)),
        entry("imatrix.chunk_count", imatrix.n_chunks),
        entry("imatrix.chunk_size", imatrix.chunk_size),
    ]
    start = header(entries, tensors, _ALIGNMENT)
    n_bytes = len(start) + sum(tensor.n_bytes + _ALIGNMENT for tensor in tensors)
    with new_file(target, n_bytes, force=force) as temporary, hashed_file(temporary) as output:
        output.write(start)
        for values in data:
            output.write(values)
            output.pad(_ALIGNMENT)
    return output.n_bytes


def read_imatrix(path: str | os.PathLike[str]) -> Imatrix:
    """An importance matrix, of ours or of llama.cpp, in GGUF.  Raises FileError, BundleError."""
    where = os.fspath(path)
    try:
        file = _core.GgufFile(path)
    except BundleError as error:
        if error.field != "magic":
            raise
        raise BundleError(
            "is not an importance matrix in GGUF",
            path=where,
            hint=f"an old one of llama.cpp becomes one with: llama-imatrix --in-file {where} -o new.gguf",
        ) from error
    return _Reader(file, where).read()


class _Reader:
    def __init__(self, file: _core.GgufFile, path: str) -> None:
        self._file = file
        self._path = path
        self._tensors = {tensor.name: tensor for tensor in file.tensors}

    def read(self) -> Imatrix:
        metadata = self._file.metadata
        kind = metadata.get("general.type")
        if kind != "imatrix":
            raise self._wrong(
                "general.type", f"is {kind!r:.40}, expected 'imatrix'", "compute one with phi4edge imatrix"
            )
        if self._file.size_on_disk > _LARGEST_FILE:
            raise self._wrong("", f"has {self._file.size_on_disk} bytes, more than the {_LARGEST_FILE} of any model")
        sizes = {name: metadata.get(f"imatrix.{name}", 0) for name in ("chunk_size", "chunk_count")}
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 0:
                raise self._wrong(f"imatrix.{name}", "is not a number of tokens or chunks")
        datasets = metadata.get("imatrix.datasets", [])
        if not isinstance(datasets, list) or not all(isinstance(name, str) for name in datasets):
            raise self._wrong("imatrix.datasets", "is not a list of names")
        names = [name.removesuffix(_SUMS) for name in self._tensors if name.endswith(_SUMS)]
        for name in self._tensors:
            if name.removesuffix(_SUMS if name.endswith(_SUMS) else _COUNTS) not in names:
                raise self._wrong(f"tensor '{name}'", f"does not belong to a pair of {_SUMS} and {_COUNTS}")
        if not names:
            raise self._wrong("", "has no matrices")
        matrices = {name: self._matrix(name) for name in names}
        return Imatrix(matrices, sizes["chunk_size"], sizes["chunk_count"], tuple(datasets), self._path)

    def _matrix(self, name: str) -> InputSquares:
        sums, counts = self._values(name + _SUMS), self._values(name + _COUNTS)
        if len(counts) != 1:
            raise self._wrong(
                f"tensor '{name}{_COUNTS}'",
                f"has {len(counts)} entries, expected 1: it is of a mixture of experts, which we do not have",
            )
        if counts[0] == 0 and sums.any():
            raise self._wrong(f"tensor '{name}{_COUNTS}'", "is 0, but there are sums")
        return InputSquares(sums, round(float(counts[0])))

    def _values(self, name: str) -> npt.NDArray[np.float64]:
        tensor, field_name = self._tensors.get(name), f"tensor '{name}'"
        if tensor is None:
            raise self._wrong(field_name, "is missing")
        if tensor.type_name != "F32":
            raise self._wrong(field_name, f"is {tensor.type_name}, expected F32")
        values = self._file.read(name).view("<f4").astype(np.float64)
        if not np.isfinite(values).all() or values.min() < 0:
            raise self._wrong(field_name, "has a value that is negative or not finite")
        return values

    def _wrong(self, where: str, problem: str, hint: str = "compute it again") -> BundleError:
        return BundleError(problem, path=self._path, field=where, hint=hint)
