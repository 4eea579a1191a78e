"""Speed and memory next to llama.cpp, on the same file, in turn, on the same machine.

``python -m benchmarks.against_llama_cpp MODEL.gguf -p 512 -n 32 -t 2 -r 5 --record benchmarks/records/decoder.jsonl``

Each side lives in a process of its own that waits at a pipe, so only one works at a time and peak memory is its own.
One round is: read bandwidth, then a prompt of -p tokens and -n single tokens on each side. Loading, tokenizing and
sampling are not in the time; both sides are fed the same ids, and both give the logits of the last token of each call.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.decoder_sides import SIDES, Worker, context_for

BUSY = 0.7  # load average at the start above which the machine is not quiet
REST_SECONDS = 0.3  # between turns: threads that spin while idle have gone to sleep by then
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Series:
    """One quantity of one side, over the rounds. Best is the largest for rates and the smallest for amounts."""

    case: str
    unit: str
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def best(self) -> float:
        return max(self.values) if self.unit.endswith("/s") else min(self.values)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all rounds; the result is what --json prints."""
    load_average = os.getloadavg()[0]  # before we add to it
    room = context_for(options.n_prompt + options.n_decode)
    workers = {name: start_worker(name, options, room) for name in options.sides}
    meter = start_worker(SIDES[0], options, room) if SIDES[0] in workers else None
    series = {name: [Series("prefill", "tok/s"), Series("decode", "tok/s")] for name in workers}
    bandwidth = Series("read bandwidth", "B/s")
    facts = {name: worker.ask(do="load") for name, worker in workers.items()}
    for worker in workers.values():  # pages are touched, buffers made, clocks up
        worker.ask(do="run", n_prompt=min(options.n_prompt, 64), n_decode=2)
    for _ in range(options.rounds):
        if meter:
            bandwidth.values.append(meter.ask(do="limits")["bytes_per_second"])
        for name, worker in workers.items():
            time.sleep(REST_SECONDS)
            answer = worker.ask(do="run", n_prompt=options.n_prompt, n_decode=options.n_decode)
            for row, n_tokens in zip(series[name], (options.n_prompt, options.n_decode), strict=True):
                if n_tokens:
                    row.values.append(n_tokens / answer[f"{row.case}_seconds"])
            facts[name] |= {"peak_bytes": answer["peak_bytes"]}
    for worker in [*workers.values(), *([meter] if meter else [])]:
        worker.close()
    for name in workers:
        series[name] = [row for row in series[name] if row.values]
        series[name] += [Series("load", "s", [facts[name]["load_seconds"]])]
        series[name] += [Series("peak memory", "B", [float(facts[name]["peak_bytes"])])]
    return {
        "model": options.model.name,
        "model_bytes": options.model.stat().st_size,
        "bytes_per_token": bytes_per_token(options.model),
        "n_prompt": options.n_prompt,
        "n_decode": options.n_decode,
        "threads": options.threads,
        "kv_type": options.kv_type,
        "rounds": options.rounds,
        "load_average": load_average,
        "commit": commit(),
        "cpu": cpu_name(),
        "isa": {name: fact["isa"] for name, fact in facts.items()},
        "bandwidth": as_record(bandwidth) if bandwidth.values else None,
        "sides": {name: {row.case: as_record(row) for row in rows} for name, rows in series.items()},
    }


def start_worker(name: str, options: argparse.Namespace, n_context: int) -> Worker:
    return Worker(name, options.model, n_context=n_context, n_threads=options.threads, kv_type=options.kv_type)


def as_record(row: Series) -> dict[str, Any]:
    return {"median": row.median, "best": row.best, "unit": row.unit}


def bytes_per_token(path: Path) -> int:
    """Bytes of weights that one decoded token reads: all tensors, but only a row of an embedding that is no head."""
    import gguf

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    if "output.weight" in sizes:
        sizes.pop("token_embd.weight")
    return sum(sizes.values())


def commit() -> str:
    """The short hash, with a + when the tree has changes; "unknown" outside a checkout."""
    try:
        git = ["git", "-C", str(ROOT)]
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("+" if changes.stdout.strip() else "")


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# --- what the user sees


def print_table(result: dict[str, Any]) -> None:
    n_tokens = {"prefill": result["n_prompt"], "decode": result["n_decode"]}
    print(f"{result['model']}, {result['model_bytes'] / 1e9:.2f} GB, {result['threads']} threads, {result['cpu']}")
    if result["load_average"] > BUSY:
        print(
            f"  Busy machine (load average {result['load_average']:.1f}): do not trust these figures. Spinning threads"
        )
        print("  of llama.cpp suffer most.")
    for name, isa in result["isa"].items():
        print(f"  {name}: {isa}")
    columns = list(result["sides"])
    title = "".join(f"{name:>22}" for name in columns)
    print(f"{'median (best)':<20}{title}{'ratio':>9}" if len(columns) > 1 else f"{'median (best)':<20}{title}")
    for case, first in result["sides"][columns[0]].items():
        scale, unit = {"B": (1e-9, "GB"), "s": (1.0, "s")}.get(first["unit"], (1.0, first["unit"]))
        label = f"{case} {n_tokens.get(case, '')}".strip() + f" [{unit}]"
        rows = [result["sides"][name][case] for name in columns]
        cells = [f"{row['median'] * scale:.2f} ({row['best'] * scale:.2f})" for row in rows]
        ratio = f"{rows[0]['median'] / rows[1]['median']:>9.2f}" if len(rows) > 1 else ""
        print(f"{label:<20}" + "".join(f"{cell:>22}" for cell in cells) + ratio)
    if result["bandwidth"]:
        rate = result["bandwidth"]["median"]
        print(f"{'read bandwidth':<20}{rate / 1e9:>17.1f} GB/s")
        for name in columns:
            if "decode" in result["sides"][name]:
                share = result["sides"][name]["decode"]["median"] * result["bytes_per_token"] / rate
                print(f"{'  used in decoding':<20}{name:>22}{share:>9.0%}")


def append_records(path: Path, result: dict[str, Any]) -> None:
    """One line per side and quantity."""
    path.parent.mkdir(parents=True, exist_ok=True)
    common = {
        key: result[key]
        for key in ("commit", "cpu", "threads", "model", "n_prompt", "n_decode", "kv_type", "rounds", "load_average")
    }
    lines = [
        common | {"system": name, "isa": result["isa"][name], "case": case} | row
        for name, rows in result["sides"].items()
        for case, row in rows.items()
    ]
    if result["bandwidth"]:
        lines.append(common | {"system": "machine", "isa": "", "case": "read bandwidth"} | result["bandwidth"])
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("-p", "--n-prompt", type=int, default=512)
    parser.add_argument("-n", "--n-decode", type=int, default=32)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--kv-type", choices=("i16", "q8_0"), default="i16", help="KV cache; llama.cpp: f16 for i16")
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    parser.add_argument("--record", type=Path, help="append one JSON line per side and quantity to this file")
    options = parser.parse_args()
    result = compare(options)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print_table(result)
    if options.record:
        append_records(options.record, result)


if __name__ == "__main__":
    main()
