"""The settings of a LoRA: which rank and which strength each module has, by PEFT's adapter_config.json.

PEFT adds scale * B @ A to the weights of a module, with scale = alpha / rank, or alpha / sqrt(rank) with use_rslora.
Settings that change anything else are refused: without them an adapter would answer, but differently.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import regex  # type: ignore[import-untyped]

from phi4edge.errors import BundleError
from phi4edge.strict_json import read_object

CONFIG_FILE = "adapter_config.json"
_LARGEST_CONFIG = 1 << 20
_LARGEST_RANK = 1 << 16
_MOST_PATTERNS = 4096
_LONGEST_PATTERN = 500
_PATTERN_SECONDS = 2.0  # for all patterns and modules together; milliseconds are usual

# What makes another function of an adapter than scale * B @ A, and how to do without.
_MERGE = "merge the adapter into its checkpoint with PEFT (merge_and_unload) and convert that"
_MUST_BE_OFF = {
    "use_dora": _MERGE,
    "lora_bias": "train it without",
    "fan_in_fan_out": "set it to false: the linears of this model keep their weights as [out, in]",
    "modules_to_save": _MERGE,
    "trainable_token_indices": _MERGE,
    "layer_replication": _MERGE,
    "use_qalora": _MERGE,
    "alora_invocation_tokens": "train it as a plain LoRA",
    "arrow_config": "give the experts as adapters of their own",
}
# What only matters for training, or shows in the names and shapes of the tensors.
_OTHERS = {"alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying"}
_OTHERS |= {"eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern"}
_OTHERS |= {"loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core"}
_OTHERS |= {"peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config"}
_OTHERS |= {"layers_to_transform", "target_modules", "target_parameters", "task_type", "use_rslora"}
# Ways to begin that change the weights of the base too, so that the adapter fits only those.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraConfig:
    """Ranks and strengths of one adapter."""

    path: str
    rank: int
    alpha: float
    rank_field: str = "r"
    use_rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)  # pattern of module names -> rank
    alphas: Mapping[str, float] = field(default_factory=dict)

    def of_modules(self, modules: list[str]) -> dict[str, tuple[int, float]]:
        """Rank and alpha of each module, such that its scale is alpha / rank."""
        deadline = time.monotonic() + _PATTERN_SECONDS
        ranks = _Patterns(self.path, "rank_pattern", self.ranks, deadline)
        alphas = _Patterns(self.path, "alpha_pattern", self.alphas, deadline)
        found = {}
        for module in modules:
            rank = int(ranks.value(module, self.rank))
            alpha = alphas.value(module, self.alpha)
            found[module] = rank, alpha * math.sqrt(rank) if self.use_rslora else alpha
        return found


class _Patterns:
    """A table of PEFT: the first pattern that fits the whole name of a module, or its last parts, counts."""

    def __init__(self, path: str, name: str, table: Mapping[str, float], deadline: float) -> None:
        self._path, self._field, self._deadline = path, name, deadline
        if len(table) > _MOST_PATTERNS:
            raise self._wrong(f"has {len(table)} patterns, more than {_MOST_PATTERNS}")
        self._entries = [(pattern, self._compiled(pattern), value) for pattern, value in table.items()]

    def value(self, module: str, default: float) -> float:
        for pattern, compiled, value in self._entries:
            try:  # a pattern from a file may be made to take forever
                if compiled.match(module, timeout=max(1e-3, self._deadline - time.monotonic())):
                    return value
            except TimeoutError:
                raise self._wrong(f"{pattern!r:.80} takes too long to match") from None
        return default

    def _compiled(self, pattern: str) -> Any:
        if len(pattern) > _LONGEST_PATTERN:
            raise self._wrong(f"{pattern!r:.80} is longer than {_LONGEST_PATTERN} characters")
        try:
            return regex.compile(rf"(.*\.)?({pattern})$", cache_pattern=False)
        except (regex.error, RecursionError, OverflowError) as error:
            raise self._wrong(f"{pattern!r:.80} is not a regular expression: {error}") from error

    def _wrong(self, problem: str) -> BundleError:
        return BundleError(problem, path=self._path, field=self._field)


def read_peft_config(directory: Path) -> LoraConfig:
    """adapter_config.json of a folder that PEFT saved.  Raises FileError, BundleError."""
    path = directory / CONFIG_FILE
    if not path.exists():
        raise BundleError(f"has no {CONFIG_FILE}", path=str(directory), hint="give a folder that PEFT saved")
    table = read_object(path, at_most=_LARGEST_CONFIG)
    if table.get("peft_type") != "LORA":
        raise BundleError(
            f"{table.get('peft_type')!r:.40} is not supported, only 'LORA'",
            path=str(path),
            field="peft_type",
            hint=_MERGE,
        )
    _require_plain_lora(table, str(path))
    use_rslora = table.get("use_rslora", False)
    if not isinstance(use_rslora, bool):
        raise BundleError(f"{use_rslora!r:.40} is neither true nor false", path=str(path), field="use_rslora")
    return LoraConfig(
        path=str(path),
        rank=rank_of(table.get("r"), str(path), "r"),
        alpha=alpha_of(table.get("lora_alpha"), str(path), "lora_alpha"),
        use_rslora=use_rslora,
        ranks={key: rank_of(value, str(path), "rank_pattern") for key, value in _table(table, "rank_pattern", path)},
        alphas={
            key: alpha_of(value, str(path), "alpha_pattern") for key, value in _table(table, "alpha_pattern", path)
        },
    )


def rank_of(value: Any, path: str, name: str) -> int:
    """The value of a field as a rank, or BundleError."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _LARGEST_RANK:
        problem = "is missing" if value is None else f"{value!r:.40} is not a rank, an integer of at least 1"
        raise BundleError(problem, path=path, field=name, hint="download the adapter again")
    return value


def alpha_of(value: Any, path: str, name: str) -> float:
    """The value of a field as an alpha: within what a float32 holds and a scale can be, or BundleError."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 1e-9 <= value <= 1e9:
        problem = "is missing" if value is None else f"{value!r:.40} is not an alpha, a number above 0"
        raise BundleError(problem, path=path, field=name, hint="download the adapter again")
    return float(value)


def _table(config: dict[str, Any], name: str, path: Path) -> list[tuple[str, Any]]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise BundleError("is not an object", path=str(path), field=name)
    return list(value.items())


def _require_plain_lora(config: dict[str, Any], path: str) -> None:
    if config.get("bias", "none") != "none":
        raise BundleError(f"{config['bias']!r:.40} is not supported, only 'none'", path=path, field="bias", hint=_MERGE)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise BundleError(
            f"{start!r:.40} changed the weights of the base too",
            path=path,
            field="init_lora_weights",
            hint="save it again with PEFT's path_initial_model_for_weight_conversion",
        )
    for name, hint in _MUST_BE_OFF.items():
        if config.get(name):
            raise BundleError(f"{config[name]!r:.40} is not supported", path=path, field=name, hint=hint)
    for name, value in config.items():
        if value and name not in _OTHERS and name not in _MUST_BE_OFF:
            raise BundleError(
                f"{value!r:.40} is a setting that we do not know",
                path=path,
                field=name[:80],
                hint="remove it if it matters for training alone, else merge the adapter with PEFT first",
            )
