"""The vision encoder as an ONNX file: SigLIP tower, 2 x 2 average pool, projector.

inputs   ``pixel_values`` float32 [crops, 3, S, S], normalised; ``patch_mask`` bool [crops, S/P, S/P], True where a
         patch is part of the picture, which is a rectangle from the upper left; P = 14 pixels
outputs  ``crop_embeddings`` float32 [crops, (S/2P)^2, hidden]; ``row_separator`` and ``view_separator`` float32
         [1, hidden], what stands after each row of a picture and before its overview

The layout is that of Phi4MultimodalImageEmbedding in transformers, but for the order of the rows, which is left to the
caller: it depends on the picture, the arithmetic here does not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto

from phi4edge.converters.checkpoint import Checkpoint
from phi4edge.converters.files import Progress, Written
from phi4edge.converters.onnx_graph import Graph
from phi4edge.converters.onnx_weights import Weights, stack
from phi4edge.converters.variants import Variant, media_tensors
from phi4edge.errors import BundleError

_PREFIX = "image_embed."
_TOWER = "img_processor."
_LAYER = re.compile(rf"{re.escape(_TOWER)}encoder\.layers\.(0|[1-9]\d{{0,3}})\..+")
_NOT_RUN = "vision layers after the one whose output is used"
_COMPUTED = "computed"
# What Microsoft's code says of its one tower, and transformers' defaults.
_SIGLIP = {"num_hidden_layers": 27, "num_attention_heads": 16, "layer_norm_eps": 1e-6, "patch_size": 14}
_SIGLIP |= {"feature_layer": -2, "crop_size": 448}
_ACTIVATION = "gelu_pytorch_tanh"
_MASKED = -1e30  # added to a score; finite, so that a crop without a patch gives numbers too


@dataclass(frozen=True)
class VisionGraph:
    """A file that is ready to be written; every name, shape and type was checked."""

    graph: Graph
    weights: Weights
    metadata: Mapping[str, str]
    unused: Mapping[str, list[str]]  # reason -> names in the checkpoint
    crop_size: int  # pixels

    @property
    def n_bytes(self) -> int:
        """Of the file, about."""
        return self.graph.n_bytes


def build_vision(checkpoint: Checkpoint, variant: Variant, hidden: int, precision: str) -> VisionGraph:
    """Plans the vision encoder.  BundleError when a tensor is missing, unknown, or of another shape or type.

    hidden: width of the language model.  precision: of the matrices, one of onnx_graph.PRECISIONS.
    """
    weights = Weights(checkpoint, media_tensors(checkpoint, variant), _PREFIX)
    shape = _read_shape(checkpoint, weights, hidden)
    graph = Graph("vision", precision)
    _Tower(graph, weights, shape).build()
    metadata = {
        "phi4edge.kind": "vision",
        "phi4edge.version": "1",
        "phi4edge.precision": precision,
        "phi4edge.hidden": str(hidden),
        "phi4edge.crop_size": str(shape.crop_size),
    }
    return VisionGraph(graph, weights, metadata, _unused(weights, shape, checkpoint), shape.crop_size)


def write_vision(path: Path, plan: VisionGraph, progress: Progress) -> Written:
    """Writes the file and syncs it.  BundleError names a tensor with a value that is not finite or does not fit."""
    plan.weights.progress = progress
    file = plan.graph.write(path, plan.metadata)
    progress("", plan.weights.n_bytes, plan.weights.n_bytes)
    return Written(file.n_bytes, file.sha256, plan.weights.source_sha256)


@dataclass(frozen=True, slots=True)
class _Shape:
    hidden: int  # of the language model
    width: int
    ffn: int
    heads: int
    layers: int  # that are run
    crop_size: int  # pixels
    patch: int  # pixels
    epsilon: float

    @property
    def side(self) -> int:
        """Patches in a row of a crop."""
        return self.crop_size // self.patch


class _Config:
    """Entries on the tower in config.json, wherever a layout has them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._path = str(checkpoint.directory / "config.json")
        tower = self._object(checkpoint.config, "vision_config") or self._object(checkpoint.config, "img_processor")
        image = self._object(self._object(checkpoint.config, "embd_layer"), "image_embd_layer")
        self._entries = {**_SIGLIP, **image, **tower}

    def integer(self, key: str, lowest: int = 1) -> int:
        value = self._entries[key]
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value < 1 << 16:
            raise self.wrong(key, f"{value!r:.40} is not an integer from {lowest} to 65535")
        return value

    def epsilon(self) -> float:
        value = self._entries["layer_norm_eps"]
        if not isinstance(value, float) or not 0 < value < 1:
            raise self.wrong("layer_norm_eps", f"{value!r:.40} is not a number between 0 and 1")
        return value

    def require_activation(self) -> None:
        value = self._entries.get("hidden_act", _ACTIVATION)
        if value != _ACTIVATION:
            raise self.wrong("hidden_act", f"{value!r:.40} is not supported, only {_ACTIVATION!r}")

    def wrong(self, key: str, problem: str) -> BundleError:
        return BundleError(problem, path=self._path, field=f"vision_config.{key}")

    def _object(self, table: Mapping[str, Any], key: str) -> dict[str, Any]:
        value = table.get(key) or {}
        if not isinstance(value, dict):
            raise BundleError("is not an object", path=self._path, field=key)
        return value


