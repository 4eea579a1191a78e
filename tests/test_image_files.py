"""Files and arrays to pictures: every kind is that picture; a damaged, huge or other one is one error of ours."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from phi4edge.errors import FileError, InputError
from phi4edge.image_processor import MAX_BYTES, load_image
from processes import ROOT
from test_image_processor import WHITE, Floats, Pixels, noise


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *before: bytes, data: bytes = b"", after: bytes = b"") -> bytes:
    """8 bits of red, green and blue; ``data`` is not compressed yet."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + body + after + chunk(b"IEND", b"")


COLOURS = noise(61, 47, 4)
RGBA = Image.fromarray(COLOURS)
RGB = RGBA.convert("RGB")
OTHER = Image.new("RGB", RGB.size, "red")
PALETTE = RGB.quantize(64)


def on_white(colours: Pixels) -> Floats:
    alpha = colours[:, :, 3:] / 255
    return np.asarray(colours[:, :, :3] * alpha + 255 * (1 - alpha))


def keyed(key: Pixels) -> Floats:
    """The picture with the pixels of one colour replaced by white."""
    return np.where((COLOURS[:, :, :3] == key).all(-1, keepdims=True), WHITE, COLOURS[:, :, :3]).astype(np.float64)


def palette_on_white() -> Floats:
    colours = np.array(PALETTE.getpalette(), np.uint8).reshape(-1, 3)
    alpha = np.full((len(colours), 1), 255, np.uint8)
    alpha[:3, 0] = (0, 100, 200)
    return on_white(np.concatenate([colours, alpha], axis=1)[np.asarray(PALETTE)])


GREY16 = np.random.default_rng(1).integers(0, 65536, (47, 61)).astype(np.uint16)
GREY = np.asarray(RGB.convert("L"))
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()

# What a file is -> the file, and the picture that it must be: what transformers' convert_to_rgb makes of it.
KINDS: dict[str, tuple[bytes, Any]] = {
    "RGB": (saved(RGB, "PNG"), RGB),
    "alpha": (saved(RGBA, "PNG"), on_white(COLOURS)),
    "alpha, WebP": (saved(RGBA, "WEBP", lossless=True, exact=True), on_white(COLOURS)),
    "grey and alpha": (
        saved(RGBA.convert("LA"), "PNG"),
        on_white(np.dstack([GREY, GREY, GREY, COLOURS[:, :, 3]])),
    ),
    "bits": (saved(RGB.convert("1"), "PNG"), RGB.convert("1").convert("RGB")),
    "palette": (saved(PALETTE, "PNG"), PALETTE.convert("RGB")),
    "palette with alpha": (saved(PALETTE, "PNG", transparency=bytes([0, 100, 200])), palette_on_white()),
    "a transparent colour": (
        saved(RGB, "PNG", transparency=tuple(COLOURS[0, 0, :3].tolist())),
        keyed(COLOURS[0, 0, :3]),
    ),
    "16 bits of grey": (saved(Image.fromarray(GREY16), "PNG"), np.dstack([GREY16 >> 8] * 3)),
    "16 bits of grey, TIFF": (saved(Image.fromarray(GREY16), "TIFF"), np.dstack([GREY16 >> 8] * 3)),
    "16 bits, big endian": (saved(Image.fromarray(GREY16.astype(">u2")), "TIFF"), np.dstack([GREY16 >> 8] * 3)),
    "CMYK, TIFF": (saved(RGB.convert("CMYK"), "TIFF"), RGB),
    "JPEG": (saved(RGB, "JPEG"), Image.open(BytesIO(saved(RGB, "JPEG")))),
    "CMYK, JPEG": (
        saved(RGB.convert("CMYK"), "JPEG"),
        Image.open(BytesIO(saved(RGB.convert("CMYK"), "JPEG"))).convert("RGB"),
    ),
    "BMP": (saved(RGB, "BMP"), RGB),
    "TIFF, LZW": (saved(RGB, "TIFF", compression="tiff_lzw"), RGB),
    "the first of many, GIF": (saved(PALETTE, "GIF", save_all=True, append_images=[OTHER]), PALETTE.convert("RGB")),
    "the first of many, PNG": (saved(RGB, "PNG", save_all=True, append_images=[OTHER]), RGB),
    "the first of many, WebP": (saved(RGB, "WEBP", save_all=True, append_images=[OTHER], lossless=True), RGB),
    "the first of many, TIFF": (saved(RGB, "TIFF", save_all=True, append_images=[OTHER]), RGB),
    "the first of many, JPEG": (
        saved(RGB, "MPO", save_all=True, append_images=[OTHER]),
        Image.open(BytesIO(saved(RGB, "JPEG"))),
    ),
    "a colour profile": (saved(RGB, "PNG", icc_profile=PROFILE), RGB),
}


