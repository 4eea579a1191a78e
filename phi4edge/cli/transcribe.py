"""``phi4edge transcribe``: a recording of any length as text, with times, or translated."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phi4edge.cli import answers, errors, output, transcripts
from phi4edge.cli.loading import load_adapter, load_model
from phi4edge.cli.options import (
    Adaptation,
    Context,
    Json,
    ModelPath,
    Runtime,
    Sampling,
    Stats,
    named_as_option,
    require_encoders,
)
from phi4edge.cli.progress import ProgressBar
from phi4edge.cli.run import clean
from phi4edge.cli.words import model_and_file
from phi4edge.embedded import model_path
from phi4edge.errors import Cancelled, InputError, Phi4EdgeError, UsageError

if TYPE_CHECKING:
    from phi4edge.generation import GenerationConfig
    from phi4edge.model import Model
    from phi4edge.transcription import Recording, Segment

EXAMPLES = """
    phi4edge transcribe talk.wav
    phi4edge transcribe BUNDLE talk.wav
    phi4edge transcribe BUNDLE talk.mp3 --translate-to fr
    phi4edge transcribe BUNDLE talk.wav --srt > talk.srt
    phi4edge transcribe BUNDLE talk.wav --json | jq -r '.segments[] | "\\(.start) \\(.text)"'
