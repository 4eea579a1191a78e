"""How much FFmpeg would have to remember of an MP4 or QuickTime file, found in its boxes before FFmpeg reads it.

FFmpeg makes a row in memory for each sample, which is a frame of a video or a packet of a sound.  How many there are
is written in the file, and few bytes can name a billion.  The walk here looks into all boxes that FFmpeg looks into,
in the same way: a box of size 0 goes on to the end of its parent, one that is too long ends there, and after one that
is too short nothing more is read.  What it cannot follow, such as a compressed header, is refused.

Rows: one for each sample of a track, and for each part of 1024 of plain sound, where a sample is only a few bytes (48
kHz for eight hours are 1.4 million parts).  Each edit of a track may repeat them all.  A row takes up to 100 bytes.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from phi4edge.container_files import QuietFile
from phi4edge.errors import InputError

MAX_ROWS: Final = 1 << 21  # 4.8 hours with 60 frames and 47 packets of sound a second
MAX_ENTRIES: Final = 1 << 22  # of all tables together; up to 12 bytes each
MAX_BOXES: Final = 1 << 19
MAX_FRAGMENTS: Final = 1 << 17
OPTIONS: Final = {"use_mfra_for": "0"}  # for FFmpeg: the index at the end of a file, which is not looked at here

_MAX_DEPTH: Final = 10  # as in FFmpeg
_MAX_DESCRIPTION: Final = 1 << 20  # bytes of all that a track says about its codec
_LEAST_DESCRIPTION: Final = 86  # bytes, where there are more than one

_CONTAINERS: Final = frozenset(
    (
        *(b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"dinf", b"tref", b"udta", b"ilst", b"sinf", b"schi"),
        *(b"mvex", b"moof", b"traf"),
    )
)
# Tables of a track: name -> bytes of an entry.  Their number of entries is always in the same place.
_TABLES: Final = {b"stts": 8, b"ctts": 8, b"stss": 4, b"stps": 4, b"stsc": 12, b"stco": 4, b"co64": 8}
_SAME: Final = {b"stz2": b"stsz", b"co64": b"stco"}  # two forms of one table
_REFUSED: Final = {b"cmov": "has a compressed header", b"senc": "is encrypted", b"saiz": "is encrypted"}
_OPAQUE: Final = frozenset((b"stsd", b"wave", b"iprp"))  # hold boxes after other things
_DECISIVE: Final = re.compile(b"|".join((*_TABLES, *_REFUSED, b"stsz|stz2|elst|trun|sbgp|sidx|hdlr")))
_PART: Final = 1024  # samples of plain sound in a row
_LARGE_FRAMES: Final = frozenset((b"agsm", b"ms\0\x31", b"Qclp", b"Qclq", b"sqcp"))  # codecs whose rows are shorter:
_FRAME: Final = 160  # samples


def check_boxes(file: QuietFile, path: str, field: str) -> None:
    """InputError when the index of an MP4 or QuickTime file would be too large, or cannot be true."""
    walk = _Walk(file, path, field)
    walk.boxes(0, walk.n_bytes, b"root", 0)
    file.raise_failure()
    walk.check_fragments()
    file.seek(0)


@dataclass(slots=True)
class _Track:
    """What decides how many rows FFmpeg makes."""

    handlers: set[bytes] = field(default_factory=set)  # what it is: soun, vide, ...
    tables: set[bytes] = field(default_factory=set)  # that were seen
    n_samples: int = 0
    n_chunks: int = 0
    samples_per_chunk: int = 0  # in the largest
    duration: int = 0  # of each sample, if it is the same for all
    samples_per_row: int = _PART  # of plain sound
    n_edits: int = 0  # that show something

    @property
    def n_rows(self) -> int:
        n_rows = self.n_samples
        if self.duration == 1 or self.duration >= 1 << 31:  # FFmpeg corrects the latter to 1
            in_parts = self.n_chunks * -(-self.samples_per_chunk // self.samples_per_row)
            certain = self.duration == 1 and self.handlers & {b"soun", b"vide", b"subp", b"clcp"} == {b"soun"}
            n_rows = in_parts if certain else max(in_parts, n_rows)
        return n_rows * max(self.n_edits, 1)


class _Walk:
    """Goes through the boxes of a file and adds up."""

    def __init__(self, file: QuietFile, path: str, field: str) -> None:
        self._file = file
        self._where = {"path": path, "field": field}
        self.n_bytes = file.seek(0, os.SEEK_END)
        self._n_boxes = self._n_rows = self._n_entries = self._n_tracks = self._n_fragments = 0
        self._track: _Track | None = None
        self._targets: set[int] = set()  # where fragments begin, by indices of the file, that were not yet found there

    def boxes(self, at: int, end: int, parent: bytes, depth: int) -> None:
        """All between two positions."""
        if depth > _MAX_DEPTH:
            raise self._refusal("has boxes that are nested too deep")
        while at + 8 <= end:
            self._n_boxes += 1
            if self._n_boxes > MAX_BOXES:
                raise self._refusal(f"has more than {MAX_BOXES} boxes")
            if depth == 0:
                self._targets.discard(at)
            start = self._read(at, 16).ljust(16, b"\0")
            (size, name), body = struct.unpack_from(">I4s", start), at + 8
            if size == 1 and body + 8 <= end:
                size, body = struct.unpack_from(">q", start, 8)[0] - 8, at + 16
            if (name in (b"trak", b"mdat") and parent not in (b"root", b"moov")) or 0 < size < 8 or size < 0:
                return
            stop = end if size == 0 else min(body + size - 8, end)
            if name in (b"free", b"hoov") and start[12:16] in (b"mvhd", b"cmov"):
                name = b"moov"  # FFmpeg looks there when it finds no other
            self._box(name, body, stop, depth)
            at = stop

    def check_fragments(self) -> None:
        if any(target < self.n_bytes for target in self._targets):  # FFmpeg would read on there, unseen by this walk
            raise self._refusal("has an index that points between its boxes")
        if self._n_fragments * self._n_tracks > 8 * MAX_FRAGMENTS:
            raise self._refusal("has too many fragments and tracks")

    def _box(self, name: bytes, body: int, stop: int, depth: int) -> None:
        if name in _REFUSED:
            raise self._refusal(_REFUSED[name], "convert it to an MP4 without that")
        if name == b"trak":
            self._track = track = _Track()
            self._n_tracks += 1
            self.boxes(body, stop, name, depth + 1)
            self._track = None
            self._add_rows(track.n_rows)
        elif name in _CONTAINERS:
            self._add_fragments(name == b"moof")
            self.boxes(body, stop, name, depth + 1)
        elif name == b"meta":
            self._meta(body, stop, depth)
        elif name == b"iref":
            self._check_fit(name, 1, 4, stop - body)  # FFmpeg would go on to the end of the file
            self.boxes(body + 4, stop, name, depth + 1)
        elif name in _OPAQUE:
            self._opaque(name, body, stop)
        elif name == b"trun":
            self._run(body, stop)
        elif name == b"sidx":
            self._index(body, stop)
        elif name == b"sbgp":
            version = self._read(body, 1)
            self._sum(name, self._table(name, body + (12 if version == b"\1" else 8), stop, 8))
        elif name in _TABLES or name in (b"stsz", b"stz2", b"elst"):
            self._table_of_track(name, body, stop)
        elif name == b"hdlr" and self._track is not None:
            self._track.handlers.add(self._read(body + 8, 4))

    def _table_of_track(self, name: bytes, body: int, stop: int) -> None:
        track, key = self._track, _SAME.get(name, name)
        if track is None:
            raise self._refusal(f"has a table '{name.decode()}' outside of a track")
        if key in track.tables:
            raise self._refusal(f"has a track with two tables '{key.decode()}'")
        track.tables.add(key)
        if key == b"stsz":
            track.n_samples = self._sizes(name, body, stop)
        elif key == b"elst":
            track.n_edits = self._edits(body, stop)
        else:
            entries = self._table(name, body + 4, stop, _TABLES[name])
            if key == b"stco":
                track.n_chunks = entries.size // (_TABLES[name] // 4)
            elif key == b"stsc":
                track.samples_per_chunk = int(entries[1::3].max(initial=1))
            elif key == b"stts" and len(entries) == 2:
                track.duration = int(entries[1])
            elif key == b"ctts":
                self._sum(name, entries)

    def _table(self, name: bytes, at: int, stop: int, n_entry_bytes: int) -> Any:
        """The numbers of a table, uint32, after their count at ``at``."""
        count = self._number(at)
        self._check_fit(name, count, n_entry_bytes, stop - at - 4)
        return np.frombuffer(self._read(at + 4, count * n_entry_bytes).ljust(count * n_entry_bytes, b"\0"), ">u4")

    def _check_fit(self, name: bytes, count: int, n_entry_bytes: float, n_bytes: int) -> None:
        if count * n_entry_bytes > n_bytes:
            raise self._refusal(f"has a table '{name.decode()}' of {count} entries in {max(n_bytes, 0)} bytes")
        self._n_entries += count
        if self._n_entries > MAX_ENTRIES:
            raise self._refusal(f"has tables with more than {MAX_ENTRIES} entries", "cut out what matters")

    def _sum(self, name: bytes, entries: Any) -> None:
        """Checks the counts in a table of (count, value), which FFmpeg may write out one by one."""
        if int(entries[::2].sum(dtype=np.uint64)) > MAX_ROWS:
            raise self._refusal(f"has a table '{name.decode()}' for more than {MAX_ROWS} samples")

    def _sizes(self, name: bytes, body: int, stop: int) -> int:
        """The number of samples of a track; one size for all needs no entries."""
        size, count = self._number(body + 4), self._number(body + 8)
        if name == b"stz2":
            self._check_fit(name, count, (size & 0xFF) / 8, stop - body - 12)
        elif size == 0:
            self._check_fit(name, count, 4, stop - body - 12)
        return count

    def _edits(self, body: int, stop: int) -> int:
        """The edits of a track; when the first is a pause before it begins, that is none."""
        long = self._read(body, 1) == b"\1"
        count = max(stop - body - 8, 0) // (20 if long else 12)
        self._check_fit(b"elst", count, 0, 0)
        time = self._read(body + (16 if long else 12), 8 if long else 4)
        return count - (set(time) == {255})

    def _run(self, body: int, stop: int) -> None:
        """Samples of a fragment; those that are all alike need no entries."""
        flags, count = self._number(body), self._number(body + 4)
        n_optional = bin(flags & 5).count("1")
        n_entry_bytes = 4 * bin(flags & 0xF00).count("1")
        self._check_fit(b"trun", count, n_entry_bytes, stop - body - 8 - 4 * n_optional)
        self._add_rows(count)

    def _index(self, body: int, stop: int) -> None:
        """Of fragments: FFmpeg goes to where it points."""
        long = self._read(body, 1) != b"\0"
        first = int.from_bytes(self._read(body + (20 if long else 16), 8 if long else 4), "big")
        at = body + (28 if long else 20)
        count = self._number(at) & 0xFFFF
        self._check_fit(b"sidx", count, 12, stop - at - 4)
        self._add_fragments(count)
        sizes = np.frombuffer(self._read(at + 4, 12 * count).ljust(12 * count, b"\0"), ">u4")[::3]
        for size in sizes.tolist():
            self._targets.add(stop + first)
            first += size

    def _add_fragments(self, count: int) -> None:
        self._n_fragments += count
        if self._n_fragments > MAX_FRAGMENTS:
            raise self._refusal(f"has more than {MAX_FRAGMENTS} fragments", "cut out what matters")

    def _meta(self, body: int, stop: int, depth: int) -> None:
        """Its boxes begin with 'hdlr', which FFmpeg looks for at every fourth byte."""
        for at in range(body, stop, 1 << 16):
            data = self._read(at, min(stop - at, 1 << 16))
            found = next((match.start() for match in re.finditer(b"hdlr", data) if match.start() % 4 == 0), None)
            if found is not None:
                self.boxes(at + found - 4, stop, b"meta", depth + 1)
                return

    def _opaque(self, name: bytes, body: int, stop: int) -> None:
        if stop - body > _MAX_DESCRIPTION:
            raise self._refusal(f"has a box '{name.decode()}' of {stop - body} bytes")
        data = self._read(body, stop - body)
        hidden = _DECISIVE.search(data)
        if hidden is not None:
            raise self._refusal(f"has a box '{hidden[0].decode()}' within '{name.decode()}'")
        if name == b"stsd" and self._track is not None:
            self._check_descriptions(data, is_sound=self._track.handlers == {b"soun"})
            self._track.samples_per_row = _samples_per_row(data)

    def _check_descriptions(self, data: bytes, is_sound: bool) -> None:
        """FFmpeg would follow one that is too long to beyond the box, and might lose its place after one too short."""
        n_descriptions, at = int.from_bytes(data[4:8], "big"), 8
        for _ in range(min(n_descriptions, len(data))):
            size = int.from_bytes(data[at : at + 4], "big")
            has_palette = not is_sound and 0 < data[min(at + 83, len(data) - 1)] & 0x1F <= 8
            alone = n_descriptions == 1 or (size >= _LEAST_DESCRIPTION and not has_palette)
            if size < 8 or at + size > len(data) or not alone:
                raise self._refusal("has a description of a codec of the wrong size")
            at += size

    def _add_rows(self, count: int) -> None:
        self._n_rows += count
        if self._n_rows > self.n_bytes:
            raise self._refusal(f"has {self.n_bytes} bytes, and {self._n_rows} samples by its header")
        if self._n_rows > MAX_ROWS:
            raise self._refusal(
                f"has {self._n_rows} samples by its header, more than {MAX_ROWS}", "cut out what matters"
            )

    def _number(self, at: int) -> int:
        """Of 32 bits.  Like FFmpeg, this does not care where the box ends."""
        return int.from_bytes(self._read(at, 4).ljust(4, b"\0"), "big")

    def _read(self, at: int, n_bytes: int) -> bytes:
        self._file.seek(at)
        return self._file.read(max(n_bytes, 0))

    def _refusal(self, problem: str, hint: str = "") -> InputError:
        return InputError(problem, hint=hint, **self._where)


def _samples_per_row(description: bytes) -> int:
    """Of plain sound, from its sample description: FFmpeg puts whole frames of the codec in a row."""
    count, _, codec = struct.unpack_from(">4xII4s", description + bytes(16))
    version = int.from_bytes(description[24:26], "big")
    if count != 1 or codec in _LARGE_FRAMES:
        return _FRAME
    at = {1: 44, 2: 76}.get(version, len(description))
    n_frame = int.from_bytes(description[at : at + 4], "big")
    if n_frame >= _FRAME or n_frame < 2:
        return n_frame if n_frame >= _FRAME else _PART
    return _PART // n_frame * n_frame