def _read_shape(checkpoint: Checkpoint, weights: Weights, hidden: int) -> _Shape:
    """Sizes from the tensors, and from the config what they do not show; both must agree."""
    config = _Config(checkpoint)
    config.require_activation()
    patch, crop_size, heads = (config.integer(key) for key in ("patch_size", "crop_size", "num_attention_heads"))
    n_layers, feature = config.integer("num_hidden_layers"), config.integer("feature_layer", -(1 << 16))
    n_found = len({match[1] for name in weights.names() if (match := _LAYER.fullmatch(name))})
    if n_found != n_layers:
        raise config.wrong("num_hidden_layers", f"is {n_layers}, and the checkpoint has {n_found} layers")
    n_run = feature if feature >= 0 else n_layers + 1 + feature  # 0 is what goes into the first layer
    if not 0 < n_run <= n_layers:
        raise config.wrong("feature_layer", f"{feature} is none of the {n_layers} layers")
    width = weights.rows(f"{_TOWER}embeddings.patch_embedding.bias")
    n_positions = weights.rows(f"{_TOWER}embeddings.position_embedding.weight")
    if width % heads:
        raise config.wrong("num_attention_heads", f"{heads} does not divide the width {width}")
    if crop_size % (2 * patch):
        raise config.wrong("crop_size", f"{crop_size} is not a multiple of {2 * patch} pixels, two patches")
    if n_positions != (crop_size // patch) ** 2:
        raise config.wrong(
            "crop_size", f"{crop_size} pixels are not the {n_positions} patches of the tower's positions"
        )
    ffn = weights.rows(f"{_TOWER}encoder.layers.0.mlp.fc1.bias")
    return _Shape(hidden, width, ffn, heads, n_run, crop_size, patch, config.epsilon())


def _unused(weights: Weights, shape: _Shape, checkpoint: Checkpoint) -> dict[str, list[str]]:
    unused: dict[str, list[str]] = {}
    unknown = []
    for name in sorted(weights.not_taken()):
        layer = _LAYER.fullmatch(name)
        if name.startswith((f"{_TOWER}head.", f"{_TOWER}post_layernorm.")) or (layer and int(layer[1]) >= shape.layers):
            unused.setdefault(_NOT_RUN, []).append(weights.source_name(name))
        elif name == f"{_TOWER}embeddings.position_ids":
            unused.setdefault(_COMPUTED, []).append(weights.source_name(name))
        else:
            unknown.append(f"'{weights.source_name(name)[:120]}'")
    if unknown:
        raise BundleError(
            f"has {len(unknown)} tensors of no use that we know: {', '.join(unknown[:3])}",
            path=str(checkpoint.directory),
            hint="use --encoders none to leave the encoders out",
        )
    return unused


class _Tower:
    def __init__(self, graph: Graph, weights: Weights, shape: _Shape) -> None:
        self._graph = graph
        self._weights = weights
        self._shape = shape

    def build(self) -> None:
        g, shape = self._graph, self._shape
        side, tokens = shape.side, (shape.side // 2) ** 2
        pixels = g.input("pixel_values", np.float32, ["crops", 3, shape.crop_size, shape.crop_size])
        mask = g.input("patch_mask", np.bool_, ["crops", side, side])
        x = g.op("Add", self._patches(pixels), self._positions(mask))
        bias = self._mask_bias(mask)
        for layer in range(shape.layers):
            x = self._layer(x, bias, f"{_TOWER}encoder.layers.{layer}.")
        grid = g.op("Reshape", x, self._integers(-1, side // 2, 2, side // 2, 2, shape.width))
        pooled = g.op("ReduceMean", grid, axes=[2, 4], keepdims=0)
        rows = g.op("Reshape", pooled, self._integers(-1, tokens, shape.width))
        g.output(self._project(rows), "crop_embeddings", np.float32, ["crops", tokens, shape.hidden])
        for output, name, rank in (
            ("row_separator", "sub_img_feature_extensor", 4),
            ("view_separator", "global_img_feature_extensor", 3),
        ):
            vector = self._weights.take(name, *[1] * (rank - 1), shape.width)
            row = g.op("Reshape", g.parameter(vector), self._integers(1, shape.width))
            g.output(self._project(row), output, np.float32, [1, shape.hidden])

    def _patches(self, pixels: str) -> str:
        """[crops, patches, width]"""
        g, shape = self._graph, self._shape
        name, patch = f"{_TOWER}embeddings.patch_embedding", shape.patch
        weight = g.parameter(self._weights.take(f"{name}.weight", shape.width, 3, patch, patch))
        grid = g.op("Conv", pixels, weight, self._vector(f"{name}.bias", shape.width), strides=[patch, patch])
        rows = g.op("Reshape", grid, self._integers(-1, shape.width, shape.side**2))
        return g.op("Transpose", rows, perm=[0, 2, 1])

    def _positions(self, mask: str) -> str:
        """Position embeddings [crops, patches, width].

        The valid patches are spread over the whole table: patch (i, j) of n rows and m columns has the row and column
        floor(side i / n), floor(side j / m) of it.  Those that are not valid have position 0.
        """
        g, side = self._graph, self._shape.side
        ones = g.op("Cast", mask, to=TensorProto.INT64)
        last, patches = g.constant(side - 1, np.int64), self._integers(-1, side * side)
        places = []
        for axis in (1, 2):
            first = g.op("Gather", ones, g.constant(0, np.int64), axis=3 - axis)  # the first column, or row
            count = g.op("ReduceSum", first, self._integers(1), keepdims=1)
            count = g.op("Max", count, g.constant(1, np.int64))  # never divide by 0, whatever the mask
            place = g.op("Div", g.constant(side * np.arange(side), np.int64), count)
            places.append(g.op("Unsqueeze", g.op("Min", place, last), self._integers(3 - axis)))
        ids = g.op("Add", g.op("Mul", places[0], g.constant(side, np.int64)), places[1])
        ids = g.op("Reshape", g.op("Mul", ids, ones), patches)
        name = f"{_TOWER}embeddings.position_embedding.weight"
        table = g.parameter(self._weights.take(name, side * side, self._shape.width))
        return g.op("Gather", table, ids, axis=0)

    def _mask_bias(self, mask: str) -> str:
        """What is added to the scores of a key, [crops, patches, heads, 1]."""
        g, shape = self._graph, self._shape
        keys = g.op("Reshape", mask, self._integers(-1, shape.side**2, 1, 1))
        bias = g.op("Where", keys, g.constant(0.0), g.constant(_MASKED))
        return g.op("Expand", bias, self._integers(1, 1, shape.heads, 1))

    def _layer(self, x: str, mask_bias: str, name: str) -> str:
        g, shape = self._graph, self._shape
        normed = self._norm(x, f"{name}layer_norm1")
        x = g.op("Add", x, self._attention(normed, mask_bias, f"{name}self_attn."))
        inner = self._linear(self._norm(x, f"{name}layer_norm2"), f"{name}mlp.fc1", shape.ffn, shape.width)
        return g.op("Add", x, self._linear(self._tanh_gelu(inner), f"{name}mlp.fc2", shape.width, shape.ffn))

    def _attention(self, x: str, mask_bias: str, name: str) -> str:
        g, shape = self._graph, self._shape
        width, heads, head = shape.width, shape.heads, shape.width // shape.heads
        parts = [f"{name}{part}_proj" for part in "qkv"]
        weight = stack(f"{_PREFIX}{name}qkv.weight", *(self._weights.take(f"{p}.weight", width, width) for p in parts))
        bias = stack(f"{_PREFIX}{name}qkv.bias", *(self._weights.take(f"{part}.bias", width) for part in parts))
        query, key, value = g.ops("Split", g.linear(x, weight, bias), n_outputs=3, axis=-1)
        # Every query gets a 1, which the product multiplies with the bias of the key.  A mask would keep onnxruntime
        # from its kernel that never holds all scores of a crop (64 MB), which takes a fifth of the time.
        query = g.op("Reshape", query, self._integers(0, 0, heads, head))
        query = g.op("Pad", query, self._integers(0, 0, 0, 0, 0, 0, 0, 1), g.constant(1.0))
        key = g.op("Concat", g.op("Reshape", key, self._integers(0, 0, heads, head)), mask_bias, axis=3)
        joined = self._integers(0, 0, heads * (head + 1))
        mixed = g.op(
            "MultiHeadAttention",
            g.op("Reshape", query, joined),
            g.op("Reshape", key, joined),
            value,
            domain="com.microsoft",
            num_heads=heads,
            scale=1 / math.sqrt(head),
        )
        return self._linear(mixed, f"{name}out_proj", width, width)

    def _project(self, x: str) -> str:
        """The projector, whose GELU is exact, unlike the tower's."""
        g, shape = self._graph, self._shape
        x = self._linear(x, "img_projection_up", shape.hidden, shape.width)
        cumulative = g.op("Add", g.op("Erf", g.op("Div", x, g.constant(math.sqrt(2)))), g.constant(1.0))
        x = g.op("Mul", g.op("Mul", x, cumulative), g.constant(0.5))  # in the form that onnxruntime fuses
        return self._linear(x, "img_projection_down", shape.hidden, shape.hidden)

    def _tanh_gelu(self, x: str) -> str:
        """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), in the form that onnxruntime fuses."""
        g = self._graph
        cubed = g.op("Mul", g.op("Pow", x, g.constant(3.0)), g.constant(0.044715))
        inner = g.op("Mul", g.op("Add", x, cubed), g.constant(math.sqrt(2 / math.pi)))
        return g.op("Mul", g.op("Mul", x, g.constant(0.5)), g.op("Add", g.op("Tanh", inner), g.constant(1.0)))

    def _norm(self, x: str, name: str) -> str:
        scale, bias = (self._vector(f"{name}.{part}", self._shape.width) for part in ("weight", "bias"))
        return self._graph.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=self._shape.epsilon)

    def _linear(self, x: str, name: str, n_out: int, n_in: int) -> str:
        weights = self._weights
        return self._graph.linear(x, weights.take(f"{name}.weight", n_out, n_in), weights.take(f"{name}.bias", n_out))

    def _vector(self, name: str, size: int) -> str:
        return self._graph.parameter(self._weights.take(name, size))

    def _integers(self, *values: int) -> str:
        return self._graph.constant(values, np.int64)
