"""The table of speeds: each row a case that one command measures, alone or with all others.

``python -m benchmarks.speed prefill-Q4_K_M decode-Q4_K_M --models /tmp/models --record benchmarks/records/speed.jsonl``
``python -m benchmarks.speed --list``

Models have the full shape and random weights; what is missing in ``--models`` is written there first, 1.7 to 4.1 GB
each. Sides take turns, a prompt or some tokens of an answer each, and the limit of the machine is measured between any
two of them: reading memory, or the int8 dot product alone. Shares and ratios are of a round, and the median of the
rounds is reported. A share of the int8 limit counts 2 operations for each weight of the layers and token; the head,
which a prompt needs once, is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.against_llama_cpp import BUSY, REST_SECONDS, bytes_per_token, commit, cpu_name
from benchmarks.decoder_sides import SIDES, Worker, context_for
from benchmarks.random_gguf import SHAPES, Shape, write_model
from benchmarks.speed_rows import AT_MOST, LONG_CONTEXT, PROMPT, ROWS, Row

OURS, THEIRS = SIDES
DECODED = 32
STEP = 4  # tokens of an answer between two measurements of the limit
BEFORE = 8  # tokens before an answer
LIMITS = {  # what it is called, its field in an answer, and its unit
    "int8": ("int8 limit", "int8_operations_per_second", "int8 operations/s"),
    "read": ("read bandwidth", "bytes_per_second", "bytes/s"),
}
SHORT = 16
MEMORY_CONTEXTS = (512, 1024, 2048, 4096, LONG_CONTEXT)
Values = dict[str, list[float]]  # quantity -> of each round
ELSEWHERE = """rows of other scripts:
  python -m benchmarks.multimodal adapters     a switchable adapter next to a merged one
  python -m benchmarks.encoders                the encoders of images and sounds
  python -m benchmarks.together                sequences that are decoded together
  python -m benchmarks.drafts                  answers with drafts and without
"""


@dataclass
class Case:
    """A row with all that it is measured with."""

    row: Row
    model: Path
    shape: Shape
    options: argparse.Namespace

    @property
    def threads(self) -> int:
        return self.row.threads or int(self.options.threads)

    def worker(self, side: str, n_tokens: int) -> Worker:
        python = self.options.llama_python if side == THEIRS and self.row.isa else sys.executable
        environment = {"PHI4EDGE_ISA": self.row.isa} if self.row.isa else {}
        return Worker(
            side,
            self.model,
            n_context=context_for(n_tokens),
            n_threads=self.threads,
            kv_type=self.row.kv_type,
            python=python,
            environment=environment,
        )

    @contextmanager
    def workers(self, n_tokens: int, sides: Sequence[str] = SIDES) -> Iterator[dict[str, Worker]]:
        """Loaded, and warm: pages are touched, buffers made, clocks up."""
        workers = {side: self.worker(side, n_tokens) for side in sides}
        try:
            for side, worker in workers.items():
                check_isa(self.row, side, worker.ask(do="load")["isa"])
                worker.ask(do="run", n_prompt=min(n_tokens - 2, 64), n_decode=2)
            yield workers
        finally:
            for worker in workers.values():
                worker.close()

    def sides(self) -> Sequence[str]:
        """Without llama.cpp where it would not be of the row's instruction set, or is not wanted."""
        comparable = not self.row.isa or self.options.llama_python != sys.executable
        return SIDES if comparable and not self.options.alone else (OURS,)


def check_isa(row: Row, side: str, isa: str) -> None:
    if row.isa and side == THEIRS and "AVX512" in isa:
        raise SystemExit(f"--llama-python: its llama.cpp uses {isa}; build it with -DGGML_NATIVE=OFF")


class Limit:
    """A limit of the machine, which changes within seconds: measured between all that is compared with it."""

    def __init__(self, worker: Worker, field: str) -> None:
        self._worker, self._field = worker, field
        self._last = self._measure()

    def _measure(self) -> float:
        return float(self._worker.ask(do="limits", fields=[self._field])[self._field])

    def around(self, worker: Worker, **run: int) -> tuple[float, float]:
        """Seconds of a run, and the mean of the limit right before and right after it."""
        before = self._last
        answer = worker.ask(do="run", **run)
        self._last = self._measure()
        return answer["prefill_seconds"] + answer["decode_seconds"], (before + self._last) / 2