"""

_SPEECH = "The speech"


@dataclass(frozen=True)
class Hearing:
    """What is done with the speech; also parameters of :func:`phi4edge.transcribe`."""

    translate_to: Annotated[
        str | None,
        typer.Option(
            metavar="LANGUAGE",
            help="Translate it to en, zh, de, fr, it, ja, es or pt, or the English name of one.",
            rich_help_panel=_SPEECH,
        ),
    ] = None
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="What to say to the model about each piece, for one that was trained with other words.",
            rich_help_panel=_SPEECH,
        ),
    ] = None
    splitter: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What finds the pauses: energy, or silero from 'phi4edge[vad]'. [default: silero if installed]",
            rich_help_panel=_SPEECH,
            show_default=False,
        ),
    ] = None


def transcribe(
    hearing: Hearing,
    sampling: Sampling,
    adaptation: Adaptation,
    runtime: Runtime,
    model: ModelPath = None,
    file: Annotated[
        str | None, typer.Argument(metavar="FILE", help="A recording of up to two hours.", show_default=False)
    ] = None,
    srt: Annotated[bool, typer.Option("--srt", help="Print subtitles in SubRip's format.")] = False,
    context: Context = None,
    stats: Stats = False,
    as_json: Json = False,
) -> None:
    """Write down what is said in a recording.

    It is cut at pauses into pieces of at most 30 seconds, which the model hears one by one: one line of text each.
    --max-tokens is for each piece.  One argument alone is the FILE.
    """
    if srt and as_json:
        raise UsageError("subtitles are no JSON", field="--srt", hint="leave --srt or --json out")
    config = sampling.config()
    model, file = model_and_file(model, file)
    path = model_path(model)
    try:
        prompt, task = _task(hearing)
        _require_hearing(path)
        recording = _read(file, hearing.splitter)
    except UsageError as error:
        raise named_as_option(error, asdict(hearing)) from None
    facts = {"model": path, "file": file, **task}
    with load_model(model, runtime, context=context) as loaded:
        adapter = None if adaptation.adapter is None else load_adapter(loaded, adaptation.adapter)
        job = _Job(loaded, recording, config, prompt=prompt, adapter=adapter, adapter_scale=adaptation.adapter_scale)
        if as_json:
            job.print_json(facts)
        elif srt:
            job.print_subtitles()
        else:
            job.print_lines()
        for line in transcripts.stats_lines(recording, job.segments, job.seconds) if stats else ():
            output.note(line)


def _task(hearing: Hearing) -> tuple[str, dict[str, str | None]]:
    """What the model is told, and how ``--json`` describes it."""
    from phi4edge.transcription import language_name, prompt_for

    own = None if hearing.prompt is None else clean(hearing.prompt)
    prompt = prompt_for(hearing.translate_to, own)
    language = None if hearing.translate_to is None else language_name(hearing.translate_to)
    task = "custom" if own is not None else "transcribe" if language is None else "translate"
    return prompt, {"task": task, "language": language, "prompt": prompt}


def _require_hearing(path: str) -> None:
    """InputError, with the path, for a model that does not hear: it may well be the recording, in the wrong place."""
    try:
        require_encoders(path, {"audio": ""})
    except InputError as error:
        if error.path:
            raise
        hint = f"the first of two words is the model; {error.hint}"
        raise InputError(error.problem, path=path, hint=hint) from error


def _read(file: str, splitter: str | None) -> Recording:
    from phi4edge.transcription import Recording

    with closing(ProgressBar("Looking for pauses (seconds)")) as bar:
        return Recording.read(file, splitter=splitter, progress=bar)


class _Job:
    """One recording on its way to text.

    options: of :func:`phi4edge.transcribe`.
    """

    def __init__(self, model: Model, recording: Recording, config: GenerationConfig, **options: Any) -> None:
        self.segments: list[Segment] = []  # those that are done
        self.seconds = 0.0  # that it took
        self._model, self._recording, self._config, self._options = model, recording, config, options
        self._bar = _new_bar()

    def print_lines(self) -> None:
        """A line for each piece, as it comes; what was printed ends in a newline, even if interrupted."""
        line = transcripts.Line()

        def show(text: str) -> None:
            if output.is_terminal(sys.stdout):  # there is no room for a bar beside a line that grows
                self._bar.close()
            line.write(text)

        try:
            for segment in self._run(on_text=show):
                line.end()
                self._tell(segment)
        except (KeyboardInterrupt, SystemExit, Phi4EdgeError):
            line.end()
            raise

    def print_subtitles(self) -> None:
        """Those that are done, each of them whole, even if interrupted."""
        from phi4edge.transcription import as_subrip

        number = 0
        for segment in self._run():
            if output.is_terminal(sys.stdout):
                self._bar.close()
            if segment.text:
                number += 1
                output.write_text(as_subrip(segment, number))
            self._tell(segment)

    def print_json(self, facts: dict[str, Any]) -> None:
        """One document, ``facts`` and all that is done, even if interrupted."""
        error: Phi4EdgeError | None = None
        try:
            for _ in self._run():
                pass
        except SystemExit:
            output.write_json(facts | self._document() | Cancelled("terminated").as_json())
            raise
        except BaseException as caught:
            error = errors.known_error(caught)
            if error is None or not self.segments:
                raise
        output.write_json(facts | self._document() | (error.as_json() if error is not None else {}))
        if error is not None:
            raise typer.Exit(error.exit_code)

    def _document(self) -> dict[str, Any]:
        return transcripts.as_json(self._recording, self.segments, self.seconds, self._model.tokenizer)

    def _run(self, **options: Any) -> Iterator[Segment]:
        from phi4edge.transcription import transcribe

        def progress(done: int, total: int) -> None:
            self._bar(done, total)

        options |= self._options
        started = time.perf_counter()
        try:
            with closing(
                transcribe(self._model, self._recording, self._config, progress=progress, **options)
            ) as segments:
                for segment in segments:
                    for warning in () if self.segments else segment.answer.warnings:
                        output.warn(warning)
                    self.segments.append(segment)
                    yield segment
        finally:
            self.seconds = time.perf_counter() - started
            self._bar.close()

    def _tell(self, segment: Segment) -> None:
        """What is not part of the text, and a new bar where the old one had to give way to text."""
        for line in answers.logprob_lines(segment.answer.logprobs, self._model.tokenizer):
            output.note(line)
        if segment.answer.finish_reason == "length":
            output.hint(f"[the piece from {segment.start:.1f} s on is cut; --max-tokens or --context allow more]")
        if output.is_terminal(sys.stdout):
            self._bar.close()
            self._bar = _new_bar()


def _new_bar() -> ProgressBar:
    return ProgressBar("Listening (seconds)")
