"""The benchmark of requests with media gives transformers the same work: the logits are the same."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

from peers import require
from phi4edge.converters.convert import convert

checkpoints: Any = importlib.import_module("benchmarks.random_checkpoint")
sides: Any = importlib.import_module("benchmarks.multimodal_sides")


def test_both_sides_compute_the_same(tmp_path: Path) -> None:
    for peer in ("torch", "transformers", "peft"):
        require(peer)
    checkpoint, bundle, saved = tmp_path / "checkpoint", tmp_path / "bundle", tmp_path / "request.npz"
    checkpoints.write_checkpoint(checkpoint, checkpoints.SHAPES["tiny"], "phi4_multimodal")
    convert(checkpoint, bundle, "f32", encoders="fp32", adapter_quant="f32")
    ours = sides.Phi4Edge(str(bundle), context=1024, threads=1, kv_type="i16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers calls its own old names
        theirs = sides.Transformers(str(checkpoint), threads=1)
        for name in ("text", "image 448", "30 s", "image 448, 5 s"):
            ours.save(sides.REQUESTS[name], 0, str(saved))
            answer = theirs.run(str(saved), n_decode=2)
            assert answer["likeness"] > 0.9995, name  # bfloat16; with the wrong adapter it is below 0.91
            assert answer["n_prompt"] == ours.run(sides.REQUESTS[name], 0, 2)["n_prompt"]
