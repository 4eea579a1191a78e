"""Frames of a video, sampled evenly over its duration, as pictures.

>>> for frame in video_frames("clip.mp4", 8):  # doctest: +SKIP
...     print(frame.index, frame.seconds, frame.image.size)

The sound of a video is not heard; whoever wants it gives the file as a sound too.

Of a video with D seconds, the frames are those that are shown at (i + 1/2) / n * D seconds after its beginning.  The
times come from the packets, which are all read but not decoded: durations in headers are missing or wrong at times, and
frames need not last equally long.  Decoding then goes from key frame to key frame where it can seek, and through
everything where it cannot; the frames are the same.

Files are hostile.  As with sounds, only kinds and codecs on a list reach a decoder, which cannot open other files; that
holds too for the frames that FFmpeg decodes to see what is in a file.  The size, the number and the pixels of what is
decoded are limited, and so is the index that FFmpeg makes of an MP4 file.  A file that ends early is sampled as far as
it goes.  Fields of interlaced frames are not separated, and HDR is not mapped to the range of a screen.
"""

from __future__ import annotations

import io
import itertools
import os
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from phi4edge.container_files import EXTRA, KINDS, START_BYTES, File, Kind, QuietFile, kind_of, open_regular
from phi4edge.errors import FileError, InputError, OutOfMemoryError, Phi4EdgeError, UnsupportedError
from phi4edge.image_processor import MAX_PIXELS, MAX_SIDE, load_image
from phi4edge.media_source import data_of, is_path, path_of
from phi4edge.mp4_boxes import OPTIONS, check_boxes

MAX_BYTES: Final = 8 << 30  # of a file, all of which is read
MAX_PACKETS: Final = 1 << 20  # frames of a video, decoded or not; 4.8 hours at 60 a second
MAX_OTHER_PACKETS: Final = 4 * MAX_PACKETS  # of sounds and all else
MAX_WORK: Final = 1 << 36  # pixels that are decoded for one video: those of 33,000 frames of 1920 x 1080

VideoSource = str | os.PathLike[str] | bytes | npt.NDArray[Any]

