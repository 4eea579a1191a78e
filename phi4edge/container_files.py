"""Files with sounds and videos: the kinds that may be decoded, and a file for decoders written in C.

>>> kind_of(b"RIFF....WAVEfmt ").name
'WAV'
"""

from __future__ import annotations

import io
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4edge.errors import FileError

START_BYTES = 192  # of a file, to see what it is
EXTRA = "pip install 'phi4edge[media]'"  # brings the package ``av``

File = io.FileIO | io.BytesIO
_STRETCH = 64  # more than the largest MP3 frame is larger than the smallest


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of file that may be decoded."""

    name: str
    start: bytes  # a regular expression for its first bytes
    demuxer: str  # of FFmpeg; naming it keeps FFmpeg from guessing, and so from playlists that name other files
    sound: bool = True  # whether it may have a sound
    video: bool = False  # whether it may have a video
    libsndfile: bool = False  # whether libsndfile is tried first


KINDS = (
    Kind("WAV", rb"(RIFF|RIFX|RF64)....WAVE", "wav", libsndfile=True),
    Kind("W64", rb"riff\x2e\x91\xcf\x11", "w64", libsndfile=True),
    Kind("FLAC", rb"fLaC", "flac", libsndfile=True),
    Kind("Ogg", rb"OggS", "ogg", video=True, libsndfile=True),
    Kind("MP3", rb"ID3|\xff[\xe2-\xe5\xf2-\xf5\xfa-\xfd]", "mp3", libsndfile=True),
    Kind("AIFF", rb"FORM....AIF[FC]", "aiff", libsndfile=True),
    Kind("AU", rb"\.snd|dns\.", "au", libsndfile=True),
    Kind("CAF", rb"caff", "caf", libsndfile=True),
    Kind("NIST SPHERE", rb"NIST_1A", "nistspeech", libsndfile=True),
    Kind("MP4 or QuickTime", rb"....(ftyp|moov|mdat|wide|pnot)", "mov", video=True),
    Kind("Matroska or WebM", rb"\x1aE\xdf\xa3", "matroska", video=True),
    Kind("AAC", rb"\xff[\xf0\xf1\xf8\xf9]", "aac"),
    Kind("AMR", rb"#!AMR", "amr"),
    Kind("WMA or WMV", rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf", video=True),
    Kind("AVI", rb"RIFF....AVI ", "avi", video=True),
    Kind("FLV", rb"FLV\x01", "flv", video=True),
    Kind("MPEG", rb"\0\0\x01\xba", "mpeg", video=True),
    Kind("GIF", rb"GIF8[79]a", "gif", sound=False, video=True),
    Kind("animated PNG", rb"\x89PNG\r\n\x1a\n", "apng", sound=False, video=True),
    Kind("MPEG-TS", rb"G.{187}G", "mpegts", video=True),  # after GIF, which may begin so too
)


def kind_of(start: bytes) -> Kind | None:
    """Of a file that starts so, with START_BYTES bytes if there are as many; None for what is on no list."""
    return next((kind for kind in KINDS if re.match(kind.start, start, re.DOTALL)), None)


def open_regular(path: Path) -> io.FileIO:
    """A pipe or a device would block us, or never end, and is refused.  Raises FileError."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        file = os.fdopen(os.open(path, flags), "rb", buffering=0)  # others read from the same descriptor
    except (OSError, ValueError) as error:  # ValueError: the path has a NUL
        raise FileError(f"cannot be read: {getattr(error, 'strerror', None) or error}", path=str(path)) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise FileError("is not a regular file", path=str(path))
    return file


class QuietFile:
    """A file for libsndfile and FFmpeg: errors, Ctrl-C too, wait for us, as nothing can be raised through C code.

    stretched: pretends to be much longer.  For MP3 without a count of frames, libmpg123 guesses the length from the
    sizes of the file and of the first frame, and libsndfile stops there: a file that starts loud would lose its end.
    """

    def __init__(self, file: File, *, stretched: bool = False) -> None:
        self._file = file
        self._n_bytes = file.seek(0, os.SEEK_END)
        self._n_pretended = self._n_bytes * (_STRETCH if stretched else 1)
        self._position = 0
        self._failure: BaseException | None = None
        self.stretched = stretched

    @property
    def at_end(self) -> bool:
        return self._position >= self._n_bytes

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_CUR: self._position, os.SEEK_END: self._n_pretended}.get(whence, 0)
        self._position = min(max(0, base + offset), self._n_pretended)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, n_bytes: int) -> bytes:
        data = bytearray(min(n_bytes, self._n_bytes))
        return bytes(data[: self.readinto(data)])

    def readinto(self, buffer: Any) -> int:
        try:
            if self.stretched and self._position >= self._n_pretended - 128:  # libmpg123 looks for a tag at the end
                n_read = min(len(buffer), self._n_pretended - self._position)
                buffer[:n_read] = bytes(n_read)
            else:
                self._file.seek(self._position)
                n_read = self._file.readinto(buffer)
        except BaseException as failure:
            self._failure = failure
            return 0
        self._position += n_read
        return n_read
