"""``phi4edge info``: what a model file is and what it needs, without loading it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phi4edge.cli import output
from phi4edge.cli.loading import tell_if_embedded
from phi4edge.cli.options import Context, Json, KvType, ModelPath, named_as_option
from phi4edge.cli.parts import part_lines
from phi4edge.cli.progress import ProgressBar
from phi4edge.errors import UsageError

if TYPE_CHECKING:
    from phi4edge.info import ModelInfo

EXAMPLES = """
    phi4edge info
    phi4edge info model.gguf
    phi4edge info model.gguf --context 32768
    phi4edge info model.gguf --tensors
    phi4edge info model.gguf --check --strict
    phi4edge info model.gguf --json | jq .memory.total_bytes
"""

_LIST_SHOWN = 4  # entries of a long list, such as the RoPE factors


def info(
    model: ModelPath = None,
    context: Context = None,
    kv_type: Annotated[
        KvType, typer.Option(help="How past keys and values are stored.", rich_help_panel="The machine")
    ] = KvType.i16,
    tensors: Annotated[bool, typer.Option("--tensors", help="List all tensors too.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Read all weights too, and fail if one is not a finite number.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where there would be a warning.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a model is, without loading it."""
    from phi4edge.embedded import model_path
    from phi4edge.info import check as check_weights
    from phi4edge.info import inspect, require_no_warnings

    path = model_path(model)
    try:
        found = inspect(path, context, kv_type.value)
    except UsageError as error:
        raise named_as_option(error, ("context", "kv_type")) from None
    if strict:
        require_no_warnings(path, found.warnings)
    if check:
        with closing(ProgressBar("Checking", in_bytes=True)) as bar:
            check_weights(path, progress=bar)
    tell_if_embedded(model)
    if as_json:
        output.write_json(info_as_json(found, with_tensors=tensors))
        return
    for warning in found.warnings:
        output.warn(f"{path}: {warning}")
    output.write_text("\n".join(info_lines(found, with_tensors=tensors)) + "\n")


def info_as_json(found: ModelInfo, *, with_tensors: bool) -> dict[str, Any]:
    memory = found.memory
    document = asdict(found) | {
        "n_parameters": found.n_parameters,
        "bits_per_weight": found.bits_per_weight,
        "types": [asdict(share) | {"bits_per_weight": share.bits_per_weight} for share in found.types],
        "memory": {
            "context": memory.context,
            "kv_type": memory.kv_type,
            "weights_bytes": memory.weights,
            "kv_cache_bytes": memory.kv_cache,
            "scratch_bytes": memory.scratch,
            "total_bytes": memory.total,
            "available_bytes": memory.available,
            "fits": memory.fits,
            "when_used_bytes": dict(found.memory_when_used),
        },
    }
    document["tokenizer"]["special_ids"] = {
        role: {"id": token, "text": text} for role, (token, text) in found.tokenizer.special_ids.items()
    }
    if not with_tensors:
        document["tensors"] = len(found.tensors)
    return document


def info_lines(found: ModelInfo, *, with_tensors: bool) -> list[str]:
    """The same for people: sections of aligned columns."""
    lines = [*_table("File", _file_rows(found)), *_bundle_lines(found), *_table("Model", _model_rows(found))]
    lines += _table("Weights", _weight_rows(found))
    lines += _table("Tokenizer", _tokenizer_rows(found))
    lines += _table(f"Memory for {found.memory.context:,} tokens of context", _memory_rows(found))
    if with_tensors:
        rows = [
            (t.name, t.type_name, " x ".join(map(str, t.shape)), output.bytes_text(t.n_bytes)) for t in found.tensors
        ]
        lines += _table(f"Tensors ({len(rows)})", rows)
    return lines[:-1]


def _file_rows(found: ModelInfo) -> Iterable[Sequence[str]]:
    yield "path", found.path
    if len(found.paths) > 1:
        yield "shards", str(len(found.paths))
    yield "size", output.bytes_text(found.size_on_disk)
    yield "format", f"GGUF version {found.gguf_version}"


def _bundle_lines(found: ModelInfo) -> list[str]:
    if found.bundle is None:
        return []
    routes = [
        (what, ", ".join(f"{key} {value}" for key, value in route.items()) or "no adapter")
        for what, route in found.bundle.router.items()
        if isinstance(route, Mapping)
    ]
    parts = [f"  {line}" for line in part_lines(found.bundle)]
    routed = _table("What a request with ... uses", routes) if routes else []
    return [f"Bundle of a {output.one_line(found.bundle.variant)}", *parts, "", *routed]


def _model_rows(found: ModelInfo) -> Iterable[Sequence[str]]:
    yield "name", found.name or "(none)"
    yield "architecture", found.architecture
    yield "parameters", f"{found.n_parameters:,}"
    for name, value in found.hyperparameters.items():
        if name == "rope":
            for rope_name, rope_value in value.items():
                yield f"rope.{rope_name}", _value(rope_value)
        else:
            yield name, _value(value)


def _weight_rows(found: ModelInfo) -> Iterable[Sequence[str]]:
    for share in found.types:
        yield (
            share.type_name,
            f"{share.n_tensors} tensor{'s' if share.n_tensors > 1 else ''}",
            output.bytes_text(share.n_bytes),
            f"{share.bits_per_weight:.2f} bits per weight",
        )
    n_bytes = sum(share.n_bytes for share in found.types)
    yield (
        "all",
        f"{len(found.tensors)} tensors",
        output.bytes_text(n_bytes),
        f"{found.bits_per_weight:.2f} bits per weight",
    )


def _tokenizer_rows(found: ModelInfo) -> Iterable[Sequence[str]]:
    tokenizer = found.tokenizer
    yield "kind", f"{tokenizer.kind} {tokenizer.pre}".strip() or "(none)"
    yield "vocabulary", f"{tokenizer.n_vocab:,} tokens, {tokenizer.n_merges:,} merges"
    for role, (token, text) in tokenizer.special_ids.items():
        yield role, f"{token} {text}".strip()
    for name, value in tokenizer.flags.items():
        yield name, _value(value)
    yield "template", "none; the Phi-4 format" if found.template is None else f"{len(found.template):,} characters"


def _memory_rows(found: ModelInfo) -> Iterable[Sequence[str]]:
    memory = found.memory
    yield "weights", output.bytes_text(memory.weights)
    yield f"keys and values, {memory.kv_type}", output.bytes_text(memory.kv_cache)
    yield "scratch", output.bytes_text(memory.scratch)
    verdict = {True: "", False: " - more than is available", None: ""}[memory.fits]
    yield "total", output.bytes_text(memory.total) + verdict
    if memory.available is not None:
        yield "available now", output.bytes_text(memory.available)
    for name, n_bytes in found.memory_when_used.items():
        yield f"{name}, when used", output.bytes_text(n_bytes)


def _table(title: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """A heading, one line per row with aligned columns, and an empty line."""
    shown = [[output.one_line(cell) for cell in row] for row in rows]
    n_columns = max((len(row) for row in shown), default=0)
    widths = [max((len(row[i]) for row in shown if i < len(row) - 1), default=0) for i in range(n_columns)]
    cells = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in shown]
    return [title, *(f"  {line}" for line in cells), ""]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        if not value:
            return "none"
        shown = ", ".join(_value(item) for item in value[:_LIST_SHOWN])
        return f"{len(value)} values: {shown}{', ...' if len(value) > _LIST_SHOWN else ''}"
    return str(value)
