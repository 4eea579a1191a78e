"""What the image processor of transformers makes of pictures of odd sizes, as it is stored in data/pixels/pixels.npz.

Phi4MultimodalImageProcessor needs torchvision, whose usual builds want a torch for GPUs, so the tests compare with what
is stored.  ``python tests/reference_pixels.py`` makes it again: torch 2.13.0, torchvision 0.28.0, transformers 5.23.0.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent / "data" / "pixels"
STORED = FOLDER / "pixels.npz"
CROP_SIZE = 112
EVERY = 3  # rows and columns of the overview that are stored
DRAWN = ((113, 112), (60, 200), (300, 120), (37, 411), (97, 45), (223, 226), (1000, 30))
FILES = ("img09.png", "img10.png", "img13.png", "img14.png", "img17.png")
# Larger than 36 crops: the grid of the most similar shape.
LARGE = ((1000, 999), (420, 1680))


def pictures() -> Iterator[tuple[str, Image.Image]]:
    """Waves of three colours, sharp and soft, and drawn pictures."""
    for width, height in DRAWN + LARGE:
        x, y = np.arange(width)[np.newaxis], np.arange(height)[:, np.newaxis]
        waves = np.sin(x / 3 + y / 40), np.sin(y / 5) * np.cos(x / 9), np.sign(np.sin((x + y) / 7))
        planes = np.broadcast_arrays(*waves)
        yield f"{width}x{height}", Image.fromarray(np.uint8(127.5 + 127.5 * np.stack(planes, axis=-1)))
    for name in FILES:
        with Image.open(FOLDER / name) as image:
            yield name, image.convert("RGB")


def main() -> None:
    processor = _processor()
    side = CROP_SIZE // 28
    arrays: dict[str, Any] = {}
    for name, image in pictures():
        found = processor(image, return_tensors="np")
        pixels, masks = found["image_pixel_values"][0], found["image_attention_mask"][0].astype(bool)
        # For the overview, transformers counts the real model's 16 rows of 16 tokens and an end at every crop size.
        arrays[f"{name} n_tokens"] = int(found["num_img_tokens"][0]) - 16 * 17 + side * (side + 1)
        arrays[f"{name} size"] = found["image_sizes"][0]
        arrays[f"{name} mask"] = masks
        arrays[f"{name} overview"] = pixels[0, :, ::EVERY, ::EVERY]
        if name not in {f"{width}x{height}" for width, height in LARGE}:
            arrays[f"{name} crops"] = np.rint((pixels[1:] + 1) * 127.5).astype(np.uint8)
    np.savez_compressed(STORED, **arrays)


def _processor() -> Any:
    torch: Any = importlib.import_module("torch")
    # A torchvision for GPUs does not find these in a torch without.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    transformers = importlib.import_module("transformers")
    return transformers.Phi4MultimodalImageProcessor(size={"height": CROP_SIZE, "width": CROP_SIZE})


if __name__ == "__main__":
    main()
