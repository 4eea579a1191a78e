"""What ``benchmarks.speed`` measures, one table: to add a row is to add an entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LONG_CONTEXT = 8192
PROMPT = 512


@dataclass(frozen=True)
class Row:
    """One case.  Targets are least values of the measured quantities of that name, or most where they are "seconds".

    kind: how it is measured, see KINDS of :mod:`benchmarks.speed`.
    """

    kind: str
    mix: str
    about: str
    kv_type: str = "i16"
    threads: int | None = None  # None: as the command says
    isa: str = ""
    targets: Mapping[str, float] = field(default_factory=dict)


def _prefill(mix: str, share: float, ratio: float | None = None) -> Row:
    targets = {"share of the int8 limit": share} | ({} if ratio is None else {"ratio to llama.cpp": ratio})
    return Row("prefill", mix, f"a prompt of {PROMPT} tokens", targets=targets)


def _decode(mix: str, ratio: float) -> Row:
    targets = {"share of the read bandwidth": 0.9, "ratio to llama.cpp": ratio}
    return Row("decode", mix, "single tokens after a short prompt", targets=targets)


ROWS: dict[str, Row] = {
    "prefill-Q4_K_M": _prefill("Q4_K_M", 0.62, 2.7),
    "prefill-Q8_0": _prefill("Q8_0", 0.58),
    "prefill-Q6_K": _prefill("Q6_K", 0.58),
    "prefill-Q3_K_M": _prefill("Q3_K_M", 0.58),
    "prefill-Q2_K": _prefill("Q2_K", 0.58),
    "prefill-16": Row(
        "short prompt", "Q4_K_M", f"a prompt of 16 tokens, next to {PROMPT}", targets={"share of the rate at 512": 0.8}
    ),
    "prefill-8192": Row(
        "long prompt",
        "Q4_K_M",
        f"the last {PROMPT} of {LONG_CONTEXT} tokens, next to the first",
        targets={"share of the rate at 512": 0.7},
    ),
    "decode-Q8_0": _decode("Q8_0", 1.3),
    "decode-Q4_K_M": _decode("Q4_K_M", 1.35),
    "decode-Q3_K_M": _decode("Q3_K_M", 1.9),
    "decode-Q2_K": _decode("Q2_K", 2.2),
    "decode-8192-i16": Row(
        "long decode",
        "Q4_K_M",
        f"single tokens after {LONG_CONTEXT}, next to after none",
        targets={"share of the read bandwidth": 0.8},
    ),
    "decode-8192-q8_0": Row(
        "long decode",
        "Q4_K_M",
        f"single tokens after {LONG_CONTEXT}, next to after none",
        kv_type="q8_0",
        targets={"share of the read bandwidth": 0.8},
    ),
    "avx2-prefill": Row(
        "prefill",
        "Q4_K_M",
        "one thread without AVX-512, a llama.cpp built for AVX2",
        threads=1,
        isa="x86_avx2",
        targets={"ratio to llama.cpp": 1.5},
    ),
    "avx2-decode": Row(
        "decode",
        "Q4_K_M",
        "one thread without AVX-512, a llama.cpp built for AVX2",
        threads=1,
        isa="x86_avx2",
        targets={"ratio to llama.cpp": 1.0},
    ),
    "load": Row(
        "load",
        "Q4_K_M",
        "from a path to the first logits, the file being in the page cache",
        targets={"seconds": 1.5, "bytes beyond weights and KV": 200e6},
    ),
    "memory-i16": Row("memory", "Q4_K_M", "peak memory by tokens of context"),
    "memory-q8_0": Row("memory", "Q4_K_M", "peak memory by tokens of context", kv_type="q8_0"),
}
AT_MOST = ("seconds", "bytes beyond weights and KV")  # targets that are upper bounds
