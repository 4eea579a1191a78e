"""Frames of videos: the right ones of files whose frames are known, upright, and an error for what is no video."""

from __future__ import annotations

import io
import itertools
import os
import struct
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from peers import require
from phi4edge import video_files
from phi4edge.errors import FileError, InputError, Phi4EdgeError, UnsupportedError
from phi4edge.video_files import video_frames
from tiny_videos import SIZE, grey, level_of, write_video

# Container, codec, and options: key frames 20 apart with frames between that are stored in another order, where that is
# possible; then all key frames; then containers where seeking is not exact or not possible.
CLIPS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mp4 with H.264": ("mp4", "libx264", {"g": 20, "bf": 3, "sc_threshold": 0}),
    "quicktime with MPEG-4": ("mov", "mpeg4", {"g": 20, "bf": 2, "sc_threshold": 1000000000}),
    "avi with MPEG-4": ("avi", "mpeg4", {"g": 20, "bf": 2, "sc_threshold": 1000000000}),
    "webm with VP9": ("webm", "libvpx-vp9", {"g": 20}),
    "matroska with FFV1": ("matroska", "ffv1", {"g": 20}),
    "avi without compression": ("avi", "rawvideo", {"pixels": "bgr24"}),
    "avi with JPEG": ("avi", "mjpeg", {"pixels": "yuvj420p"}),
    "mpeg": ("mpeg", "mpeg2video", {"g": 20, "rate": 25, "sc_threshold": 1000000000}),
    "mpeg transport stream": ("mpegts", "libx264", {"g": 20, "sc_threshold": 0}),
    "flv": ("flv", "flv", {"g": 20}),
    "wmv": ("asf", "wmv2", {"g": 20}),
    "gif": ("gif", "gif", {"pixels": "rgb8"}),
    "png": ("apng", "apng", {"pixels": "rgb24"}),
}


def levels(source: Any, n_frames: int, **options: Any) -> list[int]:
    """Which frames are given."""
    return [round(level_of(frame.image)) for frame in video_frames(source, n_frames, **options)]


def middles(n_frames: int, n_wanted: int) -> list[int]:
    """The frames in the middles of ``n_wanted`` equal parts of a video with ``n_frames`` of one duration."""
    return [int((i + 0.5) / n_wanted * n_frames) for i in range(n_wanted)]


@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_spread_evenly_with_seeking_and_without(name: str) -> None:
    container, codec, options = CLIPS[name]
    clip = write_video([grey(k) for k in range(62)], container, codec, **options)
    for n_wanted in (1, 3, 8, 61):
        assert levels(clip, n_wanted) == middles(62, n_wanted)
        sought, linear = (list(video_frames(clip, n_wanted, seek=seek)) for seek in (True, False))
        assert [frame.index for frame in sought] == list(range(n_wanted)) and sought[0].count == n_wanted
        for one, other in zip(sought, linear, strict=True):
            np.testing.assert_array_equal(np.asarray(one.image), np.asarray(other.image))
    for n_wanted in (62, 64):
        assert levels(clip, n_wanted) == list(range(62))


def test_a_long_video_is_decoded_only_near_the_frames_that_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_video([grey(k % 60) for k in range(1200)], codec="libx264", g=30, bf=2, sc_threshold=0)
    monkeypatch.setattr(video_files, "_LEAST_WORK", 0)
    monkeypatch.setattr(video_files, "MAX_WORK", 300 * SIZE[0] * SIZE[1])
    assert levels(clip, 4) == [level % 60 for level in middles(1200, 4)]
    with pytest.raises(InputError, match="video: takes too long to decode"):
        levels(clip, 4, seek=False)


@pytest.mark.parametrize("container, codec", [("mp4", "mpeg4"), ("matroska", "ffv1")])
def test_frames_are_taken_by_time_where_they_last_differently(container: str, codec: str) -> None:
    # 0 to 9 within the first second, 10 for nine seconds, 11 to 20 within the last: 11 seconds.
    times = [*range(10), 10, *range(100, 110)]
    clip = write_video([grey(k) for k in range(21)], container, codec, times=times)
    assert levels(clip, 1) == [10]
    # Every half a second there would be 0 or 5 or 10 ... 11, 16; the one that lasts is taken once.
    expected = sorted({max(k for k, time in enumerate(times) if time <= (i + 0.5) / 20 * 110) for i in range(20)})
    assert levels(clip, 20) == expected and expected.count(10) == 1
    seconds = [frame.seconds for frame in video_frames(clip, 20)]
    np.testing.assert_allclose(seconds, [times[k] / 10 for k in expected], atol=2e-3)


