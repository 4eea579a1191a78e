"""Headers of MP4 and QuickTime files: what FFmpeg has to remember is known before, and bombs are refused.

The oracle for true files is the index that FFmpeg made.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peers import require
from phi4edge import mp4_boxes
from phi4edge.audio_files import load_audio
from phi4edge.container_files import QuietFile, open_regular
from phi4edge.errors import InputError
from phi4edge.mp4_boxes import check_boxes
from phi4edge.video_files import video_frames
from tiny_videos import grey, write_video


def box(name: str, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), name.encode("latin-1")) + body


def table(name: str, *numbers: int, count: int | None = None) -> bytes:
    """A box with version and flags, a count, and numbers of 32 bits."""
    return box(name, struct.pack(f">{len(numbers) + 2}I", 0, len(numbers) if count is None else count, *numbers))


def sizes(size: int, count: int) -> bytes:
    return box("stsz", struct.pack(">3I", 0, size, count))


def track(*tables: bytes, kind: bytes = b"vide", edits: bytes = b"", entry: bytes = b"") -> bytes:
    """Without the codec; ``entry`` is its description."""
    handler = box("hdlr", bytes(8), kind, bytes(12))
    described = [box("stsd", struct.pack(">2I", 0, 1), entry)] if entry else []
    return box("trak", edits, box("mdia", handler, box("minf", box("stbl", *described, *tables))))


def movie(*boxes: bytes, n_bytes: int = 0) -> bytes:
    """A file of at least so many bytes."""
    header = box("ftyp", b"isom", bytes(4)) + box("moov", *boxes)
    return header + box("mdat", bytes(max(n_bytes - len(header) - 8, 0)))


def check(data: bytes) -> None:
    check_boxes(QuietFile(io.BytesIO(data)), "a.mp4", "video")


def refused(data: bytes, problem: str) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        check(data)
    assert str(caught.value).startswith("a.mp4: video: ") and "\n" not in str(caught.value)


def n_rows(data: bytes) -> int:
    """The smallest limit under which a file is taken."""
    low, high = 0, 1 << 20
    with pytest.MonkeyPatch.context() as patch:
        while low < high:
            patch.setattr(mp4_boxes, "MAX_ROWS", middle := (low + high) // 2)
            try:
                check(data)
            except InputError:
                low = middle + 1
            else:
                high = middle
    return low


def with_sound(container: str, video: str, sound: str, **options: str) -> bytes:
    """Four seconds; the sound is plain or compressed."""
    av = require("av")
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options) as output:
        pictures, samples = output.add_stream(video, rate=10), output.add_stream(sound, rate=16000, layout="mono")
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        samples.codec_context.open()
        to_codec = av.AudioResampler(samples.format, "mono", 16000, frame_size=samples.frame_size or 1600)
        wave = np.random.default_rng(0).uniform(-0.3, 0.3, (1, 16000)).astype(np.float32)
        for second in range(4):
            for k in range(10):
                frame = av.VideoFrame.from_ndarray(grey(10 * second + k), format="rgb24")
                output.mux(pictures.encode(frame))
            block = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            block.sample_rate, block.pts = 16000, 16000 * second
            for part in to_codec.resample(block):
                output.mux(samples.encode(part))
        for part in to_codec.resample(None):
            output.mux(samples.encode(part))
        output.mux(pictures.encode(None))
        output.mux(samples.encode(None))
    return file.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "one track": lambda: write_video([grey(k) for k in range(40)]),
    "frames in another order": lambda: write_video([grey(k) for k in range(62)], codec="libx264", bf=3, g=20),
    "with a sound": lambda: with_sound("mp4", "libx264", "aac"),
    "with plain sound": lambda: with_sound("mov", "mpeg4", "pcm_s16le"),
    "frames of one size": lambda: write_video([grey(k) for k in range(9)], "mov", "rawvideo", pixels="rgb24"),
    "fragments": lambda: with_sound("mp4", "libx264", "aac", movflags="empty_moov", frag_duration="500000"),
    "many fragments": lambda: with_sound("mp4", "mpeg4", "aac", movflags="frag_every_frame+empty_moov"),
    "fragments with an index": lambda: with_sound(
        "mp4", "mpeg4", "aac", movflags="dash+empty_moov", frag_duration="500000"
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_rows_are_those_of_the_index_that_ffmpeg_makes(name: str) -> None:
    av = require("av")
    data = FILES[name]()
    with av.open(io.BytesIO(data)) as container:
        for _ in container.demux():
            pass
        expected = sum(len(stream.index_entries) for stream in container.streams)
    assert expected >= 9
    assert n_rows(data) == expected
    assert (b"sidx" in data) == ("index" in name) and (b"trun" in data) == ("fragments" in name)


def test_headers_of_true_files_are_read_as_before() -> None:
    for name in ("with a sound", "with plain sound", "fragments", "many fragments", "fragments with an index"):
        data = FILES[name]()
        assert [frame.index for frame in video_frames(data, 4)] == [0, 1, 2, 3]
        assert 4 * 16000 <= len(load_audio(data)) <= 4 * 16000 + 3 * 1024


def test_plain_sound_of_eight_hours_is_no_bomb(tmp_path: Path) -> None:
    n_seconds, rate = 8 * 3600, 48000
    n_chunks = 2 * n_seconds
    offsets = struct.pack(f">{n_chunks}I", *range(n_chunks))
    sound = track(
        table("stts", n_seconds * rate, 1, count=1),
        table("stsc", 1, rate // 2, 1, count=1),
        sizes(2, n_seconds * rate),
        box("stco", struct.pack(">2I", 0, n_chunks), offsets),
        kind=b"soun",
        entry=box("sowt", bytes(28)),
    )
    path = tmp_path / "long.mov"
    path.write_bytes(movie(sound)[:-8])
    os.truncate(path, 2 * n_seconds * rate)
    with open_regular(path) as file:
        check_boxes(QuietFile(file), str(path), "sound")
    refused(movie(sound.replace(b"soun", b"vide"), n_bytes=1 << 20), "has 1048576 bytes, and 1382400000 samples")


def clip_with(size: int, count: int) -> bytes:
    """A video of two frames that says that it has more."""
    clip = bytearray(write_video([grey(3), grey(4)]))
    for name, at, numbers in (("stsz", 8, (size, count)), ("stsc", 12, (1, count, 1)), ("stts", 12, (count, 1))):
        struct.pack_into(f">{len(numbers)}I", clip, clip.index(name.encode()) + at, *numbers)
    return bytes(clip)


def test_M8_a_billion_samples_in_a_kilobyte_are_refused() -> None:
    for count in (3_000_000, 0xFFFFFFFF):
        bomb = clip_with(1, count)
        assert len(bomb) < 1000
        for read in (lambda data: list(video_frames(data, 2)), load_audio):
            with pytest.raises(InputError, match=f"has {len(bomb)} bytes, and {count} samples by its header"):
                read(bomb)


def nested(depth: int) -> bytes:
    return box("udta", nested(depth - 1)) if depth else b""


PLAIN = (table("stts", 9, 1, count=1), table("stsc", 1, 9, 1, count=1), sizes(1, 9), table("stco", 0))
SOUND = box("sowt", bytes(28))
EDITS = table("elst", *[9, 0, 1 << 16] * 4000)
RUN = box("trun", struct.pack(">2I", 0, 3_000_000))
LONG = 4 << 20  # bytes
BOMBS: dict[str, tuple[bytes, str]] = {
    "samples": (movie(track(*PLAIN[:2], sizes(1, 1 << 22)), n_bytes=LONG + 1), "4194304 samples by its header, more"),
    "tracks": (movie(*[track(*PLAIN[:2], sizes(1, 1 << 20))] * 3, n_bytes=LONG), "3145728 samples by its header, more"),
    "edits": (
        movie(track(*PLAIN[:2], sizes(1, 1000), edits=box("edts", EDITS)), n_bytes=LONG),
        "4000000 samples by its header, more",
    ),
    "chunks": (
        movie(track(PLAIN[0], table("stsc", 1, 1 << 31, 1, count=1), *PLAIN[2:], kind=b"soun", entry=SOUND)),
        "2097152 samples by its header",
    ),
    "chunks of an unknown kind": (
        movie(track(PLAIN[0], table("stsc", 1, 1 << 31, 1, count=1), *PLAIN[2:], kind=b"none", entry=SOUND)),
        "2097152 samples by its header",
    ),
    "fragment": (movie() + box("moof", box("traf", RUN)), "and 3000000 samples by its header"),
    "fragment after a free box": (movie() + box("free", bytes(99)) + box("moof", box("traf", RUN)), "3000000 samples"),
    "sizes": (movie(track(*PLAIN[:2], sizes(0, 9))), "a table 'stsz' of 9 entries in 0 bytes"),
    "key frames": (movie(track(table("stss", 1, count=1 << 30))), "a table 'stss' of 1073741824 entries in 4 bytes"),
    "times": (movie(track(table("ctts", 1 << 31, 1, count=1))), "a table 'ctts' for more than 2097152 samples"),
    "groups": (movie(track(box("sbgp", b"\0\0\0\0sync", struct.pack(">3I", 1, 1 << 31, 1)))), "'sbgp' for more than"),
    "two tables": (movie(track(*PLAIN, sizes(1, 9))), "two tables 'stsz'"),
    "elsewhere": (movie(track(*PLAIN), sizes(1, 1 << 30)), "a table 'stsz' outside of a track"),
    "in a description": (
        movie(track(*PLAIN, entry=box("mp4v", bytes(78), box("wave", sizes(1, 1 << 30))))),
        "a box 'stsz' within 'stsd'",
    ),
    "a long description": (
        movie(track(*PLAIN, entry=struct.pack(">I", 999) + b"mp4v" + bytes(78))),
        "description of a codec of the wrong size",
    ),
    "a compressed header": (movie(box("cmov", bytes(99))), "has a compressed header"),
    "a compressed header in a free box": (box("ftyp") + box("free", box("cmov", bytes(99))), "a compressed header"),
    "encrypted": (movie(track(*PLAIN, box("senc", bytes(8)))), "is encrypted"),
    "nested": (movie(nested(10)), "nested too deep"),
    "a header at the end of a parent": (
        movie(box("trak", b"\0\0\0\0mdia" + b"\0\0\0\0minf" + sizes(1, 1 << 30))),
        "and 1073741824 samples by its header",
    ),
    "a header of 64 bits": (
        b"\0\0\0\1moov" + struct.pack(">Q", 500) + track(*PLAIN[:2], sizes(1, 1 << 30)),
        "and 1073741824 samples by its header",
    ),
    "metadata": (movie(box("meta", bytes(4), box("hdlr", bytes(24)), sizes(1, 9))), "outside of a track"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_M8_headers_that_would_take_much_memory_are_refused(case: str) -> None:
    data, problem = BOMBS[case]
    assert len(data) < 2 * LONG
    check(movie(track(*PLAIN)))
    refused(data, problem)


def test_M8_an_index_leads_only_to_boxes() -> None:
    def index(first: int, *lengths: int) -> bytes:
        references = [number for length in lengths for number in (length, 1, 0)]
        head = struct.pack(">5I2H", 0, 1, 1000, 0, first, 0, len(lengths))
        return box("sidx", head, struct.pack(f">{len(references)}I", *references))

    fragment = box("moof", box("mfhd", bytes(8))) + box("mdat", box("moof", box("traf", RUN)))
    check(movie() + index(0, len(fragment), len(fragment)) + 2 * fragment)
    check(movie() + index(0, len(fragment), len(fragment)) + fragment)  # the file ends early
    refused(movie() + index(32, len(fragment)) + fragment, "an index that points between its boxes")
    refused(movie() + index(0, 32, 9) + fragment, "an index that points between its boxes")


def test_M8_boxes_and_fragments_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = movie(track(*PLAIN)) + box("moof") * 30
    check(boxes)
    monkeypatch.setattr(mp4_boxes, "MAX_FRAGMENTS", 29)
    refused(boxes, "more than 29 fragments")
    monkeypatch.setattr(mp4_boxes, "MAX_FRAGMENTS", 30)
    refused(movie(*[track(*PLAIN)] * 9) + box("moof") * 30, "too many fragments and tracks")
    monkeypatch.setattr(mp4_boxes, "MAX_BOXES", 30)
    refused(boxes, "more than 30 boxes")


def test_a_header_that_is_cut_is_left_to_ffmpeg() -> None:
    clip = FILES["with a sound"]()
    start = clip.index(b"moov") - 4
    for end in range(start, len(clip), 7):
        try:
            check(clip[:end])
        except InputError as error:
            assert "samples" in str(error) or "table" in str(error) or "description" in str(error)


def test_ctrl_c_while_boxes_are_read_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            if self.tell() > 100:
                raise KeyboardInterrupt
            return super().readinto(buffer)

    with pytest.raises(KeyboardInterrupt):
        check_boxes(QuietFile(Interrupted(clip_with(1, 2))), "", "video")
