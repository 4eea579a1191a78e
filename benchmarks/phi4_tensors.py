"""The tensors of a checkpoint of Phi-4-mini or Phi-4-multimodal: names and shapes.

Three layouts: ``phi3`` (text only), ``phi4mm`` (Microsoft's own names, LoRAs beside the weights), ``phi4_multimodal``
(transformers' names, LoRAs in folders of their own).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

LAYOUTS = ("phi4mm", "phi4_multimodal", "phi3")
ADAPTERS = ("vision", "speech")

_Named = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Vision:
    hidden: int = 1152
    ffn: int = 4304
    layers: int = 27
    heads: int = 16
    image: int = 448  # pixels a side of a crop
    patch: int = 14


@dataclass(frozen=True)
class Audio:
    hidden: int = 1024
    ffn: int = 1536
    blocks: int = 24
    heads: int = 16
    channels: int = 1024  # of the convolutions in front
    mels: int = 80
    bias_distance: int = 500


@dataclass(frozen=True)
class Shape:
    hidden: int = 3072
    layers: int = 32
    heads: int = 24
    kv_heads: int = 8
    ffn: int = 8192
    vocab: int = 200064
    context: int = 131072
    original_context: int = 4096
    ranks: tuple[int, int] = (256, 320)  # of the adapters
    vision: Vision = Vision()
    audio: Audio = Audio()

    @property
    def rotary_dims(self) -> int:
        return int(self.hidden // self.heads * 0.75)

    def token(self, distance: int) -> int:
        """The id of a special token, by its distance from <|endoftext|>, which is 199999 of 200064."""
        return self.vocab - 65 + distance

    def linears(self) -> dict[str, tuple[int, int]]:
        """Those of a decoder layer, which the adapters change: rows and columns."""
        head = self.hidden // self.heads
        return {
            "self_attn.qkv_proj": ((self.heads + 2 * self.kv_heads) * head, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_up_proj": (2 * self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }


SHAPES = {
    "phi4": Shape(),
    "tiny": Shape(
        hidden=256,
        layers=2,
        heads=4,
        kv_heads=2,
        ffn=512,
        vocab=512,
        context=8192,
        original_context=1024,
        ranks=(8, 10),
        vision=Vision(hidden=64, ffn=88, layers=3, heads=2, image=112),
        audio=Audio(hidden=64, ffn=96, blocks=2, heads=4, channels=16),
    ),
}

# What the real model has: values with and without LoRAs and encoders, and tensors in the files.
PHI4_VALUES, PHI4_BACKBONE_VALUES = 5_574_460_384, 3_836_021_760
PHI4_TENSORS = {"phi4mm": 2047, "phi4_multimodal": 1535, "phi3": 194}  # adapters in folders not counted


# --- tensors


def model_tensors(shape: Shape, layout: str) -> _Named:
    """Those of the model's own files."""
    yield from backbone_tensors(shape, ".base_layer.weight" if layout == "phi4mm" else ".weight")
    if layout == "phi3":
        return
    for name, size in itertools.chain(_vision_tensors(shape), _audio_tensors(shape)):
        name = "model.embed_tokens_extend." + name
        yield (_original_name(name) if layout == "phi4mm" else name), size
    if layout == "phi4mm":
        for adapter in ADAPTERS:
            yield from adapter_tensors(shape, adapter, "model", f".{adapter}.weight")


def backbone_tensors(shape: Shape, linear_suffix: str = ".weight") -> _Named:
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        yield f"model.layers.{layer}.input_layernorm.weight", (shape.hidden,)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (shape.hidden,)
        for linear, size in shape.linears().items():
            yield f"model.layers.{layer}.{linear}{linear_suffix}", size
    yield "model.norm.weight", (shape.hidden,)


def adapter_tensors(
    shape: Shape, adapter: str, prefix: str = "base_model.model.model", suffix: str = ".weight"
) -> _Named:
    """The prefix is what PEFT writes and needs."""
    rank = shape.ranks[ADAPTERS.index(adapter)]
    for layer in range(shape.layers):
        for linear, (n_rows, n_columns) in shape.linears().items():
            yield f"{prefix}.layers.{layer}.{linear}.lora_A{suffix}", (rank, n_columns)
            yield f"{prefix}.layers.{layer}.{linear}.lora_B{suffix}", (n_rows, rank)


def _linear(name: str, n_rows: int, *n_columns: int) -> _Named:
    yield f"{name}.weight", (n_rows, *n_columns)
    yield f"{name}.bias", (n_rows,)