def test_a_video_with_fewer_frames_gives_all_once() -> None:
    frames = list(video_frames(write_video([grey(9), grey(3), grey(20)], times=[0, 1, 90]), 8))
    assert [round(level_of(frame.image)) for frame in frames] == [9, 3, 20]
    assert [frame.count for frame in frames] == [3, 3, 3]
    assert levels(write_video([grey(7)]), 8) == [7]


@pytest.mark.parametrize("duration", [0, 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_durations_in_headers_are_not_believed(duration: int) -> None:
    clip = bytearray(write_video([grey(k) for k in range(40)], codec="libx264", g=10))
    for box, offset in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)):
        struct.pack_into(">I", clip, clip.index(box) + offset, duration)
    clip[clip.index(b"edts") : clip.index(b"edts") + 4] = b"free"  # which has the duration too
    assert levels(bytes(clip), 5) == middles(40, 5)


def test_a_stream_without_duration_or_index_is_read() -> None:
    class Pipe:
        """A file that cannot seek, so that no header is completed."""

        def __init__(self) -> None:
            self.data = bytearray()

        def write(self, data: bytes) -> int:
            self.data += data
            return len(data)

        def getvalue(self) -> bytearray:
            return self.data

    for container, codec in (("webm", "libvpx-vp9"), ("flv", "flv")):
        clip = write_video([grey(k) for k in range(62)], container, codec, g=20, file=Pipe())
        assert levels(clip, 4) == levels(clip, 4, seek=False) == middles(62, 4)


