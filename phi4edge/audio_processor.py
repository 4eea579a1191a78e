"""Sounds to log-mel features: one frame of 80 values every 10 ms, eight frames to a token.

>>> samples = load_audio("question.wav")  # doctest: +SKIP
>>> log_mels(samples, numbers).shape  # doctest: +SKIP
(160, 80)

The definition is that of Phi4MultimodalFeatureExtractor in transformers.  The original processor differs by 0.018 at
most in the last mel band, whose filter lacks one bin there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from phi4edge.audio_files import MAX_SECONDS, AudioSource, load_audio
from phi4edge.audio_samples import LOUDEST, RATE, Float32
from phi4edge.errors import BundleError, InputError

__all__ = ["MAX_SECONDS", "AudioNumbers", "AudioSource", "load_audio", "log_mels", "n_tokens"]

N_MELS = 80
FRAMES_PER_TOKEN = 8
HIGHEST_MEL = 7690.0  # Hz, the upper edge of the last filter
FULL_SCALE = 32768.0  # the features are those of 16-bit samples

_FRAMES_AT_ONCE = 1024  # about 20 MB of intermediate values
_LARGEST = 1 << 14  # samples of a window
_FIXED = {"sampling_rate": RATE, "feature_size": N_MELS, "audio_compression_rate": FRAMES_PER_TOKEN}


@dataclass(frozen=True, slots=True)
class AudioNumbers:
    """What a checkpoint says about its features; lengths in samples."""

    sampling_rate: int = RATE
    feature_size: int = N_MELS
    win_length: int = 400
    hop_length: int = 160
    n_fft: int = 512
    preemphasis: float = 0.97
    audio_compression_rate: int = FRAMES_PER_TOKEN

    @classmethod
    def from_manifest(cls, entry: Any) -> AudioNumbers:
        """From ``processors["audio"]`` of a manifest.  BundleError for numbers that cannot be computed with."""
        table = entry if isinstance(entry, Mapping) else {}
        values: dict[str, Any] = {}
        for number in fields(cls):
            value = table.get(number.name)
            kinds = (int, float) if number.name == "preemphasis" else (int,)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise _wrong(number.name, f"is {value!r:.60}, expected a number")
            values[number.name] = value
        numbers = cls(**values)
        for name, only in _FIXED.items():
            if values[name] != only:
                raise _wrong(name, f"is {values[name]!r:.60}, only {only} is supported")
        if not 1 <= numbers.hop_length <= numbers.win_length <= numbers.n_fft <= _LARGEST or numbers.win_length < 2:
            raise _wrong(
                "win_length",
                f"hop, window and transform of {numbers.hop_length!r:.20}, {numbers.win_length!r:.20} and"
                f" {numbers.n_fft!r:.20} samples are not in rising order up to {_LARGEST}",
            )
        if not 0 <= numbers.preemphasis <= 1:
            raise _wrong("preemphasis", f"is {numbers.preemphasis!r:.60}, expected 0 to 1")
        return numbers

    def n_frames(self, n_samples: int) -> int:
        """Frames of so many samples; what is left at the end is dropped."""
        return max(0, (n_samples - self.win_length) // self.hop_length + 1)


def n_tokens(n_frames: int) -> int:
    """Embeddings that the audio encoder makes of so many frames: one for each 80 ms that begin."""
    return -(-n_frames // FRAMES_PER_TOKEN)


def log_mels(samples: Float32, numbers: AudioNumbers) -> Float32:
    """Float32 [n_frames, 80] for float32 [n_samples] at 16 kHz: ln of the energy in each mel band, at least 0.

    Raises InputError for samples of another kind, for less than one window, and for a NaN or an infinity.
    """
    if samples.ndim != 1 or samples.dtype != np.float32:
        raise InputError(f"is {samples.dtype} {list(samples.shape)}, expected float32 [samples]", field="sound")
    n_frames = numbers.n_frames(len(samples))
    if n_frames == 0:
        raise InputError(f"has {len(samples)} samples; one frame takes {numbers.win_length}", field="sound")
    window, filters = _window(numbers.win_length), _mel_filters(numbers.n_fft)
    features = np.empty((n_frames, N_MELS), np.float32)
    for start in range(0, n_frames, _FRAMES_AT_ONCE):
        end = min(start + _FRAMES_AT_ONCE, n_frames)
        first = start * numbers.hop_length
        part = samples[first : (end - 1) * numbers.hop_length + numbers.win_length]
        frames = _emphasized_frames(part, numbers)
        spectrum = np.fft.rfft(frames * window, numbers.n_fft).astype(np.complex64)
        power = spectrum.real**2 + spectrum.imag**2
        features[start:end] = np.log(np.maximum(power @ filters, np.float32(1)))
    return features


def _emphasized_frames(samples: Float32, numbers: AudioNumbers) -> Float32:
    """Overlapping frames [n, win_length] of x[i] - 0.97 x[i-1], where the first sample of a frame precedes itself."""
    if not np.abs(samples).max() <= LOUDEST:  # not for a NaN either
        raise InputError(f"has a NaN, an infinity, or a sample above {LOUDEST:g}", field="sound")
    factor = np.float32(numbers.preemphasis)
    emphasized = samples.copy()
    emphasized[1:] -= factor * samples[:-1]
    hop = slice(None, None, numbers.hop_length)
    frames = np.lib.stride_tricks.sliding_window_view(emphasized, numbers.win_length)[hop].copy()
    firsts = samples[: len(samples) - numbers.win_length + 1][hop]
    frames[:, 0] = firsts - factor * firsts
    frames *= np.float32(FULL_SCALE)
    return np.asarray(frames)


@functools.cache
def _window(n_samples: int) -> npt.NDArray[np.float64]:
    """The symmetric Hamming window [n_samples]."""
    angles = 2 * math.pi * np.arange(n_samples) / (n_samples - 1)
    return np.asarray(0.54 - 0.46 * np.cos(angles))


@functools.cache
def _mel_filters(n_fft: int) -> Float32:
    """Weights [n_fft/2 + 1, 80]: triangles of height 1 whose sides are straight on the mel scale, not in Hz."""
    bins = _mel(np.arange(n_fft // 2 + 1) * (RATE / n_fft))[:, np.newaxis]
    edges = np.linspace(0.0, _mel(np.float64(HIGHEST_MEL)), N_MELS + 2)
    left, peak, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (bins - left) / (peak - left), (right - bins) / (right - peak)
    return np.asarray(np.maximum(0, np.minimum(rising, falling)), np.float32)


def _mel(hertz: Any) -> Any:
    return 1127 * np.log1p(hertz / 700)


def _wrong(field: str, problem: str) -> BundleError:
    return BundleError(problem, field=f"processors.audio.{field}", hint="convert the checkpoint again")
