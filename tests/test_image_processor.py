"""Pictures become the crops and tokens of the reference; whatever is no picture is one error of ours."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from peers import require
from phi4edge.converters.checkpoint import Checkpoint
from phi4edge.converters.variants import variant_of
from phi4edge.converters.vision import build_vision, write_vision
from phi4edge.encoders import VisionEncoder, VisionFeatures
from phi4edge.errors import BundleError, InputError, UsageError
from phi4edge.image_processor import Crops, ImageNumbers, assemble, load_image, process_image
from tiny_media import MediaShape, media_model, tiny_multimodal

Floats = npt.NDArray[np.floating[Any]]
Pixels = npt.NDArray[np.uint8]

HALVES = (0.5, 0.5, 0.5)
REAL = ImageNumbers(448, 14, 36, HALVES, HALVES)
SMALL = ImageNumbers(112, 14, 36, HALVES, HALVES)
WHITE = np.full(3, 255, np.uint8)


def numbers(crop_size: int, max_crops: int = 36) -> ImageNumbers:
    return ImageNumbers(crop_size, 14, max_crops, HALVES, HALVES)


def noise(width: int, height: int, channels: int = 3) -> Pixels:
    return np.random.default_rng(width + height).integers(0, 256, (height, width, channels)).astype(np.uint8)


def ramp(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards, blue in between."""
    x, y = np.arange(width)[np.newaxis] / width, np.arange(height)[:, np.newaxis] / height
    planes = np.broadcast_arrays(255 * x, 255 * y, 255 * (x + y) / 2)
    return Image.fromarray(np.floor(np.stack(planes, axis=-1)).astype(np.uint8))


def stitched(crops: Crops) -> Floats:
    """float32 [3, height, width] of the canvas that the grid was cut from."""
    (columns, rows), size = crops.grid, crops.pixel_values.shape[-1]
    tiles = crops.pixel_values[1:].reshape(rows, columns, 3, size, size)
    canvas: Floats = tiles.transpose(2, 0, 3, 1, 4).reshape(3, rows * size, columns * size)
    return canvas


# Run with Phi4MultimodalImageProcessor: size, grid, size of the picture on the canvas, valid patches, tokens.
GEOMETRY = [
    ((448, 448), (1, 1), (448, 448), (32, 32), 545),
    ((640, 480), (2, 2), (896, 672), (64, 48), 1065),
    ((1344, 1344), (3, 3), (1344, 1344), (96, 96), 2625),
    ((300, 1200), (1, 3), (336, 1344), (24, 96), 897),
    ((100, 100), (1, 1), (448, 448), (32, 32), 545),
    ((300, 200), (1, 1), (448, 298), (32, 22), 460),
    ((449, 448), (2, 1), (449, 448), (33, 32), 561),
    ((1000, 100), (3, 1), (1344, 134), (96, 10), 518),
    ((2000, 500), (5, 2), (2240, 560), (160, 40), 1893),
    ((3000, 2000), (7, 5), (3136, 2090), (224, 150), 8748),
    ((4000, 3000), (4, 3), (1792, 1344), (128, 96), 3393),
    ((10000, 600), (17, 1), (7466, 448), (534, 32), 4561),
    ((444, 333), (1, 1), (448, 335), (32, 24), 477),  # 336 with exact fractions
    ((448, 449), (1, 2), (448, 449), (32, 33), 562),
    ((55, 55), (1, 1), (447, 448), (32, 32), 545),  # 55 * (448 / 55) is less than 448
    ((1, 1), (1, 1), (448, 448), (32, 32), 545),
    ((17, 999), (1, 3), (22, 1344), (2, 96), 369),
]


