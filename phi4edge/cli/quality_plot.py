"""What ``bench --quality`` found, as a picture: right answers and divergence over the bits of the backbone."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from phi4edge.errors import UnsupportedError, UsageError

Results = Sequence[Mapping[str, Any]]

_FIELD = "--plot"
_TITLE = "Exactly right answers of each kind, and divergence from float32, by bits per weight"
_INCHES = (8.0, 6.4)  # at 100 pixels each
# Of Okabe and Ito, for all kinds of eyes; a yellow that is too light on white is left out.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
STYLE: Any = {  # Any: whether matplotlib and its types are there or not
    "svg.fonttype": "none",  # text as text, in the reader's font
    "svg.hashsalt": "phi4edge",  # the same file for the same results
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
}


class Plot:
    """An SVG file to be made; whether it can be is known before anything is measured.

    Raises UnsupportedError without matplotlib, UsageError for another ending or a directory of that name, FileError for
    no directory to put it in.
    """

    def __init__(self, path: str) -> None:
        from phi4edge.converters.new_file import disk_errors, require_writable

        self._path = Path(path)
        if self._path.suffix.lower() != ".svg":
            raise UsageError("only SVG is written", path=path, field=_FIELD, hint="give a name that ends in .svg")
        with disk_errors(self._path):
            require_writable(self._path, (), force=True)
            with suppress(FileNotFoundError):
                self._path.lstat()  # a name that is too long is told now, not after the measuring
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise UnsupportedError(
                "needs the package 'matplotlib'", field=_FIELD, hint="pip install 'phi4edge[plot]'"
            ) from error
        self._new_figure = Figure  # not pyplot, which looks for a screen

    def write(self, document: Mapping[str, Any]) -> None:
        """Draws what ``--json`` prints.  Raises DiskError, FileError, UsageError; then a file there is as it was."""
        import matplotlib

        from phi4edge.converters.new_file import new_file

        results = [each for each in document["results"] if each["compares"] == "bits"]
        by_bits = sorted(results, key=lambda each: float(each["bits_per_weight"]))
        places = {name: place for place, name in enumerate(dict.fromkeys(each["backbone"] for each in by_bits))}
        with matplotlib.rc_context(STYLE):
            figure = self._new_figure(figsize=_INCHES, layout="constrained")
            above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
            _draw_shares(above, results, places)
            _draw_divergence(below, results, places)
            drawn = io.BytesIO()
            figure.savefig(drawn, format="svg", metadata={"Title": _TITLE, "Date": None})
        with new_file(self._path, drawn.tell(), force=True) as temporary, temporary.open("wb") as file:
            file.write(drawn.getvalue())
            file.flush()
            os.fsync(file.fileno())


def _draw_shares(axes: Any, results: Results, places: Mapping[str, int]) -> None:
    for number, family in enumerate(results[0]["families"]):
        name, color = family["family"], COLORS[number % len(COLORS)]
        for merged in (True, False):  # the line with the label comes last, on top
            shares = {
                result["backbone"]: 100 * found["n_right"] / found["n"]
                for result in _of_kind(results, merged)
                for found in result["families"]
                if found["family"] == name
            }
            label = "" if merged else f"{name} ({family['n']})"
            _draw(axes, shares, places, color, MARKERS[number % len(MARKERS)], merged=merged, label=label)
    axes.set_ylabel("exactly right answers, %")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _draw_divergence(axes: Any, results: Results, places: Mapping[str, int]) -> None:
    exact = results[0]["backbone"]  # it has none but the noise of rounding
    for merged in (True, False):
        values = {
            result["backbone"]: result["divergence"]
            for result in _of_kind(results, merged)
            if result["backbone"] != exact and result["divergence"] > 0
        }
        label = "adapters merged" if merged else "switchable"
        _draw(axes, values, places, "#000000", "o", merged=merged, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("divergence from float32, nats")
    bits = {result["backbone"]: result["bits_per_weight"] for result in results}
    axes.set_xticks(list(places.values()), [f"{bits[name]:.1f}\n{name}" for name in places])
    axes.set_xlabel("bits per weight of the backbone, and its type")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _draw(
    axes: Any,
    values: Mapping[str, float],
    places: Mapping[str, int],
    color: str,
    marker: str,
    *,
    merged: bool,
    label: str,
) -> None:
    """A line over backbones; dashed and hollow where adapters are merged."""
    axes.plot(
        [places[backbone] for backbone in values],
        list(values.values()),
        color=color,
        marker=marker,
        markersize=6,
        markerfacecolor="white" if merged else color,
        linestyle="--" if merged else "-",
        linewidth=1.2 if merged else 1.8,
        label=label or "_",  # one that begins so is in no legend
    )


def _of_kind(results: Results, merged: bool) -> Results:
    return [result for result in results if (result["adapters"] == "merged") == merged]
