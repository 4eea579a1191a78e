"""Model variants: how a checkpoint of each spells what the backbone needs, and what of it is not used.

Adding a variant is adding an entry to VARIANTS.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from phi4edge.converters.checkpoint import FLOATS, Checkpoint, SourceTensor
from phi4edge.errors import BundleError

_LINEARS = r"(self_attn\.(qkv|o)|mlp\.(gate_up|down))_proj"
_COMPUTED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "computed from the config")
MEDIA_PREFIX = "model.embed_tokens_extend."  # of encoders and projectors
_ENCODERS = r"model\.embed_tokens_extend\.(image|audio)_embed\..+"
_LORA = rf"model\.layers\.\d+\.{_LINEARS}\.lora_[AB]\.(vision|speech)\.weight"

# The original names of encoders and projectors -> those of transformers.  No tensor is transposed or split.
_AUDIO_BLOCK = r"(audio_embed\.encoder\.encoders\.\d+\."
_ORIGINAL_MEDIA = (
    (_AUDIO_BLOCK + r"feed_forward_(?:in|out))\.net\.0\.linear\.", r"\1.gate_up_proj."),
    (_AUDIO_BLOCK + r"feed_forward_(?:in|out))\.net\.2\.", r"\1.down_proj."),
    (_AUDIO_BLOCK + r"self_attn)\.linear_([qkv])\.", r"\1.\2_proj."),
    (_AUDIO_BLOCK + r"self_attn)\.linear_out\.", r"\1.o_proj."),
    (r"(image_embed)\.img_projection\.0\.", r"\1.img_projection_up."),
    (r"(image_embed)\.img_projection\.2\.", r"\1.img_projection_down."),
    (r"(image_embed)\.glb_GN", r"\1.global_img_feature_extensor"),
    (r"(image_embed)\.sub_GN", r"\1.sub_img_feature_extensor"),
    (r"(audio_embed)\.audio_projection\.speech\.0\.", r"\1.up_proj_for_speech."),
    (r"(audio_embed)\.audio_projection\.speech\.2\.", r"\1.down_proj_for_speech."),
    (r"(audio_embed)\.audio_projection\.vision\.0\.", r"\1.up_proj_for_vision_speech."),
    (r"(audio_embed)\.audio_projection\.vision\.2\.", r"\1.down_proj_for_vision_speech."),
)


@dataclass(frozen=True, slots=True)
class Variant:
    """One kind of checkpoint. `unused` has patterns of tensor names that are left out, each with the reason."""

    name: str
    title: str  # general.name; "phi-3" in it would make llama.cpp treat special tokens as that model's
    model_type: str  # in config.json
    linear_suffix: str  # after self_attn.qkv_proj and its like
    unused: tuple[tuple[str, str], ...]
    placeholders: Mapping[str, str]
    router: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # as bundle.Manifest has it
    media_names: tuple[tuple[str, str], ...] = ()  # patterns of this layout's names -> those of transformers

    @property
    def is_multimodal(self) -> bool:
        return bool(self.placeholders)


_MEDIA = {"image": "<|endoftext10|>", "audio": "<|endoftext11|>"}
# As the original forward pass routes by its input_mode.  It holds for the whole sequence, generated tokens included.
_ROUTER = {
    "text": {},
    "image": {"adapter": "vision"},
    "audio": {"adapter": "speech", "audio_branch": "speech"},
    "image+audio": {"adapter": "vision", "audio_branch": "vision"},
}
VARIANTS = (
    Variant("phi4-text", "Phi-4-mini", "phi3", ".weight", (_COMPUTED,), {}),
    Variant("phi4-multimodal", "Phi-4-multimodal", "phi4_multimodal", ".weight", (_COMPUTED,), _MEDIA, _ROUTER),
    Variant(
        "phi4-multimodal-original",
        "Phi-4-multimodal",
        "phi4mm",
        ".base_layer.weight",
        (_COMPUTED,),
        _MEDIA,
        _ROUTER,
        _ORIGINAL_MEDIA,
    ),
)


@dataclass(frozen=True, slots=True)
class BackboneConfig:
    """config.json in one spelling."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rms_epsilon: float
    context: int
    original_context: int  # 0: no LongRoPE
    attention_factor: float
    rope_base: float
    rotary_dims: int
    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    sliding_window: int
    tied: bool


@dataclass(frozen=True, slots=True)
class Assignment:
    """A tensor of the checkpoint and what it becomes."""

    source: str
    target: str  # without ".weight"
    role: str
    layer: int  # -1 for what is in no layer
    shape: tuple[int, ...]


