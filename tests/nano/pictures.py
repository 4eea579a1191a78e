"""Pictures of numbers, words and shapes, drawn with the DejaVu fonts, and what is asked about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from nano.texts import Conversation, one
from nano.words import BACKGROUNDS, COLORS, PICTURE_QUESTIONS, PRINTED, SHAPES, TEST, TRAIN, a, split_of

CROP, PATCH = 112, 14
SINGLE: Final = (112, 112)
GRIDS: Final = ((224, 112), (112, 224), (224, 224), (336, 224))  # several full crops
GLYPHS: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BACKGROUND: Final = len(GLYPHS)  # class of a patch; those of the shapes follow
N_CLASSES: Final = BACKGROUND + 1 + len(SHAPES)
IGNORED: Final = -100
_FONT_FOLDER: Final = Path("/usr/share/fonts/truetype/dejavu")  # Debian: fonts-dejavu-core, fonts-dejavu-extra
_FONTS: Final = tuple(
    f"DejaVu{name}.ttf" for name in ("Sans", "Sans-Bold", "SansMono-Bold", "Serif-Bold", "SansCondensed-Bold")
)
Size = tuple[int, int]  # width, height
Color = tuple[int, int, int]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Picture:
    """A conversation about one or two pictures."""

    conversation: Conversation
    images: tuple[Image.Image, ...]
    color: str = ""  # of the shape, if there is one
    shape: str = ""


def odd_size(random: Random) -> Size:
    """One that is scaled and filled up with white, three crops wide and two high at most."""
    while True:
        width, height = random.randrange(90, 331, 2), random.randrange(56, 221, 2)
        if 0.6 <= width / height <= 3:
            return width, height


@cache
def _font(name: str, size: int) -> Any:
    return ImageFont.truetype(_FONT_FOLDER / name, size)


@cache
def _advance(font: Any, glyph: str) -> float:
    return float(font.getlength(glyph))


def _brightness(color: Color) -> float:
    return 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2]


def _near(random: Random, color: Color, by: int) -> Color:
    red, green, blue = (min(255, max(0, channel + random.randint(-by, by))) for channel in color)
    return red, green, blue


def _two_colors(random: Random, any_colors: bool, inverted: bool) -> tuple[Color, Color]:
    """Paper and ink, which can be told apart."""
    paper_level, ink_level = 255 - random.randint(0, 12), random.randint(0, 40)
    paper, ink = (paper_level,) * 3, (ink_level,) * 3
    while any_colors:
        paper, ink = (tuple(random.randint(0, 255) for _ in range(3)) for _ in range(2))  # type: ignore[assignment]
        if _brightness(paper) - _brightness(ink) > 110:
            break
    return (ink, paper) if inverted else (paper, ink)


@cache
def _noise_fields() -> npt.NDArray[np.float32]:
    return np.random.default_rng(7).standard_normal((12, 240, 350, 3), dtype=np.float32)


def _noisy(image: Image.Image, random: Random, most: float = 10) -> Image.Image:
    strength = random.random() * most
    if strength < 1:
        return image
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    fields = _noise_fields()
    top, left = random.randint(0, fields.shape[1] - height), random.randint(0, fields.shape[2] - width)
    field = fields[random.randrange(len(fields)), top : top + height, left : left + width]
    return Image.fromarray(np.clip(pixels + field * strength, 0, 255).astype(np.uint8))


def draw_text(random: Random, text: str, size: Size) -> Image.Image:
    """Half of the pictures are plain: dark on white, one of two bold fonts, its top on the border of a patch."""
    width, height = size
    plain = random.random() < 0.5
    paper, ink = _two_colors(random, not plain and random.random() < 0.7, not plain and random.random() < 0.15)
    name = random.choice(_FONTS[1:3] if plain else _FONTS)
    least = 28
    most = max(least, int(36 * min(min(width, height) / CROP, 1.4)))
    for attempt in range(60):
        font = _font(name, random.randint(least, most) if attempt < 50 else least - 2 * (attempt - 49))
        left, top, right, bottom = font.getbbox(text)
        if right - left <= width - 6 and bottom - top <= height - 6:
            break
    edges = [font.getlength(text[:i]) - left for i in range(len(text) + 1)]
    grid = -(-width // CROP), -(-height // CROP)
    cut_every = CROP / min(grid[0] * CROP / width, grid[1] * CROP / height)  # pixels of this picture

    def cut(start: float, end: float) -> float:
        """How much of a glyph's shorter part is on the other side of the border of a crop."""
        return max(0.0, *(min(end - i * cut_every, i * cut_every - start) for i in (1, 2)))

    places = []
    for _ in range(1 if grid == (1, 1) else 16):  # of several places, that where the least is cut
        x, y = (
            random.randint(3, max(3, width - 3 - (right - left))),
            random.randint(3, max(3, height - 3 - (bottom - top))),
        )
        if plain:
            y = max(0, min(y // PATCH * PATCH, height - 2 - (bottom - top)))
        cuts = sum(cut(x + start, x + end) for start, end in pairwise(edges))
        places.append((cuts + 2 * cut(y, y + bottom - top), x, y))
    _, x, y = min(places)
    image = Image.new("RGB", size, paper)
    ImageDraw.Draw(image).text((x - left, y - top), text, fill=ink, font=font)
    return _noisy(image, random)


def draw_shape(random: Random, size: Size) -> tuple[Image.Image, str, str, str, tuple[float, float, float, float]]:
    """The picture, its shape, colour and background, and the box x0, y0, x1, y1 of the shape."""
    width, height = size
    shape, color, ground = random.choice(SHAPES), random.choice(list(COLORS)), random.choice(BACKGROUNDS)
    while ground == color:
        ground = random.choice(BACKGROUNDS)
    image = Image.new("RGB", size, _near(random, COLORS[ground], 10))
    draw, ink, r = ImageDraw.Draw(image), _near(random, COLORS[color], 12), random.uniform(0.2, 0.42) * min(size)
    x, y = random.uniform(r + 2, width - r - 2), random.uniform(r + 2, height - r - 2)
    if shape == "circle":
        draw.ellipse([x - r, y - r, x + r, y + r], fill=ink)
    elif shape == "square":
        draw.rectangle([x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r], fill=ink)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x - 0.9 * r, y + 0.8 * r), (x + 0.9 * r, y + 0.8 * r)], fill=ink)
    elif shape == "cross":
        draw.rectangle([x - 0.28 * r, y - r, x + 0.28 * r, y + r], fill=ink)
        draw.rectangle([x - r, y - 0.28 * r, x + r, y + 0.28 * r], fill=ink)
    else:
        radii = [r if i % 2 == 0 else 0.42 * r for i in range(10)]
        points = [(i * math.pi / 5, radius) for i, radius in enumerate(radii)]
        draw.polygon([(x + radius * math.sin(t), y - radius * math.cos(t)) for t, radius in points], fill=ink)
    return _noisy(image, random), shape, color, ground, (x - r, y - r, x + r, y + r)


