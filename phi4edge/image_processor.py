"""Pictures to crops for the vision encoder (dynamic HD), and the encoder's output to the rows of a prompt.

>>> crops = process_image(load_image("photo.jpg"), numbers)  # doctest: +SKIP
>>> crops.pixel_values.shape, crops.n_tokens  # doctest: +SKIP
((5, 3, 448, 448), 1065)
>>> assemble(crops, encoder.encode(crops.pixel_values, crops.patch_mask)).shape  # doctest: +SKIP
(1065, 3072)

A picture is scaled to fill a grid of S x S crops in its width or in its height, and white fills the rest.  The encoder
sees each crop, and before them an overview: the whole canvas as one crop.  The arithmetic is that of
Phi4MultimodalImageProcessor in transformers, with Pillow's resize, which rounds ties otherwise than torch's: by one of
255 levels, or two where the scale is a simple ratio.  Unlike there, pictures are turned as their EXIF says, and 16-bit
grey keeps its high byte instead of being cut off at 255.
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import product
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from phi4edge.encoders import PATCH, VisionFeatures
from phi4edge.errors import BundleError, InputError, OutOfMemoryError, Phi4EdgeError, UsageError
from phi4edge.media_source import data_of, path_of
from phi4edge.strict_json import read_bytes

MAX_BYTES: Final = 64 << 20  # of a file
MAX_PIXELS: Final = 64 << 20  # of a picture, known from its header before anything is decoded
MAX_SIDE: Final = 32768  # pixels

ImageSource = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_FORMATS: Final = {  # Pillow's name -> how such a file begins
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "JPEG": rb"\xff\xd8\xff",
    "WEBP": rb"RIFF....WEBP",
    "GIF": rb"GIF8[79]a",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "BMP": rb"BM",
}
_MODES: Final = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"})
_ORIENTATION: Final = 0x0112  # the EXIF tag
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ROWS_AT_ONCE: Final = 256  # when colours are converted; bounds the memory for copies
_SMALLEST_SIDE: Final = 10  # pixels of a scaled picture; the reference refuses less
_MAX_CANVAS: Final = 1 << 24  # pixels; the real model has 36 crops of 448 x 448, which is less than half of this
# Cubic convolution with a = -0.75 for a point in the middle between its second and third neighbour.
_CUBIC: Final = (-0.09375, 0.59375, 0.59375, -0.09375)

# Pillow reports what is odd about a file through the warnings module, whose filters belong to the whole process, and
# through logging, which writes to stderr when nobody listens.
_warnings_lock = threading.Lock()
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True, slots=True)
class ImageNumbers:
    """What the processor has to know about a checkpoint.  The real model: 448, 14, 36 and 0.5 throughout."""

    crop_size: int  # S: pixels of a side of a crop
    patch_size: int  # pixels; one token is 2 x 2 patches
    max_crops: int  # of the largest grid; the overview is not counted
    mean: tuple[float, float, float]  # of red, green and blue as 0..1
    std: tuple[float, float, float]

    @classmethod
    def from_manifest(cls, entry: Any, path: str = "manifest.json") -> ImageNumbers:
        """Of ``processors["image"]`` in a bundle's manifest, which is at ``path``.  Raises BundleError."""

        def wrong(key: str, expected: str) -> BundleError:
            field = f"processors.image.{key}" if key else "processors.image"
            found = repr(entry.get(key) if key else entry)
            hint = "convert the checkpoint again"
            return BundleError(f"is {found:.60}, expected {expected}", path=path, field=field, hint=hint)

        if not isinstance(entry, Mapping):
            raise wrong("", "an object")
        for key in ("crop_size", "patch_size", "max_crops"):
            if type(entry.get(key)) is not int or not 0 < entry[key] <= _MAX_CANVAS:
                raise wrong(key, "a positive integer")
        for key in ("mean", "std"):
            values = entry.get(key)
            if not isinstance(values, (list, tuple)) or len(values) != 3 or not all(map(_is_number, values)):
                raise wrong(key, "three finite numbers")
            if key == "std" and min(values) < 1e-6:
                raise wrong(key, "three positive numbers")
        if entry["patch_size"] != PATCH:
            raise wrong("patch_size", f"{PATCH}")
        if entry["crop_size"] % (2 * PATCH):
            raise wrong("crop_size", f"a multiple of {2 * PATCH}")
        if entry["max_crops"] * entry["crop_size"] ** 2 > _MAX_CANVAS:
            raise wrong("max_crops", f"a grid of at most {_MAX_CANVAS} pixels")
        mean, std = (tuple(map(float, entry[key])) for key in ("mean", "std"))
        return cls(entry["crop_size"], entry["patch_size"], entry["max_crops"], mean, std)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Crops:
    """A picture as the vision encoder takes it: first the overview, then the crops of the grid row by row."""

    pixel_values: Float32  # [1 + columns * rows, 3, S, S], normalised
    patch_mask: npt.NDArray[np.bool_]  # [1 + columns * rows, S/14, S/14]; False where there is only padding
    grid: tuple[int, int]  # columns, rows
    n_rows: int  # of tokens that are kept of the grid
    n_columns: int

    @property
    def tokens_per_side(self) -> int:
        """Of one crop: S/28."""
        n_patches: int = self.patch_mask.shape[1]
        return n_patches // 2

    @property
    def n_tokens(self) -> int:
        """All that the picture takes in a prompt: grid, separator, overview; each row has a separator at its end."""
        side = self.tokens_per_side
        return self.n_rows * (self.n_columns + 1) + 1 + side * (side + 1)


