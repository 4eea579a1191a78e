"""Crops, masks, sizes and token counts of pictures of odd sizes are those of the image processor of transformers."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from phi4edge.image_processor import ImageNumbers, process_image
from reference_pixels import CROP_SIZE, EVERY, LARGE, STORED, pictures

HALVES = (0.5, 0.5, 0.5)
LEVEL = 1 / 127.5  # of a colour, as the encoder gets it
PICTURES = dict(pictures())


@pytest.mark.parametrize("name", PICTURES)
def test_pixels_are_those_of_transformers(name: str) -> None:
    image: Image.Image = PICTURES[name]
    crops = process_image(image, ImageNumbers(CROP_SIZE, 14, 36, HALVES, HALVES))
    with np.load(STORED) as stored:
        theirs = {key: stored[f"{name} {key}"] for key in ("n_tokens", "size", "mask", "overview")}
        levels = None if image.size in LARGE else stored[f"{name} crops"]
    assert crops.n_tokens == theirs["n_tokens"]
    assert [CROP_SIZE * crops.grid[1], CROP_SIZE * crops.grid[0]] == theirs["size"].tolist()
    np.testing.assert_array_equal(crops.patch_mask, theirs["mask"])
    # Pillow and torch round a colour apart when it is near the middle of two levels.  Scaled by a simple ratio such as
    # 4/5, as the largest picture is, many are, in both directions; then either is as near to the exact value.
    overview = crops.pixel_values[0, :, ::EVERY, ::EVERY]
    assert np.abs(overview - theirs["overview"]).max() <= (2 if image.size in LARGE else 1.25) * LEVEL
    if levels is not None:
        ours = np.rint((crops.pixel_values[1:] + 1) / LEVEL).astype(int)
        np.testing.assert_allclose(crops.pixel_values[1:], ours * LEVEL - 1, atol=1e-6)
        difference = np.abs(ours - levels)
        assert difference.max() <= 1 and (difference > 0).mean() <= 0.006


def test_the_pictures_are_the_stored_ones() -> None:
    with np.load(STORED) as stored:
        assert {key.rsplit(" ", 1)[0] for key in stored} == set(PICTURES)
