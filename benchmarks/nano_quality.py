"""The trained tiny checkpoint in 8 to 2 bits: how many questions of each kind it still answers, exactly.

``python -m benchmarks.nano_quality tests/data/nano --record benchmarks/records/nano_quality.jsonl``

The questions are the fixed test set and the held-out ones beside it.  An answer is right when it is the expected text
and ends there.  The divergence is the mean of KL(float32 || row) over all tokens of the right answers, in nats: what is
lost before an answer changes.  One thing is varied at a time; the first row is the bundle with everything in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.against_llama_cpp import ROOT, commit, cpu_name

sys.path.insert(0, str(ROOT / "tests"))
from nano import FAMILIES, Item, answer_logits, is_right, items
from reference import log_probabilities, mean_divergence

COLUMNS = {
    "text": "text",
    "vision": "image",
    "vision2": "two images",
    "speech": "speech",
    "vision-speech": "image and speech",
}
EXACT = ("f32", "f32", "fp32")
ADAPTERS, ENCODERS = "q8_0", "int8"  # what `convert` makes by default
BITS = {8: "q8_0", 4: "q4_k_m", 3: "q3_k_m", 2: "q2_k"}

Rows = npt.NDArray[np.float32]  # log-probabilities [n, vocab]


def variants(bits: list[int]) -> list[tuple[str, str, str]]:
    """Backbone, adapters, encoders: by bits, and then by what else may be quantized."""
    others = [("f32", ADAPTERS, "fp32"), ("f32", "q4_0", "fp32"), ("f32", "f32", ENCODERS)]
    others += [(BITS[4], "f16", ENCODERS), (BITS[4], "q4_0", ENCODERS), (BITS[4], ADAPTERS, "fp32")]
    by_bits = [BITS[each] for each in bits] + ["q2_k_s"] * (2 in bits)  # Q2_K in all but the head
    return [EXACT, *((quant, ADAPTERS, ENCODERS) for quant in by_bits), *others]


def measure(path: Path, asked: list[Item], exact: dict[str, Rows], threads: int) -> Iterator[dict[str, Any]]:
    """One result for each family; ``exact`` is filled by the first bundle, and compared with by the others."""
    import phi4edge

    with phi4edge.load(path, context=1024, threads=threads) as model:
        for family in FAMILIES:
            of_family = [item for item in asked if item.family == family]
            session = model.session()  # which computes a prompt once for the answer and the logits
            n_right, rows = 0, []
            for item in of_family:
                n_right += is_right(model, item, session=session)
                rows.append(log_probabilities(answer_logits(model, item, session)))
            reference = [exact.setdefault(item.name, each) for item, each in zip(of_family, rows, strict=True)]
            yield {
                "family": family,
                "n": len(of_family),
                "n_right": n_right,
                "n_positions": sum(map(len, rows)),
                "divergence": mean_divergence(np.concatenate(reference), np.concatenate(rows)),
            }


def n_bytes(bundle: Path) -> int:
    return sum(file.stat().st_size for file in bundle.iterdir())


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    sizes = {result["family"]: result["n"] for result in results}
    head = [*(f"{COLUMNS[family]} ({n})" for family, n in sizes.items()), f"all ({sum(sizes.values())})"]
    lines = ["| " + " | ".join(["backbone", "adapters", "encoders", "MB", *head, "divergence"]) + " |"]
    lines.append("|---" * (len(head) + 5) + "|")
    for variant in dict.fromkeys(tuple(result["variant"]) for result in results):
        row = [result for result in results if tuple(result["variant"]) == variant]
        n_right = [result["n_right"] for result in row]
        total = sum(result["n_positions"] for result in row)
        divergence = sum(result["divergence"] * result["n_positions"] for result in row) / total
        shares = [f"{result['n_right'] / result['n']:.1%}" for result in row]
        shares.append(f"{sum(n_right) / sum(sizes.values()):.1%}")
        size = f"{row[0]['n_bytes'] / 1e6:.1f}"
        lines.append("| " + " | ".join([*variant, size, *shares, f"{divergence:.1e}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path, help="with checkpoint/, testset/ and heldout/")
    parser.add_argument("--bits", type=int, nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--record", type=Path, help="append one JSON line per row and kind to this file")
    options = parser.parse_args()
    from phi4edge.converters.convert import convert

    asked = [*items(options.folder / "testset" / "testset.json"), *items(options.folder / "heldout" / "heldout.json")]
    common = {"commit": commit(), "cpu": cpu_name(), "threads": options.threads}
    exact: dict[str, Rows] = {}
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        for variant in variants(options.bits):
            quant, adapters, encoders = variant
            bundle = Path(work) / "-".join(variant)
            convert(options.folder / "checkpoint", bundle, quant, adapter_quant=adapters, encoders=encoders)
            about = common | {"variant": variant, "n_bytes": n_bytes(bundle)}
            results += [about | result for result in measure(bundle, asked, exact, options.threads)]
            print(*variant, *(f"{result['n_right']}/{result['n']}" for result in results[-len(FAMILIES) :]), flush=True)
    print(table(results))
    if options.record:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        with options.record.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(result) + "\n" for result in results)


if __name__ == "__main__":
    main()