_LEAST_WORK: Final = 1 << 14  # pixels; small frames take time too
_WORTH_SEEKING: Final = 16  # frames; after a jump, decoders hold back some before the first comes out
_MOST_STRETCHED: Final = 10.0  # width to height of a pixel, or the other way round; more is nonsense in a header
_CODECS: Final = frozenset(
    (
        *("apng", "av1", "dnxhd", "dvvideo", "ffv1", "ffvhuff", "flv1", "gif", "h263", "h264", "hevc", "huffyuv"),
        *("mjpeg", "mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "png", "prores"),
        *("qtrle", "rawvideo", "theora", "utvideo", "vc1", "vp6f", "vp8", "vp9", "wmv1", "wmv2", "wmv3"),
    )
)
# Those whose decoder, for FFmpeg, has another name than the codec.
_DECODERS: Final = (*sorted(_CODECS), "flv", "libdav1d", "libvpx", "libvpx-vp9", "msmpeg4")
# The signs of a, b, c, d of a display matrix, which shows the pixel at (x, y) at (ax + cy, bx + dy).
_TURNS: Final = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class Frame:
    """One of the chosen frames."""

    image: Image.Image  # RGB, upright, with square pixels
    index: int
    count: int  # how many were chosen
    seconds: float  # since the beginning of the video, when it begins to be shown


@dataclass(frozen=True, slots=True)
class _Timeline:
    """When the frames of a video are shown, in units of the time base of its stream."""

    times: Sequence[int]  # sorted
    end: int
    keys: Sequence[tuple[int, int]]  # of key frames, sorted: when one is shown, and when it is decoded
    unit: Fraction  # seconds

    def chosen(self, n_frames: int) -> list[int]:
        """When the frames that are wanted begin; all if there are no more."""
        if len(self.times) <= n_frames:
            return list(self.times)
        start, span = self.times[0], self.end - self.times[0]
        middles = (start + (2 * i + 1) * span // (2 * n_frames) for i in range(n_frames))
        return sorted({self.times[bisect_right(self.times, middle) - 1] for middle in middles})

    def key_before(self, time: int) -> tuple[int, int] | None:
        index = bisect_right(self.keys, time, key=lambda key: key[0])
        return self.keys[index - 1] if index else None

    def n_between(self, time: int, later: int) -> int:
        return bisect_right(self.times, later) - bisect_right(self.times, time)


def video_frames(source: VideoSource, n_frames: int, *, seek: bool = True) -> Iterator[Frame]:
    """At most ``n_frames`` frames of a video in their order, one at a time.

    There are fewer when the video has fewer, or shows one of them for so long that it would be taken twice.

    source: the path, the bytes or the data URL of an MP4, QuickTime, Matroska, WebM, AVI, WMV, FLV, Ogg or MPEG file,
    or of an animated GIF or PNG; or frames that are shown equally long, uint8 [n, height, width, 1, 3 or 4].
    seek: False decodes everything, which gives the same frames.

    Raises FileError when there is no readable regular file; InputError when it is no video that we take, damaged, or
    too much work; UnsupportedError without the package ``av``; OutOfMemoryError.
    """
    if isinstance(source, np.ndarray):
        yield from _frames_of(source, n_frames)
        return
    path = str(path_of(source)) if not isinstance(source, bytes) and is_path(source) else ""
    try:
        with _opened(source) as file:
            yield from _Video(file, path).frames(n_frames, seek)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"cannot be read: {error.strerror}", path=path) from error
    except MemoryError as error:
        if isinstance(error, OutOfMemoryError):
            raise
        raise OutOfMemoryError("needs more memory than there is", path=path, field="video") from error


def _frames_of(array: npt.NDArray[Any], n_frames: int) -> Iterator[Frame]:
    """One second a frame."""
    if array.ndim != 4 or len(array) == 0:
        problem = f"is {array.dtype} {list(array.shape)}, expected uint8 [n, height, width, 1, 3 or 4]"
        raise InputError(f"{problem:.200}", field="video")
    n_chosen = min(n_frames, len(array))
    for index in range(n_chosen):
        at = (2 * index + 1) * len(array) // (2 * n_chosen)
        yield Frame(load_image(array[at]), index, n_chosen, float(at))


def _opened(source: VideoSource) -> File:
    data = source if isinstance(source, bytes) else data_of(source, "video")
    if data is not None:
        return io.BytesIO(data)
    if isinstance(source, str | os.PathLike):
        return open_regular(path_of(source))
    raise InputError(
        f"a video cannot come from {type(source).__name__}", field="video", hint="give a path, bytes or an array"
    )


class _Video:
    """A video file that is open; reads it twice."""

    def __init__(self, file: File, path: str) -> None:
        self.path = path
        self._kind = self._checked_kind(file)
        try:
            import av
        except ImportError as error:
            raise UnsupportedError("a video needs the package 'av'", path=path, field="video", hint=EXTRA) from error
        self.av: Any = av
        self.file = QuietFile(file)

    def frames(self, n_frames: int, seek: bool) -> Iterator[Frame]:
        try:
            if self._kind.demuxer == "mov":
                check_boxes(self.file, self.path, "video")
            with self.open() as container:
                timeline = self._timeline(container)
            times = timeline.chosen(n_frames)
            with closing(_Decoder(self, timeline, seek)) as decoder:
                for index, time in enumerate(times):
                    picture, seconds = decoder.picture_at(time), float((time - timeline.times[0]) * timeline.unit)
                    yield Frame(picture, index, len(times), seconds)
        except (Phi4EdgeError, MemoryError):
            self.file.raise_failure()  # what was read may be wrong for that
            raise
        except (self.av.FFmpegError, ValueError) as error:
            self.file.raise_failure()
            raise self.refusal(f"is damaged, or no {self._kind.name} with a video", "get the file again") from error

    def refusal(self, problem: str, hint: str = "") -> InputError:
        return InputError(problem, path=self.path, field="video", hint=hint)

    def open(self) -> Any:
        """A container of av."""
        self.file.seek(0)
        # Some frames are decoded to see what the streams are.
        options = OPTIONS | {"codec_whitelist": ",".join(_DECODERS), "max_pixels": str(MAX_PIXELS)}
        return self.av.open(self.file, format=self._kind.demuxer, options=options, metadata_errors="replace")

    def stream_of(self, container: Any) -> Any:
        """The first video, if it can be decoded.  The picture on a cover is none."""
        pictures = self.av.stream.Disposition.attached_pic | self.av.stream.Disposition.timed_thumbnails
        stream = next((stream for stream in container.streams.video if not stream.disposition & pictures), None)
        if stream is None:
            raise self.refusal(f"is {self._kind.name} without any video")
        context = stream.codec_context
        name = None if context is None else context.codec.canonical_name
        if name not in _CODECS:
            raise self.refusal(
                f"has a video in the format {name or 'unknown'}, which is not read", "convert it to MP4 with H.264"
            )
        self.check_size(context.width, context.height)
        context.options = {"max_pixels": str(MAX_PIXELS)}
        return stream

    def check_size(self, width: int, height: int) -> None:
        if width < 1 or height < 1:
            raise self.refusal(f"has frames without a size, or of more than {MAX_PIXELS} pixels")  # FFmpeg hides it
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise self.refusal(
                f"has frames of {width} x {height} pixels, more than {MAX_PIXELS} in all or {MAX_SIDE} along a side",
                "make it smaller",
            )

    def _checked_kind(self, file: File) -> Kind:
        start = file.read(START_BYTES)
        if not start:
            raise self.refusal("is empty")
        if file.seek(0, os.SEEK_END) > MAX_BYTES:
            raise self.refusal(f"has more than {MAX_BYTES >> 30} GiB", "cut out what matters")
        kind = kind_of(start)
        if kind is None or not kind.video:
            names = ", ".join(kind.name for kind in KINDS if kind.video)
            found = f"starts with {start[:16]!r}" if kind is None else f"is {kind.name}"
            raise self.refusal(f"{found}, which is no video of a kind that can be read", f"those are {names}")
        return kind

    def _timeline(self, container: Any) -> _Timeline:
        """From all packets; nothing is decoded."""
        times, durations, keys = array("q"), array("q"), []
        stream = self.stream_of(container)
        for n_packets, packet in enumerate(self.packets(container, stream), start=1):
            if n_packets > MAX_PACKETS:
                raise self.refusal(f"has more than {MAX_PACKETS} frames", "cut out what matters")
            time = _shown_at(packet)
            if time is None:
                continue
            if packet.is_keyframe:
                keys.append((time, time if packet.dts is None else packet.dts))
            if not packet.is_discard:  # cut off by the program that made the file
                times.append(time)
                durations.append(max(packet.duration or 0, 0))
        if not times:
            raise self.refusal("has no frames")
        last = max(range(len(times)), key=times.__getitem__)
        shown = sorted(set(times))
        duration = durations[last] or (shown[-1] - shown[0]) // max(len(shown) - 1, 1)
        return _Timeline(shown, shown[-1] + duration, sorted(keys), stream.time_base or Fraction(0))

    def packets(self, container: Any, stream: Any) -> Iterator[Any]:
        """Those that hold something; where the file is damaged is its end, unless nothing came before."""
        found, n_others = False, 0
        try:
            for packet in container.demux():
                self.file.raise_failure()
                if packet.stream_index != stream.index:
                    n_others += 1
                    if n_others > MAX_OTHER_PACKETS:
                        raise self.refusal(
                            f"has more than {MAX_OTHER_PACKETS} packets of sound and other streams",
                            "cut out what matters",
                        )
                elif packet.size:
                    found = True
                    yield packet
        except self.av.FFmpegError:
            self.file.raise_failure()
            if not found:
                raise
        self.file.raise_failure()


class _Decoder:
    """Goes through a video and stops at the times that are asked for, each later than the one before."""

    def __init__(self, video: _Video, timeline: _Timeline, seek: bool) -> None:
        self._video = video
        self._timeline = timeline
        self._seek = seek
        self._work = 0
        self._container: Any = None
        self._restart()

    def close(self) -> None:
        self._container.close()

    def picture_at(self, time: int) -> Image.Image:
        """RGB, upright, with square pixels.  Raises InputError."""
        skipped = not self._seek or self._skip_to_key_before(time)
        frame = self._forward(time) if skipped else None
        if self._seek and self._shown is None:  # it went too far, or to where nothing can be decoded
            self._seek = False  # never again in this file
            self._restart()
            frame = self._forward(time)
        if frame is None:
            raise self._video.refusal("has frames that cannot be decoded", "get the file again")
        return self._picture(frame)

    def _restart(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container = self._video.open()
        self.stream = self._video.stream_of(self._container)
        self._decode_from(self._video.packets(self._container, self.stream))

    def _decode_from(self, packets: Iterable[Any]) -> None:
        self._frames = self._decoded(packets)
        self._shown: Any = None  # the latest frame that may be the answer
        self._next: Any = None  # the one after it, as far as it was decoded
        self._time = self._timeline.times[0] - 1  # of the latest frame

    def _skip_to_key_before(self, time: int) -> bool:
        """Whether decoding comes to ``time`` from where it is now: ahead, if there is a key frame far enough ahead."""
        key = self._timeline.key_before(time)
        reached = self._time if self._next is None else self._time_of(self._next)
        if key is None or self._timeline.n_between(reached, key[0]) < _WORTH_SEEKING:
            return True
        try:
            self._container.seek(key[1], stream=self.stream, backward=True)
            packets = self._video.packets(self._container, self.stream)
            first = next(packets, None)
        except self._video.av.FFmpegError:
            self._video.file.raise_failure()
            first = None
        shown = None if first is None or not first.is_keyframe else _shown_at(first)
        self._decode_from(packets if first is None else itertools.chain([first], packets))
        return shown is not None and shown <= time

    def _forward(self, time: int) -> Any:
        """The frame that is shown then: the last one that begins by then, or else the first; None for no frame."""
        while True:
            if self._next is None:
                self._next = next(self._frames, None)
            if self._next is None or self._time_of(self._next) > time:
                return self._next if self._shown is None else self._shown
            self._time = self._time_of(self._next)
            self._shown, self._next = self._next, None

    def _time_of(self, frame: Any) -> int:
        time: int | None = frame.dts if frame.pts is None else frame.pts
        return self._time if time is None else time

    def _decoded(self, packets: Iterable[Any]) -> Iterator[Any]:
        """Packets that are damaged are left out, as players do."""
        for packet in itertools.chain(packets, [None]):  # None asks for what the decoder still has
            try:
                frames = self.stream.codec_context.decode(packet)
            except self._video.av.InvalidDataError:
                frames = []
            self._video.file.raise_failure()
            for frame in frames:
                self._video.check_size(frame.width, frame.height)
                self._work += max(frame.width * frame.height, _LEAST_WORK)
                if self._work > MAX_WORK:
                    raise self._video.refusal("takes too long to decode", "make it smaller, or cut out what matters")
                yield frame

    def _picture(self, frame: Any) -> Image.Image:
        if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
            image = load_image(Image.fromarray(frame.to_ndarray(format="rgba")))  # on white
        else:
            image = frame.to_image()
        width, height = _square_pixels(image.width, image.height, self.stream.sample_aspect_ratio)
        if (width, height) != image.size:
            self._video.check_size(width, height)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        turn = _turn_of(frame)
        return image if turn is None else image.transpose(turn)


def _shown_at(packet: Any) -> int | None:
    time: int | None = packet.dts if packet.pts is None else packet.pts
    return time


def _square_pixels(width: int, height: int, aspect: Any) -> tuple[int, int]:
    """The size that a picture has when its pixels, which are ``aspect`` times as wide as high, become square."""
    if not aspect or not 1 / _MOST_STRETCHED <= aspect <= _MOST_STRETCHED:
        return width, height
    return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


def _turn_of(frame: Any) -> Image.Transpose | None:
    """How the camera was held, in steps of 90 degrees; other angles are left as they are."""
    matrix = bytes(frame.side_data.get("DISPLAYMATRIX") or b"")
    if len(matrix) != 36:
        return None
    a, b, _, c, d = (round(number / (1 << 16)) for number in struct.unpack("=9i", matrix)[:5])
    return _TURNS.get((a, b, c, d))
