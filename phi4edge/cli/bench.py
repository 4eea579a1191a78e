"""``phi4edge bench``: how fast a model reads and writes here, and how near that is to what the memory allows.

Writing a token reads every weight once, so its speed is bounded by the memory's.  Both are measured in the same run,
because the speed of a memory changes with the machine's neighbours and temperature.  Loading is not in the times.

With ``--profile``: where the time goes, see :mod:`phi4edge.cli.bench_profile`.
With ``--quality``: how much a model still knows in fewer bits, see :mod:`phi4edge.cli.quality`.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

import phi4edge
from phi4edge import machine
from phi4edge.cli import output
from phi4edge.cli.bench_profile import profile_lines, profile_record, profile_run
from phi4edge.cli.loading import load_model
from phi4edge.cli.options import Json, ModelPath, Runtime
from phi4edge.cli.quality import Quality, bench_quality
from phi4edge.errors import UsageError

if TYPE_CHECKING:
    from phi4edge.model import Model
    from phi4edge.session import Session

EXAMPLES = """
    phi4edge bench
    phi4edge bench model.gguf
    phi4edge bench model.gguf -p 512 -n 64 -t 2
    phi4edge bench model.gguf -r 9 --json >> records.json
    phi4edge bench model.gguf --profile
    phi4edge bench --quality nano --plot quality.svg
    phi4edge bench --quality nano --bits 4 --items 50 --json >> records.json
