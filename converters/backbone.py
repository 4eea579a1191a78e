"""The backbone as a GGUF file of the architecture phi3, which llama.cpp reads too; written tensor by tensor."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from phi4edge.converters.checkpoint import Checkpoint, SourceTensor, row_pieces, to_float32
from phi4edge.converters.encode import VALUES_AT_ONCE, Array, encode, encoded_bytes, require_fitting
from phi4edge.converters.files import Progress, Written, hashed_file, one_ahead
from phi4edge.converters.mixes import MIXES, fitting_type
from phi4edge.converters.variants import Assignment, BackboneConfig, Variant, match_tensors, read_config
from phi4edge.converters.vocabulary import Vocabulary, read_vocabulary

if TYPE_CHECKING:
    from phi4edge.converters.adapters import Adapter
    from phi4edge.converters.imatrix import Imatrix


@dataclass(frozen=True)
class BackbonePlan:
    """All that is known before a weight is read: every name, shape and type was checked."""

    variant: Variant
    config: BackboneConfig
    vocabulary: Vocabulary
    tensors: list[tuple[Assignment, SourceTensor, str]]  # the last is the type it will have
    file_type: int

    @property
    def n_bytes(self) -> int:
        """Of the weights in the new file."""
        return sum(encoded_bytes(assignment.shape, type_name) for assignment, _, type_name in self.tensors)

    @property
    def source_bytes(self) -> int:
        return sum(source.n_bytes for _, source, _ in self.tensors)

    def bytes_by_type(self) -> dict[str, tuple[int, int]]:
        """Type -> values and bytes, the largest first."""
        found: dict[str, tuple[int, int]] = {}
        for assignment, _, name in self.tensors:
            values, n_bytes = found.get(name, (0, 0))
            found[name] = values + math.prod(assignment.shape), n_bytes + encoded_bytes(assignment.shape, name)
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def plan_backbone(checkpoint: Checkpoint, variant: Variant, mix_name: str, head: str = "") -> BackbonePlan:
    """Checks everything but the values of the weights.  Raises BundleError, FileError.

    head: type of the output matrix, which is the embedding too where the two are tied; empty takes the mix's.
    """
    config = read_config(checkpoint)
    mix = MIXES[mix_name]
    if head:
        mix = replace(mix, head=head)
    tensors = []
    for assignment, source in match_tensors(checkpoint, variant, config):
        if len(assignment.shape) == 1:
            type_name = "F32"
        else:
            wanted = mix.type_of(assignment.role, assignment.layer, config.layers, tied=config.tied)
            type_name = fitting_type(wanted, assignment.shape[1])
        tensors.append((assignment, source, type_name))
    file_type = gguf.LlamaFileType["ALL_F32" if mix_name == "F32" else f"MOSTLY_{mix_name}"]
    vocabulary = read_vocabulary(checkpoint, config.vocab)
    return BackbonePlan(variant, config, vocabulary, tensors, int(file_type))


def write_backbone(
    path: Path,
    checkpoint: Checkpoint,
    plan: BackbonePlan,
    *,
    n_threads: int,
    progress: Progress,
    merge: Adapter | None = None,
    imatrix: Imatrix | None = None,
) -> Written:
    """Writes the file and syncs it.  BundleError names a tensor with a value that is not finite or does not fit.

    merge: an adapter that is added to the weights before they are quantized.
    """
    alignment = _write_header(path, plan)
    header = path.read_bytes()
    source_hash = hashlib.sha256()
    done, total = 0, plan.source_bytes
    with hashed_file(path) as output:
        output.write(header)
        for data in _rope_factors(plan.config).values():
            output.pad(alignment)
            output.write(data)
        for piece in one_ahead(_pieces(checkpoint, plan, merge, source_hash)):
            progress(piece.source.name, done, total)
            if piece.first_row == 0:
                output.pad(alignment)
            importance = None
            if imatrix is not None and len(piece.target.shape) == 2:
                importance = imatrix.importance(f"{piece.target.target}.weight", piece.target.shape[1])
            output.write(encode(piece.rows, piece.type_name, n_threads, importance))
            done += piece.n_source_bytes
        output.pad(alignment)
        progress("", done, total)
    return Written(output.n_bytes, output.sha256, source_hash.hexdigest())


@dataclass(frozen=True)
class _Piece:
    target: Assignment
    source: SourceTensor
    type_name: str
    first_row: int
    rows: Array
    n_source_bytes: int


def _pieces(
    checkpoint: Checkpoint, plan: BackbonePlan, merge: Adapter | None, source_hash: hashlib._Hash
) -> Iterator[_Piece]:
    """What is to be written, in order and in float32; source_hash gets all that was read for it."""
    for target, source, type_name in plan.tensors:
        source_hash.update(f"{source.name} {source.dtype} {source.shape}\n".encode())
        n_rows, n_columns = target.shape if len(target.shape) == 2 else (1, target.shape[0])
        if merge is not None and (pair := merge.modules.get(target.target)) is not None:
            source_hash.update(f"+ {pair.scale!r} * {pair.b.name} @ {pair.a.name}\n".encode())
            for tensor in (pair.a, pair.b):
                source_hash.update(merge.raw(tensor, 0, tensor.shape[0]))
        for first, n_piece in row_pieces(n_rows, n_columns, VALUES_AT_ONCE):
            raw = checkpoint.raw(source, first, n_piece)
            source_hash.update(raw)
            rows = to_float32(raw, source.dtype).reshape(n_piece, n_columns)
            if merge is not None and (delta := merge.delta(target.target, first, n_piece)) is not None:
                rows = rows + delta
            require_fitting(rows, type_name, source.path, source.name)
            yield _Piece(target, source, type_name, first, rows, len(raw))


def _write_header(path: Path, plan: BackbonePlan) -> int:
    """Metadata and the tensor directory; returns the alignment of the data that follow."""
    writer = gguf.GGUFWriter(str(path), "phi3")
    try:
        _add_config(writer, plan)
        plan.vocabulary.write_to(writer)
        # The factors come first: llama.cpp reads head_dim / 2 of them, and at the end of a file it would crash.
        for name, data in _rope_factors(plan.config).items():
            writer.add_tensor_info(name, data.shape, np.dtype(np.float32), data.nbytes, GGMLQuantizationType.F32)
        for assignment, _, type_name in plan.tensors:
            writer.add_tensor_info(
                f"{assignment.target}.weight",
                assignment.shape,
                np.dtype(np.float32),
                encoded_bytes(assignment.shape, type_name),
                GGMLQuantizationType[type_name],
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    return int(writer.data_alignment)


def _add_config(writer: gguf.GGUFWriter, plan: BackbonePlan) -> None:
    config = plan.config
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(plan.variant.title)
    n_values = sum(math.prod(assignment.shape) for assignment, _, _ in plan.tensors)
    writer.add_size_label(gguf.size_label(n_values, n_values, 0, 0))
    writer.add_context_length(config.context)
    if config.original_context:
        writer.add_rope_scaling_orig_ctx_len(config.original_context)
        writer.add_rope_scaling_attn_factors(config.attention_factor)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.ffn)
    writer.add_block_count(config.layers)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_epsilon)
    writer.add_rope_dimension_count(config.rotary_dims)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_sliding_window(config.sliding_window)
    if config.head_dim * config.heads != config.hidden:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_file_type(plan.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _rope_factors(config: BackboneConfig) -> dict[str, Array]:
    if not config.original_context:
        return {}
    return {
        "rope_factors_long.weight": np.array(config.long_factors, np.float32),
        "rope_factors_short.weight": np.array(config.short_factors, np.float32),
    }
