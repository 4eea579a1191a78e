"""Small ONNX encoders that keep the contract of phi4edge.encoders, whose outputs NumPy can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array

HIDDEN = 8
CROP_SIZE = 56  # 4 x 4 patches, 4 tokens
VISION_WEIGHT = np.random.default_rng(0).standard_normal((4, HIDDEN)).astype(np.float32)  # red, green, blue, mask
SEPARATORS = np.random.default_rng(1).standard_normal((2, HIDDEN)).astype(np.float32)
AUDIO_WEIGHT = np.random.default_rng(2).standard_normal((80, HIDDEN - 3)).astype(np.float32)

Array = npt.NDArray[Any]


def vision_model(**metadata: str) -> Any:
    """Tokens are a linear function of the mean colour and of the share of valid patches below them."""
    size, n_patches = CROP_SIZE, CROP_SIZE // 14
    nodes = [
        helper.make_node("AveragePool", ["pixel_values"], ["colours"], kernel_shape=[28, 28], strides=[28, 28]),
        helper.make_node("Cast", ["patch_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "axis_1"], ["mask_4d"]),
        helper.make_node("AveragePool", ["mask_4d"], ["shares"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Concat", ["colours", "shares"], ["channels"], axis=1),
        helper.make_node("Reshape", ["channels", "flat"], ["flattened"]),
        helper.make_node("Transpose", ["flattened"], ["tokens"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["tokens", "weight"], ["crop_embeddings"], name="projector"),
        helper.make_node("Split", ["separators"], ["row_separator", "view_separator"], axis=0),
    ]
    inputs = [
        helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["crops", 3, size, size]),
        helper.make_tensor_value_info("patch_mask", TensorProto.BOOL, ["crops", n_patches, n_patches]),
    ]
    outputs = [
        helper.make_tensor_value_info(
            "crop_embeddings", TensorProto.FLOAT, ["crops", n_patches * n_patches // 4, HIDDEN]
        ),
        helper.make_tensor_value_info("row_separator", TensorProto.FLOAT, [1, HIDDEN]),
        helper.make_tensor_value_info("view_separator", TensorProto.FLOAT, [1, HIDDEN]),
    ]
    weights = [
        from_array(VISION_WEIGHT, "weight"),
        helper.make_tensor("separators", TensorProto.FLOAT, [2, HIDDEN], SEPARATORS.ravel()),  # as float_data
        helper.make_tensor("flat", TensorProto.INT64, [3], [0, 4, -1]),  # as int64_data
        from_array(np.array([1]), "axis_1"),
    ]
    return _model(nodes, inputs, outputs, weights, {"kind": "vision", "crop_size": str(size)} | metadata)


def vision_tokens(pixel_values: Array, patch_mask: Array) -> Array:
    """What the vision model computes: float32 [n, 4, HIDDEN]."""
    n, side = len(pixel_values), CROP_SIZE // 28
    colours = pixel_values.reshape(n, 3, side, 28, side, 28).mean(axis=(3, 5))
    shares = patch_mask.reshape(n, 1, side, 2, side, 2).mean(axis=(3, 5))
    tokens = np.concatenate([colours, shares], axis=1).reshape(n, 4, -1).transpose(0, 2, 1)
    return np.asarray(tokens @ VISION_WEIGHT)


def audio_model(**metadata: str) -> Any:
    """A token is a linear function of the mean of 15 frames, those the real convolutions see; then the window that it
    is in: how many tokens that has with its padding, the branch, and how many context tokens were dropped.
    """
    nodes = [
        helper.make_node("Transpose", ["features"], ["mels"], perm=[0, 2, 1]),
        helper.make_node(
            "AveragePool", ["mels"], ["means"], kernel_shape=[15], strides=[8], pads=[7, 7], count_include_pad=1
        ),
        helper.make_node("Transpose", ["means"], ["all_tokens"], perm=[0, 2, 1]),
        helper.make_node("Reshape", ["skip", "one"], ["skip_1d"]),
        helper.make_node("Slice", ["all_tokens", "skip_1d", "end", "one"], ["tokens"]),
        helper.make_node("MatMul", ["tokens", "weight"], ["projected"]),
        helper.make_node("Shape", ["tokens"], ["n_tokens"], start=1, end=2),
        helper.make_node("Max", ["n_tokens", "window"], ["padded"]),
        helper.make_node("Reshape", ["branch", "one"], ["branch_1d"]),
        helper.make_node("Concat", ["padded", "branch_1d", "skip_1d"], ["facts"], axis=0),
        helper.make_node("Cast", ["facts"], ["facts_float"], to=TensorProto.FLOAT),
        helper.make_node("Shape", ["tokens"], ["shape"], start=0, end=2),
        helper.make_node("Concat", ["shape", "three"], ["facts_shape"], axis=0),
        helper.make_node("Expand", ["facts_float", "facts_shape"], ["facts_3d"]),
        helper.make_node("Concat", ["projected", "facts_3d"], ["embeddings"], axis=2),
    ]
    inputs = [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["windows", "frames", 80])]
    inputs += [helper.make_tensor_value_info(name, TensorProto.INT64, []) for name in ("skip", "window", "branch")]
    outputs = [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["windows", "tokens", HIDDEN])]
    weights = [from_array(AUDIO_WEIGHT, "weight")]
    weights += [from_array(np.array([n]), name) for name, n in {"one": 1, "end": 1 << 40, "three": 3}.items()]
    return _model(nodes, inputs, outputs, weights, {"kind": "audio"} | metadata)


def audio_tokens(features: Array) -> Array:
    """The linear part of what the audio model computes for one recording: float32 [ceil(n / 8), HIDDEN - 3]."""
    padded = np.pad(features.astype(np.float64), ((7, 15), (0, 0)))
    means = [padded[at : at + 15].sum(axis=0) / 15 for at in range(0, len(features), 8)]
    return np.asarray(np.array(means) @ AUDIO_WEIGHT)


def save(model: Any, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def _model(
    nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any], metadata: dict[str, str]
) -> Any:
    graph = helper.make_graph(nodes, "encoder", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    entries = {"version": "1", "precision": "fp32", "hidden": str(HIDDEN)} | metadata
    helper.set_model_props(model, {f"phi4edge.{key}": value for key, value in entries.items()})
    return model