# What a patch shows, for the training of the encoder alone.


def glyph_page(random: Random) -> tuple[Image.Image, Labels]:
    """A crop full of glyphs, some of them cut by its borders, and the class of each patch [8, 8]."""
    plain = random.random() < 0.5
    paper, ink = _two_colors(random, not plain, not plain and random.random() < 0.15)
    zoom = 1.0 if random.random() < 0.6 else random.uniform(1.0, 1.6)
    side = round(CROP / zoom)
    zoom = CROP / side
    image = Image.new("RGB", (side, side), paper)
    draw = ImageDraw.Draw(image)
    labels = np.full((8, 8), BACKGROUND, np.int64)
    y: float = random.randint(-10, 10)
    while y < side:
        font = _font(random.choice(_FONTS[1:3] if plain else _FONTS), random.randint(28, 36))
        _, top, _, bottom = font.getbbox("Q0")
        x: float = random.randint(-16, 8)
        rows = _patches(y * zoom, (y + bottom - top) * zoom)
        line = "".join(random.choices(GLYPHS, k=7))
        draw.text((x, y - top), line, fill=ink, font=font)
        end = x
        for glyph in line:
            start, end = end, end + _advance(font, glyph)  # kerning aside
            seen = (min(end, side) - max(start, 0)) / (end - start)
            seen *= (min(y + bottom - top, side) - max(y, 0)) / (bottom - top)
            columns = _patches(start * zoom, end * zoom)
            labels[rows, columns] = GLYPHS.index(glyph) if seen > 0.6 else IGNORED
        y += bottom - top + random.randint(3, 12)
        if plain and zoom == 1.0:
            y += -y % PATCH
    if side != CROP:
        image = image.resize((CROP, CROP), Image.Resampling.BICUBIC)
    return _noisy(image, random), labels


