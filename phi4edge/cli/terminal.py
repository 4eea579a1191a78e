"""Where a chat reads from: an editor on a terminal, or plain lines."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from phi4edge.cli import output


class Reader(Protocol):
    """Reads what the user says next."""

    interactive: bool  # someone is there to read an error and to try again

    def read(self) -> str:
        """Raises EOFError at the end, and KeyboardInterrupt for Ctrl-C."""


class PlainReader:
    """One line of standard input at a time: pipes, and terminals without cursor movement."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty()

    def read(self) -> str:
        if self.interactive:
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return line.decode("utf-8", "replace").rstrip("\r\n")


class TerminalReader:
    """A line editor with history.  Enter sends, Alt-Enter starts a new line, a paste may have many."""

    interactive = True

    def __init__(self) -> None:
        # Here and not above: a chat in a pipe does without.
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.key_binding.key_processor import KeyPressEvent
        from prompt_toolkit.output import create_output

        from phi4edge.cli.history import ChatHistory, history_path

        keys = KeyBindings()

        @keys.add("enter")
        def _send(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        screen = sys.stderr if sys.stderr.isatty() else sys.stdout  # the answers alone go to standard output
        self._session: PromptSession[str] = PromptSession(
            history=ChatHistory(history_path()), key_bindings=keys, multiline=True, output=create_output(stdout=screen)
        )

    def read(self) -> str:
        with _terminal_as_before():  # the editor leaves its own settings when SIGTERM comes while it makes them
            return self._session.prompt("> ", prompt_continuation="  ")


def open_reader() -> Reader:
    """The best reader for the streams we have."""
    has_screen = output.is_terminal(sys.stderr) or output.is_terminal(sys.stdout)
    return TerminalReader() if output.is_terminal(sys.stdin) and has_screen else PlainReader()


@contextmanager
def keys_unseen() -> Iterator[None]:
    """Keys that are typed meanwhile do not show up between the words of an answer; the next line gets them."""
    with _terminal_as_before() as settings:
        if settings is not None and sys.platform != "win32":
            import termios

            unseen = [*settings]
            unseen[3] &= ~termios.ECHO  # the local modes; signals of keys stay on
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, unseen)
        yield


@contextmanager
def _terminal_as_before() -> Iterator[list[Any] | None]:
    """The settings of the keyboard, restored however we leave, by Ctrl-C and SIGTERM too; None where there is none."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield None
        return
    import termios

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    try:
        yield before
    finally:
        with suppress(termios.error):  # it is gone
            termios.tcsetattr(keyboard, termios.TCSANOW, before)
