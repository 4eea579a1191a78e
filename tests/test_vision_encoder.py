"""The vision encoder as an ONNX file gives the embeddings of transformers."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

from peers import require
from phi4edge.converters.checkpoint import Checkpoint
from phi4edge.converters.files import Written
from phi4edge.converters.variants import variant_of
from phi4edge.converters.vision import VisionGraph, build_vision, write_vision
from phi4edge.errors import BundleError
from tiny_checkpoints import safetensors_bytes
from tiny_media import MEDIA, MEDIA_LAYOUTS, MediaShape, media_model, media_tensors, original_name, tiny_multimodal
from tiny_models import Array

TOWER = f"{MEDIA}image_embed.img_processor."
SHAPES: dict[str, dict[str, Any]] = {
    "odd sizes": {},
    "as many patches as the real model": {"crop_size": 448, "vision_hidden": 8, "vision_ffn": 10, "vision_layers": 2},
    "four heads and five layers": {"crop_size": 56, "vision_heads": 4, "vision_layers": 5, "seed": 1},
}
RECTANGLES = ((1.0, 1.0), (0.7, 1.0), (1.0, 0.3), (0.1, 0.9), (0.97, 0.02))  # valid rows and columns of a crop


def convert(checkpoint: Path, path: Path, precision: str = "fp32") -> tuple[VisionGraph, Written]:
    with Checkpoint(checkpoint) as source:
        plan = build_vision(source, variant_of(source), MediaShape().hidden, precision)
        return plan, write_vision(path, plan, lambda name, done, total: None)


def run(path: Path, pixels: Array, mask: npt.NDArray[np.bool_]) -> list[Array]:
    """crop_embeddings, row_separator, view_separator"""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = ["crop_embeddings", "row_separator", "view_separator"]
    outputs: list[Array] = session.run(names, {"pixel_values": pixels, "patch_mask": mask})
    return outputs


def crops(shape: MediaShape, rectangles: Sequence[tuple[float, float]]) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Random pixels, and masks of which a part of the rows and columns is valid."""
    side = shape.crop_size // 14
    mask = np.zeros((len(rectangles), side, side), np.bool_)
    for crop, (rows, columns) in enumerate(rectangles):
        mask[crop, : max(1, round(rows * side)), : max(1, round(columns * side))] = True
    rng = np.random.default_rng(7)
    return rng.standard_normal((len(rectangles), 3, shape.crop_size, shape.crop_size)).astype(np.float32), mask


@cache
def expected(name: str) -> list[Array]:
    """What transformers makes of ``crops``: pooled features and separators, all through the projector."""
    torch = require("torch")
    shape = MediaShape(**SHAPES[name])
    pixels, mask = crops(shape, RECTANGLES)
    embedding = media_model(shape).model.embed_tokens_extend.image_embed
    with torch.no_grad():
        found = [
            embedding.get_img_features(torch.from_numpy(pixels), attention_mask=torch.from_numpy(mask)),
            embedding.sub_img_feature_extensor.reshape(1, -1),
            embedding.global_img_feature_extensor.reshape(1, -1),
        ]
        gelu = torch.nn.functional.gelu
        return [
            embedding.img_projection_down(gelu(embedding.img_projection_up(part))).numpy().astype(np.float32)
            for part in found
        ]


def cosines(found: Array, wanted: Array) -> Array:
    lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(wanted, axis=-1)
    return np.asarray((found * wanted).sum(axis=-1) / lengths, np.float32)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("name", SHAPES)
def test_embeddings_are_those_of_transformers(name: str, precision: str, tmp_path: Path) -> None:
    shape = MediaShape(**SHAPES[name])
    path = tmp_path / "vision.onnx"
    convert(tiny_multimodal(tmp_path / "checkpoint", **SHAPES[name]), path, precision)
    for found, wanted in zip(run(path, *crops(shape, RECTANGLES)), expected(name), strict=True):
        assert found.shape == wanted.shape
        error = np.abs(found - wanted).max() / np.abs(wanted).max()
        if precision == "int8":
            assert cosines(found, wanted).min() > 0.999
        else:
            assert error < {"fp32": 1e-5, "fp16": 2e-3}[precision]


