"""Short videos whose frames say which they are: frame k is grey of level 4k + 2, or any picture."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from peers import missing_encoder, require

SIZE = (64, 48)


def grey(level: int, size: tuple[int, int] = SIZE) -> Any:
    return np.full((size[1], size[0], 3), 4 * level + 2, np.uint8)


def level_of(image: Image.Image) -> float:
    """Which frame it is; lossy codecs miss it by less than a half."""
    return (float(np.asarray(image).mean()) - 2) / 4


def write_video(
    frames: Sequence[Any],
    container: str = "mp4",
    codec: str = "mpeg4",
    *,
    pixels: str = "yuv420p",
    rate: int = 10,
    times: Sequence[int] | None = None,
    file: Any = None,
    **options: Any,
) -> bytes:
    """Frames uint8 [height, width, 3 or 4], all of one size; times: when they are shown, in 1/rate seconds.

    options: of the encoder; ``matrix`` and ``aspect`` say how the frames are to be shown.
    """
    av = require("av")
    matrix, aspect = options.pop("matrix", None), options.pop("aspect", None)
    file = io.BytesIO() if file is None else file
    with av.open(file, "w", format=container) as output:
        try:
            stream = output.add_stream(codec, rate=rate, options={key: str(value) for key, value in options.items()})
        except av.codec.codec.UnknownCodecError:
            missing_encoder(codec)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        stream.bit_rate = 4_000_000  # enough to tell the levels apart
        if matrix is not None:
            stream.set_display_matrix(matrix)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for packet in _encoded(av, stream, frames, times or range(len(frames)), rate):
            output.mux(packet)
    return bytes(file.getvalue())


def _encoded(av: Any, stream: Any, frames: Sequence[Any], times: Sequence[int], rate: int) -> Iterator[Any]:
    for pixels, time in zip(frames, times, strict=True):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[2] == 4 else "rgb24")
        frame.pts, frame.time_base = time, Fraction(1, rate)
        yield from stream.encode(frame)
    yield from stream.encode(None)
