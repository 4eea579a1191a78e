"""What goes with a message of a chat: images, sounds and videos that stay as they were when they were attached."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4edge.errors import BundleError
from phi4edge.media_source import FileState, file_state
from phi4edge.strict_json import read_bytes

HELD_BYTES = 64 << 20  # of a file that is kept in memory; no image may have more


@dataclass(frozen=True, slots=True, eq=False)
class Attached:
    """One image, sound or video.  Each is equal to itself alone."""

    kind: str
    source: Any  # what a part of a message takes
    name: str  # for people: the path, or which recording it is
    state: FileState | None = None  # of a file that is too large to be kept

    @property
    def part(self) -> dict[str, Any]:
        """Of a message."""
        return {"type": self.kind, self.kind: self.source}

    @property
    def short_name(self) -> str:
        return Path(self.name).name

    @property
    def is_there(self) -> bool:
        """Whether it is still what was attached."""
        return self.state is None or file_state(self.source) == self.state


def attached_file(kind: str, path: str) -> Attached:
    """A file as it is now: its bytes, unless there are too many to keep.  Raises FileError."""
    file = Path(path)
    try:
        return Attached(kind, read_bytes(file, at_most=HELD_BYTES), str(file))
    except BundleError:  # it is larger
        return Attached(kind, file, str(file), file_state(file))