def test_rows_put_together_are_a_picture_of_transformers(tmp_path: Path) -> None:
    """Of 2 x 3 crops, with odd numbers of valid patches, so that a pooled patch at the edge is half outside."""
    torch = require("torch")
    shape = MediaShape()
    n_high, n_wide, side, pooled = 2, 3, 8, 4
    canvas = np.zeros((n_high * side, n_wide * side), np.bool_)
    canvas[:13, :21] = True
    tiles = canvas.reshape(n_high, side, n_wide, side).swapaxes(1, 2).reshape(-1, side, side)
    mask = np.concatenate([np.ones((1, side, side), np.bool_), tiles])  # the overview comes first
    pixels = np.random.default_rng(2).standard_normal((len(mask), 3, 112, 112)).astype(np.float32)
    path = tmp_path / "vision.onnx"
    convert(tiny_multimodal(tmp_path / "checkpoint"), path)
    embeddings, row_separator, view_separator = run(path, pixels, mask)

    def rows_of(grid: Array) -> Array:
        separators = np.broadcast_to(row_separator, (len(grid), 1, shape.hidden))
        return np.concatenate([grid, separators], axis=1).reshape(-1, shape.hidden)

    grid = embeddings[1:].reshape(n_high, n_wide, pooled, pooled, -1).swapaxes(1, 2)
    grid = grid.reshape(n_high * pooled, n_wide * pooled, -1)[:7, :11]  # half of 13 and of 21, rounded up
    overview = embeddings[0].reshape(pooled, pooled, -1)
    found = np.concatenate([rows_of(grid), view_separator, rows_of(overview)])

    n_tokens = 7 * 12 + 1 + 4 * 5
    with torch.no_grad():
        wanted = media_model(shape).model.embed_tokens_extend.image_embed(
            torch.full((1, n_tokens), shape.image_token),
            torch.zeros(1, n_tokens, shape.hidden),
            torch.from_numpy(pixels)[None],
            image_sizes=torch.tensor([[112 * n_high, 112 * n_wide]]),
            image_attention_mask=torch.from_numpy(mask)[None],
        )
    np.testing.assert_allclose(found, wanted[0].numpy(), atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_both_layouts_become_the_same_valid_file(precision: str, tmp_path: Path) -> None:
    data = set()
    for layout in MEDIA_LAYOUTS:
        path = tmp_path / f"{layout}.onnx"
        plan, written = convert(tiny_multimodal(tmp_path / layout, layout), path, precision)
        data.add(path.read_bytes())
        assert written.n_bytes == path.stat().st_size
        assert [len(names) for names in plan.unused.values()] == [2 + 11 + 16]  # post_layernorm, head, a layer
    assert len(data) == 1
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        "phi4edge.kind": "vision",
        "phi4edge.version": "1",
        "phi4edge.precision": precision,
        "phi4edge.hidden": "64",
        "phi4edge.crop_size": "112",
    }
    assert model.ir_version <= 10


def test_int8_keeps_channels_that_stand_out(tmp_path: Path) -> None:
    """As in trained towers: a few channels are 20 to 50 times as large as the others, and their weights small."""
    sizes: dict[str, Any] = {"vision_hidden": 128, "vision_ffn": 300}
    tensors = media_tensors(MediaShape(**sizes))
    channels = np.random.default_rng(3).choice(128, 4, replace=False)
    for name, values in tensors.items():
        if "image_embed" in name and ("layer_norm1.weight" in name or "layer_norm2.weight" in name):
            values[channels] *= (20, 30, 40, 50)
        if "image_embed" in name and name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "fc1.weight")):
            values[:, channels] *= 0.1
    checkpoint = tiny_multimodal(tmp_path / "checkpoint", changes=tensors, **sizes)
    outputs = []
    for precision in ("fp32", "int8"):
        convert(checkpoint, tmp_path / precision, precision)
        outputs.append(run(tmp_path / precision, *crops(MediaShape(), RECTANGLES))[0])
    assert cosines(*outputs).min() > 0.999


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_any_mask_gives_numbers(precision: str, tmp_path: Path) -> None:
    """Not only rectangles: none at all, a single patch in the corner, a chessboard."""
    path = tmp_path / "vision.onnx"
    convert(tiny_multimodal(tmp_path / "checkpoint"), path, precision)
    mask = np.zeros((3, 8, 8), np.bool_)
    mask[1, 7, 7] = True
    mask[2] = np.indices((8, 8)).sum(axis=0) % 2 == 1
    assert np.isfinite(run(path, np.zeros((3, 3, 112, 112), np.float32), mask)[0]).all()