def _patches(start: float, end: float) -> slice:
    """Those whose middle lies between."""
    first, last = math.ceil((start - PATCH / 2) / PATCH), math.ceil((end - PATCH / 2) / PATCH)
    return slice(min(8, max(0, first)), min(8, max(0, last)))


def shape_page(random: Random) -> tuple[Image.Image, Labels]:
    image, shape, _, _, (left, top, right, bottom) = draw_shape(random, SINGLE)
    labels = np.full((8, 8), BACKGROUND, np.int64)
    labels[_patches(top, bottom), _patches(left, right)] = BACKGROUND + 1 + SHAPES.index(shape)
    return image, labels


# Conversations about pictures.


def _number(random: Random, split: str, most_digits: int = 4) -> str:
    """Of one to four digits; those of three and more are in one split only."""
    n = random.randint(1, most_digits)
    while True:
        text = str(random.randint(10 ** (n - 1) if n > 1 else 0, 10**n - 1))
        if n < 3 or split_of(f"N{text}") == split:
            return text


def _word(random: Random, split: str) -> str:
    """Training also has any letters, but never a word of another split."""
    while True:
        made_up = split == TRAIN and random.random() < 0.5
        word = "".join(random.choices(GLYPHS[10:], k=random.randint(2, 5))) if made_up else random.choice(PRINTED)
        if split_of(f"W{word}", 8) == split:
            return word


def _asked(random: Random, task: str, answer: str) -> Conversation:
    return one(task, random.choice(PICTURE_QUESTIONS[task]), answer)


def text_picture(random: Random, split: str, size: Size, task: str) -> Picture:
    text = (
        _number(random, split)
        if task == "number" or (task == "sign" and random.random() < 0.4)
        else _word(random, split)
    )
    return Picture(_asked(random, task, text), (draw_text(random, text, size),))


def shape_picture(random: Random, split: str, size: Size, task: str) -> Picture:
    image, shape, color, ground, _ = draw_shape(random, size)
    answers = {"describe": f"{a(f'{color} {shape}')} on {ground}", "color": color, "shape": shape}
    if task in answers:
        talk = _asked(random, task, answers[task])
    else:
        both = random.sample(("color", "shape"), 2)
        talk = Conversation("turns", tuple((PICTURE_QUESTIONS[each][0], answers[each]) for each in both))
    return Picture(talk, (image,), color, shape)


def two_numbers(random: Random, split: str, size: Size, task: str) -> Picture:
    while True:
        texts = [_number(random, split, 2) for _ in range(2)]
        if texts[0] != texts[1] and split_of(f"L{texts}", 8) == split:
            break
    images = tuple(draw_text(random, text, size) for text in texts)
    return Picture(_asked(random, task, str(max(map(int, texts)))), images)


# Task: how to make a picture, its share of the training, and of that with spoken questions.
TASKS: Final[dict[str, tuple[Callable[[Random, str, Size, str], Picture], float, float]]] = {
    "number": (text_picture, 3, 3),
    "word": (text_picture, 4, 4),
    "sign": (text_picture, 1.5, 0),
    "describe": (shape_picture, 1.5, 1.5),
    "color": (shape_picture, 0.5, 1.5),
    "shape": (shape_picture, 0.5, 1.5),
    "turns": (shape_picture, 0.7, 0),
    "larger": (two_numbers, 0, 0),  # two pictures: in batches of its own
}


def picture(random: Random, split: str, size: Size, task: str) -> Picture:
    return TASKS[task][0](random, split, size, task)


def tasks(random: Random, n: int, spoken: bool = False) -> Sequence[str]:
    shares = [of_spoken if spoken else share for _, share, of_spoken in TASKS.values()]
    return random.choices(list(TASKS), shares, k=n)


def typical_sizes(split: str = TEST) -> dict[str, list[Size]]:
    """Kinds of sizes that are reported apart; the odd ones of a split are its own."""
    random = Random(f"sizes {split}")
    return {"one crop": [SINGLE], "several crops": list(GRIDS), "odd sizes": [odd_size(random) for _ in range(12)]}