@pytest.mark.parametrize(("size", "grid", "scaled", "valid", "n_tokens"), GEOMETRY)
def test_geometry_is_that_of_the_reference(
    size: tuple[int, int], grid: tuple[int, int], scaled: tuple[int, int], valid: tuple[int, int], n_tokens: int
) -> None:
    crops = process_image(Image.new("RGB", size), REAL)
    n_crops = 1 + grid[0] * grid[1]
    assert crops.grid == grid
    assert crops.n_tokens == n_tokens
    assert crops.pixel_values.shape == (n_crops, 3, 448, 448)
    assert crops.pixel_values.dtype == np.float32
    assert crops.patch_mask.shape == (n_crops, 32, 32)
    assert crops.patch_mask.dtype == np.bool_
    assert crops.patch_mask[0].all()
    assert crops.patch_mask[1:].sum() == valid[0] * valid[1]
    assert (crops.n_columns, crops.n_rows) == (-(-valid[0] // 2), -(-valid[1] // 2))
    is_black = stitched(crops)[0] == -1
    assert (np.flatnonzero(is_black.any(0))[-1] + 1, np.flatnonzero(is_black.any(1))[-1] + 1) == scaled


# At row 100, column 200 of the first crop of the grid and of the overview; mean and deviation of the overview.
VALUES = [
    (448, 448, (-0.113725, -0.560784, -0.333333), (-0.113725, -0.560784, -0.333333), -0.006148, 0.527074),
    (640, 480, (-0.560784, -0.709804, -0.631373), (-0.114461, -0.412500, -0.264354), 0.245733, 0.631026),
    (1344, 1344, (-0.709804, -0.858824, -0.780392), (-0.105882, -0.552941, -0.333333), -0.004659, 0.527025),
    (300, 1200, (0.192157, -0.858824, -0.333333), (0.192157, -0.552941, -0.184314), 0.245559, 0.630913),
    (100, 100, (-0.113725, -0.560784, -0.341176), (-0.113725, -0.560784, -0.341176), -0.013765, 0.526826),
]


@pytest.mark.parametrize(("width", "height", "first", "overview", "mean", "deviation"), VALUES)
def test_values_are_those_of_the_reference(
    width: int, height: int, first: Floats, overview: Floats, mean: float, deviation: float
) -> None:
    pixels = process_image(ramp(width, height), REAL).pixel_values
    np.testing.assert_allclose(pixels[1, :, 100, 200], first, atol=1e-6)
    np.testing.assert_allclose(pixels[0, :, 100, 200], overview, atol=1e-6)
    assert pixels[0].mean(dtype=np.float64) == pytest.approx(mean, abs=1e-6)
    assert pixels[0].std(dtype=np.float64, ddof=1) == pytest.approx(deviation, abs=1e-6)


# Grids that the reference chose when the picture has more pixels than its budget; many are ties.
BUDGETS = [
    (3000, 3000, 448, 36, (6, 6)),
    (900, 900, 448, 2, (1, 1)),
    (1300, 1300, 448, 4, (2, 2)),
    (1400, 1400, 448, 5, (2, 2)),
    (2000, 1000, 448, 4, (2, 1)),
    (4000, 2000, 448, 36, (8, 4)),
    (1500, 500, 448, 2, (2, 1)),
    (500, 1600, 448, 2, (1, 2)),
    (640, 480, 448, 1, (1, 1)),
    (420, 1680, 112, 20, (2, 8)),
    (1000, 999, 112, 16, (4, 4)),
    (500, 500, 448, 3, (1, 1)),
]


@pytest.mark.parametrize(("width", "height", "crop_size", "budget", "grid"), BUDGETS)
def test_a_budget_gives_the_grid_of_the_reference(
    width: int, height: int, crop_size: int, budget: int, grid: tuple[int, int]
) -> None:
    image = Image.new("RGB", (width, height))
    assert process_image(image, numbers(crop_size, budget)).grid == grid
    assert process_image(image, numbers(crop_size), max_crops=budget).grid == grid


@pytest.mark.parametrize("budget", [0, -1, 37, True, 1.5, "4"])
def test_a_budget_outside_of_the_models_is_refused(budget: Any) -> None:
    with pytest.raises(UsageError, match=r"max_crops: is .*, expected 1 to 36"):
        process_image(Image.new("RGB", (9, 9)), SMALL, max_crops=budget)


SIZES = [(112, 112), (113, 90), (50, 700), (640, 480), (336, 336), (601, 500), (4032, 60), (60, 4032)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_grid_is_the_scaled_picture_on_white(width: int, height: int) -> None:
    image = Image.fromarray(noise(width, height))
    mean, std = (0.48, 0.45, 0.4), (0.27, 0.26, 0.28)
    crops = process_image(image, ImageNumbers(112, 14, 36, mean, std))
    columns, rows = crops.grid
    wide, high = 112 * columns, 112 * rows
    scale = min(wide / width, high / height)
    new = (wide, int(height * scale)) if wide / width == scale and scale < high / height else (int(width * scale), high)
    canvas = np.full((high, wide, 3), 255, np.uint8)
    canvas[: new[1], : new[0]] = np.asarray(image.resize(new, Image.Resampling.BILINEAR))
    wanted = (canvas / 255 - mean) / std
    np.testing.assert_allclose(stitched(crops), wanted.transpose(2, 0, 1), atol=1e-6)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_overview_is_the_canvas_scaled_by_torch(width: int, height: int) -> None:
    torch = require("torch")
    crops = process_image(Image.fromarray(noise(width, height)), SMALL)
    canvas = torch.from_numpy(stitched(crops))[None]
    wanted = torch.nn.functional.interpolate(canvas, (112, 112), mode="bicubic", align_corners=False)[0].numpy()
    np.testing.assert_allclose(crops.pixel_values[0], wanted, atol=5e-7)


@pytest.mark.parametrize("size", [(1, 20000), (20000, 1), (4032, 9), (9, 4032)])
def test_a_picture_that_would_be_a_line_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=f"image: with {size[0]} x {size[1]} pixels is too long and too narrow"):
        process_image(Image.new("RGB", size), SMALL)


def test_ten_pixels_are_no_line() -> None:
    crops = process_image(Image.new("RGB", (4032, 10)), SMALL)
    assert (crops.grid, crops.n_rows, crops.n_columns) == ((36, 1), 1, 144)


def test_only_rgb_is_processed() -> None:
    with pytest.raises(InputError, match="image: is RGBA, expected RGB"):
        process_image(Image.new("RGBA", (9, 9)), SMALL)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> VisionEncoder:
    directory = tmp_path_factory.mktemp("vision")
    with Checkpoint(tiny_multimodal(directory / "checkpoint")) as source:
        plan = build_vision(source, variant_of(source), MediaShape().hidden, "fp32")
        write_vision(directory / "vision.onnx", plan, lambda name, done, total: None)
    return VisionEncoder(directory / "vision.onnx", MediaShape().hidden)


@pytest.mark.parametrize("size", [(112, 112), (300, 200), (113, 112), (37, 290), (450, 300), (130, 800)])
def test_rows_of_a_picture_are_those_of_transformers(size: tuple[int, int], encoder: VisionEncoder) -> None:
    """It checks the number of tokens, too."""
    torch = require("torch")
    shape = MediaShape()
    crops = process_image(load_image(noise(*size)), SMALL)
    found = assemble(crops, encoder.encode(crops.pixel_values, crops.patch_mask))
    assert found.dtype == np.float32
    assert found.shape == (crops.n_tokens, shape.hidden)
    with torch.no_grad():
        wanted = media_model(shape).model.embed_tokens_extend.image_embed(
            torch.full((1, crops.n_tokens), shape.image_token),
            torch.zeros(1, crops.n_tokens, shape.hidden),
            torch.from_numpy(crops.pixel_values)[None],
            image_sizes=torch.tensor([[112 * crops.grid[1], 112 * crops.grid[0]]]),
            image_attention_mask=torch.from_numpy(crops.patch_mask)[None],
        )
    np.testing.assert_allclose(found, wanted[0].numpy(), atol=1e-5 * float(wanted.abs().max()))


def test_features_of_another_picture_are_refused() -> None:
    crops = process_image(Image.new("RGB", (300, 200)), SMALL)
    for shape in ((6, 16, 8), (7, 15, 8), (7, 16, 9), (7, 16)):
        features = VisionFeatures(np.zeros(shape, np.float32), np.zeros(8, np.float32), np.zeros(8, np.float32))
        with pytest.raises(InputError, match=r"features: have the shapes .*, expected \(\(7, 16, "):
            assemble(crops, features)


# ---- numbers of the manifest

ENTRY = {"crop_size": 112, "patch_size": 14, "max_crops": 36, "mean": [0.5] * 3, "std": [0.5] * 3}
BAD_ENTRIES: list[tuple[Any, str]] = [
    (None, "processors.image: is None"),
    ([], r"processors.image: is \[\]"),
    *itertools.product(
        [ENTRY | {"crop_size": value} for value in (0, -28, 113, 14, "112", True, 112.0, 1 << 40, None)],
        ["processors.image.crop_size"],
    ),
    *itertools.product([ENTRY | {"patch_size": value} for value in (0, 16, 28)], ["processors.image.patch_size"]),
    *itertools.product([ENTRY | {"max_crops": value} for value in (0, 1 << 20, None)], ["processors.image.max_crops"]),
    (ENTRY | {"crop_size": 4480}, "processors.image.max_crops"),
    *itertools.product(
        [ENTRY | {"mean": value} for value in (None, 0.5, [0.5] * 2, [0.5, "1", 0.5], [float("nan")] * 3, [1e300] * 3)],
        ["processors.image.mean"],
    ),
    *itertools.product([ENTRY | {"std": [0.5, 0.5, value]} for value in (0, -1, 1e-300)], ["processors.image.std"]),
    ({}, "processors.image.crop_size"),
]


@pytest.mark.parametrize(("entry", "message"), BAD_ENTRIES)
def test_wrong_numbers_in_a_manifest_are_named(entry: Any, message: str) -> None:
    with pytest.raises(BundleError, match=f"^manifest.json: {message}"):
        ImageNumbers.from_manifest(entry)


def test_numbers_of_a_manifest() -> None:
    assert ImageNumbers.from_manifest(ENTRY) == SMALL
