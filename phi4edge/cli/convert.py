"""``phi4edge convert``: a checkpoint of Hugging Face to a bundle that the other commands run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phi4edge import machine
from phi4edge.cli import output
from phi4edge.cli.options import Json
from phi4edge.cli.progress import ProgressBar
from phi4edge.errors import UsageError

if TYPE_CHECKING:
    from phi4edge.bundle import Manifest

EXAMPLES = """
    phi4edge convert Phi-4-mini-instruct phi4-mini-q4
    phi4edge convert Phi-4-mini-instruct phi4-mini-q8 --bits 8
    phi4edge convert my-fine-tune bundle --quant q6_k --force
    phi4edge run phi4-mini-q4 "Why is the sky blue?"
"""

_DEFAULT_BITS = 4


def convert(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT_DIR", help="A directory with config.json and safetensors.")
    ],
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE_DIR", help="The directory to make.")],
    quant: Annotated[
        str | None,
        typer.Option(
            metavar="MIX",
            help="f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, q4_k_s, q4_0, iq4_nl, iq4_xs, q3_k_m, q3_k_s, q2_k "
            "or q2_k_s. [default: q4_k_m]",
        ),
    ] = None,
    bits: Annotated[int | None, typer.Option(metavar="N", help="The same by size: 8, 4, 3 or 2 bits a weight.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there already.")] = False,
    threads: Annotated[
        int | None,
        typer.Option("--threads", "-t", metavar="N", help="Threads to quantize with. [default: one per physical core]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint to a bundle.  Only the language model of it, for now."""
    from phi4edge.converters.convert import convert as convert_checkpoint

    n_threads, warning = machine.clamp_threads(threads)
    if warning:
        output.warn(f"--threads: {warning}")
    with closing(ProgressBar("Converting", in_bytes=True)) as bar:

        def show(tensor: str, done: int, total: int) -> None:
            bar.title = tensor or "Writing"
            bar(done, total)

        done = convert_checkpoint(
            checkpoint, bundle, mix_name(quant, bits), force=force, n_threads=n_threads, progress=show
        )
    if as_json:
        output.write_json(_as_json(bundle, done.bundle.manifest, done.plan.unused))
        return
    output.write_text("\n".join(_lines(bundle, done.bundle.manifest, done.plan.unused)) + "\n")


def mix_name(quant: str | None, bits: int | None) -> str:
    from phi4edge.converters.mixes import BITS

    if quant is not None and bits is not None:
        raise UsageError("--quant and --bits say the same thing", field="--bits", hint="give one of them")
    if quant is not None:
        return quant
    if bits is not None and bits not in BITS:
        raise UsageError(f"{bits} is not possible", field="--bits", hint="choose 8, 4, 3 or 2")
    return BITS[_DEFAULT_BITS if bits is None else bits]


def _as_json(path: str, manifest: Manifest, unused: Mapping[str, list[str]]) -> dict[str, Any]:
    return {
        "bundle": path,
        "variant": manifest.variant,
        "parts": [
            {"role": part.role, "file": part.file, "n_bytes": part.n_bytes, "sha256": part.sha256, **part.details}
            for part in manifest.parts
        ],
        "unused_tensors": dict(unused),
    }


def _lines(path: str, manifest: Manifest, unused: Mapping[str, list[str]]) -> list[str]:
    lines = [f"{'part':<14}{'mix':<9}{'types':<48}{'bits/weight':>11}{'size':>12}"]
    for part in manifest.parts:
        whole = sum(part.details["types"].values())
        types = ", ".join(f"{name} {100 * size / whole:.0f}%" for name, size in part.details["types"].items())
        bits, size = f"{part.details['bits_per_weight']:.2f}", output.bytes_text(part.n_bytes)
        lines.append(f"{part.role:<14}{part.details['mix']:<9}{types:<48}{bits:>11}{size:>12}")
    for reason, names in unused.items():
        lines.append(f"not used: {len(names)} tensors ({reason})")
    return [*lines, f"{path} is ready: phi4edge chat {path}"]
