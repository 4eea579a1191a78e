"""The audio encoder of Phi-4-multimodal and its two projectors as one ONNX file.

Log-mels [windows, frames, 80] are normalised, subsampled by eight in time and in frequency by convolutions, run through
conformer blocks whose attention has a learned bias for each distance, and projected to the width of the language model.
A window knows nothing of the others; the frames that the convolutions look back are given with it, and skipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from phi4edge.converters.audio_config import N_MELS, SUBSAMPLING, AudioShape, dims, read_shape
from phi4edge.converters.checkpoint import Checkpoint
from phi4edge.converters.files import Progress, Written
from phi4edge.converters.onnx_graph import Graph
from phi4edge.converters.onnx_weights import Weight, Weights, stack
from phi4edge.converters.variants import Variant, media_tensors
from phi4edge.errors import BundleError

_PREFIX = "audio_embed."
_LAYER_NORM_EPSILON = 1e-5
_INT64 = 7  # in ONNX
_LAST = int(np.iinfo(np.int64).max)
# The convolutions that subsample make so many of their 10 rows (frequencies) at a time: at once, 40 s of sound
# would take 328 MB after the first one.
_ROWS_AT_ONCE = 2


@dataclass(frozen=True)
class AudioGraph:
    """What :func:`write_audio` writes.

    unused: names of tensors that have no effect, by the reason; the audio encoder has none.
    n_bytes: of the file, about.
    """

    graph: Graph
    weights: Weights
    metadata: Mapping[str, str]
    n_bytes: int
    unused: Mapping[str, list[str]] = field(default_factory=dict)


def build_audio(checkpoint: Checkpoint, variant: Variant, hidden: int, precision: str) -> AudioGraph:
    """The graph, with every name, shape and type checked; BundleError when one is wrong.

    hidden: width of the language model.  precision: of the matrices, one of onnx_graph.PRECISIONS.

    Inputs: features float32 [windows, frames, 80], log-mels that are not normalised; skip int64 [], leading tokens to
    drop after the subsampling (1 when 8 frames of left context were given, else 0); window int64 [], tokens to which
    zeros are appended before the blocks (attended to, as in the reference) and cut off after them; branch int64 [],
    0 for the speech projector and 1 for the one used beside images.
    Output: embeddings float32 [windows, tokens, hidden] with tokens = ceil(frames / 8) - skip.
    """
    weights = Weights(checkpoint, media_tensors(checkpoint, variant), _PREFIX)
    graph = Graph("audio", precision)
    _Encoder(graph, weights, read_shape(checkpoint, weights)).build(hidden)
    if extra := sorted(weights.source_name(name) for name in weights.not_taken()):
        shown = ", ".join(f"'{name[:120]}'" for name in extra[:3])
        raise BundleError(
            f"has tensors of no use that we know: {shown}" + (f" and {len(extra) - 3} more" if len(extra) > 3 else ""),
            path=str(checkpoint.directory),
            hint="use --encoders none, or a checkpoint that was not changed",
        )
    metadata = {
        "phi4edge.kind": "audio",
        "phi4edge.version": "1",
        "phi4edge.precision": precision,
        "phi4edge.hidden": str(hidden),
    }
    return AudioGraph(graph, weights, metadata, graph.n_bytes)


def write_audio(path: Path, plan: AudioGraph, progress: Progress) -> Written:
    """Writes the file and syncs it; BundleError names a tensor with a value that is not finite.

    progress is called for each tensor; what it raises ends the writing.
    """
    plan.weights.progress = progress
    file = plan.graph.write(path, plan.metadata)
    return Written(file.n_bytes, file.sha256, plan.weights.source_sha256)


class _Encoder:
    """Adds the nodes.  Comments give the shapes, with w windows and t tokens."""

    def __init__(self, graph: Graph, weights: Weights, shape: AudioShape) -> None:
        self._graph = graph
        self._weights = weights
        self._shape = shape

    def build(self, hidden: int) -> None:
        g = self._graph
        features = g.input("features", np.float32, ["windows", "frames", N_MELS])
        skip, window, branch = (g.input(name, np.int64, []) for name in ("skip", "window", "branch"))
        x = self._slice(self._subsample(features), g.op("Unsqueeze", skip, self._ints(0)))
        n_tokens = g.op("Shape", x, start=1, end=2)  # [1]
        n_more = g.op("Max", g.op("Sub", window, n_tokens), self._ints(0))
        x = g.op("Pad", x, g.op("Concat", self._ints(0, 0, 0, 0), n_more, self._ints(0), axis=0))
        bias = self._attention_bias(x)
        for block in range(self._shape.blocks):
            x = self._block(x, bias, f"encoder.encoders.{block}")
        # The tokens go to one projector; the other one gets a single token, for not every operator takes none.
        parts = []
        for number, name in enumerate(("speech", "vision_speech")):
            is_chosen = g.op("Cast", g.op("Equal", branch, g.constant(number, np.int64)), to=_INT64)
            n_wanted = g.op("Mul", n_tokens, is_chosen)
            some = self._slice(x, end=g.op("Max", n_wanted, self._ints(1)))
            parts.append(self._slice(self._projector(some, name, hidden), end=n_wanted))
        embeddings = g.op("Concat", *parts, axis=1)
        g.output(embeddings, "embeddings", np.float32, ["windows", "tokens", hidden])

    def _subsample(self, features: str) -> str:
        """[w, frames, 80] -> [w, t, width]: three convolutions of stride two, the last two separable."""
        g, channels = self._graph, self._shape.channels
        mean, scale = (self._vector(f"encoder.encoder_embedding.global_{name}", N_MELS) for name in ("mean", "invstd"))
        x = g.op("Mul", g.op("Sub", features, mean), scale)
        x = g.op("Unsqueeze", x, self._ints(1))  # [w, 1, frames, 80]
        first = self._convolution("encoder.embed.conv.0", channels, 1, 3, 3)
        second = self._convolution("encoder.embed.conv.2", channels, 1, 3, 3)
        third = self._convolution("encoder.embed.conv.5", channels, 1, 3, 3)
        n_rows = N_MELS // SUBSAMPLING
        pieces = []
        for row in range(0, n_rows, _ROWS_AT_ONCE):
            # Output rows row..end need 2 * row - 1..2 * end of the rows below; row -1 is padding.
            end = min(row + _ROWS_AT_ONCE, n_rows)
            pads = [1, int(row == 0), 1, 0]
            piece = self._slice(x, max(0, 8 * row - 7), 8 * end, axis=3)
            piece = g.op("Relu", g.op("Conv", piece, *first, strides=[2, 2], pads=pads))
            piece = g.op("Conv", piece, *second, strides=[2, 2], pads=pads, group=channels)
            piece = g.op("Transpose", piece, perm=[0, 2, 3, 1])
            piece = g.op("Relu", self._linear(piece, "encoder.embed.conv.3", channels, channels, 1, 1))
            piece = g.op("Transpose", piece, perm=[0, 3, 1, 2])
            pieces.append(g.op("Conv", piece, *third, strides=[2, 2], pads=pads, group=channels))
        x = g.op("Transpose", g.op("Concat", *pieces, axis=3), perm=[0, 2, 3, 1])  # [w, t, 10, channels]
        x = g.op("Relu", self._linear(x, "encoder.embed.conv.6", channels, channels, 1, 1))
        # The matrix wants all frequencies of the first channel, then those of the second.
        x = g.op("Reshape", g.op("Transpose", x, perm=[0, 1, 3, 2]), self._ints(0, 0, channels * n_rows))
        return self._linear(x, "encoder.embed.out", self._shape.width, channels * n_rows)

    def _attention_bias(self, x: str) -> str:
        """[heads, t, t]: row q, column k has the entry of the distance k - q, cut to -distance..distance - 1."""
        g, heads, distance = self._graph, self._shape.heads, self._shape.distance
        table = self._take("encoder.relative_attention_bias_layer.bias_values.weight", 2 * distance, heads)
        n_tokens = g.op("Squeeze", g.op("Shape", x, start=1, end=2), self._ints(0))
        one = g.constant(1, np.int64)
        places = g.op("Range", g.constant(0, np.int64), n_tokens, one)
        distances = g.op("Sub", g.op("Unsqueeze", places, self._ints(0)), g.op("Unsqueeze", places, self._ints(1)))
        low, high = g.constant(-distance, np.int64), g.constant(distance - 1, np.int64)
        entries = g.op("Add", g.op("Clip", distances, low, high), g.constant(distance, np.int64))
        return g.op("Gather", g.parameter(table, (heads, 2 * distance), np.transpose), entries, axis=1)

    def _block(self, x: str, bias: str, name: str) -> str:
        g, half = self._graph, self._graph.constant(0.5)
        x = g.op("Add", x, g.op("Mul", self._feed_forward(x, f"{name}.feed_forward_in"), half))
        attended = self._attention(self._layer_norm(x, f"{name}.layer_norm_att"), bias, f"{name}.self_attn")
        x = g.op("Add", x, attended)
        x = g.op("Add", x, self._convolve(x, f"{name}.conv"))
        x = g.op("Add", x, g.op("Mul", self._feed_forward(x, f"{name}.feed_forward_out"), half))
        return self._layer_norm(x, f"{name}.layer_norm")

    def _feed_forward(self, x: str, name: str) -> str:
        g, width = self._graph, self._shape.width
        _, inner = dims(self._weights, f"{name}.down_proj.weight", 2)
        self._take(f"{name}.down_proj.weight", width, inner)  # is wrong itself when its other size is
        x = self._linear(self._layer_norm(x, f"{name}.layer_norm"), f"{name}.gate_up_proj", 2 * inner, width)
        value, gate = g.ops("Split", x, n_outputs=2, axis=-1)  # the value comes first, unlike in the language model
        return self._linear(g.op("Mul", value, self._swish(gate)), f"{name}.down_proj", width, inner)

    def _attention(self, x: str, bias: str, name: str) -> str:
        g, width, heads = self._graph, self._shape.width, self._shape.heads
        scale = g.constant(1 / math.sqrt(width // heads))
        split = self._ints(0, 0, heads, width // heads)
        weight, more = (
            stack(f"{name}.qkv.{kind}", *(self._take(f"{name}.{part}_proj.{kind}", width, *sizes) for part in "qkv"))
            for kind, sizes in (("weight", (width,)), ("bias", ()))
        )
        parts = g.ops("Split", g.linear(x, weight, more), n_outputs=3, axis=-1)
        q, k, v = (g.op("Reshape", part, split) for part in parts)  # [w, t, heads, width / heads]
        q, v = (g.op("Transpose", value, perm=[0, 2, 1, 3]) for value in (g.op("Mul", q, scale), v))
        scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 2, 3, 1]))  # [w, heads, t, t]
        x = g.op("MatMul", g.op("Softmax", g.op("Add", scores, bias), axis=-1), v)
        x = g.op("Reshape", g.op("Transpose", x, perm=[0, 2, 1, 3]), self._ints(0, 0, width))
        return self._linear(x, f"{name}.o_proj", width, width)

    def _convolve(self, x: str, name: str) -> str:
        """Across the tokens before: the only place of a block, but for attention, where tokens meet."""
        g, width = self._graph, self._shape.width
        x = self._layer_norm(x, f"{name}.layer_norm")
        x = self._linear(x, f"{name}.glu.ext_pw_conv_1d", 2 * width, width, 1)
        value, gate = g.ops("Split", x, n_outputs=2, axis=-1)
        first, second = (
            g.parameter(self._take(f"{name}.glu.{bias}", 1, width, 1), (width,), np.ravel) for bias in ("b1", "b2")
        )
        x = g.op("Mul", g.op("Add", value, first), self._swish(g.op("Add", gate, second)))
        kernel = dims(self._weights, f"{name}.dw_sep_conv_1d.dw_conv.weight", 3)[2]
        weight, bias = self._convolution(f"{name}.dw_sep_conv_1d.dw_conv", width, 1, kernel)
        x = g.op("Transpose", x, perm=[0, 2, 1])
        x = g.op("Conv", x, weight, bias, pads=[kernel - 1, 0], group=width)
        x = g.op("Transpose", x, perm=[0, 2, 1])
        x = self._swish(self._linear(x, f"{name}.dw_sep_conv_1d.pw_conv", width, width, 1))
        return self._linear(x, f"{name}.ext_pw_conv_1d", width, width, 1)

    def _projector(self, x: str, branch: str, hidden: int) -> str:
        g = self._graph
        x = self._linear(x, f"up_proj_for_{branch}", hidden, self._shape.width)
        error = g.op("Erf", g.op("Div", x, g.constant(math.sqrt(2))))
        gelu = g.op("Mul", g.op("Mul", x, g.op("Add", error, g.constant(1))), g.constant(0.5))
        return self._linear(gelu, f"down_proj_for_{branch}", hidden, hidden)

    def _layer_norm(self, x: str, name: str) -> str:
        weight, bias = (self._vector(f"{name}.{kind}", self._shape.width) for kind in ("weight", "bias"))
        return self._graph.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=_LAYER_NORM_EPSILON)

    def _swish(self, x: str) -> str:
        return self._graph.op("Mul", x, self._graph.op("Sigmoid", x))

    def _linear(self, x: str, name: str, *shape: int) -> str:
        """shape: of the weight; a pointwise convolution has axes of 1 at the end."""
        return self._graph.linear(x, self._take(f"{name}.weight", *shape), self._take(f"{name}.bias", shape[0]))

    def _convolution(self, name: str, *shape: int) -> tuple[str, str]:
        return self._graph.parameter(self._take(f"{name}.weight", *shape)), self._vector(f"{name}.bias", shape[0])

    def _slice(self, x: str, start: str | int = 0, end: str | int = _LAST, axis: int = 1) -> str:
        """x[start:end] along an axis; values of the graph are int64 [1]."""
        start, end = (bound if isinstance(bound, str) else self._ints(bound) for bound in (start, end))
        return self._graph.op("Slice", x, start, end, self._ints(axis))

    def _vector(self, name: str, size: int) -> str:
        return self._graph.parameter(self._take(name, size))

    def _take(self, name: str, *shape: int) -> Weight:
        return self._weights.take(name, *shape)

    def _ints(self, *values: int) -> str:
        return self._graph.constant(values, np.int64)
