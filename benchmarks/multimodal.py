"""Speed and memory of requests with pictures and sounds, of adapters, and of a long recording.

``python -m benchmarks.multimodal requests BUNDLE --checkpoint CHECKPOINT_DIR``
    Time to the first token, by its parts, and peak memory.  Each request is first answered once by a process of its
    own: its peak memory is that of the request, and its first token ("cold") waits for the encoder to be opened and the
    adapter to be read, not for the backbone.  Then one process answers all of them in turn, with other media each
    time; what the cold ones read is read.  With --checkpoint, which must be in transformers' own layout, transformers
    answers the same in bfloat16 on pixels and log-mels of ours, between two halves of our rounds.  "likeness" is the
    cosine between the logits of the first token.

``python -m benchmarks.multimodal adapters BUNDLE [BUNDLE_OF_ANOTHER_TYPE ...] MERGED_BUNDLE``
    A prompt and single tokens with the switchable speech adapter of each bundle on the backbone of the first, without
    an adapter, and on the bundle that has the adapter in its weights.  Sides take turns, and each round begins with
    another one; a ratio is the median over the rounds.

``python -m benchmarks.multimodal long BUNDLE --minutes 30 --kv-type i16``
    One recording in one prompt.  It takes many minutes, and shows how far it is.  Peak memory includes the file, 58 MB
    for 30 minutes.

--record benchmarks/records/multimodal.jsonl appends one JSON line per quantity.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.against_llama_cpp import BUSY, REST_SECONDS, Series, as_record, commit, cpu_name
from benchmarks.multimodal_sides import REQUESTS, Request, Worker

ADAPTER = "speech"
TARGETS = {"Q8_0": 1.20, "Q4_0": 1.12, "IQ4_NL": 1.12}  # times of decoding over those of the merged adapter
NO_ADAPTER, MERGED = "no adapter", "merged"
CONTEXT = 4096
SPARE_TOKENS = 64  # of a long recording's context: question and answer
TOKENS_PER_SECOND = 12.5  # of sound


class Results:
    """Series of one system by case, in the order in which they came."""

    def __init__(self, about: Mapping[str, Any]) -> None:
        self.about = {"system": about["system"], "isa": about["isa"]}
        self.series: dict[str, dict[str, Series]] = {}

    def add(self, case: str, quantity: str, unit: str, value: float) -> None:
        self.series.setdefault(case, {}).setdefault(quantity, Series(quantity, unit)).values.append(value)

    def median(self, case: str, quantity: str) -> float | None:
        row = self.series.get(case, {}).get(quantity)
        return None if row is None else row.median

    def records(self) -> Iterator[dict[str, Any]]:
        for case, rows in self.series.items():
            for quantity, row in rows.items():
                yield self.about | {"request": case, "case": quantity, "rounds": len(row.values)} | as_record(row)


# --- requests


def compare_requests(options: argparse.Namespace) -> list[Results]:
    side = {"context": CONTEXT, "threads": options.threads, "kv_type": options.kv_type}
    ours: Results | None = None
    for case in options.requests:
        worker = Worker("phi4edge", bundle=str(options.bundle), **side)
        ours = ours or Results(worker.about)
        say(f"{case}: a process of its own, loaded in {worker.about['load']:.1f} s")
        answer = worker.ask("run", request=asdict(REQUESTS[case]), seed=0, n_decode=options.n_decode)
        say_answer(answer)
        worker.close()
        ours.add(case, "load", "s", worker.about["load"])
        ours.add(case, "cold first token", "s", answer["first token"])
        add_peak(ours, case, worker, answer)
    assert ours is not None
    if not options.checkpoint:
        answer_warm(ours, options, side, options.rounds, None)
        return [ours]
    with tempfile.TemporaryDirectory() as folder:
        answer_warm(ours, options, side, options.rounds - options.rounds // 2, Path(folder))
        results = [ours]
        try:
            results.append(answer_with_transformers(options, Path(folder)))
        except RuntimeError as error:  # it takes 16 GB
            say(f"transformers is left out: {error}")
        answer_warm(ours, options, side, options.rounds // 2, None)
    return results


def answer_warm(
    results: Results, options: argparse.Namespace, side: Mapping[str, Any], n_rounds: int, folder: Path | None
) -> None:
    """Our rounds; with a folder, inputs and logits of each request go there."""
    if n_rounds == 0 and folder is None:
        return
    worker = Worker("phi4edge", bundle=str(options.bundle), **side)
    for case in options.requests:
        request = asdict(REQUESTS[case])
        if folder is None:  # either opens encoders and reads adapters
            worker.ask("run", request=request, seed=0, n_decode=2)
        else:
            worker.ask("save", request=request, seed=0, path=str(saved(folder, case)))
    for seed in range(1, n_rounds + 1):
        for case in options.requests:
            say(f"phi4edge, round {seed} of {n_rounds}: {case}")
            time.sleep(REST_SECONDS)
            answer = worker.ask("run", request=asdict(REQUESTS[case]), seed=seed, n_decode=options.n_decode)
            say_answer(answer)
            add_times(results, case, answer, options.n_decode)
    worker.close()


def answer_with_transformers(options: argparse.Namespace, folder: Path) -> Results:
    say("transformers: loading")
    worker = Worker("transformers", checkpoint=str(options.checkpoint.resolve()), threads=options.threads)
    results = Results(worker.about)
    first = options.requests[0]
    worker.ask("run", path=str(saved(folder, first)), n_decode=2)  # buffers made, kernels chosen
    for number in range(1, options.peer_rounds + 1):
        for case in options.requests:
            say(f"transformers, round {number} of {options.peer_rounds}: {case}")
            answer = worker.ask("run", path=str(saved(folder, case)), n_decode=options.n_decode)
            say_answer(answer)
            add_times(results, case, answer, options.n_decode)
            add_peak(results, case, worker, answer)
            results.add(case, "likeness", "", answer["likeness"])
            if number == 1:
                results.add(case, "load", "s", worker.about["load"])
    worker.close()
    return results


def add_peak(results: Results, case: str, worker: Worker, answer: Mapping[str, float]) -> None:
    """Of loading or of the answer, whichever takes more."""
    results.add(case, "peak memory", "B", max(worker.about["peak"], answer["peak"]))


def saved(folder: Path, case: str) -> Path:
    return folder / f"{list(REQUESTS).index(case)}.npz"


def add_times(results: Results, case: str, answer: Mapping[str, float], n_decode: int) -> None:
    results.add(case, "prompt", "tokens", answer["n_prompt"])
    for quantity in ("processor", "encoder", "prefill", "first token"):
        if quantity in answer:
            results.add(case, quantity, "s", answer[quantity])
    results.add(case, "decode", "tok/s", n_decode / answer["decode"])


# --- adapters


def compare_adapters(options: argparse.Namespace) -> list[Results]:
    merged, files = sort_bundles(options.bundles)
    context = -(-(options.n_prompt + options.n_decode) // 256) * 256
    side = {"context": context, "threads": options.threads, "kv_type": options.kv_type}
    switchable = Worker("phi4edge", bundle=str(options.bundles[0]), adapter_files=files, **side)
    whole = Worker("phi4edge", bundle=str(merged), **side)
    sides: list[tuple[str, Worker, str | None]] = [(MERGED, whole, None), (NO_ADAPTER, switchable, None)]
    sides += [(name, switchable, name) for name in files]
    results = Results(switchable.about)
    for _, worker, adapter in sides:  # pages are touched, buffers made
        worker.ask("extend", adapter=adapter, n_prompt=min(options.n_prompt, 64), n_decode=2)
    for number in range(options.rounds):
        say(f"round {number + 1} of {options.rounds}")
        times: dict[str, dict[str, float]] = {}
        start = number % len(sides)
        for name, worker, adapter in sides[start:] + sides[:start]:
            time.sleep(REST_SECONDS)
            times[name] = worker.ask("extend", adapter=adapter, n_prompt=options.n_prompt, n_decode=options.n_decode)
        for name, answer in times.items():
            for phase, n_tokens in (("prefill", options.n_prompt), ("decode", options.n_decode)):
                results.add(name, phase, "tok/s", n_tokens / answer[phase])
                results.add(name, f"{phase} time to merged", "", answer[phase] / times[MERGED][phase])
    switchable.close()
    whole.close()
    return [results]


def sort_bundles(paths: Sequence[Path]) -> tuple[Path, dict[str, str]]:
    """The bundle with the adapter merged, and the files of the switchable ones by their type."""
    from phi4edge.bundle import ADAPTER_PREFIX, Bundle

    merged: Path | None = None
    files: dict[str, str] = {}
    backbones = set()
    for path in paths:
        parts = {part.role: part for part in Bundle.open(path).manifest.parts}
        if parts["backbone"].details.get("merged_adapter") == ADAPTER:
            merged = path
            continue
        part = parts[ADAPTER_PREFIX + ADAPTER]
        files[str(part.details["type"])] = str(path / part.file)
        backbones.add(parts["backbone"].sha256)
    if merged is None or merged == paths[0] or len(backbones) != 1:
        raise SystemExit(f"expected bundles with one backbone, and at the end one with --adapters merged:{ADAPTER}")
    return merged, files


# --- a long recording


def answer_long(options: argparse.Namespace) -> list[Results]:
    request = Request(seconds=60 * options.minutes)
    context = int(request.seconds * TOKENS_PER_SECOND) + SPARE_TOKENS + options.n_decode
    side = {"context": context, "threads": options.threads, "kv_type": options.kv_type}
    worker = Worker("phi4edge", bundle=str(options.bundle), **side)
    results = Results(worker.about)
    case = f"{options.minutes:g} minutes"
    say(f"{case} of sound, {context} tokens")
    answer = worker.ask("run", request=asdict(request), seed=0, n_decode=options.n_decode, show_progress=True)
    worker.close()
    results.add(case, "load", "s", worker.about["load"])
    add_peak(results, case, worker, answer)
    add_times(results, case, answer, options.n_decode)
    return [results]


# --- what the user sees


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def say_answer(answer: Mapping[str, float]) -> None:
    say(f"  first token after {answer['first token']:.1f} s, peak memory {answer['peak'] / 1e9:.2f} GB")


COLUMNS = {  # quantity -> title, scale, digits
    "prompt": ("tokens", 1.0, 0),
    "processor": ("processor/s", 1.0, 3),
    "encoder": ("encoder/s", 1.0, 2),
    "prefill": ("prefill/s", 1.0, 2),
    "first token": ("first/s", 1.0, 2),
    "cold first token": ("cold/s", 1.0, 2),
    "decode": ("tok/s", 1.0, 2),
    "peak memory": ("peak/GB", 1e-9, 2),
    "likeness": ("likeness", 1.0, 4),
}
ADAPTER_COLUMNS = {
    "prefill": ("prefill tok/s", 1.0, 2),
    "prefill time to merged": ("prefill x", 1.0, 3),
    "decode": ("decode tok/s", 1.0, 2),
    "decode time to merged": ("decode x", 1.0, 3),
}


def print_table(results: Iterable[Results], columns: Mapping[str, tuple[str, float, int]]) -> None:
    for each in results:
        print(f"{each.about['system']}, {each.about['isa']}")
        print(f"  {'median':<16}" + "".join(f"{title:>14}" for title, _, _ in columns.values()))
        for case in each.series:
            cells = []
            for quantity, (_, scale, digits) in columns.items():
                value = each.median(case, quantity)
                cells.append("" if value is None else f"{value * scale:.{digits}f}")
            print(f"  {case:<16}" + "".join(f"{cell:>14}" for cell in cells))


def print_targets(results: Results) -> None:
    for name, limit in TARGETS.items():
        ratio = results.median(name, "decode time to merged")
        if ratio is not None:
            verdict = "kept" if ratio <= limit else "missed"
            print(f"  decode with {name}: {ratio:.3f} of the time of the merged one, target {limit:.2f}: {verdict}")
    ratio = results.median(NO_ADAPTER, "decode time to merged")
    print(f"  without an adapter: {ratio:.3f}; this should be 1, the same work on other weights")


def append_records(path: Path, options: argparse.Namespace, load_average: float, results: Iterable[Results]) -> None:
    """One line per quantity."""
    common = {
        "benchmark": options.command,
        "commit": commit(),
        "cpu": cpu_name(),
        "threads": options.threads,
        "model": options.bundle.name,
        "kv_type": options.kv_type,
        "n_decode": options.n_decode,
        "load_average": load_average,
    }
    if "n_prompt" in options:
        common["n_prompt"] = options.n_prompt
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(common | line) + "\n" for each in results for line in each.records())


def parse() -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-t", "--threads", type=int, default=2)
    common.add_argument("-n", "--n-decode", type=int, default=32, help="single tokens after the first")
    common.add_argument("--kv-type", default="i16")
    common.add_argument("--record", type=Path, help="append one JSON line per quantity to this file")
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    requests = commands.add_parser("requests", parents=[common], help="time to the first token, and peak memory")
    requests.add_argument("bundle", type=Path)
    requests.add_argument("--checkpoint", type=Path, help="compare with transformers, on this checkpoint")
    requests.add_argument("--requests", nargs="+", choices=REQUESTS, default=list(REQUESTS))
    requests.add_argument("-r", "--rounds", type=int, default=4, help="0: peak memory alone")
    requests.add_argument("--peer-rounds", type=int, default=2)
    requests.set_defaults(run=compare_requests)
    adapters = commands.add_parser("adapters", parents=[common], help="a switchable adapter against a merged one")
    adapters.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    adapters.add_argument("-p", "--n-prompt", type=int, default=512)
    adapters.add_argument("-r", "--rounds", type=int, default=8)
    adapters.set_defaults(run=compare_adapters)
    long = commands.add_parser("long", parents=[common], help="one long recording")
    long.add_argument("bundle", type=Path)
    long.add_argument("--minutes", type=float, default=30)
    long.set_defaults(run=answer_long)
    return parser.parse_args()


def main() -> None:
    options = parse()
    options.bundles = [path.resolve() for path in getattr(options, "bundles", None) or [options.bundle]]
    options.bundle = options.bundles[0]
    load_average = os.getloadavg()[0]  # before we add to it
    results: list[Results] = options.run(options)
    print(f"{options.bundle.name}, {options.threads} threads, {cpu_name()}, KV cache in {options.kv_type}")
    if load_average > BUSY:
        print(f"Busy machine (load average {load_average:.1f}): do not trust the times.")
    if options.run is compare_adapters:
        print_table(results, ADAPTER_COLUMNS)
        print_targets(results[0])
    else:
        print_table(results, COLUMNS)
    if options.record:
        append_records(options.record, options, load_average, results)


if __name__ == "__main__":
    main()
