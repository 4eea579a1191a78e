"""``phi4edge bench --quality``: what is left of a model in fewer bits, and what the wrong adapter makes of it.

The checkpoint is converted once for each variant, into a temporary directory, and asked everything that is beside it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import phi4edge
from phi4edge import machine
from phi4edge.adapters import NO_ADAPTER
from phi4edge.bundle import BACKBONE, Bundle
from phi4edge.cli import errors, output
from phi4edge.cli.options import Runtime, named_as_option
from phi4edge.cli.progress import ProgressBar
from phi4edge.errors import OutOfMemoryError, Phi4EdgeError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from phi4edge.cli.quality_plot import Plot
    from phi4edge.model import Model
    from phi4edge.quality import Measured
    from phi4edge.quality_items import Item

_PANEL = "Quality instead of speed"
_NANO = "nano"
_MERGED = "merged"


@dataclass(frozen=True)
class Quality:
    """What to ask, and of which variants."""

    quality: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Measure what a checkpoint still knows in fewer bits. A folder with checkpoint/ and questions in "
            "files such as heldout/heldout.json; or nano: the one in the clone of the repository that you are in.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    bits: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            help="Backbones to compare with float32: 8, 4, 3 or 2 bits; may be repeated. [default: all]",
            rich_help_panel=_PANEL,
        ),
    ] = None
    items: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Ask at most N questions of each family. [default: all]",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None
    plot: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.svg",
            help="Draw the results; needs matplotlib: pip install 'phi4edge[plot]'.",
            rich_help_panel=_PANEL,
        ),
    ] = None

    def __post_init__(self) -> None:
        for name in ("bits", "items", "plot"):
            if self.quality is None and getattr(self, name):
                raise UsageError("is for --quality", field=f"--{name}", hint="add --quality nano, or leave it out")


@dataclass(frozen=True)
class Variant:
    """A checkpoint as it is converted; what each part is stored as.

    adapters: a type of adapter files, or "merged": then a bundle with each adapter in its weights, and one without.
    """

    backbone: str
    adapters: str
    encoders: str
    compares: str = "parts"  # "bits": in how many the backbone is; "parts": how the other parts are stored

    def bundles(self, items: Sequence[Item]) -> Iterator[tuple[dict[str, Any], list[Item]]]:
        """Options of the converter for each bundle, and what it is asked."""
        from phi4edge.quality_items import adapters

        if self.adapters != _MERGED:
            yield {"adapter_quant": self.adapters, "encoders": self.encoders}, list(items)
            return
        for name in (None, *adapters(items)):
            asked = [item for item in items if item.adapter == name]
            if asked:
                encoders = self.encoders if any(item.has_media for item in asked) else "none"
                yield {"adapters": "none" if name is None else f"merged:{name}", "encoders": encoders}, asked


EXACT = Variant("f32", "f32", "fp32", "bits")  # what all others are compared with
ADAPTERS, ENCODERS = "q8_0", "int8"  # what `convert` makes by default
BACKBONES = {8: ("q8_0",), 4: ("q4_k_m",), 3: ("q3_k_m",), 2: ("q2_k", "q2_k_s")}
USUAL = Variant(BACKBONES[4][0], ADAPTERS, ENCODERS, "bits")
ROUTED = (EXACT, USUAL)  # that are asked with the wrong adapters too


def variants(bits: Sequence[int]) -> list[Variant]:
    """The exact one first; then by bits, each with adapters that can be switched and merged ones; then by part."""
    backbones = [backbone for each in bits for backbone in BACKBONES[each]]
    found = [EXACT, Variant(EXACT.backbone, _MERGED, EXACT.encoders, "bits")]
    for backbone in backbones:
        found += [Variant(backbone, adapters, ENCODERS, "bits") for adapters in (ADAPTERS, _MERGED)]
    found += [Variant(EXACT.backbone, adapters, EXACT.encoders) for adapters in ("f16", "q8_0", "q4_0", "iq4_nl")]
    found.append(Variant(EXACT.backbone, EXACT.adapters, ENCODERS))
    if USUAL.backbone in backbones:
        found += [Variant(USUAL.backbone, "q4_0", ENCODERS), Variant(USUAL.backbone, ADAPTERS, EXACT.encoders)]
    chosen: dict[tuple[str, str, str], Variant] = {}
    for each in found:
        chosen.setdefault((each.backbone, each.adapters, each.encoders), each)
    return list(chosen.values())


def bench_quality(options: Quality, runtime: Runtime, *, as_json: bool) -> None:
    from phi4edge.quality_items import item_files, nano_folder, read_items, some_of

    chosen = variants(_checked_bits(options.bits))
    plot = None
    if options.plot is not None:
        from phi4edge.cli.quality_plot import Plot

        plot = Plot(options.plot)
    folder = nano_folder() if options.quality == _NANO else Path(options.quality or "")
    items = [item for file in item_files(folder) for item in read_items(file)]
    document = _Bench(options.quality or "", folder, some_of(items, options.items), runtime).run(chosen)
    show(document, plot, as_json=as_json)


def show(document: dict[str, Any], plot: Plot | None, *, as_json: bool) -> None:
    """Prints the results and draws the plot; they are printed even if it cannot be written."""
    if not as_json:
        from phi4edge.cli.quality_tables import tables

        output.write_text(tables(document))
    error: Phi4EdgeError | None = None
    try:
        if plot is not None:
            plot.write(document)
    except BaseException as caught:
        error = errors.known_error(caught)
        if error is None or not as_json:
            raise
    finally:
        if as_json:
            output.write_json(document | (error.as_json() if error is not None else {}))
    if error is not None:
        raise typer.Exit(error.exit_code)


def _checked_bits(bits: Sequence[int] | None) -> list[int]:
    for each in bits or ():
        if each not in BACKBONES:
            raise UsageError(f"{each} is not possible", field="--bits", hint="choose 8, 4, 3 or 2")
    return [each for each in BACKBONES if not bits or each in bits]


@dataclass
class _Bench:
    """All variants of one checkpoint."""

    source: str  # as it was asked for
    folder: Path
    items: list[Item]
    runtime: Runtime
    threads: int = 1
    isa: str = ""
    exact: dict[Item, Any] = field(default_factory=dict)
    routing: list[dict[str, Any]] = field(default_factory=list)
    n_done: int = 0
    n_to_do: int = 0

    def run(self, chosen: Sequence[Variant]) -> dict[str, Any]:
        """What ``--json`` prints."""
        from phi4edge.quality_items import adapters

        self.threads, warning = machine.clamp_threads(self.runtime.threads)
        if warning:
            output.warn(f"--threads: {warning}")
        started = time.perf_counter()
        n_routed = sum(variant in ROUTED for variant in chosen)
        self.n_to_do = len(self.items) * (len(chosen) + n_routed * len(adapters(self.items)))
        with closing(ProgressBar("Asking")) as self.bar:
            results = [self._variant(variant) for variant in chosen]
        return {
            "quality": self.source,
            "version": phi4edge.__version__,
            "cpu": machine.cpu_name(),
            "isa": self.isa,
            "threads": self.threads,
            "kv_type": self.runtime.kv_type.value,
            "provider": self.runtime.provider,
            "seconds": round(time.perf_counter() - started, 1),
            "results": results,
            "routing": self.routing,
        }

    def _variant(self, variant: Variant) -> dict[str, Any]:
        from phi4edge.quality import measure
        from phi4edge.quality_items import require_adapters

        self.bar.title = f"{variant.backbone}, adapters {variant.adapters}, encoders {variant.encoders}"
        started = time.perf_counter()
        measured: list[Measured] = []
        manifests = []
        for options, asked in variant.bundles(self.items):
            with self._bundle(variant, options) as (bundle, model):
                self._require_memory(model)
                if variant.adapters != _MERGED:
                    require_adapters(asked, model.adapters)
                measured += measure(model, asked, self.exact, progress=self._tell)
                if variant in ROUTED:
                    self._wrong_adapters(variant, model, measured)
                manifests.append(bundle.manifest)
        place = {item: index for index, item in enumerate(self.items)}
        measured.sort(key=lambda each: place[each.item])  # not bundle by bundle
        parts = [part for manifest in manifests for part in manifest.parts]
        bits = next(part.details["bits_per_weight"] for part in parts if part.role == BACKBONE)
        return {
            **asdict(variant),
            "bits_per_weight": bits,
            "n_bytes": sum(part.n_bytes for part in parts),
            "n_bundles": len(manifests),
            "seconds": round(time.perf_counter() - started, 2),
            **_score(measured),
            "families": _by_family(measured),
        }

    def _wrong_adapters(self, variant: Variant, model: Model, right: Sequence[Measured]) -> None:
        """A row for each family, and for each adapter that is right for some of it, with all adapters beside it."""
        from phi4edge.quality import measure

        under = {}
        for name in (NO_ADAPTER, *model.adapters):
            asked = [item for item in self.items if (item.adapter or NO_ADAPTER) != name]
            wrong = measure(model, asked, self.exact, adapter=name, progress=self._tell)
            under[name] = [*wrong, *(each for each in right if (each.item.adapter or NO_ADAPTER) == name)]
        for family, adapter in dict.fromkeys((item.family, item.adapter) for item in self.items):
            row: dict[str, Any] = {"backbone": variant.backbone, "family": family, "right": adapter or NO_ADAPTER}
            row["adapters"] = {
                name: _score([m for m in each if (m.item.family, m.item.adapter) == (family, adapter)])
                for name, each in under.items()
            }
            self.routing.append(row)

    @contextmanager
    def _bundle(self, variant: Variant, options: dict[str, Any]) -> Iterator[tuple[Bundle, Model]]:
        """One bundle, as long as it is needed."""
        from phi4edge.converters.convert import convert
        from phi4edge.model import load
        from phi4edge.quality_items import CHECKPOINT

        with tempfile.TemporaryDirectory(prefix="phi4edge-") as directory:
            target = Path(directory) / "bundle"
            done = convert(self.folder / CHECKPOINT, target, variant.backbone, n_threads=self.threads, **options)
            try:
                model = load(
                    target,
                    threads=self.threads,
                    kv_type=self.runtime.kv_type.value,
                    isa=self.runtime.isa,
                    provider=self.runtime.provider,
                )
            except (UsageError, UnsupportedError) as error:
                raise named_as_option(error, ("kv_type", "provider", "threads")) from None
            with model:
                self.isa = model.isa
                yield done.bundle, model

    def _require_memory(self, model: Model) -> None:
        """The probabilities of the first variant stay in memory: for a large vocabulary, that is a lot."""
        from phi4edge.quality import n_positions

        needed, available = 4 * n_positions(model, self.items) * model.config.vocab_size, machine.total_memory()
        if available is not None and needed > available // 2:
            raise OutOfMemoryError(
                f"what this model says to all questions needs {output.bytes_text(needed)} of memory, and this computer "
                f"has {output.bytes_text(available)}",
                hint="ask fewer with --items",
            )

    def _tell(self) -> None:
        self.n_done += 1
        self.bar(self.n_done, max(self.n_to_do, self.n_done))


def _score(measured: Sequence[Measured]) -> dict[str, Any]:
    from phi4edge.quality import total

    return asdict(total(measured))


def _by_family(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    found = []
    for family in dict.fromkeys(each.item.family for each in measured):
        of_family = [each for each in measured if each.item.family == family]
        tasks = [
            {"task": task, **_score([each for each in of_family if each.item.task == task])}
            for task in dict.fromkeys(each.item.task for each in of_family)
        ]
        found.append({"family": family, **_score(of_family), "tasks": tasks})
    return found
