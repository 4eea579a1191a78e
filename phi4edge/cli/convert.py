"""``phi4edge convert``: a checkpoint of Hugging Face to a bundle that the other commands run."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phi4edge import machine
from phi4edge.cli import output
from phi4edge.cli.options import Json, named_as_option
from phi4edge.cli.parts import part_lines, parts_as_json
from phi4edge.cli.progress import ProgressBar
from phi4edge.errors import UsageError

if TYPE_CHECKING:
    from phi4edge.converters.convert import Converted, Options

EXAMPLES = """
    phi4edge convert Phi-4-mini-instruct phi4-mini-q4
    phi4edge convert Phi-4-multimodal-instruct phi4-mm-q4 --quant q4_k_m --adapters switchable --encoders int8
    phi4edge convert Phi-4-multimodal-instruct phi4-vision-q3 --bits 3 --adapters merged:vision
    phi4edge convert Phi-4-mini-instruct bundle --quant q2_k --imatrix phi4-mini.imatrix --head q8_0
    phi4edge convert Phi-4-mini-instruct bundle --adapter law=my-peft-folder --force
"""

_DEFAULT_BITS = 4
_OPTIONS = ("quant", "head", "adapters", "adapter", "adapter_quant", "encoders", "imatrix")


@dataclass(frozen=True)
class Conversion:
    """What to make of a checkpoint; shared with ``pull``."""

    quant: Annotated[
        str | None,
        typer.Option(
            metavar="MIX",
            help="f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, q4_k_s, q4_0, iq4_nl, iq4_xs, q3_k_m, q3_k_s, q2_k "
            "or q2_k_s. [default: q4_k_m]",
        ),
    ] = None
    bits: Annotated[int | None, typer.Option(metavar="N", help="The same by size: 8, 4, 3 or 2 bits a weight.")] = None
    head: Annotated[
        str,
        typer.Option(
            metavar="TYPE",
            help="Type of the output matrix, which is Phi-4's embedding too: f16, q8_0, q6_k, q5_k, q4_k ... "
            "[default: the mix's, mostly q6_k]",
            show_default=False,
        ),
    ] = ""
    adapters: Annotated[
        str,
        typer.Option(
            metavar="MODE",
            help="switchable: each adapter in a file of its own; merged:NAME: one is added to the weights; none.",
        ),
    ] = "switchable"
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="Add an adapter of your own, in PEFT's format; may be repeated."),
    ] = None
    adapter_quant: Annotated[
        str, typer.Option(metavar="TYPE", help="Type of adapter files: f32, f16, q8_0, q5_0, q4_0 or iq4_nl.")
    ] = "q8_0"
    encoders: Annotated[
        str, typer.Option(metavar="PRECISION", help="Of the vision and audio encoders: fp32, fp16, int8 or none.")
    ] = "int8"
    imatrix: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="An importance matrix, which 'phi4edge imatrix' makes; helps below 5 bits."),
    ] = None

    def options(self) -> Options:
        """As the converter takes them; an error names the option."""
        from phi4edge.converters.convert import Options

        try:
            return Options(
                mix_name(self.quant, self.bits),
                head=self.head,
                adapters=self.adapters,
                adapter_quant=self.adapter_quant,
                user_adapters=_named_directories(self.adapter or []),
                encoders=self.encoders,
                imatrix=self.imatrix,
            )
        except UsageError as error:
            raise named_as_option(error, _OPTIONS) from None

    def run(self, source: str, target: str, *, force: bool, threads: int | None) -> Converted:
        """Converts with a progress bar."""
        from phi4edge.converters.convert import convert

        options = self.options()
        n_threads, warning = machine.clamp_threads(threads)
        if warning:
            output.warn(f"--threads: {warning}")
        with closing(ProgressBar("Converting", in_bytes=True)) as bar:
            try:
                return convert(source, target, **vars(options), force=force, n_threads=n_threads, progress=bar.item)
            except UsageError as error:
                raise named_as_option(error, _OPTIONS) from None


Force = Annotated[bool, typer.Option("--force", help="Replace a bundle that is there already.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", "-t", metavar="N", help="Threads to quantize with. [default: one per physical core]"),
]


def convert(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT_DIR", help="A directory with config.json and safetensors.")
    ],
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE_DIR", help="The directory to make.")],
    conversion: Conversion,
    force: Force = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint to a bundle: the language model, its adapters and its encoders."""
    done = conversion.run(checkpoint, bundle, force=force, threads=threads)
    if as_json:
        output.write_json(converted_as_json(bundle, done))
    else:
        output.write_text("\n".join(converted_lines(bundle, done)) + "\n")


def mix_name(quant: str | None, bits: int | None) -> str:
    from phi4edge.converters.mixes import BITS

    if quant is not None and bits is not None:
        raise UsageError("--quant and --bits say the same thing", field="--bits", hint="give one of them")
    if quant is not None:
        return quant
    if bits is not None and bits not in BITS:
        raise UsageError(f"{bits} is not possible", field="--bits", hint="choose 8, 4, 3 or 2")
    return BITS[_DEFAULT_BITS if bits is None else bits]


def converted_as_json(path: str, done: Converted) -> dict[str, Any]:
    manifest = done.bundle.manifest
    return {
        "bundle": path,
        "variant": manifest.variant,
        "parts": parts_as_json(manifest),
        "unused_tensors": dict(done.unused),
    }


def converted_lines(path: str, done: Converted) -> list[str]:
    lines = part_lines(done.bundle.manifest)
    for reason, names in done.unused.items():
        lines.append(f"not used: {len(names)} tensors ({reason})")
    return [*lines, f"{path} is ready: phi4edge chat {path}"]


def _named_directories(values: list[str]) -> dict[str, str]:
    """NAME=DIR, several times."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, directory = value.partition("=")
        if not (name and equals and directory):
            raise UsageError(f"'{value:.80}' is not NAME=DIR", field="--adapter", hint="for example --adapter law=lora")
        if name in found:
            raise UsageError(f"'{name:.40}' is given twice", field="--adapter")
        found[name] = directory
    return found
