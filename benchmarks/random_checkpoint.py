"""A checkpoint of random bfloat16 weights at full size, 11 GB, or with --shape tiny of 4 MB, to convert and measure.

``python -m benchmarks.random_checkpoint OUT_DIR [--layout phi4mm|phi4_multimodal|phi3] [--shape phi4|tiny]``

Weights are Gaussian with a deviation of 1 / sqrt(inputs), so that activations neither vanish nor overflow.  Values are
repeated after a few millions, which no quantizer looks at.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.phi4_files import adapter_config, write_files, write_json
from benchmarks.phi4_tensors import (
    ADAPTERS,
    LAYOUTS,
    PHI4_BACKBONE_VALUES,
    PHI4_TENSORS,
    PHI4_VALUES,
    SHAPES,
    Shape,
    adapter_tensors,
    backbone_tensors,
    model_tensors,
)

Words = npt.NDArray[np.uint16]
Tensor = tuple[str, tuple[int, ...]]

BLOCK_VALUES = (1 << 22) + 4099  # a prime distance after powers of two: rows of a matrix do not repeat each other
SPARE_BYTES = 1 << 28


class RandomWeights:
    """Makes the bytes of tensors; the same seed and order give the same."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.Generator(np.random.SFC64(seed))
        self._block = self._rng.standard_normal(BLOCK_VALUES, np.float32)
        self._scaled: dict[float, Words] = {}

    def write(self, tensor: Tensor, write: Callable[[Any], object]) -> None:
        name, shape = tensor
        left = math.prod(shape)
        mean, deviation = distribution(name, shape)
        if mean or len(shape) < 2:
            write(as_bfloat16(np.float32(mean) + np.float32(deviation) * self._rng.standard_normal(left, np.float32)))
            return
        if deviation not in self._scaled:
            self._scaled[deviation] = as_bfloat16(self._block * np.float32(deviation))
        start = int(self._rng.integers(BLOCK_VALUES))
        while left:
            piece = self._scaled[deviation][start : start + left]
            write(piece.data)
            left -= len(piece)
            start = 0


def distribution(name: str, shape: Sequence[int]) -> tuple[float, float]:
    """Mean and standard deviation."""
    if name.endswith("global_mean"):  # of log-mel energies
        return 18.0, 1.0
    if name.endswith("global_invstd"):
        return 0.3, 0.03
    if "norm" in name and name.endswith(".weight"):
        return 1.0, 0.1
    if len(shape) == 1 or name.endswith((".b1", ".b2")):
        return 0.0, 0.02
    gain = 0.1 if ".lora_B." in name else 1.0  # an adapter changes a model, it does not replace it
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))


def as_bfloat16(values: npt.NDArray[np.float32]) -> Words:
    """Rounded to the nearest."""
    words = values.view(np.uint32)
    rounded: Words = ((words + np.uint32(0x7FFF) + ((words >> 16) & 1)) >> 16).astype("<u2")
    return rounded


def write_safetensors(path: Path, tensors: Iterable[Tensor], weights: RandomWeights) -> None:
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors:
        n_bytes = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            weights.write(tensor, file.write)


def write_checkpoint(directory: Path, shape: Shape, layout: str, *, n_shards: int = 3, seed: int = 0) -> None:
    """Writes a checkpoint into a new or empty directory."""
    tensors = list(model_tensors(shape, layout))
    adapters = {name: list(adapter_tensors(shape, name)) for name in ADAPTERS} if layout == "phi4_multimodal" else {}
    require_space(directory, 2 * sum(map(n_values, [tensors, *adapters.values()])))
    directory.mkdir(parents=True, exist_ok=True)
    weights = RandomWeights(seed)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards(tensors, n_shards), start=1):
        file = f"model-{number:05}-of-{n_shards:05}.safetensors"
        write_safetensors(directory / file, shard, weights)
        places |= {name: file for name, _ in shard}
    total = {"total_size": 2 * n_values(tensors)}
    write_json(directory / "model.safetensors.index.json", {"metadata": total, "weight_map": places})
    for name, lora in adapters.items():
        folder = directory / f"{name}-lora"
        folder.mkdir(exist_ok=True)
        write_safetensors(folder / "adapter_model.safetensors", lora, weights)
        write_json(folder / "adapter_config.json", adapter_config(shape, name))
    write_files(directory, shape, layout)


def n_values(tensors: Iterable[Tensor]) -> int:
    return sum(math.prod(shape) for _, shape in tensors)


def shards(tensors: Sequence[Tensor], n_shards: int) -> list[list[Tensor]]:
    """The tensors in order, in pieces of about the same size."""
    total, done = n_values(tensors), 0
    pieces: list[list[Tensor]] = [[] for _ in range(n_shards)]
    for tensor in tensors:
        pieces[min(n_shards - 1, done * n_shards // total)].append(tensor)
        done += n_values([tensor])
    return pieces


def require_space(directory: Path, n_bytes: int) -> None:
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < n_bytes + SPARE_BYTES:
        raise SystemExit(f"{directory}: {n_bytes / 1e9:.1f} GB are needed and {free / 1e9:.1f} are free")


def totals(shape: Shape, layout: str) -> tuple[int, int, int]:
    """Values with adapters, values of the backbone, and tensors in the model's own files."""
    tensors = list(model_tensors(shape, layout))
    adapters = [tensor for name in ADAPTERS for tensor in adapter_tensors(shape, name)]
    n_apart = n_values(adapters) if layout == "phi4_multimodal" else 0
    return n_values(tensors) + n_apart, n_values(backbone_tensors(shape)), len(tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("directory", type=Path, metavar="OUT_DIR")
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0])
    parser.add_argument("--shape", choices=SHAPES, default="phi4")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    whole, backbone, n_tensors = totals(shape, options.layout)
    if options.shape == "phi4":
        expected = PHI4_BACKBONE_VALUES if options.layout == "phi3" else PHI4_VALUES
        if (whole, backbone, n_tensors) != (expected, PHI4_BACKBONE_VALUES, PHI4_TENSORS[options.layout]):
            raise SystemExit(
                f"{whole} values, {backbone} of the backbone, {n_tensors} tensors are not the real model's"
            )
    if options.directory.exists() and any(options.directory.iterdir()):
        raise SystemExit(f"{options.directory} is not empty")
    write_checkpoint(options.directory, shape, options.layout, seed=options.seed)
    size = sum(path.stat().st_size for path in options.directory.rglob("*") if path.is_file())
    print(
        f"{options.directory}: {whole:,} values, {backbone:,} of the backbone, {n_tensors} tensors, {size / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