def test_a_file_that_ends_early_is_sampled_as_far_as_it_goes() -> None:
    noise = np.random.default_rng(0).integers(0, 9, (60, SIZE[1], SIZE[0], 3), np.uint8)
    for container, codec in (("matroska", "ffv1"), ("mpegts", "mpeg2video"), ("avi", "mjpeg")):
        pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        clip = write_video([grey(k) + noise[k] for k in range(60)], container, codec, pixels=pixels, rate=25)
        found = [level_of(frame.image) for frame in video_frames(clip[: len(clip) // 2], 4)]
        assert 10 < found[-1] < 32 and np.diff(found).min() > 4


@pytest.mark.parametrize(
    "matrix",
    [*itertools.product((-1, 1), (0,), (0,), (-1, 1)), *itertools.product((0,), (-1, 1), (-1, 1), (0,))],
    ids=str,
)
def test_frames_are_turned_as_the_camera_was_held(matrix: tuple[int, int, int, int]) -> None:
    a, b, c, d = matrix
    height, width = 32, 48
    frame = np.zeros((height, width, 3), np.uint8)
    frame[:16, :24], frame[:16, 24:], frame[16:, :24] = (240, 0, 0), (0, 240, 0), (0, 0, 240)
    clip = write_video(
        [frame], pixels="yuv444p", codec="libx264", matrix=[a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    )
    (found,) = video_frames(clip, 1)
    # By the definition of the matrix: what is at (x, y) is shown at (ax + cy, bx + dy), moved so that all is positive.
    y, x = np.mgrid[:height, :width]
    right, down = a * x + c * y, b * x + d * y
    expected = np.zeros((np.ptp(down) + 1, np.ptp(right) + 1, 3), np.uint8)
    expected[down - down.min(), right - right.min()] = frame
    assert found.image.size == (expected.shape[1], expected.shape[0])
    assert np.abs(np.asarray(found.image).astype(int) - expected).mean() < 10


@pytest.mark.parametrize("aspect, size", [((2, 1), (128, 48)), ((1, 2), (64, 96)), ((1, 1), SIZE), ((255, 1), SIZE)])
def test_pixels_become_square(aspect: tuple[int, int], size: tuple[int, int]) -> None:
    clip = write_video([grey(20)], codec="libx264", aspect=Fraction(*aspect))
    (found,) = video_frames(clip, 1)
    assert found.image.size == size and abs(level_of(found.image) - 20) < 0.5


@pytest.mark.parametrize("pixels", ["gray", "yuv422p", "bgra", "gray16le", "yuv420p10le", "yuv444p12le", "rgb48le"])
def test_all_kinds_of_pixels_become_rgb(pixels: str) -> None:
    # Odd sides, but for more than 8 bits: there the conversion with which the clip is made leaves noise behind rows.
    height, width = (45, 67) if pixels in ("gray", "yuv422p", "bgra") else (48, 64)
    rows = np.linspace(0, 255, height).astype(np.uint8)
    ramp = np.broadcast_to(rows[:, np.newaxis, np.newaxis], (height, width, 3))
    (found,) = video_frames(write_video([np.ascontiguousarray(ramp)], "matroska", "ffv1", pixels=pixels), 1)
    assert (found.image.mode, found.image.size) == ("RGB", (width, height))
    assert np.abs(np.asarray(found.image).astype(int) - ramp).max() <= 4


@pytest.mark.parametrize("name", ["gif", "png"])
def test_animations_are_shown_on_white(name: str) -> None:
    require("av")
    pictures = [Image.new("RGBA", (20, 10), (0, 0, 200, 0)) for k in range(4)]
    for k, picture in enumerate(pictures):
        picture.paste((60 * k, 90, 9, 255), (0, 0, 5, 5))
    file = io.BytesIO()
    pictures[0].save(file, name, save_all=True, append_images=pictures[1:], duration=100)
    found = [frame.image for frame in video_frames(file.getvalue(), 4)]
    assert len(found) == 4
    for picture, image in zip(pictures, found, strict=True):
        expected = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        np.testing.assert_allclose(np.asarray(image, int), np.asarray(expected, int), atol=3)


def test_colours_are_those_of_the_standard_that_the_file_names() -> None:
    av = require("av")
    frame = av.VideoFrame(64, 48, "yuv444p")
    for plane, value in zip(frame.planes, (100, 90, 200), strict=True):
        plane.update(bytes([value]) * plane.buffer_size)
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("ffv1", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1  # BT.709, 16 to 235
        frame.colorspace, frame.color_range = 1, 1
        for packet in (*stream.encode(frame), *stream.encode(None)):
            output.mux(packet)
    (found,) = video_frames(file.getvalue(), 1)
    luma, blue, red = (100 - 16) * 255 / 219, (90 - 128) * 255 / 224, (200 - 128) * 255 / 224  # ITU-R BT.709
    expected = luma + 1.5748 * red, luma - 0.1873 * blue - 0.4681 * red, luma + 1.8556 * blue
    np.testing.assert_allclose(np.asarray(found.image)[20, 20], expected, atol=2)


def sound_with_cover() -> bytes:
    """An m4a whose cover FFmpeg calls a video."""
    av = require("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        sound, cover = output.add_stream("aac", rate=16000), output.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = *SIZE, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 16000
        for packet in (*cover.encode(av.VideoFrame(*SIZE, "yuvj420p")), *cover.encode(None)):
            output.mux(packet)
        for packet in (*sound.encode(samples), *sound.encode(None)):
            output.mux(packet)
    return file.getvalue()


def test_packets_of_other_streams_are_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    av = require("av")
    for container in ("mp4", "matroska", "mpegts"):
        file = io.BytesIO()
        with av.open(file, "w", format=container) as output:
            pictures, sound = output.add_stream("libx264", rate=10), output.add_stream("ac3", rate=48000, layout="mono")
            pictures.width, pictures.height = SIZE
            for packet in (*pictures.encode(av.VideoFrame.from_ndarray(grey(7))), *pictures.encode(None)):
                output.mux(packet)
            for k in range(30):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1536), np.float32), format="fltp", layout="mono")
                silence.sample_rate, silence.pts = 48000, 1536 * k
                output.mux(sound.encode(silence))
            output.mux(sound.encode(None))
        monkeypatch.setattr(video_files, "MAX_OTHER_PACKETS", 100)
        assert levels(file.getvalue(), 2) == [7]
        monkeypatch.setattr(video_files, "MAX_OTHER_PACKETS", 20)
        with pytest.raises(InputError, match="video: has more than 20 packets of sound and other streams"):
            list(video_frames(file.getvalue(), 2))


def test_what_is_no_video_is_one_error(tmp_path: Path) -> None:
    clip = write_video([grey(k) for k in range(10)], codec="libx264")
    still = io.BytesIO()
    Image.new("RGB", SIZE).save(still, "PNG")
    webp = io.BytesIO()
    Image.new("RGB", SIZE).save(webp, "WEBP", save_all=True, append_images=[Image.new("RGB", SIZE, "red")])
    cases = [
        (b"", "is empty"),
        (b"not a video", "starts with b'not a video', which is no video of a kind"),
        (b"#EXTM3U\n/etc/passwd\n", "which is no video of a kind"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "which is no video of a kind"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "is WAV, which is no video of a kind"),
        (webp.getvalue(), "starts with b'RIFF"),
        (still.getvalue(), "is damaged, or no animated PNG with a video"),
        (sound_with_cover(), "is MP4 or QuickTime without any video"),
        (clip[:40], "is damaged, or no MP4|without any video"),
        (write_video([grey(3)], "avi", "asv1"), "has a video in the format asv1, which is not read"),
        (clip[: clip.index(b"mdat")], "damaged|no frames|without"),
    ]
    for data, problem in cases:
        path = tmp_path / "clip"
        path.write_bytes(data)
        for source, start in ((path, f"{path}: video: "), (data, "video: ")):
            with pytest.raises(InputError, match=problem) as caught:
                list(video_frames(source, 4))
            assert str(caught.value).startswith(start) and "\n" not in str(caught.value)


def test_a_video_is_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path, tmp_path / "pipe.mp4", tmp_path / "missing.mp4", "/dev/zero", "a\0"):
        with pytest.raises(FileError) as caught:
            list(video_frames(path, 4))
        assert "\n" not in str(caught.value)
    for source in (None, 3, ["a.mp4"]):
        with pytest.raises(InputError, match="a video cannot come from"):
            list(video_frames(source, 4))  # type: ignore[arg-type]


def test_large_frames_are_refused_before_they_are_decoded() -> None:
    clip = bytearray(write_video([grey(3)], "avi", "mjpeg", pixels="yuvj420p"))
    for at in (clip.index(b"avih") + 40, clip.index(b"strf") + 12):  # width and height
        struct.pack_into("<2i", clip, at, 40_000, 40_000)
    start = clip.index(b"\xff\xc0", clip.index(b"movi"))  # of the JPEG's own header
    struct.pack_into(">2H", clip, start + 5, 40_000, 40_000)
    with pytest.raises(InputError, match="frames without a size, or of more than 67108864 pixels"):
        list(video_frames(bytes(clip), 1))


def test_frames_that_become_large_on_the_way_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    small = write_video([grey(3)] * 3, "mpegts", "mpeg2video", rate=25, g=1)
    large = write_video([grey(3, (640, 480))] * 3, "mpegts", "mpeg2video", rate=25, g=1)
    monkeypatch.setattr(video_files, "MAX_PIXELS", 100 * 100)
    assert levels(small, 2) == [3, 3]
    with pytest.raises(InputError, match="frames without a size, or of more than 10000 pixels"):
        list(video_frames(large, 2))
    with pytest.raises(InputError, match=r"640 x 480 pixels|damaged"):
        list(video_frames(small + large, 6))


def test_too_many_frames_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_files, "MAX_PACKETS", 20)
    with pytest.raises(InputError, match="has more than 20 frames"):
        list(video_frames(write_video([grey(3)] * 21), 2))
    monkeypatch.setattr(video_files, "MAX_BYTES", 100)
    with pytest.raises(InputError, match="has more than"):
        list(video_frames(write_video([grey(3)] * 2), 2))


@pytest.mark.parametrize("name", ["mp4 with H.264", "avi with MPEG-4", "webm with VP9", "mpeg transport stream", "gif"])
def test_damaged_files_give_frames_or_one_error(name: str) -> None:
    container, codec, options = CLIPS[name]
    clip = write_video([grey(k) for k in range(30)], container, codec, **options)
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = np.frombuffer(clip, np.uint8).copy()
        where = rng.integers(0, len(damaged) if rng.random() < 0.5 else 400, rng.integers(1, 12))
        damaged[where] = rng.integers(0, 256, len(where))
        data = damaged.tobytes()[: None if rng.random() < 0.7 else int(rng.integers(1, len(clip)))]
        try:
            found = list(video_frames(data, 4))
        except Phi4EdgeError as error:
            assert str(error).startswith("video: ") and "\n" not in str(error)
        else:
            assert 1 <= len(found) <= 4 and all(frame.image.mode == "RGB" for frame in found)


def test_a_video_needs_the_package_av(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_video([grey(3)])
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        UnsupportedError, match=r"video: a video needs the package 'av'; pip install 'phi4edge\[media\]'"
    ):
        list(video_frames(clip, 1))


def test_ctrl_c_while_reading_is_not_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    noise = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3), np.uint8)
    path.write_bytes(write_video(list(noise), "matroska", "ffv1"))

    for n_bytes in (100, 50_000):  # while it is opened, and later

        class Interrupted(io.FileIO):
            def readinto(self, buffer: Any, after: int = n_bytes) -> int:
                if self.tell() > after:
                    raise KeyboardInterrupt
                return super().readinto(buffer) or 0

        monkeypatch.setattr(video_files, "open_regular", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(video_frames(path, 4))


@pytest.mark.parametrize("n_frames, expected", [(1, [4]), (3, [1, 4, 6]), (8, list(range(8))), (20, list(range(8)))])
def test_arrays_are_videos(n_frames: int, expected: list[int]) -> None:
    array = np.stack([grey(k)[:20, :30] for k in range(8)])
    found = list(video_frames(array, n_frames))
    assert [level_of(frame.image) for frame in found] == expected
    assert {(frame.image.size, frame.count) for frame in found} == {((30, 20), len(expected))}


@pytest.mark.parametrize(
    "shape, kind", [((20, 30, 3), "uint8"), ((0, 20, 30, 3), "uint8"), ((2, 20, 30, 3), "float32")]
)
def test_arrays_that_are_no_video_are_refused(shape: tuple[int, ...], kind: str) -> None:
    with pytest.raises(InputError, match="expected uint8"):
        list(video_frames(np.zeros(shape, kind), 2))
