"""The command line in processes of its own, on pipes and on terminals."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import phi4edge
from tiny_models import tiny_gguf

ROOT = Path(phi4edge.__file__).parent.parent  # the package that the tests import, wherever that is
COMMAND = [sys.executable, "-m", "phi4edge"]
DEADLINE = 60.0  # seconds; a test that waits this long has failed
ENDLESSLY = ("--context", "150000", "--max-tokens", "140000")


def endless_gguf(directory: Path) -> str:
    """A model that writes for minutes, with :data:`ENDLESSLY`."""
    return str(tiny_gguf(directory, context=200_000, layers=6))


def run(*arguments: str, text: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; ``text`` is its standard input, ``env`` is added to the environment."""
    options["env"] = os.environ | options.get("env", {})
    return subprocess.run(
        [*COMMAND, *arguments], input=text, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE, **options
    )


def is_one_error_line(text: str) -> bool:
    return text.count("\n") == 1 and text.startswith("phi4edge: error: ") and "Traceback" not in text


PROMPT = r"\x1b\[\?2004h[^>]*>"  # the line editor turns on bracketed paste, then shows its prompt


class Terminal:
    """A process on a pseudo-terminal of its own."""

    def __init__(self, arguments: list[str], *, columns: int = 80, **environment: str) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.settings = termios.tcgetattr(self.slave)
        self.shown = ""
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=ROOT,
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env=os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"} | environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
        )

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def expect(self, pattern: str) -> None:
        """Waits for text on the screen, and forgets what came before its end."""
        self._read_until(lambda: re.search(pattern, self.shown) is not None, pattern)
        found = re.search(pattern, self.shown)
        assert found is not None
        self.shown = self.shown[found.end() :]

    def wait(self) -> int:
        """The exit code; the terminal is as it was before."""
        self._read_until(lambda: self.process.poll() is not None, "the end")
        assert termios.tcgetattr(self.slave) == self.settings
        assert "Traceback" not in self.shown
        return self.process.wait()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)

    def _read_until(self, is_done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE
        while not is_done():
            ended = self.process.poll() is not None
            if select.select([self.master], [], [], 0.1)[0]:
                self.shown += os.read(self.master, 65536).decode(errors="replace")
            else:
                assert not ended or is_done(), f"ended before {what}, showed {self.shown!r}"
            assert time.monotonic() < deadline, f"waited for {what}, saw {self.shown!r}"
