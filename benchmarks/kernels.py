"""Speed of the matrix kernels next to the limits of the machine, for each instruction set, format and number of tokens.

``python -m benchmarks.kernels -t 2 --record benchmarks/records/kernels.jsonl``
``python -m benchmarks.kernels --isa x86_avx2 --format Q4_K Q6_K --tokens 1 512 -t 1 --pool 0``

One matrix, packed, with random weights. Products take copies of it in turn that are larger together than any cache
(``--pool``), as a decoder's weights are; with ``--pool 0`` there is one copy, in whatever cache holds it. Limits are
measured between the products of each case: reading memory, and the int8 dot product alone (which is no limit of float
formats). Quantising the activations is not in the time, which runs from barrier to barrier of all threads, in C++.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.against_llama_cpp import BUSY, commit, cpu_name
from benchmarks.decoder_sides import BANDWIDTH_BYTES
from benchmarks.random_gguf import block_maker, deviation_of
from phi4edge import _core

TOKENS = (1, 2, 4, 8, 16, 32, 128, 512)
LEAST_PRODUCTS = 3  # of a round
MOST_PRODUCTS = 10_000
FORMATS = {each.name: each for each in _core.formats()}


def packed_matrix(format_name: str, n_rows: int, n_columns: int) -> _core.PackedMatrix:
    """Random weights with the size of trained ones."""
    info = FORMATS[format_name]
    if n_columns % info.block_values:
        raise SystemExit(f"--columns: {n_columns} is no multiple of {info.block_values}, the block of {format_name}")
    make = block_maker(format_name, deviation_of("ffn_up", n_columns), np.random.Generator(np.random.SFC64(0)))
    blocks = np.ascontiguousarray(make(n_rows * n_columns // info.block_values)).view(np.uint8).reshape(-1)
    return _core.PackedMatrix(info.type_id, blocks, n_rows, n_columns)


def measure(
    matrix: _core.PackedMatrix, isa: str, n_tokens: int, pool: _core.ThreadPool, options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of all products, and the limits between them."""
    x = np.random.default_rng(0).standard_normal((n_tokens, options.columns), np.float32)
    n_copies = max(1, -(-options.pool * 10**6 // matrix.n_bytes))
    seconds: list[float] = []
    bandwidth: list[float] = []
    peak: list[float] = []
    n_products = LEAST_PRODUCTS
    for _ in range(options.rounds):
        bandwidth.append(_core.read_bandwidth(pool.size, BANDWIDTH_BYTES, options.seconds / 2))
        peak.append(_core.int8_peak(isa, pool.size, options.seconds / 2))
        times = matrix.time_multiply(x, pool, n_products, n_copies, isa)
        seconds += times
        wanted = round(options.seconds / statistics.fmean(times))  # a busy machine must not take minutes
        n_products = min(max(wanted, LEAST_PRODUCTS), MOST_PRODUCTS)
    median = statistics.median(seconds)
    n_operations = 2 * options.rows * options.columns * n_tokens
    return {
        "median": median,
        "best": min(seconds),
        "unit": "s",
        "products": len(seconds),
        "copies": n_copies,
        "bytes": matrix.n_bytes,
        "operations": n_operations,
        "bytes_per_second": matrix.n_bytes / median,
        "operations_per_second": n_operations / median,
        "read_bandwidth": statistics.median(bandwidth),
        "int8_peak": statistics.median(peak),
    }


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    pool = _core.ThreadPool(options.threads)
    common = {
        "commit": commit(),
        "cpu": cpu_name(),
        "threads": options.threads,
        "load_average": os.getloadavg()[0],  # before we add to it
        "rows": options.rows,
        "columns": options.columns,
        "pool_bytes": options.pool * 10**6,
        "rounds": options.rounds,
    }
    records = []
    if not options.json:
        print_title(common)
    for format_name in options.format:
        matrix = packed_matrix(format_name, options.rows, options.columns)
        for isa in options.isa:
            for n_tokens in options.tokens:
                case = {"case": "kernel", "isa": isa, "format": format_name, "tokens": n_tokens}
                records.append(common | case | measure(matrix, isa, n_tokens, pool, options))
                if not options.json:
                    print_row(records[-1])
    return records


def print_title(common: dict[str, Any]) -> None:
    print(f"{common['cpu']}, {common['threads']} threads, {common['rows']} x {common['columns']} weights")
    if common["load_average"] > BUSY:
        print(f"  Busy machine (load average {common['load_average']:.1f}): do not trust these figures.")
    title = f"{'format':<8}{'instructions':<16}{'tokens':>7}{'ms (best)':>20}{'GB/s':>8}{'of':>7}{'':>6}"
    print(title + f"{'T int8/s':>10}{'of':>7}")


def print_row(record: dict[str, Any]) -> None:
    times = f"{record['median'] * 1e3:.3f} ({record['best'] * 1e3:.3f})"
    bandwidth, peak = record["bytes_per_second"], record["operations_per_second"]
    print(
        f"{record['format']:<8}{record['isa']:<16}{record['tokens']:>7}{times:>20}"
        f"{bandwidth / 1e9:>8.1f}{record['read_bandwidth'] / 1e9:>7.1f}{bandwidth / record['read_bandwidth']:>6.0%}"
        f"{peak / 1e12:>10.3f}{record['int8_peak'] / 1e12:>7.3f}{peak / record['int8_peak']:>6.0%}",
        flush=True,
    )


def main() -> None:
    quantized = [name for name, each in FORMATS.items() if not each.is_float]
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--isa", nargs="+", choices=_core.isas(), default=_core.isas(), metavar="NAME")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=quantized, metavar="NAME")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="N")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=3072)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=0.2, help="of products in a round, and of both limits together"
    )
    parser.add_argument("--pool", type=int, default=400, metavar="MB", help="size of all copies; 0: one copy")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    parser.add_argument("--record", type=Path, help="append one JSON line per case to this file")
    options = parser.parse_args()
    lines = [json.dumps(record) + "\n" for record in run(options)]
    if options.json:
        print("".join(lines), end="")
    if options.record:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        with options.record.open("a", encoding="utf-8") as file:
            file.writelines(lines)


if __name__ == "__main__":
    main()
