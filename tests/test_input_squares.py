"""Sums of squared inputs of each weight matrix equal those that transformers' own layers see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peers import require
from phi4edge import _core
from tiny_models import TinyShape, tiny_gguf, tiny_transformers

SHAPES: dict[str, dict[str, Any]] = {
    "fused": {"rotary_fraction": 0.75},
    "split, odd sizes": {
        "architecture": "llama",
        "hidden": 100,
        "vocab": 301,
        "tied": False,
        "heads": 5,
        "kv_heads": 1,
        "layers": 3,
        "ffn": 130,
    },
}
# Of transformers' layers, the GGUF names of the matrices that have the same input.
NAMES = {
    "qkv_proj": ["attn_qkv"],
    "q_proj": ["attn_q", "attn_k", "attn_v"],
    "o_proj": ["attn_output"],
    "gate_up_proj": ["ffn_up"],
    "gate_proj": ["ffn_gate", "ffn_up"],
    "down_proj": ["ffn_down"],
}


def expected_squares(options: dict[str, Any], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Sums over tokens, by GGUF name, seen by hooks on every linear layer of transformers."""
    torch = require("torch")
    model = tiny_transformers(**options)
    sums: dict[str, np.ndarray] = {}

    def watch(module: Any, names: list[str]) -> None:
        def note(_: Any, inputs: tuple[Any, ...]) -> None:
            squares = (inputs[0][0].double() ** 2).sum(0).numpy()
            sums.update({name: sums.get(name, 0) + squares for name in names})

        module.register_forward_pre_hook(note)

    for number, layer in enumerate(model.model.layers):
        for path, module in layer.named_modules():
            if names := NAMES.get(path.rpartition(".")[2]):
                watch(module, [f"blk.{number}.{name}.weight" for name in names])
    watch(model.lm_head, ["token_embd.weight" if TinyShape(**options).tied else "output.weight"])
    with torch.no_grad():
        model(torch.as_tensor(tokens)[None].long(), use_cache=False)
    return sums


def run(path: Path, chunks: list[np.ndarray], n_threads: int = 2, logits: str = "all", **options: Any) -> _core.Session:
    session = _core.Session(_core.Model(_core.GgufFile(path), n_threads), 512, kv_type="f32")
    session.collect_input_squares(True)
    for chunk in chunks:
        session.extend(chunk, logits=logits, **options)
    return session


@pytest.mark.parametrize("name", SHAPES)
def test_the_sums_equal_those_of_transformers(name: str, models: Path) -> None:
    tokens = np.random.default_rng(3).integers(0, 290, 150).astype(np.int32)
    expected = expected_squares(SHAPES[name], tokens)
    ours = run(tiny_gguf(models, **SHAPES[name]), [tokens[:1], tokens[1:140], tokens[140:]]).input_squares()
    assert set(ours) == set(expected)
    for tensor, (sums, n_tokens) in ours.items():
        assert n_tokens == len(tokens) and sums.dtype == np.float64
        np.testing.assert_allclose(sums, expected[tensor], rtol=1e-3, atol=1e-5 * expected[tensor].max())


def test_threads_change_no_bit_and_collecting_changes_no_logits(models: Path) -> None:
    path = tiny_gguf(models, "Q4_K")
    tokens = np.arange(200, dtype=np.int32)
    one, three = (run(path, [tokens], n_threads).input_squares() for n_threads in (1, 3))
    for tensor in one:
        np.testing.assert_array_equal(one[tensor][0], three[tensor][0])
    model = _core.Model(_core.GgufFile(path), 2)
    silent, collecting = _core.Session(model, 512), _core.Session(model, 512)
    collecting.collect_input_squares(True)
    np.testing.assert_array_equal(silent.extend(tokens), collecting.extend(tokens))
    assert silent.input_squares() == {}


def test_the_head_counts_its_own_tokens_and_stopping_keeps_the_sums(models: Path) -> None:
    tokens = np.arange(20, dtype=np.int32)
    session = run(tiny_gguf(models), [tokens], logits="last")
    assert {name: n for name, (_, n) in session.input_squares().items() if n != 20} == {"token_embd.weight": 1}
    session.collect_input_squares(False)
    session.extend(tokens)
    assert session.input_squares()["blk.0.ffn_down.weight"][1] == 20
    session.collect_input_squares(True)
    assert session.input_squares()["blk.0.ffn_down.weight"][1] == 0


def test_what_longrope_computes_again_counts_once(models: Path) -> None:
    tokens = np.arange(40, dtype=np.int32)
    session = run(tiny_gguf(models, original_context=32), [tokens[:30], tokens[30:]])
    assert {n for _, n in session.input_squares().values()} == {40}
