"""Speed of our quantizers next to llama.cpp's, on the same rows, in turn, on the same machine.

``python -m benchmarks.quantize -t 1 2 -r 9 --record benchmarks/records/quantize.jsonl``

Rows are Gaussian, in memory, and so is the output; megabytes are of float32 input. Both sides get the same importance,
or none. llama.cpp is ``ggml_quantize_chunk``, in as many threads as ours, each with an equal part of the rows.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.against_llama_cpp import BUSY, commit, cpu_name
from phi4edge import _core

Floats = npt.NDArray[np.float32]
Quantize = Callable[[Any, Floats, int, Floats | None], None]
MIN_SECONDS = 0.02  # of one turn: rows are repeated until they take that long


def phi4edge(format_info: Any, rows: Floats, n_threads: int, importance: Floats | None) -> None:
    _core.quantize(format_info.type_id, rows, n_threads, importance)


class LlamaCpp:
    """``ggml_quantize_chunk`` of the llama-cpp-python that is installed."""

    def __init__(self) -> None:
        import llama_cpp

        folder = Path(str(llama_cpp.__file__)).parent / "lib"
        self._chunk = ctypes.CDLL(str(next(folder.glob("libggml-base.*")))).ggml_quantize_chunk
        floats = ctypes.POINTER(ctypes.c_float)
        self._chunk.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, *3 * [ctypes.c_int64], floats]
        self._chunk.restype = ctypes.c_size_t
        self._pool = ThreadPoolExecutor(os.cpu_count())

    def __call__(self, format_info: Any, rows: Floats, n_threads: int, importance: Floats | None) -> None:
        floats = ctypes.POINTER(ctypes.c_float)
        n_rows, n_columns = rows.shape
        out = np.empty((n_rows, n_columns // format_info.block_values * format_info.block_bytes), np.uint8)
        source = rows.ctypes.data_as(floats)
        weights = None if importance is None else importance.ctypes.data_as(floats)

        def part(number: int) -> None:
            first, end = n_rows * number // n_threads, n_rows * (number + 1) // n_threads
            start = first * n_columns  # counted in values, from the start of both arrays
            self._chunk(format_info.type_id, source, out.ctypes.data, start, end - first, n_columns, weights)

        if n_threads == 1:
            part(0)
        else:
            list(self._pool.map(part, range(n_threads)))


def seconds_of(work: Callable[[], None]) -> float:
    """Of one run, out of as many as fill a turn."""
    started, n_runs = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < MIN_SECONDS:
        work()
        n_runs += 1
    return elapsed / n_runs


def compare(
    sides: dict[str, Quantize], format_info: Any, rows: Floats, n_threads: int, importance: Floats | None, rounds: int
) -> dict[str, dict[str, float]]:
    """Median and best rate of each side, in megabytes of input a second."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, quantize in sides.items():
            seconds = seconds_of(partial(quantize, format_info, rows, n_threads, importance))
            rates[name].append(rows.nbytes / seconds / 1e6)
    return {name: {"median": statistics.median(values), "best": max(values)} for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("formats", nargs="*", help="such as Q4_K; all quantized ones when none is named")
    parser.add_argument("-t", "--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("-r", "--rounds", type=int, default=9)
    parser.add_argument("--record", type=Path, help="append one JSON line per side and case to this file")
    options = parser.parse_args()

    load_average = os.getloadavg()[0]  # before we add to it
    rng = np.random.default_rng(5)
    rows = (0.02 * rng.standard_normal((256, 3072))).astype(np.float32)
    importance = np.exp(rng.normal(0, 1.5, rows.shape[1])).astype(np.float32)
    sides: dict[str, Quantize] = {"phi4edge": phi4edge, "llama.cpp": LlamaCpp()}
    isa = os.environ.get("PHI4EDGE_ISA") or _core.isas()[0]
    common = {"commit": commit(), "cpu": cpu_name(), "isa": isa, "rounds": options.rounds, "load_average": load_average}

    print(f"MB/s of float32 input, median (best) of {options.rounds}; {common['cpu']}, {isa}")
    if load_average > BUSY:
        print(f"  Busy machine (load average {load_average:.1f}): compare the best figures, which suffer least.")
    print(f"{'format':<8}{'threads':>8}{'importance':>12}{'phi4edge':>18}{'llama.cpp':>18}{'ratio of best':>15}")
    for format_info in _core.formats():
        if format_info.is_float or (options.formats and format_info.name not in options.formats):
            continue
        for n_threads in options.threads:
            for weights in (None, importance):
                rates = compare(sides, format_info, rows, n_threads, weights, options.rounds)
                ours, theirs = rates["phi4edge"], rates["llama.cpp"]
                cells = "".join(f"{'{median:.0f} ({best:.0f})'.format(**rate):>18}" for rate in (ours, theirs))
                given = "no" if weights is None else "yes"
                print(
                    f"{format_info.name:<8}{n_threads:>8}{given:>12}{cells}{ours['best'] / theirs['best']:>15.2f}",
                    flush=True,
                )
                if options.record:
                    append_records(options.record, common, format_info.name, n_threads, weights is not None, rates)


def append_records(
    path: Path, common: dict[str, Any], name: str, n_threads: int, weighted: bool, rates: dict[str, dict[str, float]]
) -> None:
    """One line per side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for side, rate in rates.items():
            case = {"system": side, "case": f"quantize {name}", "threads": n_threads, "importance": weighted}
            file.write(json.dumps(common | case | rate | {"unit": "MB/s"}) + "\n")


if __name__ == "__main__":
    main()
