"""Time, memory and traffic of one conversion, from the outside: what a user waits for.

``python -m benchmarks.convert_full_size CHECKPOINT BUNDLE --quant q4_k_m --record benchmarks/records/convert.jsonl``

Options that are not listed in --help go to ``phi4edge convert``.  The checkpoint is dropped from the page cache first,
so reading it from the disk is in the time; --warm leaves it there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.against_llama_cpp import BUSY, ROOT, commit, cpu_name

SHOWN = {"s": (1.0, "s"), "B": (1e-9, "GB"), "B/s": (1e-6, "MB/s")}  # unit of a record -> scale and unit of the table


@dataclass(frozen=True)
class Quantity:
    case: str
    value: float
    unit: str


def measure(checkpoint: Path, bundle: Path, options: list[str]) -> tuple[list[Quantity], dict[str, Any]]:
    """Runs a conversion; the second value is what it printed with --json."""
    command = [sys.executable, "-m", "phi4edge", "convert", str(checkpoint), str(bundle), "--force", "--json", *options]
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        printed = child.stdout.read()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, but the kernel still has its counters
        wall = time.perf_counter() - started
        traffic = io_counters(child.pid)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"the conversion ended with {child.returncode}: {printed.strip()}")
    report: dict[str, Any] = json.loads(printed)
    quantities = [
        Quantity("wall time", wall, "s"),
        Quantity("user time", used.ru_utime, "s"),
        Quantity("system time", used.ru_stime, "s"),
        Quantity("peak memory", used.ru_maxrss * 1024, "B"),
        Quantity("read", traffic["rchar"], "B"),  # by system calls, from the disk or from the page cache
        Quantity("written", traffic["wchar"], "B"),
        Quantity("checkpoint", size_of(checkpoint), "B"),
        Quantity("bundle", size_of(bundle), "B"),
        Quantity("speed", size_of(checkpoint) / wall, "B/s"),
    ]
    return quantities, report


def io_counters(process: int) -> dict[str, int]:
    lines = Path(f"/proc/{process}/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def drop_from_cache(directory: Path) -> None:
    for path in directory.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # only pages that are on the disk can go
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def print_table(quantities: list[Quantity], report: dict[str, Any], load_average: float) -> None:
    print(f"{report['bundle']}, {report['variant']}, {cpu_name()}, {os.cpu_count()} processors")
    if load_average > BUSY:
        print(f"  Busy machine (load average {load_average:.1f}): do not trust these times.")
    parts = [Quantity(f"  {part['role']}", part["n_bytes"], "B") for part in report["parts"]]
    for row in [*quantities, *parts]:
        scale, unit = SHOWN[row.unit]
        print(f"{row.case:<18}{row.value * scale:>9.2f} {unit}")


def append_records(
    path: Path, quantities: list[Quantity], model: str, arguments: list[str], load_average: float, *, warm: bool
) -> None:
    """One line per quantity."""
    path.parent.mkdir(parents=True, exist_ok=True)
    common: dict[str, Any] = {
        "commit": commit(),
        "cpu": cpu_name(),
        "threads": os.cpu_count(),
        "model": model,
        "rounds": 1,
    }
    common |= {"options": " ".join(arguments), "warm": warm, "load_average": load_average, "system": "phi4edge"}
    with path.open("a", encoding="utf-8") as file:
        for row in quantities:
            values = {"case": row.case, "median": row.value, "best": row.value, "unit": row.unit}
            file.write(json.dumps(common | values) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT_DIR")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE_DIR")
    parser.add_argument("--warm", action="store_true", help="leave the checkpoint in the page cache")
    parser.add_argument("--record", type=Path, help="append one JSON line per quantity to this file")
    options, arguments = parser.parse_known_args()
    checkpoint, bundle = options.checkpoint.resolve(), options.bundle.resolve()
    load_average = os.getloadavg()[0]
    if not options.warm:
        drop_from_cache(checkpoint)
    quantities, report = measure(checkpoint, bundle, arguments)
    print_table(quantities, report, load_average)
    if options.record:
        append_records(options.record, quantities, checkpoint.name, arguments, load_average, warm=options.warm)


if __name__ == "__main__":
    main()
