"""Speech of any length to text: cut at its pauses, and each piece answered by the model in a request of its own.

>>> for segment in phi4edge.transcribe(model, "talk.wav"):  # doctest: +SKIP
...     print(f"{segment.start:.1f} {segment.text}")
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi4edge.audio_files import AudioSource, load_audio
from phi4edge.audio_processor import AudioNumbers, n_tokens
from phi4edge.audio_samples import RATE, Float32
from phi4edge.bundle import bundle_at
from phi4edge.errors import InputError, UsageError
from phi4edge.media import no_encoder
from phi4edge.pauses import Progress, Span, choose, split
from phi4edge.router import AUDIO

if TYPE_CHECKING:
    from phi4edge.generation import Generation, GenerationConfig
    from phi4edge.model import Message, Model

TRANSCRIBE = "Transcribe the audio clip into text."
TRANSLATE = "Translate the audio to {language}."
LANGUAGES = {  # that Phi-4-multimodal hears and speaks
    "en": "English",
    "zh": "Chinese",
    "de": "German",
    "fr": "French",
    "it": "Italian",
    "ja": "Japanese",
    "es": "Spanish",
    "pt": "Portuguese",
}


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """Samples, float32 [n_samples] at 16 kHz, and where they are cut."""

    samples: Float32
    spans: tuple[Span, ...]
    splitter: str  # that found the speech

    @classmethod
    def read(cls, source: AudioSource, *, splitter: str | None = None, progress: Progress | None = None) -> Recording:
        """A path, the bytes of a file, or samples with their rate in Hz; at most two hours.

        splitter: "energy", or "silero" from the extra ``vad``; None takes that where it is installed.
        progress: called with (seconds done, seconds in all) while pauses are looked for.

        Raises FileError, InputError, OutOfMemoryError, UnsupportedError, UsageError.
        """
        name = choose(splitter)
        samples = load_audio(source)
        return cls(samples, tuple(split(samples, name, progress)), name)

    @property
    def seconds(self) -> float:
        return len(self.samples) / RATE

    @property
    def pieces(self) -> list[Span]:
        """What the model is asked about."""
        return [span for span in self.spans if span.has_speech]

    @property
    def silences(self) -> list[Span]:
        """What it is not asked about, since it would hear words there too."""
        return [span for span in self.spans if not span.has_speech]


@dataclass(frozen=True, slots=True)
class Segment:
    """What was said in a piece of a recording."""

    start: float  # seconds from the start of the recording
    end: float
    answer: Generation  # the tokens, why they end, and what they cost

    @property
    def text(self) -> str:
        """On one line."""
        return " ".join(self.answer.text.split())


def as_subrip(segment: Segment, number: int) -> str:
    """One entry of a SubRip file; ``number`` counts from 1."""
    text = segment.text.replace("-->", "->")
    return f"{number}\n{_clock(segment.start)} --> {_clock(segment.end)}\n{text}\n\n"


def _clock(seconds: float) -> str:
    milliseconds = round(1000 * seconds)
    minutes, hours = milliseconds // 60_000 % 60, milliseconds // 3_600_000
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000 % 60:02},{milliseconds % 1000:03}"


def transcribe(
    model: Model,
    source: AudioSource | Recording,
    config: GenerationConfig | None = None,
    *,
    translate_to: str | None = None,
    prompt: str | None = None,
    splitter: str | None = None,
    on_text: Callable[[str], None] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Generator[Segment, None, None]:
    """The segments of a recording as they are done, in order.  ``config`` and ``max_tokens`` are for each piece.

    source: what :meth:`Recording.read` takes, or what it gave.
    translate_to: a code or a name of :data:`LANGUAGES`; None keeps the language of the speech.
    prompt: what to say to the model about each piece instead, for a model that was trained with other words.
    splitter: as for :meth:`Recording.read`.
    on_text: called with the text of a segment as it comes, before the segment.
    progress: called with (seconds done, seconds in all); what it returns is not looked at.
    options: as for :meth:`Model.stream`: the adapter, fields of GenerationConfig, and the session; by default it is the
        model's own conversation, which starts anew with each piece.

    Raises what :meth:`Recording.read` and :meth:`Model.stream` raise; all but a wrong option before the first piece.
    """
    text = prompt_for(translate_to, prompt)
    require_encoder(model.path, model.modalities)
    if isinstance(source, Recording):
        if splitter is not None:
            raise UsageError(
                "is for a source that was not read yet", field="splitter", hint="give it to Recording.read"
            )
        recording = source
    else:
        recording = Recording.read(source, splitter=splitter)
    _require_room(model, recording, text)
    return _segments(model, recording, text, config, on_text, progress, options)


def prompt_for(translate_to: str | None, prompt: str | None) -> str:
    """What the model is asked.  UsageError for a language it does not speak, and for two wishes at once."""
    if prompt is not None:
        if translate_to is not None:
            raise UsageError(
                "says what to do, and so does the language to translate to", field="prompt", hint="leave one out"
            )
        if not prompt.strip():
            raise UsageError("is empty", field="prompt")
        return prompt
    return TRANSCRIBE if translate_to is None else TRANSLATE.format(language=language_name(translate_to))


def language_name(language: str) -> str:
    """The English name for a code or a name: "French" for "fr"."""
    for code, name in LANGUAGES.items():
        if language.strip().casefold() in (code, name.casefold()):
            return name
    known = ", ".join(f"{code} ({name})" for code, name in LANGUAGES.items())
    raise UsageError(
        f"{language!r:.40} is not a language of the model", field="translate_to", hint=f"those are {known}"
    )


def require_encoder(path: str, modalities: frozenset[str]) -> None:
    """InputError unless a model, a bundle or a file at ``path``, takes sounds."""
    if AUDIO not in modalities:
        raise no_encoder(AUDIO, bundle_at(path))


def _require_room(model: Model, recording: Recording, prompt: str) -> None:
    """InputError before the first piece when the last one would not fit."""
    longest = max((span.end - span.start for span in recording.pieces), default=0)
    n_sound = n_tokens(AudioNumbers().n_frames(longest))
    n_prompt = len(model.encode([_message((recording.samples, RATE), prompt)])) - 1 + n_sound
    if n_prompt >= model.context:
        raise InputError(
            f"a piece of {longest / RATE:.1f} s and its prompt are {n_prompt} tokens, and the context holds"
            f" {model.context}, the answer included",
            hint="load the model with a larger context",
        )


def _segments(
    model: Model,
    recording: Recording,
    prompt: str,
    config: GenerationConfig | None,
    on_text: Callable[[str], None] | None,
    progress: Progress | None,
    options: dict[str, Any],
) -> Generator[Segment, None, None]:
    n_seconds = int(recording.seconds)
    for span in recording.pieces:
        start, end = span.seconds
        tell = functools.partial(_tell, progress, int(start), n_seconds)
        tell()
        message = _message((recording.samples[span.start : span.end], RATE), prompt)
        stream = model.stream([message], config, progress=tell, **options)
        try:
            for piece in stream:
                tell()
                if on_text is not None and piece.text:
                    on_text(piece.text)
        finally:
            stream.close()
        if model.last is None:
            raise InputError("no answer was generated")
        yield Segment(start, end, model.last)
    _tell(progress, n_seconds, n_seconds)


def _tell(progress: Progress | None, done: int, total: int, *tokens: int) -> None:
    """The seconds do not change while the tokens of a piece are computed, but a bar wants to be called."""
    if progress is not None:
        progress(done, total)


def _message(sound: AudioSource, prompt: str) -> Message:
    return {"role": "user", "content": [{"type": "audio", "audio": sound}, {"type": "text", "text": prompt}]}
