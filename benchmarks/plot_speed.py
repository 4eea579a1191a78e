"""Records of ``benchmarks.kernels`` and ``benchmarks.speed`` as a roofline: how near to the limits of the machine.

``python -m benchmarks.plot_speed benchmarks/records/kernels.jsonl benchmarks/records/speed.jsonl docs/performance.svg``

To the right are more operations for each byte of weights, that is, more tokens at once; up are more operations per
second. The roof is what reading memory allows (the slope) and what the int8 dot product does alone (the top), as
measured between the same products. A line is the matrix product of one format for the numbers of tokens in the
records; a star is a whole model of it, reading a prompt or writing a token. The last record of a case counts.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.speed_rows import PROMPT
from phi4edge.cli.quality_plot import COLORS, MARKERS, STYLE

Record = dict[str, Any]
KERNEL_FIELDS = {
    "isa",
    "format",
    "tokens",
    "operations",
    "bytes",
    "operations_per_second",
    "read_bandwidth",
    "int8_peak",
}
MODEL_FIELDS = {"case", "isa", "model", "threads", "operations_per_token", "bytes_per_token", "medians"}
INCHES = (6.4, 5.2)  # of each instruction set, at 100 pixels each


def read_records(paths: Iterable[Path]) -> list[Record]:
    records = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise SystemExit(f"{path}: line {number}: is no JSON: {error}") from error
            if not isinstance(record, dict):
                raise SystemExit(f"{path}: line {number}: is no record")
            records.append(record)
    return records


def kernels_of(records: Sequence[Record]) -> list[Record]:
    """The last record of each instruction set, format and number of tokens."""
    kernels = [record for record in records if record.keys() >= KERNEL_FIELDS]
    last = {(record["isa"], record["format"], record["tokens"]): record for record in kernels}
    return sorted(last.values(), key=lambda record: (record["format"], record["tokens"]))


def models_of(records: Sequence[Record], isa: str) -> list[tuple[str, float, float]]:
    """(label, operations per byte, operations per second) of whole models."""
    last = {record["case"]: record for record in records if record.keys() >= MODEL_FIELDS}
    points = []
    for case, record in last.items():
        phase, _, mix = case.partition("-")
        rate = record["medians"].get("phi4edge tok/s")
        if rate is None or phase not in ("prefill", "decode") or record["isa"] != isa:
            continue
        n_tokens = PROMPT if phase == "prefill" else 1
        operations = record["operations_per_token"]
        points.append((f"{mix}, {phase}", n_tokens * operations / record["bytes_per_token"], rate * operations))
    return points


def draw(axes: Any, isa: str, kernels: Sequence[Record], models: Sequence[tuple[str, float, float]]) -> None:
    formats = list(dict.fromkeys(record["format"] for record in kernels))
    intensities = [record["operations"] / record["bytes"] for record in kernels] + [each[1] for each in models]
    bandwidth = statistics.median(record["read_bandwidth"] for record in kernels)
    peak = statistics.median(record["int8_peak"] for record in kernels)
    ends = min(intensities) / 1.5, peak / bandwidth, max(intensities) * 1.5
    roof = [min(peak, bandwidth * x) / 1e12 for x in ends]
    axes.plot(ends, roof, color="#000000", linewidth=1.2, label=f"{bandwidth / 1e9:.0f} GB/s, {peak / 1e12:.2f} T/s")
    for number, name in enumerate(formats):
        of_format = [record for record in kernels if record["format"] == name]
        axes.plot(
            [record["operations"] / record["bytes"] for record in of_format],
            [record["operations_per_second"] / 1e12 for record in of_format],
            color=COLORS[number % len(COLORS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            linewidth=1.0,
            linestyle="-" if number < len(COLORS) else "--",
            label=name,
        )
    for number, (label, x, y) in enumerate(models):
        color = COLORS[number % len(COLORS)]
        axes.plot([x], [y / 1e12], marker="*", markersize=11, color=color, linestyle="", label=label)
    axes.set(xscale="log", yscale="log", title=isa)
    axes.set(xlabel="operations per byte of weights", ylabel="T operations per second")
    axes.legend(loc="lower right", frameon=False, fontsize=8)


def plot(records: Sequence[Record]) -> bytes:
    """An SVG; the same one for the same records."""
    kernels = kernels_of(records)
    isas = list(dict.fromkeys(record["isa"] for record in kernels))
    if not isas:
        raise SystemExit("there is no record of benchmarks.kernels in these files")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(INCHES[0] * len(isas), INCHES[1]), layout="constrained")
        for axes, isa in zip(figure.subplots(1, len(isas), squeeze=False)[0], isas, strict=True):
            draw(axes, isa, [record for record in kernels if record["isa"] == isa], models_of(records, isa))
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Title": "Speed next to the machine's limits", "Date": None})
    return drawn.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("records", nargs="+", type=Path, help="files of JSON lines")
    parser.add_argument("svg", type=Path)
    options = parser.parse_args()
    if options.svg.suffix != ".svg":
        parser.error(f"{options.svg}: give a name that ends in .svg")
    options.svg.write_bytes(plot(read_records(options.records)))


if __name__ == "__main__":
    main()