def variant_of(checkpoint: Checkpoint) -> Variant:
    """The entry for this checkpoint; BundleError when there is none.  Code that comes with it is never run."""
    model_type = checkpoint.config.get("model_type")
    for variant in VARIANTS:
        if variant.model_type == model_type:
            return variant
    known = ", ".join(variant.model_type for variant in VARIANTS)
    custom = " (it wants code of its own to be run, which we never do)" if "auto_map" in checkpoint.config else ""
    raise BundleError(
        f"{model_type!r:.80} cannot be converted{custom}",
        path=str(checkpoint.directory / "config.json"),
        field="model_type",
        hint=f"supported are {known}",
    )


def read_config(checkpoint: Checkpoint) -> BackboneConfig:
    """The backbone's sizes.  What is missing is an error, not a default: transformers' defaults fit another model."""
    return _ConfigReader(checkpoint).read()


def media_tensors(checkpoint: Checkpoint, variant: Variant) -> dict[str, SourceTensor]:
    """Tensors of encoders and projectors by the names that transformers gives them, after MEDIA_PREFIX."""
    found: dict[str, SourceTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        if not name.startswith(MEDIA_PREFIX):
            continue
        native = name.removeprefix(MEDIA_PREFIX)
        for pattern, replacement in variant.media_names:
            native = re.sub(f"^{pattern}", replacement, native)
        if native in found:
            raise BundleError(f"is '{found[native].name}' too", path=str(tensor.path), field=f"tensor '{name[:200]}'")
        found[native] = tensor
    return found


def assignments(variant: Variant, config: BackboneConfig) -> Iterator[Assignment]:
    """What the checkpoint must hold, in the order of the GGUF file."""
    linear, hidden = variant.linear_suffix, config.hidden
    q_rows, kv_rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
    yield Assignment("model.embed_tokens.weight", "token_embd", "token_embd", -1, (config.vocab, hidden))
    for layer in range(config.layers):
        old, new = f"model.layers.{layer}.", f"blk.{layer}."
        for source, role, shape in (
            ("input_layernorm.weight", "attn_norm", (hidden,)),
            (f"self_attn.qkv_proj{linear}", "attn_qkv", (q_rows + 2 * kv_rows, hidden)),
            (f"self_attn.o_proj{linear}", "attn_output", (hidden, q_rows)),
            ("post_attention_layernorm.weight", "ffn_norm", (hidden,)),
            (f"mlp.gate_up_proj{linear}", "ffn_up", (2 * config.ffn, hidden)),  # the gate comes first in both
            (f"mlp.down_proj{linear}", "ffn_down", (hidden, config.ffn)),
        ):
            yield Assignment(old + source, new + role, role, layer, shape)
    yield Assignment("model.norm.weight", "output_norm", "output_norm", -1, (hidden,))
    if not config.tied:
        yield Assignment("lm_head.weight", "output", "output", -1, (config.vocab, hidden))


def match_tensors(
    checkpoint: Checkpoint, variant: Variant, config: BackboneConfig
) -> list[tuple[Assignment, SourceTensor]]:
    """Every tensor of the backbone with its source; BundleError when one is missing or has another shape or type."""
    wanted = list(assignments(variant, config))
    missing = [assignment.source for assignment in wanted if assignment.source not in checkpoint.tensors]
    if missing:
        raise BundleError(
            f"lacks {_names(missing)}",
            path=str(checkpoint.directory),
            hint=f"a {variant.model_type} checkpoint has them",
        )
    pairs = [(assignment, checkpoint.tensors[assignment.source]) for assignment in wanted]
    for assignment, tensor in pairs:
        field = f"tensor '{tensor.name}'"
        if tensor.shape != assignment.shape:
            raise BundleError(
                f"has the shape {list(tensor.shape)}, config.json says {list(assignment.shape)}",
                path=str(tensor.path),
                field=field,
            )
        if tensor.dtype not in FLOATS:
            raise BundleError(
                f"is {tensor.dtype}, expected {', '.join(sorted(FLOATS))}",
                path=str(tensor.path),
                field=field,
                hint="convert the checkpoint that was not quantized",
            )
    return pairs


def unused_tensors(checkpoint: Checkpoint, variant: Variant, config: BackboneConfig) -> dict[str, list[str]]:
    """What is neither of the backbone nor of an encoder or adapter, by the reason; BundleError when we know of none."""
    used = {assignment.source for assignment in assignments(variant, config)}
    rules = variant.unused + ((("lm_head\\.weight", "tied to the embedding"),) if config.tied else ())
    unused: dict[str, list[str]] = {}
    unknown = []
    for name in sorted(checkpoint.tensors.keys() - used):
        if variant.is_multimodal and re.match(_ENCODERS, name):
            continue
        if variant.linear_suffix != ".weight" and re.fullmatch(_LORA, name):
            continue
        reason = next((reason for pattern, reason in rules if re.fullmatch(pattern, name)), None)
        if reason is None:
            unknown.append(name)
        else:
            unused.setdefault(reason, []).append(name)
    if unknown:
        raise BundleError(
            f"has tensors of no use that we know: {_names(unknown)}",
            path=str(checkpoint.directory),
            hint="give adapters of your own with --adapter NAME=DIR, or merge them into the weights first",
        )
    return unused


def lora_names(checkpoint: Checkpoint) -> list[str]:
    """The adapter tensors that lie among the weights, as in the original layout."""
    return sorted(name for name in checkpoint.tensors if re.fullmatch(_LORA, name))


def _names(names: list[str]) -> str:
    shown = ", ".join(f"'{name[:120]}'" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class _ConfigReader:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self._path = str(checkpoint.directory / "config.json")
        self._config = checkpoint.config
        self._n_tensors = len(checkpoint.tensors)
        self._has_head = "lm_head.weight" in checkpoint.tensors
        # transformers 5 gathers in rope_parameters what used to be rope_scaling and entries beside it.
        rope = self._config.get("rope_parameters") or self._config.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise self._wrong("rope_scaling", "is not an object")
        self._rope: dict[str, Any] = rope

    def read(self) -> BackboneConfig:
        hidden, heads = self._size("hidden_size"), self._size("num_attention_heads")
        kv_heads, layers = self._size("num_key_value_heads"), self._size("num_hidden_layers")
        if layers > self._n_tensors:  # before as many names are made
            raise self._wrong("num_hidden_layers", f"{layers} layers need more than the {self._n_tensors} tensors here")
        if heads % kv_heads:
            raise self._wrong("num_key_value_heads", f"{kv_heads} does not divide the {heads} attention heads")
        if self._config.get("head_dim") is None and hidden % heads:
            raise self._wrong("num_attention_heads", f"{heads} does not divide the hidden size {hidden}")
        head_dim = self._size("head_dim") if self._config.get("head_dim") is not None else hidden // heads
        for key, value in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
            if self._config.get(key, value) != value:
                raise self._wrong(key, f"{self._config[key]!r:.40} is not supported, only {value!r}")
        context = self._size("max_position_embeddings")
        rotary_dims = int(head_dim * self._number("partial_rotary_factor", 1.0))
        if not 2 <= rotary_dims <= head_dim or rotary_dims % 2:
            raise self._wrong("partial_rotary_factor", f"gives {rotary_dims} rotary dims of {head_dim}")
        original, factor, short, long = self._long_rope(context, rotary_dims // 2)
        tied = self._config.get("tie_word_embeddings", not self._has_head)
        if not isinstance(tied, bool):
            raise self._wrong("tie_word_embeddings", "is neither true nor false")
        return BackboneConfig(
            layers=layers,
            hidden=hidden,
            ffn=self._size("intermediate_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab=self._size("vocab_size"),
            rms_epsilon=self._number("rms_norm_eps"),
            context=context,
            original_context=original,
            attention_factor=factor,
            rope_base=self._number("rope_theta"),
            rotary_dims=rotary_dims,
            short_factors=short,
            long_factors=long,
            sliding_window=0 if self._config.get("sliding_window") is None else self._size("sliding_window"),
            tied=tied,
        )

    def _long_rope(self, context: int, n_pairs: int) -> tuple[int, float, tuple[float, ...], tuple[float, ...]]:
        kind = self._rope.get("rope_type", self._rope.get("type", "default"))
        if kind == "default":
            return 0, 1.0, (), ()
        if kind not in ("longrope", "su"):  # "su" is what longrope was called at first
            raise self._wrong("rope_scaling", f"the type {kind!r:.40} is not supported, only longrope")
        original = self._size("original_max_position_embeddings")
        factors = [self._factors(name, n_pairs) for name in ("short_factor", "long_factor")]
        scale = context / original
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 and original > 1 else 1.0
        if self._rope.get("attention_factor") is not None:
            factor = self._number("attention_factor")
        return original, factor, factors[0], factors[1]

    def _factors(self, name: str, n_pairs: int) -> tuple[float, ...]:
        values = self._rope.get(name)
        if not isinstance(values, list) or len(values) != n_pairs:
            raise self._wrong(name, f"is not a list of {n_pairs} numbers, one for each pair of rotary dims")
        if not all(_is_positive(value) for value in values):
            raise self._wrong(name, "has an entry that is not a positive number")
        return tuple(float(value) for value in values)

    def _get(self, key: str, default: object = None) -> Any:
        return next((place[key] for place in (self._rope, self._config) if place.get(key) is not None), default)

    def _size(self, key: str) -> int:
        value = self._get(key)
        if value is None:
            raise self._wrong(key, "is missing")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise self._wrong(key, f"{value!r:.40} is not a positive integer")
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if value is None:
            raise self._wrong(key, "is missing")
        if not _is_positive(value):
            raise self._wrong(key, f"{value!r:.40} is not a positive number")
        return float(value)

    def _wrong(self, field: str, problem: str) -> BundleError:
        return BundleError(problem, path=self._path, field=field)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1e30
