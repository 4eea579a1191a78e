"""The benchmarks of speed: their rows can be run, they count work as is published, and records become a picture."""

from __future__ import annotations

import importlib
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from peers import require

speed: Any = importlib.import_module("benchmarks.speed")
rows: Any = importlib.import_module("benchmarks.speed_rows")


def test_every_row_is_of_a_kind_that_can_be_measured() -> None:
    assert {row.kind for row in rows.ROWS.values()} == speed.KINDS.keys()


def test_a_token_of_a_prompt_has_two_operations_for_each_weight_of_the_layers() -> None:
    # Phi-4-mini as published; its embedding is tied, and 65 norms are no matrices.
    n_weights = 3_836_021_760 - 200_064 * 3_072 - 65 * 3_072
    assert speed.body_operations(speed.SHAPES["phi4-mini"]) == 2 * n_weights


def test_a_target_is_met_or_missed_on_the_right_side() -> None:
    record = {
        "case": "load",
        "about": "",
        "model": "m.gguf",
        "threads": 1,
        "load_average": 0.0,
        "targets": {"seconds": 1.5, "share of the int8 limit": 0.6, "ratio to llama.cpp": 2.0},
        "medians": {"seconds": 1.6, "share of the int8 limit": 0.7},
    }
    _, seconds, share, ratio = speed.result_lines(record)
    assert seconds.endswith("missed") and share.endswith("met") and ratio.endswith("not measured")


def kernel(tokens: int, rate: float) -> dict[str, Any]:
    return {
        "isa": "scalar", "format": "Q8_0", "tokens": tokens, "operations": 2e6 * tokens, "bytes": 1_062_500,
        "operations_per_second": rate, "read_bandwidth": 2e10, "int8_peak": 1e12,
    }  # fmt: skip


def test_records_become_one_picture_with_a_roof(tmp_path: Path) -> None:
    require("matplotlib")
    plot_speed: Any = importlib.import_module("benchmarks.plot_speed")
    path = tmp_path / "kernels.jsonl"
    records = [kernel(1, 1e10), kernel(512, 1e11), kernel(512, 5e11)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    read = plot_speed.read_records([path])
    assert [record["operations_per_second"] for record in plot_speed.kernels_of(read)] == [
        1e10,
        5e11,
    ]  # the last counts
    svg = plot_speed.plot(read)
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert b"Q8_0" in svg and b"20 GB/s" in svg
    assert plot_speed.plot(read) == svg


@pytest.mark.parametrize(("text", "says"), [("{", "line 1"), ("[]", "no record"), ("{}", "no record of")])
def test_what_is_no_record_is_told(text: str, says: str, tmp_path: Path) -> None:
    require("matplotlib")
    plot_speed: Any = importlib.import_module("benchmarks.plot_speed")
    path = tmp_path / "kernels.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(SystemExit, match=says):
        plot_speed.plot(plot_speed.read_records([path]))
