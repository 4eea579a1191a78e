"""What the audio encoder is like: sizes come from its tensors, and config.json must agree with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from phi4edge.converters.checkpoint import Checkpoint
from phi4edge.converters.onnx_weights import Weights
from phi4edge.errors import BundleError

N_MELS = 80  # of a frame of features
SUBSAMPLING = 8  # frames to a token

_HINT = "use --encoders none, or a checkpoint that was not changed"
_Rules = Iterable[tuple[str, tuple[object, ...]]]
# Names in the config of the encoder, in both layouts, and the only values that the graph computes.
_SWISH = ("swish", "silu")
_ONLY: _Rules = (
    ("activation", _SWISH),
    ("conv_activation", _SWISH),
    ("conv_glu_type", _SWISH),
    ("nemo_activation", ("relu",)),
    ("input_layer", ("nemo_conv",)),
    ("input_size", (N_MELS,)),
    ("time_reduction", (SUBSAMPLING,)),
    ("chunk_size", (-1,)),  # attention is not cut into chunks
    ("depthwise_multiplier", (1,)),
    ("downsample_rate", (1,)),
    ("bias_symmetric", (False,)),
    ("relative_attention_bias_args.type", ("t5",)),
    ("causal", (True,)),
    ("batch_norm", (False,)),
    ("bias_in_glu", (True,)),
)
_ONLY_AROUND: _Rules = (  # beside it, in the original layout
    ("compression_rate", (SUBSAMPLING,)),
    ("downsample_rate", (1,)),
    ("projection_cls", ("mlp",)),
    ("use_qformer", (False,)),
    ("use_conv_downsample", (False,)),
)


@dataclass(frozen=True)
class AudioShape:
    """Sizes that the tensors tell."""

    width: int
    heads: int
    distance: int  # keys that are farther away have the bias of this distance
    channels: int  # of the convolutions that subsample
    blocks: int


def read_shape(checkpoint: Checkpoint, weights: Weights) -> AudioShape:
    """The sizes; BundleError when a tensor is missing or config.json wants something else."""
    buckets, heads = dims(weights, "encoder.relative_attention_bias_layer.bias_values.weight", 2)
    width, _ = dims(weights, "encoder.embed.out.weight", 2)
    channels = dims(weights, "encoder.embed.conv.0.weight", 4)[0]
    found = {match[1] for name in weights.names() if (match := re.match(r"encoder\.encoders\.(\d+)\.", name))}
    shape = AudioShape(width, heads, buckets // 2, channels, max(1, len(found)))
    _check_config(checkpoint, shape)
    return shape


def dims(weights: Weights, name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that sizes are taken from; BundleError when it has another rank or is empty."""
    shape = weights.shape(name)
    if len(shape) != rank or 0 in shape:
        raise BundleError(
            f"has the shape {list(shape)}, expected {rank} sizes above 0",
            path=str(weights.take(name, *shape).source.path),
            field=f"tensor '{weights.source_name(name)}'",
            hint="download the checkpoint again, or use --encoders none",
        )
    return shape


def _check_config(checkpoint: Checkpoint, shape: AudioShape) -> None:
    config, file = checkpoint.config, str(checkpoint.directory / "config.json")
    section = "audio_config" if "audio_config" in config else "audio_processor.config"
    if not isinstance(_get(config, section), dict):
        raise BundleError("is missing or not an object", path=file, field=section, hint="use --encoders none")
    sizes: _Rules = (
        ("num_attention_heads", (shape.heads,)),
        ("attention_heads", (shape.heads,)),
        ("bias_max_distance", (shape.distance,)),
        ("relative_attention_bias_args.t5_bias_max_distance", (shape.distance,)),
        ("hidden_size", (shape.width,)),
        ("attention_dim", (shape.width,)),
        ("nemo_conv_channels", (shape.channels,)),
        ("nemo_conv_settings.conv_channels", (shape.channels,)),
        ("num_blocks", (shape.blocks,)),
    )
    _require(config, file, section, sizes, "contradicts the tensors, which say")
    _require(config, file, section, _ONLY, "is not supported, only")
    _require(config, file, "embd_layer.audio_embd_layer", _ONLY_AROUND, "is not supported, only")
    if shape.width % shape.heads:
        raise BundleError(
            f"{shape.heads} heads do not divide the width {shape.width}", path=file, field=section, hint=_HINT
        )


def _require(config: Mapping[str, Any], file: str, section: str, rules: _Rules, problem: str) -> None:
    """BundleError when an entry has none of its values; what is not there is not checked."""
    for key, allowed in rules:
        value = _get(config, f"{section}.{key}")
        if value is not None and (type(value), value) not in [(type(one), one) for one in allowed]:
            raise BundleError(
                f"{value!r:.40} {problem} {allowed[0]!r}", path=file, field=f"{section}.{key}", hint=_HINT
            )


def _get(config: Mapping[str, Any], dotted: str) -> Any:
    """What a path of keys leads to; None when it leads nowhere."""
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