FC2 = f"{TOWER}encoder.layers.1.mlp.fc2."
BAD_TENSORS: dict[str, tuple[dict[str, Array | None], str]] = {
    "a layer's bias is missing": ({f"{FC2}bias": None}, "layers.1.mlp.fc2.bias"),
    "a matrix of another shape": ({f"{FC2}weight": np.ones((40, 53), np.float32)}, r"\[40, 53\], expected \[40, 54\]"),
    "a matrix of no size": ({f"{TOWER}encoder.layers.0.mlp.fc1.bias": np.ones((0,), np.float32)}, "empty"),
    "the positions are missing": ({f"{TOWER}embeddings.position_embedding.weight": None}, "position_embedding"),
    "positions of another size": (
        {f"{TOWER}embeddings.position_embedding.weight": np.ones((49, 40), np.float32)},
        "crop_size: 112 pixels are not the 49 patches",
    ),
    "a tensor too many": ({f"{FC2}scale": np.ones(1, np.float32)}, "no use that we know.*fc2.scale"),
    "a layer too many": (
        {f"{TOWER}encoder.layers.3.layer_norm1.bias": np.ones(40, np.float32)},
        "num_hidden_layers: is 3, and the checkpoint has 4",
    ),
    "a NaN": ({f"{FC2}weight": np.full((40, 54), np.nan, np.float32)}, "fc2.weight': has a NaN"),
    "an infinity": ({f"{MEDIA}image_embed.img_projection_up.bias": np.full(64, np.inf, np.float32)}, "has a NaN or"),
}


@pytest.mark.parametrize("layout", MEDIA_LAYOUTS)
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_wrong_tensor_is_named(case: str, layout: str, tmp_path: Path) -> None:
    changes, message = BAD_TENSORS[case]
    if layout == "phi4mm":
        changes = {original_name(name): values for name, values in changes.items()}
    checkpoint = tiny_multimodal(tmp_path / "checkpoint", layout, changes=changes)
    with pytest.raises(BundleError, match=message):
        convert(checkpoint, tmp_path / "vision.onnx")


def test_integers_are_no_weights(tmp_path: Path) -> None:
    checkpoint = tiny_multimodal(tmp_path / "checkpoint")
    path = checkpoint / "model.safetensors"
    header_bytes, data = _split(path.read_bytes())
    name = f"{FC2}weight".encode()
    at = header_bytes.index(name)
    path.write_bytes(safetensors_bytes(header_bytes[:at] + header_bytes[at:].replace(b'"F32"', b'"I32"', 1), data))
    with pytest.raises(BundleError, match="is I32, expected BF16, F16, F32"):
        convert(checkpoint, tmp_path / "vision.onnx")


def _split(file: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(file[:8], "little")
    return file[8:end], file[end:]


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"num_attention_heads": 3}, "num_attention_heads: 3 does not divide the width 40"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads: 0 is not an integer"),
    "patch": ({"patch_size": 16}, r"crop_size: 112 is not a multiple of 32|patch_embedding"),
    "an odd number of patches": ({"crop_size": 98}, "crop_size: 98 is not a multiple of 28"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
    "feature layer": ({"feature_layer": -4}, "feature_layer: -4 is none of the 3 layers"),
    "epsilon": ({"layer_norm_eps": float("nan")}, "layer_norm_eps|NaN"),
    "type": ({"num_hidden_layers": "3"}, "num_hidden_layers: '3' is not an integer"),
}


@pytest.mark.parametrize("layout", MEDIA_LAYOUTS)
@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_wrong_config_is_named(case: str, layout: str, tmp_path: Path) -> None:
    changes, message = BAD_CONFIGS[case]
    checkpoint = tiny_multimodal(tmp_path / "checkpoint", layout)
    _change_config(checkpoint / "config.json", "img_processor" if layout == "phi4mm" else "vision_config", changes)
    with pytest.raises(BundleError, match=message):
        convert(checkpoint, tmp_path / "vision.onnx")


def test_without_a_description_the_original_tower_is_the_real_one(tmp_path: Path) -> None:
    """Microsoft's config.json has ``img_processor: null``; our small tower then lacks layers."""
    checkpoint = tiny_multimodal(tmp_path / "checkpoint", "phi4mm")
    _change_config(checkpoint / "config.json", "img_processor", None)
    with pytest.raises(BundleError, match="num_hidden_layers: is 27, and the checkpoint has 3"):
        convert(checkpoint, tmp_path / "vision.onnx")


def _change_config(path: Path, key: str, changes: Mapping[str, Any] | None) -> None:
    config = json.loads(path.read_text())
    config[key] = None if changes is None else config[key] | changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_memory_does_not_grow_with_the_model(precision: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vision_hidden": 192, "vision_ffn": 400, "vision_layers": 12, "crop_size": 56}
    checkpoint = tiny_multimodal(tmp_path / "checkpoint", **sizes)
    largest = 3 * 192 * 192 * 4  # bytes of the queries, keys and values of a layer
    with Checkpoint(checkpoint) as source:
        plan = build_vision(source, variant_of(source), MediaShape().hidden, precision)
        tracemalloc.start()
        try:
            write_vision(tmp_path / "vision.onnx", plan, lambda name, done, total: None)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert plan.weights.n_bytes > 25 * largest
    assert peak < 5 * largest