def median_of_ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(above, below, strict=True)]


# --- kinds of rows: rounds of measurements by quantity


def prefill(case: Case) -> Values:
    return _side_by_side(case, "int8", body_operations(case.shape), n_prompt=PROMPT, n_decode=0, n_steps=1)


def decode(case: Case) -> Values:
    n_steps = DECODED // STEP
    return _side_by_side(case, "read", bytes_per_token(case.model), n_prompt=BEFORE, n_decode=STEP, n_steps=n_steps)


def _side_by_side(case: Case, limit_name: str, needed: float, *, n_prompt: int, n_decode: int, n_steps: int) -> Values:
    """Sides take turns, with a measurement of the limit between any two; ``needed`` by a token: operations or bytes."""
    about, field, unit = LIMITS[limit_name]
    rates: Values = {side: [] for side in case.sides()}
    shares: Values = {side: [] for side in case.sides()}
    limits: list[float] = []
    # A prompt is timed, or what comes after it.
    timed = {"n_prompt": 0, "n_decode": n_decode} if n_decode else {"n_prompt": n_prompt, "n_decode": 0}
    n_each = n_decode or n_prompt
    with case.workers(n_prompt + max(n_steps * n_decode, 2), case.sides()) as workers:
        limit = Limit(workers[OURS], field)
        for _ in range(case.options.rounds):
            seconds, least = dict.fromkeys(workers, 0.0), dict.fromkeys(workers, 0.0)
            if n_decode:
                for worker in workers.values():
                    worker.ask(do="run", n_prompt=n_prompt, n_decode=0)
            for step in range(n_steps):
                for side, worker in workers.items():
                    after = n_prompt + step * n_decode if n_decode else 0
                    taken, at_most = limit.around(worker, **timed, after=after)
                    seconds[side] += taken
                    least[side] += needed * n_each / at_most
                    limits.append(at_most)
            for side in workers:
                rates[side].append(n_steps * n_each / seconds[side])
                shares[side].append(least[side] / seconds[side])
    values = {f"{side} tok/s": rate for side, rate in rates.items()}
    if THEIRS in rates:
        values["ratio to llama.cpp"] = median_of_ratios(rates[OURS], rates[THEIRS])
    for side, share in shares.items():
        values[f"share of the {about}" if side == OURS else f"{side} share of the {about}"] = share
    return values | {unit: limits}


def short_prompt(case: Case) -> Values:
    rates: Values = {"tok/s at 512": [], "tok/s at 16": []}
    with case.workers(PROMPT, (OURS,)) as workers:
        for _ in range(case.options.rounds):
            for name, n_prompt in zip(rates, (PROMPT, SHORT), strict=True):
                answer = workers[OURS].ask(do="run", n_prompt=n_prompt, n_decode=0)
                rates[name].append(n_prompt / answer["prefill_seconds"])
    return rates | {"share of the rate at 512": median_of_ratios(rates["tok/s at 16"], rates["tok/s at 512"])}


def long_prompt(case: Case) -> Values:
    """Each side of the comparison has a worker of its own, so that a round need not compute all tokens again."""
    rates: Values = {"tok/s at 512": [], f"tok/s at {LONG_CONTEXT}": []}
    before = LONG_CONTEXT - PROMPT
    with case.workers(PROMPT, (OURS,)) as short, case.workers(LONG_CONTEXT, (OURS,)) as long:
        long[OURS].ask(do="run", n_prompt=before, n_decode=0)
        for _ in range(case.options.rounds):
            for name, worker, after in zip(rates, (short[OURS], long[OURS]), (0, before), strict=True):
                time.sleep(REST_SECONDS)
                answer = worker.ask(do="run", n_prompt=PROMPT, n_decode=0, after=after)
                rates[name].append(PROMPT / answer["prefill_seconds"])
    at_512, at_end = rates.values()
    return rates | {"share of the rate at 512": median_of_ratios(at_end, at_512)}


