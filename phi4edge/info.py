"""What a model file is, from its header alone: no weights are read.

>>> inspect("model.gguf", context=8192).memory.total  # doctest: +SKIP
2839445504
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi4edge import _core, machine
from phi4edge.bundle import AUDIO, BACKBONE, VISION, Manifest, backbone_of, bundle_at
from phi4edge.embedded import model_path
from phi4edge.errors import BundleError, UsageError
from phi4edge.providers import CPU, memory_need

LARGEST_CONTEXT = 1 << 24  # tokens
DEFAULT_CONTEXT = 4096  # tokens; less when the model was trained on less

_UNKNOWN = (1 << 64) - 1  # available memory where the system does not tell

_HYPERPARAMETERS = (
    "n_layers",
    "hidden_size",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "ffn_size",
    "vocab_size",
    "context_length",
    "sliding_window",
    "rms_epsilon",
    "tied_head",
)
_ROPE_HYPERPARAMETERS = (
    "n_dims",
    "base",
    "interleaved",
    "position_scale",
    "attention_factor",
    "original_context",
    "factors_short",
    "factors_long",
)
_TOKENIZER_KINDS = {"gpt2": "bpe", "llama": "spm"}
_SPECIAL_ID_SUFFIX = "_token_id"


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """One entry of the file's tensor directory; ``shape`` is in ggml order, the row length first."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    n_bytes: int

    @property
    def n_values(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class TypeShare:
    """How much of the model is stored in one weight format."""

    type_name: str
    n_tensors: int
    n_values: int
    n_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.n_values if self.n_values else 0.0


@dataclass(frozen=True, slots=True)
class TokenizerSummary:
    """``special_ids`` maps a role such as ``"eos"`` to its id and the token's text."""

    kind: str
    pre: str
    n_vocab: int
    n_merges: int
    special_ids: Mapping[str, tuple[int, str]]
    flags: Mapping[str, bool]  # add_bos_token, add_space_prefix and the like, as far as the file has them


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes that the model takes with room for ``context`` tokens, next to what the machine has."""

    context: int
    kv_type: str
    weights: int
    kv_cache: int
    scratch: int
    available: int | None

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.scratch

    @property
    def fits(self) -> bool | None:
        """Whether it fits now; ``None`` where the system does not tell."""
        return None if self.available is None else self.total <= self.available


@dataclass(frozen=True, slots=True)
class ModelInfo:
    path: str
    paths: tuple[str, ...]  # all shards
    size_on_disk: int
    gguf_version: int
    architecture: str
    name: str
    hyperparameters: Mapping[str, Any]  # ``rope`` holds those of the rotary embedding
    tensors: tuple[TensorSummary, ...]
    types: tuple[TypeShare, ...]  # the largest first
    tokenizer: TokenizerSummary
    template: str | None  # source of the chat template
    memory: MemoryNeed
    metadata: Mapping[str, Any]  # in file order; an array is replaced by ``{"items": n}``
    warnings: tuple[str, ...]
    bundle: Manifest | None  # of the directory that was given

    @property
    def memory_when_used(self) -> dict[str, int]:
        """Bytes, about, that a request adds which needs an adapter or an encoder of the bundle, by their roles."""
        parts = () if self.bundle is None else self.bundle.parts
        return {
            part.role: memory_need(CPU, part.n_bytes, str(part.details.get("precision", "")))
            if part.role in (VISION, AUDIO)
            else part.n_bytes
            for part in parts
            if part.role != BACKBONE
        }

    @property
    def n_parameters(self) -> int:
        return sum(share.n_values for share in self.types)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(share.n_bytes for share in self.types) / max(1, self.n_parameters)


def inspect(path: str | os.PathLike[str] | None = None, context: int | None = None, kv_type: str = "i16") -> ModelInfo:
    """Reads the header of a GGUF file (all headers, of a split one), or of the one in a bundle directory.

    ``path`` is that of :func:`phi4edge.load`: ``None`` is the embedded model.
    ``context`` is the number of tokens to compute the memory for; the one that :func:`phi4edge.load` would choose if
    ``None``.  Raises FileError, BundleError, and UsageError for a context below 1.
    """
    check_options(context, kv_type)
    path = model_path(path)
    bundle = bundle_at(path)
    file = _core.GgufFile(path if bundle is None else bundle.part(BACKBONE))
    config = _core.read_config(file)
    metadata: dict[str, Any] = file.metadata
    tensors = tuple(TensorSummary(t.name, t.type_name, tuple(t.shape), t.n_bytes) for t in file.tensors)
    template = metadata.get("tokenizer.chat_template")
    n_context = choose_context(config, context)
    return ModelInfo(
        path=path,
        paths=tuple(file.paths),
        size_on_disk=file.size_on_disk,
        gguf_version=file.version,
        architecture=config.architecture,
        name=config.name,
        hyperparameters=_hyperparameters(config),
        tensors=tensors,
        types=_type_shares(tensors),
        tokenizer=_tokenizer(metadata),
        template=template if isinstance(template, str) else None,
        memory=_memory_need(file, n_context, kv_type),
        metadata={key: {"items": len(value)} if isinstance(value, list) else value for key, value in metadata.items()},
        warnings=(*file.warnings, *context_warnings(config, n_context)),
        bundle=None if bundle is None else bundle.manifest,
    )


def check_options(context: int | None, kv_type: str) -> None:
    """UsageError for a context or a type of the KV cache that no model can have."""
    if kv_type not in _core.kv_types():
        known = ", ".join(_core.kv_types())
        raise UsageError(f"'{kv_type}' is not a type of the KV cache", field="kv_type", hint=f"use one of {known}")
    if context is None:
        return
    if isinstance(context, bool) or not isinstance(context, int):
        raise UsageError(f"must be an integer, got {type(context).__name__}", field="context")
    if not 1 <= context <= LARGEST_CONTEXT:
        raise UsageError(f"must be from 1 to {LARGEST_CONTEXT}, got {context}", field="context")


def choose_context(config: _core.ModelConfig, context: int | None) -> int:
    """The context to use when the caller gave ``context``."""
    return context or min(config.context_length, DEFAULT_CONTEXT)


def context_warnings(config: _core.ModelConfig, context: int) -> list[str]:
    trained = config.context_length
    return [f"a context of {context} is beyond the {trained} tokens it was trained on"] if context > trained else []


def check(
    path: str | os.PathLike[str],
    threads: int | None = None,
    progress: Callable[[int, int], bool | None] | None = None,
) -> None:
    """Reads all weights of a file; BundleError names the first tensor that holds a NaN or an infinity.

    progress: called with (bytes done, bytes in all); False cancels.
    """
    n_threads, _ = machine.clamp_threads(threads)
    _core.check_finite(_core.GgufFile(backbone_of(path)), _core.ThreadPool(n_threads), progress)


def require_no_warnings(path: str, warnings: Sequence[str]) -> None:
    """BundleError when reading the file gave a warning; for callers that want a file to be exactly right."""
    if warnings:
        raise BundleError(warnings[0], path=path, hint="download it again, or do without --strict")


def _memory_need(file: _core.GgufFile, context: int, kv_type: str) -> MemoryNeed:
    need = _core.memory_need(file, context, kv_type)
    available = _core.available_memory()
    return MemoryNeed(
        context, kv_type, need.weights, need.kv_cache, need.scratch, None if available == _UNKNOWN else available
    )


def _hyperparameters(config: _core.ModelConfig) -> dict[str, Any]:
    rope = {name: getattr(config.rope, name) for name in _ROPE_HYPERPARAMETERS}
    return {name: getattr(config, name) for name in _HYPERPARAMETERS} | {"rope": rope}


def _type_shares(tensors: Sequence[TensorSummary]) -> tuple[TypeShare, ...]:
    by_type: dict[str, list[TensorSummary]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.type_name, []).append(tensor)
    shares = [
        TypeShare(type_name, len(group), sum(t.n_values for t in group), sum(t.n_bytes for t in group))
        for type_name, group in by_type.items()
    ]
    return tuple(sorted(shares, key=lambda share: -share.n_bytes))


def _tokenizer(metadata: Mapping[str, Any]) -> TokenizerSummary:
    """Lenient, unlike the tokenizer itself: a file with a broken one can still be looked at."""
    prefix = "tokenizer.ggml."
    values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    model = str(values.get("model", ""))
    tokens = values.get("tokens")
    tokens = tokens if isinstance(tokens, list) else []
    merges = values.get("merges")
    ids = {
        key.removesuffix(_SPECIAL_ID_SUFFIX): value
        for key, value in values.items()
        if key.endswith(_SPECIAL_ID_SUFFIX) and isinstance(value, int)
    }
    return TokenizerSummary(
        kind=_TOKENIZER_KINDS.get(model, str(model)),
        pre=str(values.get("pre", "")),
        n_vocab=len(tokens),
        n_merges=len(merges) if isinstance(merges, list) else 0,
        special_ids={
            role: (token, str(tokens[token]) if 0 <= token < len(tokens) else "") for role, token in ids.items()
        },
        flags={key: value for key, value in values.items() if isinstance(value, bool)},
    )
