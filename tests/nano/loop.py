"""One training loop for all stages: bfloat16, AdamW or Muon, a cosine; it goes on where it was stopped.

What a step sees depends on the stage's seed and the step's number alone, so a run that was interrupted, or a second run
on such a machine, gives the same weights.
"""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from nano.network import torch

Metrics = Mapping[str, Iterable[float]]
_WARM_UP, _REPORT, _STORE = 100, 100, 300  # steps


@dataclass
class Stage:
    """What is trained, and for how long."""

    name: str
    folder: Path  # for its checkpoints
    steps: int
    rate: float  # the learning rate after warming up
    weight_decay: float = 0.01
    slow: tuple[str, ...] = ()  # parts that learn at 0.4 of the rate
    muon: tuple[str, ...] = ()  # parts whose matrices Muon trains: a quarter fewer steps here than AdamW
    rank: int = 0  # of two processes that share the gradients
    world: int = 1
    modules: dict[str, Any] = field(default_factory=dict)  # what has weights

    @property
    def done(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def random(self, step: int) -> Random:
        return Random(f"{self.name} {self.rank} {step}")

    def log(self, *words: Any) -> None:
        if self.rank == 0:
            print(time.strftime("%H:%M:%S"), self.name, *words, flush=True)


def finish(stage: Stage, state: Any) -> None:
    """Stores what a stage is for; what it would go on from is not needed any more."""
    store(state, stage.done)
    (stage.folder / f"{stage.name}.unfinished").unlink(missing_ok=True)


def _store_progress(path: Path, step: int, optimizers: list[Any], weights: list[Any]) -> None:
    states = [optimizer.state_dict() for optimizer in optimizers]
    store({"step": step, "optimizers": states, "weights": [weight.data for weight in weights]}, path)


def store(state: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    torch.save(state, part)
    part.replace(path)


def train(
    stage: Stage, loss_of: Callable[[int], tuple[Any, Metrics]], watch: Callable[[], Mapping[str, float]]
) -> None:
    """Changes the weights of ``stage.modules``; ``loss_of`` takes the number of the step."""
    optimizers = _optimizers(stage)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    weights = [weight for group in groups for weight in group["params"]]
    unfinished = stage.folder / f"{stage.name}.unfinished"
    step = 0
    if unfinished.exists():
        stored = torch.load(unfinished, weights_only=True)
        step = stored["step"]
        for optimizer, state in zip(optimizers, stored["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        with torch.no_grad():
            for weight, value in zip(weights, stored["weights"], strict=True):
                weight.copy_(value)
    stage.log(f"{sum(weight.numel() for weight in weights)} weights, from step {step} to {stage.steps}")
    seen: dict[str, list[float]] = defaultdict(list)
    started = time.time()
    while step < stage.steps:
        warm = min(1.0, (step + 1) / _WARM_UP)
        rate = stage.rate * warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / stage.steps)))
        for group in groups:
            group["lr"] = rate * group["speed"]
        with torch.autocast("cpu", torch.bfloat16):
            loss, metrics = loss_of(step)
        for weight in weights:
            weight.grad = None
        loss.backward()
        if stage.world > 1:
            _share_gradients(weights, stage.world)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        for name, values in ({"loss": [loss.item()]} | dict(metrics)).items():
            seen[name] += values
        if step % _REPORT == 0:
            means = {name: round(sum(values) / len(values), 3) for name, values in sorted(seen.items()) if values}
            stage.log(step, f"{time.time() - started:.0f} s", means)
            seen.clear()
        if step % _STORE == 0 and stage.rank == 0 and step < stage.steps:
            _store_progress(unfinished, step, optimizers, weights)
            stage.log("watched:", watch())
    if stage.rank == 0:
        _store_progress(unfinished, step, optimizers, weights)
        stage.log("watched:", watch())


def _optimizers(stage: Stage) -> list[Any]:
    """AdamW for all, or all but the matrices that are Muon's; vectors do not decay."""
    groups: dict[tuple[bool, float, float], list[Any]] = {}
    for module in stage.modules.values():
        for name, weight in module.named_parameters():
            if weight.requires_grad:
                muon = weight.dim() == 2 and any(part in name for part in stage.muon)
                decay = stage.weight_decay if weight.dim() > 1 else 0.0
                speed = 0.4 if any(part in name for part in stage.slow) else 1.0
                groups.setdefault((muon, decay, speed), []).append(weight)
    of_muon, of_adam = (
        [
            {"params": params, "weight_decay": decay, "speed": speed}
            for (muon, decay, speed), params in groups.items()
            if muon == wanted
        ]
        for wanted in (True, False)
    )
    optimizers = [torch.optim.AdamW(of_adam, lr=stage.rate, betas=(0.9, 0.98))]
    if of_muon:  # with steps as large as those of AdamW
        optimizers.append(torch.optim.Muon(of_muon, lr=stage.rate, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _share_gradients(weights: list[Any], world: int) -> None:
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    together = torch.cat([weight.grad.reshape(-1) for weight in weights])
    torch.distributed.all_reduce(together)
    together /= world
    offset = 0
    for weight in weights:
        weight.grad.copy_(together[offset : offset + weight.numel()].view_as(weight))
        offset += weight.numel()
