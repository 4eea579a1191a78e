"""A GGUF model to the same model in another type mix, row by row: memory does not grow with the model."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from phi4edge import _core
from phi4edge.bundle import backbone_of
from phi4edge.converters.checkpoint import row_pieces
from phi4edge.converters.encode import VALUES_AT_ONCE, encode, require_fitting
from phi4edge.converters.files import HashedFile, Progress, hashed_file, one_ahead
from phi4edge.converters.gguf_raw import FLOATS, GgufRows, NewTensor, dequantize, entry, header, n_rows_of
from phi4edge.converters.imatrix import Imatrix
from phi4edge.converters.mixes import HEAD_TYPES, MIXES, fitting_type
from phi4edge.converters.new_file import new_file, require_writable
from phi4edge.errors import BundleError, UsageError

_OF_SHARDS = ("split.no", "split.count", "split.tensors.count")
_LAYER_MATRIX = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
# With four query heads or more for a key head, values are few and worth more bits: mix -> type, as llama.cpp has it.
_SHARED_VALUES = {"Q2_K": "Q4_K", "Q2_K_S": "Q4_K", "IQ4_NL": "Q5_K", "IQ4_XS": "Q5_K"}


@dataclass(frozen=True)
class Quantized:
    """What was written."""

    path: Path
    mix: str
    n_bytes: int
    sha256: str
    types: dict[str, tuple[int, int]]  # type -> values and bytes, the largest first
    without_importance: tuple[str, ...]  # quantized matrices that the importance matrix does not know

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(size for _, size in self.types.values()) / sum(values for values, _ in self.types.values())


@dataclass(frozen=True)
class _Step:
    source: _core.TensorInfo
    target: NewTensor
    importance: npt.NDArray[np.float32] | None = None  # of each column

    @property
    def is_copy(self) -> bool:
        return self.source.type_name == self.target.type_name

    @property
    def is_quantized(self) -> bool:
        return not self.is_copy and self.target.type_name not in FLOATS

    def weighted(self, imatrix: Imatrix) -> _Step:
        if not self.is_quantized:
            return self
        return replace(self, importance=imatrix.importance(self.source.name, self.source.shape[0]))


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    mix: str,
    *,
    imatrix: Imatrix | None = None,
    head: str = "",
    force: bool = False,
    allow_requantize: bool = False,
    n_threads: int = 1,
    progress: Progress = lambda tensor, done, total: None,
) -> Quantized:
    """Writes a GGUF file, or the backbone of a bundle, in one of the type mixes ("Q4_K_M") as a new GGUF file.

    imatrix: weighs the errors of each column.  head: a type of its own for the output matrix, or the tied embedding.
    allow_requantize: matrices that are quantized already may be quantized again, which adds to the error.
    Norms, and matrices that have their type already, are copied.  The same input gives the same bytes.

    Raises FileError, BundleError, UsageError, DiskError; then the target is as it was before.
    """
    target, mix, head = Path(target), _known(mix, MIXES, "quant"), _known(head, ("", *HEAD_TYPES), "head")
    with GgufRows(backbone_of(source)) as rows:
        inputs = [*rows.paths, *([Path(imatrix.path)] if imatrix is not None and imatrix.path else [])]
        require_writable(target, inputs, force=force)
        config = _core.read_config(rows.file)
        steps = [_step(rows, tensor, config, mix, head) for tensor in rows.file.tensors]
        if not allow_requantize:
            _require_floats(rows, steps)
        if imatrix is not None:
            imatrix.require_model({step.source.name: step.source.shape[0] for step in steps})
            steps = [step.weighted(imatrix) for step in steps]
        start = header(_metadata(rows, mix), [step.target for step in steps], rows.alignment)
        n_bytes = len(start) + sum(step.target.n_bytes + rows.alignment for step in steps)
        with new_file(target, n_bytes, force=force) as temporary:
            with hashed_file(temporary) as output:
                output.write(start)
                _write_tensors(output, rows, steps, n_threads, progress)
            rows.require_unchanged()
    # An embedding that is not the head as well has no inputs.
    no_inputs = () if config.tied_head else ("token_embd.weight",)
    unknown = [step.source.name for step in steps if step.is_quantized and step.importance is None]
    without = tuple(name for name in unknown if imatrix is not None and name not in no_inputs)
    return Quantized(target, mix, output.n_bytes, output.sha256, _by_type(steps), without)


def _step(rows: GgufRows, tensor: _core.TensorInfo, config: _core.ModelConfig, mix: str, head: str) -> _Step:
    if tensor.type_name not in {known.name for known in _core.formats()}:
        raise BundleError(
            f"is {tensor.type_name}, which we do not read",
            path=str(rows.paths[tensor.shard]),
            field=f"tensor '{tensor.name}'",
            hint="get the model in F16 or Q8_0",
        )
    return _Step(tensor, NewTensor(tensor.name, tensor.shape, _new_type(tensor, config, mix, head)))


def _new_type(tensor: _core.TensorInfo, config: _core.ModelConfig, mix: str, head: str) -> str:
    if n_rows_of(tensor.shape) == 1:
        return tensor.type_name  # norms and RoPE factors
    found = _LAYER_MATRIX.fullmatch(tensor.name)
    layer, role = (int(found[1]), found[2]) if found else (-1, tensor.name.removesuffix(".weight"))
    is_head = role == "output" or (role == "token_embd" and config.tied_head)
    if head and is_head:
        wanted = head
    elif role in ("attn_v", "attn_qkv") and config.n_heads >= 4 * config.n_kv_heads and mix in _SHARED_VALUES:
        wanted = _SHARED_VALUES[mix]
    else:
        role = "attn_qkv" if role == "attn_v" else role  # a mix gives the fused matrix the type that its values need
        wanted = MIXES[mix].type_of(role, layer, config.n_layers, tied=config.tied_head)
    return fitting_type(wanted, tensor.shape[0])


def _require_floats(rows: GgufRows, steps: Sequence[_Step]) -> None:
    for step in steps:
        if not step.is_copy and step.source.type_name not in FLOATS:
            raise BundleError(
                f"is already {step.source.type_name}; a second quantization adds to the error of the first",
                path=str(rows.paths[step.source.shard]),
                field=f"tensor '{step.source.name}'",
                hint="use a file in F32, F16 or BF16, or give --allow-requantize",
            )


def _metadata(rows: GgufRows, mix: str) -> list[bytes]:
    """The entries of the source, but for the two that tell the types and those that number shards."""
    file_type = gguf.LlamaFileType["ALL_F32" if mix == "F32" else f"MOSTLY_{mix}"]
    new = {
        key: entry(key, int(value))
        for key, value in (
            ("general.file_type", file_type),
            ("general.quantization_version", gguf.GGML_QUANT_VERSION),
        )
    }
    kept = {key: new.pop(key, data) for key, data in rows.entries() if key not in _OF_SHARDS}
    return [*kept.values(), *new.values()]


def _write_tensors(
    output: HashedFile, rows: GgufRows, steps: Sequence[_Step], n_threads: int, progress: Progress
) -> None:
    done, total = 0, sum(step.source.n_bytes for step in steps)
    for step, is_last, raw, values in one_ahead(_pieces(rows, steps)):
        progress(step.source.name, done, total)
        output.write(raw if step.is_copy else encode(values, step.target.type_name, n_threads, step.importance))
        if is_last:
            output.pad(rows.alignment)
        done += len(raw)
    progress("", done, total)


def _pieces(rows: GgufRows, steps: Sequence[_Step]) -> Iterator[tuple[_Step, bool, bytes, npt.NDArray[np.float32]]]:
    """What to do with some rows, whether they are the last of their tensor, their bytes, and float32 values."""
    for step in steps:
        n_columns, n_rows = step.source.shape[0], n_rows_of(step.source.shape)
        checked = "F32" if step.is_copy else step.target.type_name
        for first, n_piece in row_pieces(n_rows, n_columns, VALUES_AT_ONCE):
            raw = rows.raw(step.source, first, n_piece)
            values = dequantize(raw, step.source, n_piece)
            require_fitting(values, checked, Path(rows.paths[step.source.shard]), step.source.name)
            yield step, first + n_piece == n_rows, raw, values


def _by_type(steps: Sequence[_Step]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for tensor in (step.target for step in steps):
        values, n_bytes = found.get(tensor.type_name, (0, 0))
        found[tensor.type_name] = values + math.prod(tensor.shape), n_bytes + tensor.n_bytes
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def _known(name: str, choices: Iterable[str], field: str) -> str:
    if name.upper() not in choices:
        shown = ", ".join(choice for choice in choices if choice).lower()
        raise UsageError(f"'{name:.40}' is not known", field=field, hint=f"choose one of {shown}")
    return name.upper()