def load_image(source: ImageSource) -> Image.Image:
    """A picture in RGB, upright, on white where it was transparent.

    source: the path, the bytes or the data URL of a PNG, JPEG, WebP, BMP, GIF or TIFF file, of which the first frame is
    taken; an image of Pillow; or an array uint8 [height, width] or [height, width, 1, 3 or 4].

    Raises FileError when the file cannot be read, InputError when it is no picture that we take, OutOfMemoryError.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        with _decoding("picture"):
            return _upright_rgb(source)
    data = source if isinstance(source, bytes) else data_of(source, "image")
    if data is not None:
        return _from_file(data)
    if not isinstance(source, (str, os.PathLike)):
        raise _refusal(f"is of type {type(source).__name__}, expected a path, bytes, an image of Pillow or an array")
    path = path_of(source)
    try:
        data = read_bytes(path, at_most=MAX_BYTES)
    except BundleError as error:
        raise InputError(error.problem, path=str(path), hint="save it smaller, as JPEG for example") from error
    return _from_file(data, str(path))


def crop_budget(numbers: ImageNumbers, max_crops: int | None) -> int:
    """The crops that a grid may have; None is what the model was made for.  Raises UsageError."""
    budget = numbers.max_crops if max_crops is None else max_crops
    if type(budget) is not int or not 1 <= budget <= numbers.max_crops:
        raise UsageError(f"is {budget!r:.40}, expected 1 to {numbers.max_crops}", field="max_crops")
    return budget


def process_image(image: Image.Image, numbers: ImageNumbers, max_crops: int | None = None) -> Crops:
    """Cuts an RGB picture, such as ``load_image`` gives, into crops.

    max_crops: of the grid, 1 to ``numbers.max_crops``, which is the default.  Less takes less time and fewer tokens,
    and shows large pictures less sharp.

    Raises InputError for pictures that are far longer than wide or the other way round, UsageError.
    """
    budget = crop_budget(numbers, max_crops)
    width, height = image.size
    _check_size(width, height)
    if image.mode != "RGB":
        raise _refusal(f"is {image.mode}, expected RGB")
    size, patch = numbers.crop_size, numbers.patch_size
    columns, rows = grid = _grid(width, height, size, budget)
    wide, high = size * columns, size * rows  # of the canvas
    # Doubles, cut off: this is the reference's arithmetic, and exact fractions would be off by a pixel at times.
    x_scale, y_scale = wide / width, high / height
    new = (wide, int(height * x_scale)) if x_scale < y_scale else (int(width * y_scale), high)
    if min(new) < _SMALLEST_SIDE:
        raise _refusal(f"with {width} x {height} pixels is too long and too narrow", hint="cut it into pieces")

    canvas = np.full((high, wide, 3), 255, np.uint8)
    canvas[: new[1], : new[0]] = np.asarray(image.resize(new, Image.Resampling.BILINEAR))
    levels = np.arange(256)
    mean, std = (np.array(values, np.float64)[:, np.newaxis] for values in (numbers.mean, numbers.std))
    table = ((levels - 255 * mean) / (255 * std)).astype(np.float32)  # [3, 256]

    pixel_values = np.empty((1 + columns * rows, 3, size, size), np.float32)
    pixel_values[0] = _overview(canvas, table, size)
    for index, (row, column) in enumerate(product(range(rows), range(columns)), start=1):
        tile = canvas[row * size : (row + 1) * size, column * size : (column + 1) * size]
        pixel_values[index] = _normalised(tile, table)

    side = size // patch
    valid_rows, valid_columns = side * rows - (high - new[1]) // patch, side * columns - (wide - new[0]) // patch
    valid = np.zeros((side * rows, side * columns), np.bool_)
    valid[:valid_rows, :valid_columns] = True
    patch_mask = np.ones((1 + columns * rows, side, side), np.bool_)
    patch_mask[1:] = valid.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(-1, side, side)
    return Crops(pixel_values, patch_mask, grid, -(-valid_rows // 2), -(-valid_columns // 2))


def assemble(crops: Crops, features: VisionFeatures) -> Float32:
    """Float32 [n_tokens, hidden]: the rows of a picture in the prompt, from what the encoder made of its crops.

    The grid as one picture, the separator of views, the overview; after each row of both the separator of rows.

    Raises InputError when the features are those of another picture.
    """
    (columns, rows), side = crops.grid, crops.tokens_per_side
    hidden = features.crops.shape[-1]
    shapes = features.crops.shape, features.row_separator.shape, features.view_separator.shape
    expected = (1 + columns * rows, side * side, hidden), (hidden,), (hidden,)
    if shapes != expected:
        raise InputError(f"have the shapes {shapes!r:.120}, expected {expected}", field="features")
    tiles = features.crops.reshape(-1, side, side, hidden)
    n_rows, n_columns = crops.n_rows, crops.n_columns
    n_grid = n_rows * (n_columns + 1)
    embeddings = np.empty((crops.n_tokens, hidden), np.float32)

    grid = embeddings[:n_grid].reshape(n_rows, n_columns + 1, hidden)  # views: what is written here is in embeddings
    for tile, (row, column) in zip(tiles[1:], product(range(rows), range(columns)), strict=True):
        end = min((column + 1) * side, n_columns)
        place = grid[row * side : (row + 1) * side, column * side : end]
        place[:] = tile[: place.shape[0], : place.shape[1]]
    grid[:, n_columns] = features.row_separator
    embeddings[n_grid] = features.view_separator
    overview = embeddings[n_grid + 1 :].reshape(side, side + 1, hidden)
    overview[:, :side] = tiles[0]
    overview[:, side] = features.row_separator
    return embeddings


def _grid(width: int, height: int, size: int, max_crops: int) -> tuple[int, int]:
    """Columns and rows: as many as the picture has pixels for, or else of the most similar shape."""
    best = -(-width // size), -(-height // size)
    if best[0] * best[1] <= max_crops:
        return best
    smallest = math.inf
    pairs = [(columns, rows) for columns in range(1, max_crops + 1) for rows in range(1, max_crops // columns + 1)]
    for columns, rows in sorted(pairs, key=lambda pair: pair[0] * pair[1]):
        difference = abs(width / height - columns / rows)
        # The largest of equally similar grids.  The reference demands that the picture has pixels for half of it, which
        # holds for all that are too large for the budget.
        if difference <= smallest:
            best, smallest = (columns, rows), difference
    return best


def _normalised(pixels: Bytes, table: Float32) -> Float32:
    """uint8 [height, width, 3] -> float32 [3, height, width]"""
    return np.stack([table[channel][pixels[:, :, channel]] for channel in range(3)])


def _overview(canvas: Bytes, table: Float32, size: int) -> Float32:
    """Float32 [3, S, S]: the normalised canvas, scaled down by cubic interpolation without a filter, not clamped."""
    view = np.zeros((3, size, size), np.float32)
    for y, y_weight in _taps(canvas.shape[0] // size, size):
        row = np.zeros_like(view)
        for x, x_weight in _taps(canvas.shape[1] // size, size):
            row += x_weight * _normalised(canvas[y[:, np.newaxis], x], table)
        view += y_weight * row
    return view


def _taps(factor: int, size: int) -> list[tuple[npt.NDArray[np.intp], float]]:
    """Which of ``factor * size`` points make each of ``size`` points, with their weights.

    The centres of the new points fall on old ones when the factor is odd, and in the middle of two when it is even.
    """
    points = factor * np.arange(size) + factor // 2
    if factor % 2:
        return [(points, 1.0)]
    last = factor * size - 1
    return [(np.clip(points + offset, 0, last), weight) for offset, weight in enumerate(_CUBIC, start=-2)]


def _from_file(data: bytes, path: str = "") -> Image.Image:
    kind = next((kind for kind, start in _FORMATS.items() if re.match(start, data, re.DOTALL)), None)
    if kind is None:
        problem = "is not a PNG, JPEG, WebP, BMP, GIF or TIFF picture" if data else "is empty"
        raise _refusal(problem, path, "save the picture as PNG or JPEG")
    with _decoding(kind, path):
        image = Image.open(BytesIO(data), formats=[kind])
        _check_size(*image.size, path)
        if kind == "PNG":  # decoding alone would not notice wrong checksums, nor that the end is missing
            image.verify()
            image = Image.open(BytesIO(data), formats=[kind])
        return _upright_rgb(image, path)


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        found = f"{array.dtype} {list(array.shape)}"
        raise _refusal(f"is {found:.80}, expected uint8 [height, width] or [height, width, 1, 3 or 4]")
    _check_size(array.shape[1], array.shape[0])
    with _decoding("picture"):
        return _upright_rgb(Image.fromarray(np.ascontiguousarray(array)))


def _check_size(width: int, height: int, path: str = "") -> None:
    if width < 1 or height < 1:
        raise _refusal(f"has {width} x {height} pixels", path)
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise _refusal(
            f"has {width} x {height} pixels, more than {MAX_PIXELS} in all or {MAX_SIDE} along a side",
            path,
            "make it smaller, or cut it into pieces",
        )


@contextmanager
def _decoding(kind: str, path: str = "") -> Iterator[None]:
    """Errors of Pillow, which are of many types, become ours; its warnings are dropped."""
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Phi4EdgeError:
            raise
        except MemoryError as error:
            raise OutOfMemoryError("not enough memory for this picture", path=path, hint="make it smaller") from error
        except Image.DecompressionBombError as error:
            raise _refusal(f"has more than {MAX_PIXELS} pixels", path, "make it smaller") from error
        except Exception as error:
            problem = f"is a damaged {kind} ({type(error).__name__})"
            raise _refusal(problem, path, "download or save it again") from error


def _refusal(problem: str, path: str = "", hint: str = "") -> InputError:
    return InputError(problem, path=path, field="" if path else "image", hint=hint)


def _upright_rgb(image: Image.Image, path: str = "") -> Image.Image:
    _check_size(*image.size, path)
    image.load()
    _check_size(*image.size, path)  # once more, as the data may say something else than the header
    if image.mode not in _MODES and not image.mode.startswith("I;16"):
        raise _refusal(f"has pixels of the kind '{image.mode}'", path, "save it with 8 bits a colour")
    turn = _TURNS.get(_orientation(image))
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, _ROWS_AT_ONCE):
        part = image.crop((0, top, image.width, min(top + _ROWS_AT_ONCE, image.height)))
        rgb.paste(_rgb(part), (0, top))
    return rgb if turn is None else rgb.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("La", "RGBa"):  # colours that are multiplied with their alpha
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _orientation(image: Image.Image) -> Any:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:
        return None  # many cameras and programs write wrong EXIF; the picture is still right
    return orientation if isinstance(orientation, int) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e6
