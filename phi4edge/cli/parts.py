"""The parts of a bundle, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi4edge.bundle import BACKBONE, Manifest, Part
from phi4edge.cli import output


def parts_as_json(manifest: Manifest) -> list[dict[str, Any]]:
    return [
        {"role": part.role, "file": part.file, "n_bytes": part.n_bytes, "sha256": part.sha256, **part.details}
        for part in manifest.parts
    ]


def part_lines(manifest: Manifest) -> list[str]:
    """A table of the parts; the details in it come from a file and may be anything."""
    rows = [("part", "file", "format", "size")]
    rows += [(part.role, part.file, _format_of(part), output.bytes_text(part.n_bytes)) for part in manifest.parts]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        output.one_line(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]:>{widths[3]}}")
        for row in rows
    ]


def _format_of(part: Part) -> str:
    details = part.details
    if part.role != BACKBONE:
        rank = details.get("rank")
        return f"{details.get('type', details.get('precision', ''))}" + (f", rank {rank}" if rank else "")
    text = f"{details.get('mix', '')}"
    if isinstance(bits := details.get("bits_per_weight"), float):
        text += f", {bits:.2f} bits per weight"
    types = details.get("types")
    if isinstance(types, Mapping) and all(isinstance(size, int) for size in types.values()) and sum(types.values()):
        whole = sum(types.values())
        shares = ((name, 100 * size / whole) for name, size in types.items())
        text += ": " + ", ".join(f"{name} {share:.0f}%" for name, share in shares if share >= 0.5)
    if merged := details.get("merged_adapter"):
        text += f", with {merged} merged"
    return text