@pytest.mark.parametrize("kind", KINDS)
def test_M3_every_kind_of_picture_is_that_picture(kind: str, tmp_path: Path) -> None:
    data, wanted = KINDS[kind]
    image = load_image(data)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image) - np.asarray(wanted, np.float64)).max() <= 1
    path = tmp_path / "picture of no matter what name.txt"
    path.write_bytes(data)
    for source in (path, str(path), Image.open(BytesIO(data))):
        np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(image))


TURNED: dict[int, Callable[[Pixels], Pixels]] = {  # how the pixels of the file must be turned to be upright
    1: lambda file: file,
    2: lambda file: file[:, ::-1],
    3: lambda file: file[::-1, ::-1],
    4: lambda file: file[::-1],
    5: lambda file: file.swapaxes(0, 1),
    6: lambda file: file.swapaxes(0, 1)[:, ::-1],
    7: lambda file: file[::-1, ::-1].swapaxes(0, 1),
    8: lambda file: file.swapaxes(0, 1)[::-1],
    0: lambda file: file,
    9: lambda file: file,
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNED)
def test_M3_pictures_are_turned_as_their_exif_says(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = np.asarray(load_image(saved(RGB, kind)))
    turned = np.asarray(load_image(saved(RGB, kind, exif=exif)))
    np.testing.assert_array_equal(turned, TURNED[orientation](plain))


def test_M3_wrong_exif_is_no_reason_to_refuse_a_picture() -> None:
    for exif in (b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(40), b"Exif\0\0hello"):
        assert load_image(saved(RGB, "JPEG", exif=exif)).size == RGB.size


def test_M3_arrays_are_pictures() -> None:
    np.testing.assert_array_equal(np.asarray(load_image(COLOURS[:, :, :3])), COLOURS[:, :, :3])
    np.testing.assert_array_equal(np.asarray(load_image(COLOURS[::2, ::-1, :3])), COLOURS[::2, ::-1, :3])
    assert np.abs(np.asarray(load_image(COLOURS)) - on_white(COLOURS)).max() <= 1
    for grey in (GREY, GREY[:, :, np.newaxis]):
        np.testing.assert_array_equal(np.asarray(load_image(grey)), np.dstack([GREY] * 3))


BAD_ARRAYS: dict[str, Any] = {
    "floats": np.full((4, 4, 3), 0.5, np.float32),
    "NaN": np.full((4, 4, 3), np.nan),
    "integers": np.zeros((4, 4, 3), np.int64),
    "objects": np.full((4, 4, 3), None),
    "two channels": np.zeros((4, 4, 2), np.uint8),
    "channels first": np.zeros((3, 40, 40), np.uint8),
    "a batch": np.zeros((1, 4, 4, 3), np.uint8),
    "a row": np.zeros(4, np.uint8),
    "nothing": np.zeros((0, 4, 3), np.uint8),
    "no pixels": Image.new("RGB", (0, 5)),
    "a wide one": np.zeros((1, 33000), np.uint8),
    "floats of Pillow": Image.new("F", (4, 4)),
    "integers of Pillow": Image.new("I", (4, 4)),
    "a number": 7,
    "nothing at all": None,
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_M3_what_is_no_picture_is_refused(case: str) -> None:
    with pytest.raises(InputError, match=r"^image: (is|has) "):
        load_image(BAD_ARRAYS[case])


def test_files_that_cannot_be_read_are_file_errors(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing.png", "pipe", ".", "a\0b", "http://127.0.0.1/a.png"):
        with pytest.raises(FileError):
            load_image(str(tmp_path / name))


def refused(data: bytes, match: str = "") -> None:
    with pytest.raises(InputError, match=f"^image: {match}") as caught:
        load_image(data)
    assert "\n" not in str(caught.value)


def test_M1_what_is_no_picture_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    for data, problem in ((b"", "is empty"), (b"Dear diary", "is not a PNG"), (os.urandom(99), "is ")):
        path.write_bytes(data)
        with pytest.raises(InputError, match=f"notes.png: {problem}") as caught:
            load_image(path)
        assert caught.value.path == str(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_M1_a_file_that_ends_too_early_is_refused(kind: str) -> None:
    data = saved(PALETTE if kind == "GIF" else RGB, kind)
    for length in {*range(64), *range(64, len(data) - 64, 211), len(data) - 64}:
        refused(data[:length])


def test_M1_a_png_is_refused_at_every_cut_chunk_and_wrong_checksum() -> None:
    data = saved(RGB, "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0")
    start = 8
    while start < len(data):
        length = 12 + int.from_bytes(data[start : start + 4], "big")
        name = data[start + 4 : start + 8]
        for cut in (start, start + 4, start + 7, start + length // 2 - 1):
            refused(data[:cut])
        if name != b"IEND":  # what follows the picture is not read
            wrong = bytearray(data)
            wrong[start + length - 1] ^= 1
            refused(bytes(wrong), "is a damaged PNG")
        start += length


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_M1_damaged_files_are_pictures_or_our_error(kind: str) -> None:
    rng = random.Random(kind)
    data = saved(PALETTE if kind == "GIF" else RGB, kind)
    for _ in range(150):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            changed[rng.randrange(min(len(data), rng.choice((40, 200, 10**6))))] = rng.choice((0, 1, 127, 128, 255))
        try:
            assert load_image(bytes(changed)).mode == "RGB"
        except InputError as error:
            assert str(error).startswith("image: ")


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


def gif(screen: int, frame: int) -> bytes:
    header = b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0x80, 0, 0) + bytes(6)
    return header + b"," + struct.pack("<HHHHB", 0, 0, frame, frame, 0) + b"\x02\x02\x4c\x01\0;"


def webp(side: int) -> bytes:
    """An animation whose header says how large it is, with a small frame."""
    picture = saved(Image.new("RGB", (16, 16)), "WEBP", lossless=True)[12:]
    frame = bytes(6) + b"\x0f\0\0" * 2 + b"\x0a\0\0\0" + picture
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + struct.pack("<I", side - 1)[:3] * 2
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6) + b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg(width: int, height: int) -> bytes:
    data = bytearray(saved(RGB, "JPEG"))
    at = data.index(b"\xff\xc0") + 5  # of the start of the frame: height, width
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def tiff(width: int, height: int) -> bytes:
    """One directory; the pixels would follow it."""
    entries = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 200), (277, 3, 1)]
    entries += [(278, 4, height), (279, 4, width * height & 0xFFFFFFFF)]
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + directory + bytes(100)


def one_colour() -> bytes:
    """40,000 x 40,000 pixels of one colour."""
    packer = zlib.compressobj(9)
    start = packer.compress(b"") + packer.flush(zlib.Z_FULL_FLUSH)
    rows = packer.compress(bytes(120_001 * 100)) + packer.flush(
        zlib.Z_FULL_FLUSH
    )  # stands alone, so it may be repeated
    packed = start + rows * 400 + packer.flush()
    return png(40_000, 40_000)[:33] + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


BOMBS: dict[str, Callable[[], bytes]] = {
    "40000x40000 of one colour": one_colour,
    "65535x65535, PNG": lambda: png(65535, 65535),
    "10000x9000, PNG": lambda: png(10000, 9000),  # Pillow would only warn
    "52800x44, PNG": lambda: png(52800, 44, data=bytes((3 * 52800 + 1) * 44)),
    "65535x65535, JPEG": lambda: jpeg(65535, 65535),
    "9000x9000, JPEG": lambda: jpeg(9000, 9000),
    "16383x16383, WebP": lambda: webp(16383),
    "40000x40000, BMP": lambda: bmp(40000, 40000),
    "65535x65535, GIF": lambda: gif(65535, 65535),
    "32767x32767, a frame of GIF": lambda: gif(1, 32767),
    "60000x60000, TIFF": lambda: tiff(60000, 60000),
}


SAMPLES = struct.pack("<HHII", 277, 3, 1, 2048)  # a pixel; Pillow would log it


@pytest.mark.parametrize("case", BOMBS)
def test_M2_a_picture_of_too_many_pixels_is_refused_by_its_header(case: str) -> None:
    refused(BOMBS[case](), "has .*more than")


def test_M2_an_image_of_pillow_is_measured_before_it_is_decoded() -> None:
    with pytest.raises(InputError, match=r"image: has 8300 x 8300 pixels"):
        load_image(Image.open(BytesIO(png(8300, 8300))))


def test_M2_bombs_take_no_memory_and_nothing_is_written_to_stderr(tmp_path: Path) -> None:
    """In a process of its own, whose peak we know."""
    for index, make in enumerate(BOMBS.values()):
        (tmp_path / f"{index}").write_bytes(make())
    (tmp_path / "text").write_bytes(png(1, 1, TEXT_BOMB, data=b"\0abc"))
    (tmp_path / "samples").write_bytes(tiff(10, 10).replace(struct.pack("<HHII", 277, 3, 1, 1), SAMPLES))
    (tmp_path / "ok").write_bytes(saved(RGB, "PNG"))
    code = """
import resource, sys
from pathlib import Path
from phi4edge.errors import InputError
from phi4edge.image_processor import load_image
load_image(sys.argv[1] + "/ok")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in Path(sys.argv[1]).iterdir():
    try:
        load_image(path)
    except InputError:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) < 50 << 10  # KiB
    assert done.stderr == ""


@pytest.mark.parametrize(
    "start",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"SIMPLE  =                    T",
        b"8BPS\0\1" + bytes(60),
        b"%PDF-1.7\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\0\0\1\0\1\0" + bytes(60),
        b"\0\0\0\x18ftypheic\0\0\0\0",
        b"P6 1 1 255 abc",
        b"#define x_width 8\n#define x_height 1\nstatic char x_bits[] = {0};",
    ],
    ids=["EPS", "FITS", "PSD", "PDF", "SVG", "ICO", "HEIC", "PPM", "XBM"],
)
def test_M4_other_formats_are_refused(start: bytes) -> None:
    refused(start, "is not a PNG, JPEG, WebP, BMP, GIF or TIFF picture; save the picture as PNG or JPEG")


TEXT_BOMB = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100 << 20)))


def test_M5_text_that_grows_is_refused_and_of_many_frames_the_first_is_read() -> None:
    refused(png(1, 1, TEXT_BOMB, data=b"\0abc"), "is a damaged PNG")
    refused(png(1, 1, data=b"\0abc", after=TEXT_BOMB), "is a damaged PNG")
    refused(png(1, 1, chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(100 << 20))), data=b"\0abc"), "is a damaged")
    one = gif(1, 1)
    assert load_image(one[:19] + one[19:-1] * 10_000 + b";").size == (1, 1)


def test_M6_a_file_of_too_many_bytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(InputError, match=rf"large.png: has {MAX_BYTES + 1} bytes, more than"):
        load_image(path)


def test_the_warnings_of_the_process_stay_as_they_are(capfd: pytest.CaptureFixture[str]) -> None:
    before = list(warnings.filters)
    load_image(png(1, 1, data=b"\0abc"))
    refused(tiff(100, 100)[:60])
    refused(png(10000, 9000))
    assert warnings.filters == before
    assert capfd.readouterr() == ("", "")
