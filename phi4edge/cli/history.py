"""What was typed in earlier chats: one JSON string per line, in the user's state folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit.history import History

from phi4edge.cli import output


class ChatHistory(History):
    """Reads ``path`` when a chat starts and appends to it; two chats at once may share it.

    A damaged file is kept beside it as ``.bak`` and a new one is started.  Where nothing can be written, the chat goes
    on without saving.
    """

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self._path = path
        self._earlier = _read_or_set_aside(path) if path is not None else []

    def load_history_strings(self) -> Iterable[str]:
        return reversed(self._earlier)  # the newest first, as the base class wants

    def store_string(self, string: str) -> None:
        if self._path is None:
            return
        line = (json.dumps(string) + "\n").encode()
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)  # a chat is private
            try:
                os.write(file, line)  # one write, so that lines of two chats do not mix
            finally:
                os.close(file)
        except OSError as error:
            output.warn(f"{self._path}: {error.strerror}; this chat's lines are not remembered")
            self._path = None


def history_path() -> Path | None:
    """The history file by the XDG rules; ``None`` for a user without a home."""
    state = os.environ.get("XDG_STATE_HOME", "")
    try:
        folder = Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return folder / "phi4edge" / "chat-history"


def _read_or_set_aside(path: Path) -> list[str]:
    try:
        data = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        output.warn(f"{path}: {error.strerror}; going on without earlier lines")
        return []
    try:
        return [_string(line) for line in data.decode().splitlines()]
    except ValueError:
        backup = path.with_name(f"{path.name}.bak")
        try:
            path.replace(backup)
        except OSError as error:
            output.warn(f"{path}: damaged, and cannot be set aside: {error.strerror}")
        else:
            output.warn(f"{path}: damaged; kept as {backup.name}, and a new one was started")
        return []


def _string(line: str) -> str:
    value = json.loads(line)
    if not isinstance(value, str):
        raise ValueError("not a string")
    return value
