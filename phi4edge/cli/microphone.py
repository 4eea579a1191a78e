"""The microphone: what someone says, until Enter or for some seconds.  Needs the package ``sounddevice``."""

from __future__ import annotations

import sys
import threading
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt

from phi4edge.cli import output
from phi4edge.errors import InputError, UnsupportedError, UsageError

LONGEST = 1800.0  # seconds, after which nothing more is kept

_FIELD = "/mic"


def record(seconds: float | None) -> tuple[npt.NDArray[np.float32], float]:
    """Samples [n] of one channel and their rate in Hz, as the device has it.  None records until Enter.

    Raises UsageError, UnsupportedError when the package or a microphone is missing, InputError when nothing came.
    """
    if seconds is None and not sys.stdin.isatty():
        raise UsageError("nobody can press Enter to end it", field=_FIELD, hint="write /mic SECONDS")
    if seconds is not None and not 0 < seconds <= LONGEST:
        raise UsageError(f"{seconds:g} seconds are not in 0 to {LONGEST:g}", field=_FIELD)
    device = _sounddevice()
    blocks: list[npt.NDArray[np.float32]] = []
    n_samples = 0
    is_full = threading.Event()

    def keep(block: Any, n_frames: int, time: Any, status: Any) -> None:
        nonlocal n_samples
        if n_samples < limit:
            blocks.append(block[:, 0].copy())
            n_samples += n_frames
        else:
            is_full.set()

    try:
        stream = device.InputStream(channels=1, dtype="float32", callback=keep)
        rate = float(stream.samplerate)
        limit = rate * (LONGEST if seconds is None else seconds)
        stream.start()
    except Exception as error:  # PortAudio has errors of its own, and ValueError for a device that only plays
        raise UnsupportedError(
            f"no microphone can be opened ({error})", field=_FIELD, hint="connect one, or use /audio FILE"
        ) from error
    with closing(stream):
        if seconds is None:
            output.note("[recording; Enter ends it]")
            sys.stdin.readline()
        else:
            output.note(f"[recording for {seconds:g} s]")
            is_full.wait(seconds + 1)  # some devices are slow to start
        stream.stop()
    if not blocks:
        raise InputError("the microphone gave no sound", field=_FIELD, hint="look at the settings of the system")
    return np.concatenate(blocks)[: int(limit)], rate


def _sounddevice() -> Any:
    try:
        import sounddevice
    except ImportError as error:
        raise UnsupportedError(
            "needs the package 'sounddevice'", field=_FIELD, hint="pip install 'phi4edge[mic]', or use /audio FILE"
        ) from error
    except Exception as error:  # it loads and starts PortAudio; OSError when there is none
        raise UnsupportedError(
            f"PortAudio cannot be used ({error})", field=_FIELD, hint="on Debian: apt install libportaudio2"
        ) from error
    return sounddevice
