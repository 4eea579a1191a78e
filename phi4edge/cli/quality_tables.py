"""What ``bench --quality`` found, as Markdown whose columns are aligned: to read in a terminal, and to paste."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Sequence[str]
Document = Mapping[str, Any]  # as --json prints it

_LEGEND = """\
Share of exactly right answers, by bits.  MB is all bundles together: with merged adapters there is one bundle for each,
and one without.  The divergence is the mean of KL(float32 || row) over all tokens of the right answers, in nats."""
_N_TEXTS = 3  # leading columns that are no numbers


def tables(document: Document) -> str:
    """All of it."""
    results = document["results"]
    threads = "1 thread" if document["threads"] == 1 else f"{document['threads']} threads"
    paragraphs = [
        f"phi4edge {document['version']}, {document['cpu']}, {threads}, {document['isa']}, {document['seconds']:.0f} s",
        _LEGEND,
        table(_results([each for each in results if each["compares"] == "bits"])),
    ]
    if parts := [each for each in results if each["compares"] == "parts"]:
        paragraphs += ["One part at a time:", table(_results(parts))]
    paragraphs += [
        "Routing: the same questions under every adapter, the right one in bold.",
        table(_routing(document["routing"])),
    ]
    return "\n\n".join(paragraphs) + "\n"


def table(rows: Sequence[Row]) -> str:
    """Rows, the first of which is the head."""
    columns = [_aligned(column, is_text=i < _N_TEXTS) for i, column in enumerate(zip(*rows, strict=True))]
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*columns, strict=True))


def _aligned(cells: Sequence[str], *, is_text: bool) -> list[str]:
    """A column in one width, with the rule below its head."""
    width = max(map(len, cells))
    head, *rest = [cell.ljust(width) if is_text else cell.rjust(width) for cell in cells]
    return [head, "-" * width if is_text else "-" * (width - 1) + ":", *rest]


def _results(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    families = results[0]["families"]
    head = ["backbone", "adapters", "encoders", "bits", "MB", *(f"{each['family']} ({each['n']})" for each in families)]
    rows: list[Row] = [[*head, f"all ({results[0]['n']})", "divergence"]]
    for result in results:
        found = {each["family"]: each for each in result["families"]}
        shares = [_share(found[each["family"]]) for each in families]
        rows.append(
            [
                *(result[part] for part in ("backbone", "adapters", "encoders")),
                f"{result['bits_per_weight']:.2f}",
                f"{result['n_bytes'] / 1e6:.1f}",
                *shares,
                _share(result),
                f"{result['divergence']:.1e}" if result["divergence"] else "0",
            ]
        )
    return rows


def _routing(routing: Sequence[Mapping[str, Any]]) -> list[Row]:
    names = list(routing[0]["adapters"])
    rows: list[Row] = [["backbone", "family", "right", "questions", *names]]
    for row in routing:
        shares = {name: _share(score) for name, score in row["adapters"].items()}
        shares[row["right"]] = f"**{shares[row['right']]}**"
        n_items = row["adapters"][row["right"]]["n"]
        rows.append([row["backbone"], row["family"], row["right"], str(n_items), *(shares[name] for name in names)])
    return rows


def _share(score: Mapping[str, Any]) -> str:
    return f"{score['n_right'] / score['n']:.1%}"