def _vision_tensors(shape: Shape) -> _Named:
    vision = shape.vision
    hidden, ffn = vision.hidden, vision.ffn
    tower = "image_embed.img_processor"
    yield from _linear(f"{tower}.embeddings.patch_embedding", hidden, 3, vision.patch, vision.patch)
    yield f"{tower}.embeddings.position_embedding.weight", ((vision.image // vision.patch) ** 2, hidden)
    for layer in range(vision.layers):
        name = f"{tower}.encoder.layers.{layer}"
        for norm in ("layer_norm1", "layer_norm2"):
            yield from _linear(f"{name}.{norm}", hidden)
        for linear in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{name}.self_attn.{linear}", hidden, hidden)
        yield from _linear(f"{name}.mlp.fc1", ffn, hidden)
        yield from _linear(f"{name}.mlp.fc2", hidden, ffn)
    yield from _linear(f"{tower}.post_layernorm", hidden)
    yield f"{tower}.head.probe", (1, 1, hidden)
    yield f"{tower}.head.attention.in_proj_weight", (3 * hidden, hidden)
    yield f"{tower}.head.attention.in_proj_bias", (3 * hidden,)
    yield from _linear(f"{tower}.head.attention.out_proj", hidden, hidden)
    yield from _linear(f"{tower}.head.layernorm", hidden)
    yield from _linear(f"{tower}.head.mlp.fc1", ffn, hidden)
    yield from _linear(f"{tower}.head.mlp.fc2", hidden, ffn)
    yield "image_embed.global_img_feature_extensor", (1, 1, hidden)
    yield "image_embed.sub_img_feature_extensor", (1, 1, 1, hidden)
    yield from _linear("image_embed.img_projection_up", shape.hidden, hidden)
    yield from _linear("image_embed.img_projection_down", shape.hidden, shape.hidden)


def _audio_tensors(shape: Shape) -> _Named:
    audio = shape.audio
    hidden, channels = audio.hidden, audio.channels
    encoder = "audio_embed.encoder"
    yield f"{encoder}.encoder_embedding.global_mean", (audio.mels,)
    yield f"{encoder}.encoder_embedding.global_invstd", (audio.mels,)
    yield from _linear(f"{encoder}.embed.conv.0", channels, 1, 3, 3)
    for depthwise, pointwise in ((2, 3), (5, 6)):
        yield from _linear(f"{encoder}.embed.conv.{depthwise}", channels, 1, 3, 3)
        yield from _linear(f"{encoder}.embed.conv.{pointwise}", channels, channels, 1, 1)
    yield from _linear(f"{encoder}.embed.out", hidden, channels * math.ceil(audio.mels / 8))
    yield f"{encoder}.relative_attention_bias_layer.bias_values.weight", (2 * audio.bias_distance, audio.heads)
    for block in range(audio.blocks):
        name = f"{encoder}.encoders.{block}"
        for part in ("feed_forward_in", "feed_forward_out"):
            yield from _linear(f"{name}.{part}.layer_norm", hidden)
            yield from _linear(f"{name}.{part}.gate_up_proj", 2 * audio.ffn, hidden)
            yield from _linear(f"{name}.{part}.down_proj", hidden, audio.ffn)
        for linear in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield from _linear(f"{name}.self_attn.{linear}", hidden, hidden)
        yield from _linear(f"{name}.conv.layer_norm", hidden)
        yield f"{name}.conv.glu.b1", (1, hidden, 1)
        yield f"{name}.conv.glu.b2", (1, hidden, 1)
        yield from _linear(f"{name}.conv.glu.ext_pw_conv_1d", 2 * hidden, hidden, 1)
        yield from _linear(f"{name}.conv.dw_sep_conv_1d.dw_conv", hidden, 1, 3)
        yield from _linear(f"{name}.conv.dw_sep_conv_1d.pw_conv", hidden, hidden, 1)
        yield from _linear(f"{name}.conv.ext_pw_conv_1d", hidden, hidden, 1)
        yield from _linear(f"{name}.layer_norm_att", hidden)
        yield from _linear(f"{name}.layer_norm", hidden)
    for branch in ("speech", "vision_speech"):
        yield from _linear(f"audio_embed.up_proj_for_{branch}", shape.hidden, hidden)
        yield from _linear(f"audio_embed.down_proj_for_{branch}", shape.hidden, shape.hidden)


# transformers' names -> Microsoft's; those that no pattern matches are the same.
_ORIGINAL_NAMES = (
    (r"(encoders\.\d+\.feed_forward_\w+)\.gate_up_proj\.", r"\1.net.0.linear."),
    (r"(encoders\.\d+\.feed_forward_\w+)\.down_proj\.", r"\1.net.2."),
    (r"(encoders\.\d+\.self_attn)\.([qkv])_proj\.", r"\1.linear_\2."),
    (r"(encoders\.\d+\.self_attn)\.o_proj\.", r"\1.linear_out."),
    (r"\.img_projection_up\.", ".img_projection.0."),
    (r"\.img_projection_down\.", ".img_projection.2."),
    (r"\.global_img_feature_extensor$", ".glb_GN"),
    (r"\.sub_img_feature_extensor$", ".sub_GN"),
    (r"\.up_proj_for_vision_speech\.", ".audio_projection.vision.0."),
    (r"\.down_proj_for_vision_speech\.", ".audio_projection.vision.2."),
    (r"\.up_proj_for_speech\.", ".audio_projection.speech.0."),
    (r"\.down_proj_for_speech\.", ".audio_projection.speech.2."),
)


def _original_name(name: str) -> str:
    for pattern, replacement in _ORIGINAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name
