"""Float models give the logits of transformers, in every shape and on every instruction set."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import phi4edge
from phi4edge import _core
from reference import Reference, relative_difference
from tiny_models import TinyShape, tiny_gguf, tiny_transformers, transformers_logits

TOLERANCE = 1e-4  # of the range of the logits
ODD = {"heads": 5, "kv_heads": 1, "layers": 3, "ffn": 130}
SHAPES: dict[str, dict[str, Any]] = {
    "phi3": {},
    "phi3 as Phi-4-mini": {
        "rotary_fraction": 0.75,
        "heads": 6,
        "kv_heads": 2,
        "hidden": 192,
        "original_context": 1024,
        "context": 8192,
    },
    "phi3 with an output matrix": {"tied": False, "rotary_fraction": 0.75, "heads": 8, "kv_heads": 2},
    "phi3 with separate Q, K and V": {"fused": False, "rotary_fraction": 0.75},
    "phi3 with long factors": {"rotary_fraction": 0.75, "original_context": 64},
    "phi3 with factors everywhere": {"original_context": 64, "short_factors": tuple(np.linspace(1, 2, 32).tolist())},
    "phi3 with a sliding window": {"sliding_window": 24},
    "phi3 of odd sizes": {"hidden": 100, "vocab": 293, "rotary_fraction": 0.5, **ODD},
    "phi3 with one query head per key head": {"heads": 4, "kv_heads": 4, "layers": 1},
    "llama": {"architecture": "llama"},
    "llama with heads of 16": {"architecture": "llama", "hidden": 144, "heads": 9, "kv_heads": 3, "ffn": 384},
    "llama of odd sizes": {"architecture": "llama", "hidden": 100, "vocab": 301, "tied": False, **ODD},
    "llama with heads wider than hidden": {"architecture": "llama", "hidden": 70, "head_dim": 16, "vocab": 299, **ODD},
    "llama with linear scaling": {"architecture": "llama", "rope_scaling": "linear"},
    "llama with llama 3 scaling": {"architecture": "llama", "rope_scaling": "llama3", "rope_base": 50000.0},
}


@cache
def expected(name: str) -> tuple[list[int], npt.NDArray[np.float32]]:
    """100 token ids, and transformers' logits for them."""
    options = SHAPES[name]
    tokens = np.random.default_rng(1).integers(0, TinyShape(**options).vocab, 100)
    return tokens.tolist(), transformers_logits(tiny_transformers(**options), tokens)


@pytest.mark.parametrize("name", SHAPES)
def test_the_numpy_reference_equals_transformers(name: str, models: Path) -> None:
    tokens, logits = expected(name)
    path = tiny_gguf(models, **SHAPES[name])
    assert relative_difference(Reference(path).logits(tokens), logits) < 1e-5


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("name", SHAPES)
def test_a_float_model_equals_transformers(name: str, isa: str, n_threads: int, models: Path) -> None:
    tokens, logits = expected(name)
    with phi4edge.load(tiny_gguf(models, **SHAPES[name]), kv_type="f32", isa=isa, threads=n_threads) as model:
        assert model.isa == isa
        assert relative_difference(model.logits(tokens), logits) <= TOLERANCE


@pytest.mark.parametrize("file_type", ["F16", "BF16"])
@pytest.mark.parametrize("isa", _core.isas())
def test_half_precision_weights_lose_nothing_more(file_type: str, isa: str, models: Path) -> None:
    path = tiny_gguf(models, file_type, rotary_fraction=0.75)
    tokens = list(range(90))
    with phi4edge.load(path, kv_type="f32", isa=isa) as model:
        assert relative_difference(model.logits(tokens), Reference(path).logits(tokens)) <= TOLERANCE


@pytest.mark.parametrize("n_tokens", [1, 2, 15, 16, 17, 255, 256, 257, 300])
def test_prompts_of_any_length_equal_transformers(n_tokens: int, models: Path) -> None:
    tokens = np.random.default_rng(n_tokens).integers(0, 512, n_tokens)
    logits = transformers_logits(tiny_transformers(rotary_fraction=0.75), tokens)
    with phi4edge.load(tiny_gguf(models, rotary_fraction=0.75), kv_type="f32") as model:
        assert relative_difference(model.logits(tokens.tolist()), logits) <= TOLERANCE
