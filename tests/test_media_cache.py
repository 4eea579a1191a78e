"""Parts that a conversation brings again: read once while they are the same, and never mistaken for others."""

from __future__ import annotations

import base64
import io
import os
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import phi4edge
from conversations import RATE, picture, sound
from phi4edge.bundle import Bundle
from phi4edge.converters.convert import convert
from phi4edge.encoders import Branch
from phi4edge.errors import FileError, InputError, UsageError
from phi4edge.media import Media
from phi4edge.media_cache import Latest
from phi4edge.prompt import MediaPart
from tiny_media import tiny_multimodal
from tiny_videos import grey, write_video

LONG_AGO = 1_000_000_000  # seconds since 1970; a file of this moment might change without getting another time
SPEECH: Branch = "speech"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    convert(tiny_multimodal(folder / "checkpoint"), folder / "bundle", "F32", encoders="fp32", adapter_quant="F32")
    return folder / "bundle"


@pytest.fixture
def new_media(bundle: Path) -> Callable[[], Media]:
    with phi4edge.load(bundle, threads=1) as model:
        tokens = model.tokenizer.special_tokens
    return lambda: Media(Bundle.open(bundle), 64, 2, tokens)


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(150, 90, seed)).save(file, "PNG", compress_level=0)  # of the same size for each seed
    return file.getvalue()


def wav(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((sound(1, seed)[0] * 32767).astype(np.int16).tobytes())
    return buffer.getvalue()


def old_file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def write_over(path: Path, data: bytes) -> None:
    """In place, with the size and the time that it had."""
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, (LONG_AGO, LONG_AGO))


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *((kind, form) for kind in ("image", "audio", "video") for form in ("path", "text", "bytes", "url")),
        ("image", "array"),
        ("audio", "array"),
    ],
)
def test_what_comes_again_is_not_read_again_and_is_encoded_the_same(
    new_media: Callable[[], Media], tmp_path: Path, kind: str, form: str
) -> None:
    data = {"image": png, "audio": wav}.get(kind, lambda: write_video([grey(i) for i in range(12)]))()
    array: Any = picture(150, 90) if kind == "image" else sound(1)
    path = old_file(tmp_path / "file", data)
    url = f"data:{kind}/x;base64,{base64.b64encode(data).decode()}"
    source: Any = {"path": path, "text": str(path), "bytes": data, "url": url, "array": array}[form]
    frames = 3 if kind == "video" else None
    media = new_media()
    first = media.read(MediaPart(kind, source, f"{kind} 1", frames=frames), SPEECH)
    expected = [media.encode(item) for item in first]
    again = media.read(MediaPart(kind, source, f"{kind} 2", frames=frames), SPEECH)
    assert all(item.data is not None for item in first) and all(item.data is None for item in again)
    ends = [f", frame {i + 1}" for i in range(3)] if kind == "video" else [""]
    assert [item.label for item in first] == [f"{kind} 1{end}" for end in ends]
    assert [item.label for item in again] == [f"{kind} 2{end}" for end in ends]
    assert [(item.digest, item.n_tokens) for item in again] == [(item.digest, item.n_tokens) for item in first]
    media.release()  # their embeddings too: now each has to be read after all
    for item, rows in zip(again, expected, strict=True):
        np.testing.assert_array_equal(media.encode(item), rows)


def test_a_file_that_changed_is_read_again(new_media: Callable[[], Media], tmp_path: Path) -> None:
    path = old_file(tmp_path / "shot.png", png(0))
    digests: dict[int, bytes] = {}
    for seed in range(3):
        (item,) = new_media().read(MediaPart("image", png(seed), "image 1"), None)
        digests[seed] = item.digest
    media = new_media()

    def read() -> Any:
        (item,) = media.read(MediaPart("image", path, "image 1"), None)
        return item

    assert read().digest == read().digest == digests[0]
    write_over(path, png(1))
    assert read().digest == digests[1]
    other = old_file(tmp_path / "other.png", png(2))
    other.replace(path)
    assert read().digest == digests[2]
    path.unlink()
    with pytest.raises(FileError, match=r"shot\.png"):
        read()


def test_a_file_that_was_just_written_is_not_trusted(new_media: Callable[[], Media], tmp_path: Path) -> None:
    path = tmp_path / "shot.png"
    path.write_bytes(png())
    part = MediaPart("image", path, "image 1")
    media = new_media()
    for _ in range(2):
        (item,) = media.read(part, None)
        assert item.data is not None


def test_a_file_that_goes_before_its_embeddings_are_needed_is_an_error(
    new_media: Callable[[], Media], tmp_path: Path
) -> None:
    path = old_file(tmp_path / "shot.png", png(0))
    part = MediaPart("image", path, "image 1")
    media = new_media()
    media.read(part, None)
    (item,) = media.read(part, None)
    write_over(path, png(1))
    with pytest.raises(InputError, match=r"shot\.png: was changed while it was used; try again"):
        media.encode(item)
    path.unlink()
    with pytest.raises(FileError, match=r"shot\.png: cannot be read"):
        media.encode(item)


def test_the_options_of_a_part_belong_to_it(new_media: Callable[[], Media], tmp_path: Path) -> None:
    image, audio = png(), wav()
    clip = write_video([grey(i) for i in range(12)])
    media = new_media()

    def read(kind: str, source: Any, branch: Branch = SPEECH, max_crops: Any = None, frames: int | None = None) -> Any:
        return media.read(MediaPart(kind, source, "it", frames=frames), branch, max_crops)

    assert [read("image", image, max_crops=n)[0].n_tokens for n in (1, 2, None, 1, 2)] == [36, 53, 53, 36, 53]
    for wrong in (1.0, True, "1", [1], 0):
        with pytest.raises(UsageError, match="max_crops"):
            read("image", image, max_crops=wrong)
    digests = [read("audio", audio, branch)[0].digest for branch in ("speech", "vision", "speech")]
    assert digests[0] == digests[2] != digests[1]
    assert [len(read("video", clip, frames=n)) for n in (2, 3, 2, 64, 64)] == [2, 3, 2, 12, 12]
    with pytest.raises(InputError, match="no sound"):
        read("audio", image)
    samples, rate = sound(1)
    lengths = [read("audio", (samples, each))[0].n_tokens for each in (rate, rate // 2, rate)]
    assert lengths == [13, 25, 13]
    wide = picture(150, 90)
    tall = wide.reshape(150, 90, 3)  # the same bytes
    assert read("image", wide)[0].digest != read("image", tall)[0].digest


def test_what_cannot_be_told_without_reading_is_read(new_media: Callable[[], Media]) -> None:
    media = new_media()
    image = Image.fromarray(picture(150, 90, 1))
    changed: list[bytes] = []
    for seed in (1, 2):
        image.paste(Image.fromarray(picture(150, 90, seed)))
        (item,) = media.read(MediaPart("image", image, "image 1"), None)
        assert item.data is not None
        changed.append(item.digest)
    assert changed[0] != changed[1]
    array = picture(150, 90, 1)
    for seed in (1, 2):
        array[:] = picture(150, 90, seed)
        (item,) = media.read(MediaPart("image", array, "image 1"), None)
        assert item.digest == changed[seed - 1]


def test_the_oldest_goes_when_there_is_no_room() -> None:
    cache: Latest[str] = Latest(7, len)
    for word in ("one", "two", "one", "four"):
        if cache.get(word) is None:
            cache.put(word, word)
    assert (cache.get("one"), cache.get("two"), cache.get("four")) == ("one", None, "four")
    cache.put("too long", "too long")
    assert (cache.get("too long"), cache.get("four")) == (None, "four")
