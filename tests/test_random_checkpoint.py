"""The checkpoints that conversions are measured with hold what transformers' models hold, and can be converted."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peers import require
from phi4edge.bundle import Bundle
from phi4edge.converters.checkpoint import Checkpoint
from phi4edge.converters.convert import convert

benchmark: Any = importlib.import_module("benchmarks.random_checkpoint")


def write(directory: Path, layout: str) -> Path:
    benchmark.write_checkpoint(directory, benchmark.SHAPES["tiny"], layout)
    return directory


@pytest.mark.parametrize("layout", ["phi3", "phi4_multimodal"])
def test_names_and_shapes_are_those_of_transformers(tmp_path: Path, layout: str) -> None:
    torch, transformers = require("torch"), require("transformers")
    config = transformers.AutoConfig.from_pretrained(write(tmp_path / "checkpoint", layout))
    kind = {"phi3": "Phi3ForCausalLM", "phi4_multimodal": "Phi4MultimodalForCausalLM"}[layout]
    with torch.device("meta"):
        model = getattr(transformers, kind)(config)
    expected = {name: tuple(values.shape) for name, values in model.state_dict().items()}
    del expected["lm_head.weight"]  # tied
    with Checkpoint(tmp_path / "checkpoint") as checkpoint:
        assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == expected


@pytest.mark.parametrize(
    "layout, n_values, n_tensors",
    [("phi3", 3_836_021_760, 194), ("phi4_multimodal", 5_574_460_384, 1535), ("phi4mm", 5_574_460_384, 2047)],
)
def test_the_full_size_is_the_published_one(layout: str, n_values: int, n_tensors: int) -> None:
    assert benchmark.totals(benchmark.SHAPES["phi4"], layout) == (n_values, 3_836_021_760, n_tensors)


@pytest.mark.parametrize("layout", ["phi3", "phi4_multimodal", "phi4mm"])
def test_a_conversion_takes_it(tmp_path: Path, layout: str) -> None:
    convert(write(tmp_path / "checkpoint", layout), tmp_path / "bundle", "q4_k_m")
    roles = {part.role for part in Bundle.open(tmp_path / "bundle").manifest.parts}
    media = {"vision", "audio", "adapter:vision", "adapter:speech"}
    assert roles == {"backbone"} | (set() if layout == "phi3" else media)


def test_weights_are_gaussian_and_the_same_each_time(tmp_path: Path) -> None:
    first, second = write(tmp_path / "first", "phi4mm"), write(tmp_path / "second", "phi4mm")
    with Checkpoint(first) as one, Checkpoint(second) as other:
        for name, tensor in one.tensors.items():
            values = one.array(tensor)
            np.testing.assert_array_equal(values, other.array(other.tensors[name]))
            assert np.isfinite(values).all()
            if len(tensor.shape) == 2 and "lora" not in name:
                assert values.std() * tensor.shape[1] ** 0.5 == pytest.approx(1.0, rel=0.1), name
