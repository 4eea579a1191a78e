"""Samples of any rate, kind and number of channels to one channel at 16 kHz, block by block and within limits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import soxr

from phi4edge.errors import InputError

RATE = 16000  # Hz, of all sounds from here on
SHORTEST = 400  # samples at this rate: one frame of features
LOUDEST = 100.0  # 40 dB above full scale; samples that were not divided by 32768 are louder
RATES = (4000, 768_000)  # Hz, lowest and highest that is resampled
MAX_CHANNELS = 1024

Float32 = npt.NDArray[np.float32]

_VALUES_AT_ONCE = 1 << 18
_INTEGERS = {"int16": (0, 1 << 15), "int32": (0, 1 << 31), "uint8": (128, 1 << 7)}  # value of silence, full scale


class Mono16k:
    """Collects a sound.  All methods raise InputError, which names ``path``.

    rate: of the blocks in Hz; max_seconds: what the whole sound may last.
    """

    def __init__(self, rate: float, n_channels: int, path: str, max_seconds: float) -> None:
        self._path = path
        self._max_seconds = max_seconds
        self._samples = bytearray()  # grows in place, and becomes an array without a copy
        if not isinstance(rate, (int, float, np.number)) or not RATES[0] <= rate <= RATES[1]:
            raise self.refusal(f"a rate of {rate!r:.40} Hz is not in {RATES[0]} to {RATES[1]} Hz")
        if not 1 <= n_channels <= MAX_CHANNELS:
            raise self.refusal(f"{n_channels} channels are not in 1 to {MAX_CHANNELS}")
        self.block = max(1, _VALUES_AT_ONCE // n_channels)  # samples that are a good number to add
        self._resampler: Any = None if rate == RATE else soxr.ResampleStream(float(rate), RATE, 1, "float32", "HQ")

    def refusal(self, problem: str, hint: str = "") -> InputError:
        return InputError(problem, path=self._path, field="sound", hint=hint)

    def check_duration(self, seconds: float, why: str) -> None:
        if seconds > self._max_seconds:
            raise self.refusal(
                f"{why} {seconds / 60:.1f} minutes, and at most {self._max_seconds / 60:g} are taken", "split it"
            )

    def add(self, block: Float32) -> None:
        """Float32 [n_samples, n_channels]."""
        if len(block) == 0:
            return
        peak = float(np.abs(block).max())
        if not math.isfinite(peak):
            raise self.refusal("has a NaN or an infinity among its samples")
        if peak > LOUDEST:
            raise self.refusal(f"has a sample of {peak:g}; full scale is 1", "divide 16-bit samples by 32768")
        self._append(block.mean(axis=1, dtype=np.float32))

    def finish(self) -> Float32:
        """All samples: float32 [n], at least 400."""
        if self._resampler is not None:
            self._append(np.empty(0, np.float32), last=True)
        samples = np.frombuffer(self._samples, np.float32)
        if len(samples) == 0:
            raise self.refusal("has no samples")
        if len(samples) < SHORTEST:
            raise self.refusal(
                f"lasts {1000 * len(samples) / RATE:.1f} ms; {1000 * SHORTEST // RATE} ms are the shortest"
            )
        return samples

    def _append(self, mono: Float32, last: bool = False) -> None:
        if self._resampler is not None:
            mono = self._resampler.resample_chunk(mono, last=last)
        self.check_duration((len(self._samples) // 4 + len(mono)) / RATE, "goes on for at least")
        self._samples += mono.data.cast("B") if len(mono) else b""


def from_array(array: npt.NDArray[Any], rate: float, max_seconds: float) -> Float32:
    """Float32 [n_samples] at 16 kHz for [n_samples] or [n_samples, n_channels].  Raises InputError."""
    columns = array[:, np.newaxis] if array.ndim == 1 else array
    kind = columns.dtype.newbyteorder("=").name
    if columns.ndim != 2 or (kind not in _INTEGERS and columns.dtype.kind != "f"):
        raise InputError(
            f"is {array.dtype} {list(array.shape)}, expected floats, int16, int32 or uint8 [samples] or"
            " [samples, channels]",
            field="sound",
        )
    n_samples, n_channels = columns.shape
    if n_channels > n_samples > 0:
        raise InputError(
            f"has {n_channels} channels of {n_samples} samples",
            field="sound",
            hint="transpose it to [samples, channels]",
        )
    sound = Mono16k(rate, n_channels, "", max_seconds)
    sound.check_duration(n_samples / rate, "lasts")
    silence, full_scale = _INTEGERS.get(kind, (0, 1))
    for start in range(0, n_samples, sound.block):
        with np.errstate(over="ignore"):  # what does not fit becomes an infinity, which is refused
            block = columns[start : start + sound.block].astype(np.float32)
        sound.add((block - np.float32(silence)) / np.float32(full_scale) if full_scale > 1 else block)
    return sound.finish()
