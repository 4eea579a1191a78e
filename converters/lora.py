"""The tensors of a LoRA in pairs, by PEFT's names: every one of them is used, and fits the base, or is an error."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from phi4edge.converters.checkpoint import FLOATS, SourceTensor
from phi4edge.converters.peft import LoraConfig
from phi4edge.converters.variants import VARIANTS, BackboneConfig, assignments
from phi4edge.errors import BundleError

# PEFT's own files have the prefix, those of Microsoft have not; "label" is the name of an adapter in memory.
_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>model\.layers\.(?P<layer>0|[1-9]\d{0,8})\.(?P<linear>\w+\.\w+))"
    r"\.lora_(?P<matrix>[AB])(?:\.(?P<label>[^.]{1,100}))?\.weight",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class LoraPair:
    """What is added to the weights of one linear: alpha / rank * B @ A."""

    a: SourceTensor  # [rank, in]
    b: SourceTensor  # [out, rank]
    alpha: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True)
class Linear:
    """One of the matrices that a layer of the decoder has."""

    name: str  # "self_attn.qkv_proj"
    role: str  # "attn_qkv", in GGUF
    shape: tuple[int, ...]  # [out, in]


def decoder_linears(config: BackboneConfig) -> list[Linear]:
    """The four of each layer, in the order of GGUF files."""
    one_layer = assignments(VARIANTS[0], replace(config, layers=1))  # of the variant whose names are PEFT's
    return [
        Linear(matrix.source.removeprefix("model.layers.0.").removesuffix(".weight"), matrix.role, matrix.shape)
        for matrix in one_layer
        if matrix.layer == 0 and len(matrix.shape) == 2
    ]


def pair_tensors(
    tensors: Iterable[SourceTensor], path: str, lora: LoraConfig, config: BackboneConfig
) -> dict[str, LoraPair]:
    """Stem of a name in GGUF ("blk.3.attn_qkv") -> its pair, in the order of the layers.  Raises BundleError."""
    linears = decoder_linears(config)
    places = {linear.name: place for place, linear in enumerate(linears)}
    found: dict[tuple[int, int], dict[str, SourceTensor]] = {}
    modules: dict[tuple[int, int], str] = {}
    labels = set()
    for tensor in tensors:
        match = _TENSOR.fullmatch(tensor.name)
        if match is None or match["linear"] not in places:
            names = ", ".join(places)
            raise _wrong(tensor, f"is not the lora_A or lora_B of {names}", "merge this adapter with PEFT first")
        layer, matrix = int(match["layer"]), match["matrix"]
        if layer >= config.layers:
            raise _wrong(tensor, f"is for a model of more layers than the {config.layers} of this one")
        pair = found.setdefault((layer, places[match["linear"]]), {})
        if matrix in pair:
            raise _wrong(tensor, f"is there as '{pair[matrix].name[:200]}' too")
        pair[matrix] = tensor
        modules[layer, places[match["linear"]]] = match["module"]
        labels.add(match["label"] or "")
    if not found:
        raise BundleError("has no tensors", path=path, hint="download it again")
    if len(labels) > 1:
        raise BundleError(f"has several adapters: {sorted(labels)!r:.200}", path=path, hint="save each apart")
    settings = lora.of_modules(list(modules.values()))
    pairs = {}
    for (layer, place), matrices in sorted(found.items(), key=lambda item: item[0]):
        rank, alpha = settings[modules[layer, place]]
        stem = f"blk.{layer}.{linears[place].role}"
        pairs[stem] = _pair(matrices, linears[place], rank, alpha, lora)
    return pairs


def _pair(matrices: dict[str, SourceTensor], linear: Linear, rank: int, alpha: float, lora: LoraConfig) -> LoraPair:
    for one, other in (("A", "B"), ("B", "A")):
        if one not in matrices:
            raise _wrong(matrices[other], f"has no lora_{one} beside it")
    a, b = matrices["A"], matrices["B"]
    for tensor in (a, b):
        if tensor.dtype not in FLOATS:
            raise _wrong(tensor, f"is {tensor.dtype}, expected {', '.join(sorted(FLOATS))}", "save it in bfloat16")
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise _wrong(tensor, f"has the shape {list(tensor.shape)}, which is no matrix")
    if a.shape[0] != b.shape[1]:
        raise _wrong(b, f"has the rank {b.shape[1]}, but '{a.name[:200]}' has {a.shape[0]}")
    if (b.shape[0], a.shape[1]) != linear.shape:
        shapes = f"{list(b.shape)} @ {list(a.shape)}"
        raise _wrong(b, f"does not fit the base: {shapes} is added to {list(linear.shape)}")
    if a.shape[0] != rank:
        raise _wrong(a, f"has the rank {a.shape[0]}, but {lora.rank_field} of {lora.path} says {rank}")
    return LoraPair(a, b, alpha)


def _wrong(tensor: SourceTensor, problem: str, hint: str = "use the files of one adapter for this base") -> BundleError:
    return BundleError(problem, path=str(tensor.path), field=f"tensor '{tensor.name[:200]}'", hint=hint)
