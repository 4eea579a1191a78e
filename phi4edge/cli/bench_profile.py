"""What ``bench --profile`` adds: where the time of a prompt, and of the tokens after it, goes.

Each moment of each thread between the start and the end of a forward pass belongs to one step, waiting for the other
threads included.  A step that leaves its result in eight bits for the next one has that in its time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi4edge.session import Session, StepTotal

_PEAK_SECONDS = 1.0


def profile_run(session: Session, tokens: Sequence[int], decode_tokens: int) -> dict[str, dict[str, StepTotal]]:
    """Steps of one prompt, and of so many tokens after it, from an empty cache; a run beside those that are timed."""
    session.clear()
    session.collect_profile(True)
    logits = session.extend(tokens)
    prefill = session.profile()
    session.collect_profile(True)
    for _ in range(decode_tokens):
        logits = session.extend([int(logits[-1].argmax())])
    decode = session.profile()
    session.collect_profile(False)
    return {"prefill": prefill, "decode": decode}


def profile_record(profiles: Mapping[str, Mapping[str, StepTotal]], isa: str, threads: int) -> dict[str, Any]:
    """What ``--json`` has under ``profile``; measures the int8 limit."""
    from phi4edge.model import int8_peak

    peak = int8_peak(isa, threads, _PEAK_SECONDS)
    return {"int8_operations_per_second": peak} | {phase: _phase(steps, peak) for phase, steps in profiles.items()}


def _phase(steps: Mapping[str, StepTotal], peak: float) -> dict[str, Any]:
    in_all = sum(step.seconds for step in steps.values())
    return {
        "seconds": in_all,
        "bytes": sum(step.n_bytes for step in steps.values()),
        "operations": sum(step.operations for step in steps.values()),
        "steps": [
            {
                "step": name,
                "seconds": step.seconds,
                "share": step.seconds / in_all,
                "bytes": step.n_bytes,
                "bytes_per_second": step.n_bytes / step.seconds,
                "operations": step.operations,
                "share_of_int8_limit": step.operations / step.seconds / peak,
            }
            for name, step in steps.items()
            if step.seconds > 0  # no adapter: no steps of one
        ],
    }


def profile_lines(record: Mapping[str, Any]) -> list[str]:
    """The record for people."""
    peak = record["int8_operations_per_second"]
    lines = [f"int8 limit   {peak / 1e12:.2f} T operations/s"]
    for phase in ("prefill", "decode"):
        lines += ["", f"{phase:<18}{'ms':>10}{'share':>8}{'GB/s':>8}{'of int8 limit':>15}"]
        for step in record[phase]["steps"]:
            time = f"{step['seconds'] * 1e3:>10.2f}{step['share']:>8.1%}"
            rate = f"{step['bytes_per_second'] / 1e9:.1f}" if step["bytes"] else ""
            of_limit = f"{step['share_of_int8_limit']:.0%}" if step["operations"] else ""
            lines.append(f"  {step['step']:<16}{time}{rate:>8}{of_limit:>15}".rstrip())
    return lines