"""

_PROMPT_TOKENS, _DECODE_TOKENS, _REPETITIONS = 512, 64, 3

_BANDWIDTH_BYTES = 512 << 20  # well beyond any last-level cache
_BANDWIDTH_SECONDS = 1.0


@dataclass
class Measured:
    """Seconds of each repetition."""

    prefill: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def bench(
    runtime: Runtime,
    quality: Quality,
    model: ModelPath = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            "--prompt-tokens", "-p", metavar="N", min=1, help=f"Length of the prompt. [default: {_PROMPT_TOKENS}]"
        ),
    ] = None,
    decode_tokens: Annotated[
        int | None,
        typer.Option(
            "--decode-tokens", "-n", metavar="N", min=1, help=f"Tokens to write after it. [default: {_DECODE_TOKENS}]"
        ),
    ] = None,
    repetitions: Annotated[
        int | None,
        typer.Option("--repetitions", "-r", metavar="N", min=1, help=f"Times to do both. [default: {_REPETITIONS}]"),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Do both once more, and say where the time goes.")] = False,
    as_json: Json = False,
) -> None:
    """Measure the speed of a model, or with --quality what it still knows in fewer bits."""
    if quality.quality is not None:
        if model is not None:
            raise UsageError("asks the checkpoint of its source", field="--quality", hint=f"leave '{model:.80}' out")
        if (prompt_tokens, decode_tokens, repetitions) != (None, None, None) or profile:
            raise UsageError("measures no speed", field="--quality", hint="leave -p, -n, -r and --profile out")
        bench_quality(quality, runtime, as_json=as_json)
        return
    from phi4edge.model import read_bandwidth

    prompt_tokens, decode_tokens = prompt_tokens or _PROMPT_TOKENS, decode_tokens or _DECODE_TOKENS
    repetitions = repetitions or _REPETITIONS
    with load_model(model, runtime, context=prompt_tokens + decode_tokens) as loaded:
        timings = measure(loaded, prompt_tokens, decode_tokens, repetitions)
        peak = machine.peak_memory()  # before the bandwidth test adds its own
        bandwidth = read_bandwidth(loaded.threads, _BANDWIDTH_BYTES, _BANDWIDTH_SECONDS)
        record = bench_record(loaded, timings, bandwidth, prompt_tokens=prompt_tokens, decode_tokens=decode_tokens)
        record["peak_memory_bytes"] = peak
        if profile:
            profiles = profile_run(loaded.session(), prompt(loaded, prompt_tokens), decode_tokens)
            record["profile"] = profile_record(profiles, loaded.isa, loaded.threads)
    if as_json:
        output.write_json(record)
    else:
        output.write_text("\n".join(bench_lines(record)) + "\n")


def measure(model: Model, prompt_tokens: int, decode_tokens: int, repetitions: int) -> Measured:
    """Times ``repetitions`` runs from an empty cache, after one short run that does not count."""
    tokens = prompt(model, prompt_tokens)
    session = model.session()
    timings = Measured()
    _run_once(session, tokens[:16], min(4, decode_tokens), Measured())
    for repetition in range(1, repetitions + 1):
        _run_once(session, tokens, decode_tokens, timings)
        # No progress bar: drawing it would take time from the threads that are measured.
        output.hint(
            f"{repetition} of {repetitions}: prefill {prompt_tokens / timings.prefill[-1]:.1f} tokens/s, "
            f"decode {decode_tokens / timings.decode[-1]:.1f} tokens/s"
        )
    return timings


def prompt(model: Model, n_tokens: int) -> list[int]:
    """Tokens at random, the same ones each time."""
    return random.Random(0).choices(range(model.config.vocab_size), k=n_tokens)


def _run_once(session: Session, tokens: Sequence[int], decode_tokens: int, timings: Measured) -> None:
    session.clear()
    started = time.perf_counter()
    logits = session.extend(tokens)
    prefilled = time.perf_counter()
    token = int(logits[-1].argmax())
    chosen = time.perf_counter()
    for _ in range(decode_tokens):
        token = int(session.extend([token])[-1].argmax())
    ended = time.perf_counter()
    timings.prefill.append(prefilled - started)
    timings.first_token.append(chosen - started)
    timings.decode.append(ended - chosen)


def bench_record(
    model: Model, timings: Measured, bandwidth: float, *, prompt_tokens: int, decode_tokens: int
) -> dict[str, Any]:
    """What was measured, as ``--json`` prints it.  ``bandwidth`` is in bytes per second."""
    bytes_per_token = model.decode_bytes(prompt_tokens + decode_tokens // 2)
    decode = _rates(decode_tokens, timings.decode)
    return {
        "model": model.path,
        "version": phi4edge.__version__,
        "cpu": machine.cpu_name(),
        "isa": model.isa,
        "threads": model.threads,
        "prompt_tokens": prompt_tokens,
        "decode_tokens": decode_tokens,
        "repetitions": len(timings.decode),
        "prefill": _rates(prompt_tokens, timings.prefill),
        "decode": decode,
        "first_token": {
            "median": statistics.median(timings.first_token),
            "best": min(timings.first_token),
            "unit": "seconds",
        },
        "bytes_per_token": bytes_per_token,
        "memory_bytes_per_second": bandwidth,
        "share_of_memory_speed": bytes_per_token * decode["median"] / bandwidth,
    }


def bench_lines(record: dict[str, Any]) -> list[str]:
    """The record for people."""
    peak = record["peak_memory_bytes"]
    threads = "1 thread" if record["threads"] == 1 else f"{record['threads']} threads"
    needed = record["bytes_per_token"] * record["decode"]["median"]
    return [
        f"{record['cpu']}, {threads}, {record['isa']}",
        f"prefill      {_rate_text(record['prefill'])}, {record['prompt_tokens']} tokens",
        f"decode       {_rate_text(record['decode'])}, {record['decode_tokens']} tokens",
        f"first token  {record['first_token']['median']:.3f} s median, {record['first_token']['best']:.3f} s best",
        f"memory       {output.bytes_text(record['bytes_per_token'])} per token, {needed / 1e9:.1f} GB/s of "
        f"{record['memory_bytes_per_second'] / 1e9:.1f} GB/s: {record['share_of_memory_speed']:.0%}",
        f"peak memory  {'unknown' if peak is None else output.bytes_text(peak)}",
        *(profile_lines(record["profile"]) if "profile" in record else ()),
    ]


def _rates(n_tokens: int, seconds: Sequence[float]) -> dict[str, Any]:
    rates = [n_tokens / duration for duration in seconds]
    return {"median": statistics.median(rates), "best": max(rates), "all": rates, "unit": "tokens/s"}


def _rate_text(rates: dict[str, Any]) -> str:
    return f"{rates['median']:.1f} tokens/s median, {rates['best']:.1f} best of {len(rates['all'])}"
