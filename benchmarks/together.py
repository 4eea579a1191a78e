"""Tokens per second of 1, 2, 4 and 8 sequences that are decoded together.

``python -m benchmarks.together MODEL.gguf -s 1 2 4 8 -n 32 -t 2 -r 5 --record benchmarks/records/together.jsonl``

One round is: read bandwidth, then -n steps with each number of sequences, in turn, after prompts of -p tokens.
Prompts, loading and sampling are not in the time; every step gives the logits of each sequence.  "alone" is the same
number of tokens of the first sequence by itself, by the call for one.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.against_llama_cpp import (
    BUSY,
    REST_SECONDS,
    Series,
    as_record,
    bytes_per_token,
    commit,
    cpu_name,
)
from benchmarks.decoder_sides import BANDWIDTH_BYTES
from phi4edge import _core

ALONE = "alone"


class Sequences:
    """Sessions of one model, each at the end of a prompt of its own."""

    def __init__(self, model: _core.Model, options: argparse.Namespace) -> None:
        n_most = max(options.sequences)
        rng = np.random.default_rng(0)
        shape = (n_most, options.n_prompt + options.n_decode)
        self._tokens = rng.integers(0, model.config.vocab_size, shape).astype(np.int32)
        self._n_prompt = options.n_prompt
        self._sessions = [_core.Session(model, shape[1], options.kv_type) for _ in range(n_most)]
        for session, tokens in zip(self._sessions, self._tokens, strict=True):
            session.extend(tokens[: self._n_prompt], "none")

    def alone(self) -> float:
        """Seconds of the first one's tokens."""
        self._sessions[0].truncate(self._n_prompt)
        started = time.perf_counter()
        for token in self._tokens[0, self._n_prompt :]:
            self._sessions[0].extend(np.array([token], np.int32))
        return time.perf_counter() - started

    def together(self, n_sequences: int) -> float:
        """Seconds of the tokens of so many."""
        sessions = self._sessions[:n_sequences]
        for session in sessions:
            session.truncate(self._n_prompt)
        started = time.perf_counter()
        for step in self._tokens[:n_sequences, self._n_prompt :].T:
            _core.extend_together(sessions, [np.array([token], np.int32) for token in step])
        return time.perf_counter() - started


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all rounds; the result is what --json prints."""
    load_average = os.getloadavg()[0]  # before we add to it
    model = _core.Model(_core.GgufFile(options.model), options.threads)
    sequences = Sequences(model, options)
    alone, bandwidth = Series(ALONE, "tok/s"), Series("read bandwidth", "B/s")
    together = {n: Series(f"{n} together", "tok/s") for n in options.sequences}
    sequences.together(max(options.sequences))  # pages are touched, clocks up
    for _ in range(options.rounds):
        bandwidth.values.append(_core.read_bandwidth(options.threads, BANDWIDTH_BYTES, 0.5))
        time.sleep(REST_SECONDS)
        alone.values.append(options.n_decode / sequences.alone())
        for n, series in together.items():
            time.sleep(REST_SECONDS)
            series.values.append(n * options.n_decode / sequences.together(n))
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
        "isa": model.isa,
        "bandwidth": as_record(bandwidth),
        ALONE: as_record(alone),
        "together": {
            str(n): {"n_sequences": n, **as_record(series), "times_alone": series.median / alone.median}
            for n, series in together.items()
        },
    }


def print_table(result: dict[str, Any]) -> None:
    print(f"{result['model']}, {result['model_bytes'] / 1e9:.2f} GB, {result['threads']} threads, {result['isa']}")
    print(f"{result['cpu']}; after {result['n_prompt']} tokens, {result['n_decode']} steps, {result['rounds']} rounds")
    if result["load_average"] > BUSY:
        print(f"  Busy machine (load average {result['load_average']:.1f}): do not trust these figures.")
    print(f"{'sequences':<12}{'tok/s, median (best)':>24}{'times alone':>14}")
    rows = {ALONE: result[ALONE] | {"times_alone": 1.0}, **result["together"]}
    for name, row in rows.items():
        cell = f"{row['median']:.2f} ({row['best']:.2f})"
        print(f"{name:<12}{cell:>24}{row['times_alone']:>14.2f}")
    used = result[ALONE]["median"] * result["bytes_per_token"] / result["bandwidth"]["median"]
    print(f"read bandwidth {result['bandwidth']['median'] / 1e9:.1f} GB/s, of which {used:.0%} used alone")


def append_records(path: Path, result: dict[str, Any]) -> None:
    """One line for each number of sequences."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = ("commit", "cpu", "isa", "threads", "model", "n_prompt", "n_decode", "kv_type", "rounds", "load_average")
    common = {key: result[key] for key in shared}
    lines = [common | {"case": "read bandwidth"} | result["bandwidth"], common | {"case": ALONE} | result[ALONE]]
    lines += [common | {"case": "together"} | row for row in result["together"].values()]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("-s", "--sequences", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("-p", "--n-prompt", type=int, default=64)
    parser.add_argument("-n", "--n-decode", type=int, default=32, help="steps; each is a token of every sequence")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--kv-type", choices=_core.kv_types(), default="i16")
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    parser.add_argument("--record", type=Path, help="append one JSON line for each number of sequences to this file")
    options = parser.parse_args()
    options.model = options.model.resolve()
    result = measure(options)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print_table(result)
    if options.record:
        append_records(options.record, result)


if __name__ == "__main__":
    main()
