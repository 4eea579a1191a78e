"""A checkpoint directory to a bundle directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import phi4edge
from phi4edge.bundle import ADAPTER_PREFIX, AUDIO, BACKBONE, VISION, Bundle, Manifest, Part
from phi4edge.converters.backbone import BackbonePlan, plan_backbone, write_backbone
from phi4edge.converters.bundle_writer import PlannedPart, require_target, write_bundle
from phi4edge.converters.checkpoint import Checkpoint
from phi4edge.converters.files import Progress, Written
from phi4edge.converters.mixes import ADAPTER_TYPES, CONVERTIBLE, HEAD_TYPES, PRECISIONS
from phi4edge.converters.processors import read_processors
from phi4edge.converters.variants import BackboneConfig, Variant, lora_names, unused_tensors, variant_of
from phi4edge.errors import BundleError, UsageError

if TYPE_CHECKING:
    from phi4edge.converters.adapters import Adapter
    from phi4edge.converters.imatrix import Imatrix

SWITCHABLE, NONE, MERGED_PREFIX = "switchable", "none", "merged:"


@dataclass(frozen=True)
class Options:
    """What to make of a checkpoint; UsageError when it makes no sense.

    mix: a type mix of mixes.CONVERTIBLE, e.g. "Q4_K_M".
    head: type of the output matrix, which is the embedding too where the two are tied; empty takes the mix's.
    adapters: "switchable" (a file each), "merged:NAME" (added to the weights before they are quantized), or "none".
    adapter_quant: type of adapter files.  user_adapters: name -> folder in PEFT's format.
    encoders: "fp32", "fp16", "int8" or "none".
    imatrix: an importance matrix for the backbone.
    """

    mix: str = "Q4_K_M"
    head: str = ""
    adapters: str = SWITCHABLE
    adapter_quant: str = "Q8_0"
    user_adapters: Mapping[str, str | os.PathLike[str]] = field(default_factory=dict)
    encoders: str = "int8"
    imatrix: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name in ("mix", "head", "adapter_quant"):
            object.__setattr__(self, name, getattr(self, name).upper())
        for name, option, what, choices in (
            ("mix", "quant", "type mix", CONVERTIBLE),
            ("head", "head", "type", ("", *HEAD_TYPES)),
            ("adapter_quant", "adapter_quant", "type of adapters", ADAPTER_TYPES),
            ("encoders", "encoders", "precision", (*PRECISIONS, NONE)),
        ):
            if (value := getattr(self, name)) not in choices:
                shown = ", ".join(choice for choice in choices if choice).lower()
                raise UsageError(f"'{value:.40}' is no {what}", field=option, hint=f"choose one of {shown}")
        if self.adapters not in (SWITCHABLE, NONE) and not self.merged:
            raise UsageError(
                f"'{self.adapters:.60}' is not known", field="adapters", hint="choose switchable, merged:NAME or none"
            )

    @property
    def merged(self) -> str:
        """The name of the adapter that is merged, or nothing."""
        return self.adapters.removeprefix(MERGED_PREFIX) if self.adapters.startswith(MERGED_PREFIX) else ""

    def as_json(self) -> dict[str, Any]:
        return {
            "quant": self.mix,
            "head": self.head,
            "adapters": self.adapters,
            "adapter_quant": self.adapter_quant,
            "encoders": self.encoders,
            "imatrix": self.imatrix is not None,
        }


@dataclass(frozen=True)
class Converted:
    bundle: Bundle
    unused: Mapping[str, list[str]]  # tensors of the checkpoint that are in no part, by the reason


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    mix: str = "Q4_K_M",
    *,
    force: bool = False,
    n_threads: int = 1,
    progress: Progress = lambda tensor, done, total: None,
    **options: Any,
) -> Converted:
    """Converts a checkpoint; replaces a bundle only if ``force``.  ``options`` are those of :class:`Options`.

    Raises FileError, BundleError, UsageError, DiskError, UnsupportedError; then the target is as it was before.
    """
    chosen = Options(mix, **options)
    root = Path(target)
    with ExitStack() as opened:
        checkpoint = opened.enter_context(Checkpoint(source))
        require_target(root, checkpoint.directory, force=force)
        plan = _Planner(checkpoint, chosen, n_threads, opened)
        parts = plan.parts()
        bundle = write_bundle(root, checkpoint.directory, parts, plan.manifest, force=force, progress=progress)
        return Converted(bundle, plan.unused)


class _Planner:
    """Checks all that can be known before a weight is read."""

    def __init__(self, checkpoint: Checkpoint, options: Options, n_threads: int, opened: ExitStack) -> None:
        self._checkpoint = checkpoint
        self._options = options
        self._n_threads = n_threads
        self._variant: Variant = variant_of(checkpoint)
        self._backbone: BackbonePlan = plan_backbone(checkpoint, self._variant, options.mix, options.head)
        self.unused = unused_tensors(checkpoint, self._variant, self._backbone.config)
        self._imatrix: Imatrix | None = None
        if options.imatrix is not None:
            from phi4edge.converters.imatrix import read_imatrix

            self._imatrix = read_imatrix(Path(options.imatrix))
            matrices = (assignment for assignment, _, _ in self._backbone.tensors if len(assignment.shape) == 2)
            self._imatrix.require_model({f"{matrix.target}.weight": matrix.shape[1] for matrix in matrices})
        self._adapters: dict[str, Adapter] = {}
        if self._variant.is_multimodal or options.user_adapters or options.merged:
            self._adapters = self._read_adapters(self._backbone.config, opened)
        self._processors: dict[str, Any] = {}

    def parts(self) -> list[PlannedPart]:
        return [self._backbone_part(), *self._adapter_parts(), *self._encoder_parts()]

    def manifest(self, parts: tuple[Part, ...], written: tuple[Written, ...]) -> Manifest:
        provenance = {
            "source_sha256": {part.role: made.source_sha256 for part, made in zip(parts, written, strict=True)},
            "tool": f"phi4edge {phi4edge.__version__}",
            "options": self._options.as_json(),
            "unused_tensors": {reason: len(names) for reason, names in self.unused.items()},
        }
        variant = self._variant
        return Manifest(variant.name, parts, variant.placeholders, variant.router, self._processors, provenance)

    def _read_adapters(self, config: BackboneConfig, opened: ExitStack) -> dict[str, Adapter]:
        from phi4edge.converters.adapters import built_in_adapters, read_peft_adapter

        options = self._options
        adapters: dict[str, Adapter] = {}
        if options.adapters != NONE:
            adapters = built_in_adapters(self._checkpoint, self._variant, config)
        elif names := lora_names(self._checkpoint):
            self.unused["adapters: left out as asked"] = names
        for adapter in adapters.values():
            opened.enter_context(adapter)
        for name, directory in options.user_adapters.items():
            if name in adapters:
                raise UsageError(
                    f"'{name}' is an adapter of the checkpoint", field="adapter", hint="choose another name"
                )
            adapters[name] = opened.enter_context(read_peft_adapter(name, Path(directory), config))
        if options.merged and options.merged not in adapters:
            known = ", ".join(adapters) or "none"
            raise UsageError(f"there is no '{options.merged:.40}'", field="adapters", hint=f"the adapters are {known}")
        return adapters

    def _backbone_part(self) -> PlannedPart:
        plan, merge = self._backbone, self._adapters.get(self._options.merged)

        def write(path: Path, progress: Progress) -> Written:
            return write_backbone(
                path,
                self._checkpoint,
                plan,
                n_threads=self._n_threads,
                progress=progress,
                merge=merge,
                imatrix=self._imatrix,
            )

        n_values = sum(values for values, _ in plan.bytes_by_type().values())
        details: dict[str, Any] = {
            "mix": self._options.mix,
            "types": {type_name: n_bytes for type_name, (_, n_bytes) in plan.bytes_by_type().items()},
            "bits_per_weight": round(8 * plan.n_bytes / n_values, 4),
        }
        if merge is not None:
            details["merged_adapter"] = merge.name
        return PlannedPart(BACKBONE, "backbone", ".gguf", plan.n_bytes, plan.source_bytes, details, write)

    def _adapter_parts(self) -> list[PlannedPart]:
        if self._options.merged:
            others = [adapter for name, adapter in self._adapters.items() if name != self._options.merged]
            names = [part.name for adapter in others for pair in adapter.modules.values() for part in (pair.a, pair.b)]
            if names:  # they were trained on the weights without the merged one
                self.unused["adapters: another one is merged"] = names
            return []
        return [self._adapter_part(adapter) for adapter in self._adapters.values()]

    def _adapter_part(self, adapter: Adapter) -> PlannedPart:
        from phi4edge.converters.adapters import adapter_bytes, write_adapter

        type_name = self._options.adapter_quant

        def write(path: Path, progress: Progress) -> Written:
            return write_adapter(path, adapter, type_name, n_threads=self._n_threads, progress=progress)

        n_bytes = adapter_bytes(adapter, type_name)
        details = {"type": type_name, "rank": adapter.rank, "alpha": adapter.alpha}
        role = f"{ADAPTER_PREFIX}{adapter.name}"
        return PlannedPart(role, adapter.name, ".lora.gguf", n_bytes, adapter.source_bytes, details, write)

    def _encoder_parts(self) -> list[PlannedPart]:
        if not self._variant.is_multimodal:
            return []
        if self._options.encoders == NONE:
            self._processors = read_processors(self._checkpoint, None)
            media = sorted(name for name in self._checkpoint.tensors if ".embed_tokens_extend." in name)
            if media:
                self.unused["encoders: left out as asked"] = media
            return []
        for text in self._variant.placeholders.values():
            if text not in self._backbone.vocabulary.tokens:
                raise BundleError(
                    f"has no token {text}, which stands for images or sounds",
                    path=str(self._checkpoint.directory / "tokenizer.json"),
                    hint="use the tokenizer of Phi-4-multimodal, or --encoders none",
                )
        from phi4edge.converters.audio import build_audio, write_audio  # they import onnx, which takes a while
        from phi4edge.converters.vision import build_vision, write_vision

        arguments = self._checkpoint, self._variant, self._backbone.config.hidden, self._options.encoders
        vision, audio = build_vision(*arguments), build_audio(*arguments)
        self._processors = read_processors(self._checkpoint, vision.crop_size)
        for reason, names in (*vision.unused.items(), *audio.unused.items()):
            self.unused.setdefault(reason, []).extend(names)
        details = {"precision": self._options.encoders}

        def write_vision_to(path: Path, progress: Progress) -> Written:
            return write_vision(path, vision, progress)

        def write_audio_to(path: Path, progress: Progress) -> Written:
            return write_audio(path, audio, progress)

        return [
            PlannedPart(VISION, "vision", ".onnx", vision.n_bytes, vision.weights.n_bytes, details, write_vision_to),
            PlannedPart(AUDIO, "audio", ".onnx", audio.n_bytes, audio.weights.n_bytes, details, write_audio_to),
        ]
