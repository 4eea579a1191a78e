"""``phi4edge quantize``: a GGUF model in another type mix."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phi4edge import machine
from phi4edge.cli import output
from phi4edge.cli.convert import Threads
from phi4edge.cli.options import Json, named_as_option
from phi4edge.cli.progress import ProgressBar
from phi4edge.errors import UsageError

if TYPE_CHECKING:
    from phi4edge.converters.quantize import Quantized

EXAMPLES = """
    phi4edge quantize phi4-mini-f16.gguf phi4-mini-q4.gguf
    phi4edge quantize phi4-mini-f16.gguf phi4-mini-q2.gguf --quant q2_k --imatrix phi4-mini.imatrix
    phi4edge quantize phi4-mini-q8.gguf phi4-mini-q3.gguf --quant q3_k_m --head q4_k --allow-requantize
"""


def quantize(
    model: Annotated[
        str, typer.Argument(metavar="IN.gguf", help="A model in F32, F16 or BF16; the first of its shards; a bundle.")
    ],
    target: Annotated[str, typer.Argument(metavar="OUT.gguf", help="The file to make.")],
    quant: Annotated[
        str,
        typer.Option(
            metavar="MIX",
            help="f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q5_1, q5_0, q4_k_m, q4_k_s, q4_1, q4_0, iq4_nl, iq4_xs, "
            "q3_k_l, q3_k_m, q3_k_s, q2_k or q2_k_s.",
        ),
    ] = "q4_k_m",
    imatrix: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="An importance matrix, which 'phi4edge imatrix' makes; helps below 5 bits."),
    ] = None,
    head: Annotated[
        str,
        typer.Option(
            metavar="TYPE",
            help="Type of the output matrix, which is Phi-4's embedding too: f16, q8_0, q6_k, q5_k, q4_k ... "
            "[default: the mix's, mostly q6_k]",
            show_default=False,
        ),
    ] = "",
    allow_requantize: Annotated[
        bool,
        typer.Option("--allow-requantize", help="Quantize what is quantized already, which adds to the error."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Write a GGUF model in another type mix."""
    from phi4edge.converters.imatrix import read_imatrix
    from phi4edge.converters.quantize import quantize as quantize_model

    n_threads, warning = machine.clamp_threads(threads)
    if warning:
        output.warn(f"--threads: {warning}")
    with closing(ProgressBar("Quantizing", in_bytes=True)) as bar:
        try:
            done = quantize_model(
                model,
                target,
                quant,
                imatrix=None if imatrix is None else read_imatrix(imatrix),
                head=head,
                force=force,
                allow_requantize=allow_requantize,
                n_threads=n_threads,
                progress=bar.item,
            )
        except UsageError as error:
            raise named_as_option(error, ("quant", "head")) from None
    if done.without_importance:
        names = ", ".join(done.without_importance[:3]) + (" ..." if len(done.without_importance) > 3 else "")
        output.warn(f"{imatrix}: knows nothing of {len(done.without_importance)} matrices: {names}")
    if as_json:
        output.write_json(_as_json(done))
    else:
        output.write_text("\n".join(_lines(done)) + "\n")


def _as_json(done: Quantized) -> dict[str, Any]:
    return {
        "model": str(done.path),
        "mix": done.mix,
        "n_bytes": done.n_bytes,
        "sha256": done.sha256,
        "bits_per_weight": round(done.bits_per_weight, 4),
        "types": {name: {"values": values, "n_bytes": size} for name, (values, size) in done.types.items()},
        "without_importance": done.without_importance,
    }


def _lines(done: Quantized) -> list[str]:
    lines = [f"{'type':<8}{'bits/weight':>12}{'size':>12}"]
    for name, (values, size) in done.types.items():
        lines.append(f"{name:<8}{8 * size / values:>12.2f}{output.bytes_text(size):>12}")
    lines.append(f"{'all':<8}{done.bits_per_weight:>12.2f}{output.bytes_text(done.n_bytes):>12}")
    return [*lines, f"{done.path} is ready: phi4edge chat {done.path}"]
