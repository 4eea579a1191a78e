"""Exceptions to exit codes: one line for what the user can mend, and a request for a report when the fault is ours."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from phi4edge.cli import output
from phi4edge.errors import Cancelled, DiskError, OutOfMemoryError, Phi4EdgeError, UnsupportedError, UsageError

OK = 0
BUG = 70
INTERRUPTED = 128 + 2
BROKEN_PIPE = 128 + 13
TERMINATED = 128 + 15

# Typer keeps its parser's exceptions private except for this one, whose bases they share.
_ParserError = typer.BadParameter.__mro__[1]

_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG} if hasattr(errno, "EDQUOT") else {errno.ENOSPC}


def run_guarded(command: Callable[[], object], *, as_json: bool) -> int:
    """Runs ``command`` and returns the exit code; whatever it raises becomes one line, or one JSON object."""
    with _signals():
        try:
            command()
            sys.stdout.flush()
            return OK
        except typer.Exit as leaving:
            return _flush(leaving.exit_code)
        except SystemExit as leaving:
            return _flush(leaving.code if isinstance(leaving.code, int) else BUG)
        except BaseException as error:
            # From here on a second Ctrl-C ends us at once, without a traceback.
            if _in_main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            return _flush(_report(error, as_json))


def known_error(error: BaseException) -> Phi4EdgeError | None:
    """``error`` as one of ours, or ``None`` when it is a bug."""
    if isinstance(error, Phi4EdgeError):
        return error
    if isinstance(error, _ParserError):
        return _usage_error(error)
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return Cancelled("interrupted")
    if isinstance(error, MemoryError):
        return OutOfMemoryError("not enough memory", hint="try a smaller --context or a smaller model")
    if isinstance(error, ImportError) and "_core" in f"{error.name} {error}":
        return UnsupportedError(
            "this installation has no compiled module for this processor and Python", hint="install phi4edge again"
        )
    if isinstance(error, OSError) and error.errno in _DISK_FAULTS:
        return DiskError(f"cannot write: {error.strerror}", path=str(error.filename or "standard output"))
    return None


def _report(error: BaseException, as_json: bool) -> int:
    if isinstance(error, BrokenPipeError):  # the reader, e.g. `head`, has seen enough
        output.discard_stdout()
        return BROKEN_PIPE
    if os.environ.get("PHI4EDGE_DEBUG") == "1":
        traceback.print_exception(error)
    known = known_error(error)
    if isinstance(known, DiskError):
        output.discard_stdout()  # the rest of the answer would fail again at exit
        as_json = False
    if as_json:
        output.write_json((known or _bug(error)).as_json())
    elif isinstance(known, Cancelled):
        output.hint("interrupted")
    elif known is not None:
        output.note(f"phi4edge: error: {known}")
    else:
        output.note(f"phi4edge: internal error: {_bug(error)}")
    return known.exit_code if known is not None else BUG


def _bug(error: BaseException) -> Phi4EdgeError:
    return Phi4EdgeError(
        f"{type(error).__name__}: {error}",
        hint="this is a bug in phi4edge: please report it with the traceback that PHI4EDGE_DEBUG=1 shows",
    )


def _usage_error(error: BaseException) -> UsageError:
    """An error of the option parser; it knows the option and the command."""
    message = str(getattr(error, "format_message", error.__str__)()).rstrip(".")
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "phi4edge"
    options = getattr(getattr(error, "param", None), "opts", None)
    field = options[0] if options else ""
    if field and isinstance(error, typer.BadParameter) and error.message:
        message = error.message.rstrip(".").removeprefix("Value error, ")
    else:
        field = ""  # the message already names it
    return UsageError(message, field=field, hint=f"try '{path} --help'")


def _flush(code: int) -> int:
    try:
        sys.stdout.flush()
    except OSError:
        output.discard_stdout()
    return code


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C does, so that the terminal is restored and the answer ends with a newline."""
    if not _in_main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one does not wait
    raise SystemExit(TERMINATED)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