def long_decode(case: Case) -> Values:
    """Time that a token takes longer because of what it looks back at, against the bytes of that."""
    from phi4edge import _core

    config = _core.read_config(_core.GgufFile(case.model))
    kv_bytes = LONG_CONTEXT * _core.kv_bytes_per_token(config, case.row.kv_type)
    seconds: Values = {"seconds at 0": [], f"seconds at {LONG_CONTEXT}": []}
    limits: list[float] = []
    shares: list[float] = []
    with case.workers(256, (OURS,)) as short, case.workers(LONG_CONTEXT + DECODED, (OURS,)) as long:
        long[OURS].ask(do="run", n_prompt=LONG_CONTEXT, n_decode=0)
        short[OURS].ask(do="run", n_prompt=1, n_decode=0)
        limit = Limit(short[OURS], "bytes_per_second")
        for _ in range(case.options.rounds):
            taken, could_read = [0.0, 0.0], [0.0, 0.0]  # seconds, and the bytes that could have been read in them
            for step in range(DECODED // STEP):
                for i, (worker, after) in enumerate(((short[OURS], 1), (long[OURS], LONG_CONTEXT))):
                    each, rate = limit.around(worker, n_prompt=0, n_decode=STEP, after=after + step * STEP)
                    taken[i] += each / DECODED
                    could_read[i] += each * rate / DECODED
                    limits.append(rate)
            for values, each in zip(seconds.values(), taken, strict=True):
                values.append(each)
            added = could_read[1] - could_read[0]
            shares.append(kv_bytes / added if added > 0 else math.inf)
    at_0, at_end = seconds.values()
    return seconds | {
        "KV bytes": [float(kv_bytes)],
        "seconds added": [end - start for start, end in zip(at_0, at_end, strict=True)],
        "bytes/s": limits,
        "share of the read bandwidth": shares,
    }


def load(case: Case) -> Values:
    """A process of its own for each round; starting Python and importing are not in the time."""
    values: Values = {"seconds": [], "seconds of loading": [], "peak bytes": [], "bytes beyond weights and KV": []}
    with case.model.open("rb") as file:
        while file.read(1 << 24):  # into the page cache
            pass
    for _ in range(case.options.rounds):
        worker = case.worker(OURS, 256)
        answer = worker.ask(do="first token")
        worker.close()
        values["seconds"].append(answer["first_token_seconds"])
        values["seconds of loading"].append(answer["load_seconds"])
        values["peak bytes"].append(answer["peak_bytes"])
        # One token of context: what it stores is nothing beside the rest.
        values["bytes beyond weights and KV"].append(answer["peak_bytes"] - answer["weight_bytes"])
    return values


def memory(case: Case) -> Values:
    values: Values = {}
    for n_tokens in MEMORY_CONTEXTS:
        worker = case.worker(OURS, 256)
        answer = worker.ask(do="memory", n_tokens=n_tokens)
        worker.close()
        needed = answer["weight_bytes"] + answer["kv_bytes"]
        values[f"peak bytes at {n_tokens}"] = [answer["peak_bytes"]]
        values[f"KV bytes at {n_tokens}"] = [answer["kv_bytes"]]
        values[f"bytes beyond weights and KV at {n_tokens}"] = [answer["peak_bytes"] - needed]
    return values


KINDS: dict[str, Callable[[Case], Values]] = {
    "prefill": prefill,
    "decode": decode,
    "short prompt": short_prompt,
    "long prompt": long_prompt,
    "long decode": long_decode,
    "load": load,
    "memory": memory,
}


def body_operations(shape: Shape) -> int:
    """Operations of a prompt's token in the layers' matrix products: two for each weight."""
    return sum(2 * n_rows * n_columns for _, layer, n_rows, n_columns in shape.matrices() if layer >= 0)


# --- running, and what the user sees


def model_of(row: Row, options: argparse.Namespace) -> Path:
    """The file of a row; written when it is not there."""
    path: Path = options.models / f"{options.shape}-{row.mix}.gguf"
    if not path.exists():
        options.models.mkdir(parents=True, exist_ok=True)
        print(f"writing {path} ...", file=sys.stderr, flush=True)
        partial = path.with_suffix(".partial")
        write_model(partial, SHAPES[options.shape], row.mix)
        partial.rename(path)
    return path


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    from phi4edge import _core

    row = ROWS[name]
    case = Case(row, model_of(row, options), SHAPES[options.shape], options)
    load_average = os.getloadavg()[0]  # before we add to it
    values = KINDS[row.kind](case)
    return {
        "case": name,
        "about": row.about,
        "commit": commit(),
        "cpu": cpu_name(),
        "threads": case.threads,
        "isa": row.isa or os.environ.get("PHI4EDGE_ISA") or _core.isas()[0],
        "model": case.model.name,
        "kv_type": row.kv_type,
        "rounds": options.rounds,
        "load_average": load_average,
        "operations_per_token": body_operations(case.shape),
        "bytes_per_token": bytes_per_token(case.model),
        "medians": {quantity: statistics.median(each) for quantity, each in values.items()},
        "values": values,
        "targets": dict(row.targets),
    }


def result_lines(record: dict[str, Any]) -> list[str]:
    lines = [f"{record['case']}: {record['about']} ({record['model']}, {record['threads']} threads)"]
    if record["load_average"] > BUSY:
        lines.append(f"  Busy machine (load average {record['load_average']:.1f}): do not trust these figures.")
    for quantity, median in record["medians"].items():
        target = record["targets"].get(quantity)
        verdict = "" if target is None else _verdict(quantity, median, target)
        lines.append(f"  {quantity:<34}{_text(quantity, median):>14}{verdict}")
    missing = [quantity for quantity in record["targets"] if quantity not in record["medians"]]
    return lines + [f"  {quantity:<34}{'not measured':>14}" for quantity in missing]


def _verdict(quantity: str, median: float, target: float) -> str:
    at_most = quantity in AT_MOST
    met = median <= target if at_most else median >= target
    bound = "at most" if at_most else "at least"
    return f"   {bound} {_text(quantity, target)}: {'met' if met else 'missed'}"


def _text(quantity: str, value: float) -> str:
    if "share" in quantity:
        return f"{value:.0%}"
    if "operations/s" in quantity:
        return f"{value / 1e12:.3f} T/s"
    if "bytes" in quantity:
        return f"{value / 1e9:.3f} GB" + ("/s" if quantity.endswith("/s") else "")
    if "seconds" in quantity:
        return f"{value * 1e3:.2f} ms"
    return f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=str(__doc__).splitlines()[0],
        epilog=ELSEWHERE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="see --list; none: all of them")
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    parser.add_argument("--models", type=Path, help="directory of the model files")
    parser.add_argument("--shape", choices=SHAPES, default="phi4-mini", help="of the models; nano to try a row out")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="without llama.cpp")
    parser.add_argument(
        "--llama-python",
        default=sys.executable,
        metavar="FILE",
        help="a Python whose llama-cpp-python is built with -DGGML_NATIVE=OFF -DGGML_AVX2=ON, for the avx2 rows",
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of tables")
    parser.add_argument("--record", type=Path, help="append one JSON line per row to this file")
    options = parser.parse_args()
    if options.list:
        for name, row in ROWS.items():
            print(f"{name:<18} {row.mix:<7} {row.about}")
        return
    if unknown := [name for name in options.rows if name not in ROWS]:
        parser.error(f"{unknown[0]} is no row; --list has them")
    if options.models is None:
        parser.error("--models: a directory for the model files is needed")
    for name in options.rows or ROWS:
        record = measure(name, options)
        print(json.dumps(record) if options.json else "\n".join(result_lines(record)), flush=True)
        if options.record:
            options.record.parent.mkdir(parents=True, exist_ok=True)
            with options.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
