"""What a recording became: a line of text as it comes, a document for programs, and counts for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from phi4edge import machine
from phi4edge.cli import answers, output

if TYPE_CHECKING:
    from phi4edge.tokenizer import Tokenizer
    from phi4edge.transcription import Recording, Segment

_OF_A_SEGMENT = ("tokens", "finish_reason", "usage", "timings", "logprobs")  # the rest is the same for all
_TIMES = ("processor_seconds", "encoder_seconds", "prefill_seconds", "decode_seconds")


class Line:
    """A line on standard output that grows: what comes, with a space for each run of spaces and newlines."""

    def __init__(self) -> None:
        self._begun = False
        self._spaced = False  # by the end of what came last

    def write(self, text: str) -> None:
        words = text.split()
        if words:
            space = " " if self._begun and (self._spaced or text[0].isspace()) else ""
            self._begun = True
            output.write_text(space + " ".join(words))
        if text:
            self._spaced = text[-1].isspace()

    def end(self) -> None:
        """Nothing was written: no line."""
        begun, self._begun, self._spaced = self._begun, False, False
        if begun:
            output.write_text("\n")


def as_json(recording: Recording, segments: Sequence[Segment], seconds: float, tokenizer: Tokenizer) -> dict[str, Any]:
    """A recording and the segments that are done, after so many seconds."""
    documents = [_segment_as_json(segment, tokenizer) for segment in segments]
    first = segments[0].answer.as_json() if segments else {}
    return {
        "seconds": recording.seconds,
        "splitter": recording.splitter,
        "segments": documents,
        "silences": [{"start": span.seconds[0], "end": span.seconds[1]} for span in recording.silences],
        "text": " ".join(segment.text for segment in segments if segment.text),
        "usage": _sums([asdict(segment.answer.usage) for segment in segments]),
        "timings": _times(segments) | {"seconds": seconds, "real_time_factor": seconds / recording.seconds},
        "adapter": first.get("adapter"),
        "merged_adapter": first.get("merged_adapter"),
        "warnings": first.get("warnings", []),
        "peak_memory_bytes": machine.peak_memory(),
    }


def _segment_as_json(segment: Segment, tokenizer: Tokenizer) -> dict[str, Any]:
    answer = answers.answer_as_json(segment.answer, tokenizer)
    chosen = {name: answer[name] for name in _OF_A_SEGMENT if name in answer}
    return {"start": segment.start, "end": segment.end, "text": segment.text, **chosen}


def stats_lines(recording: Recording, segments: Sequence[Segment], seconds: float) -> list[str]:
    """Counts and speeds, for people."""
    silent = sum(end - start for start, end in (span.seconds for span in recording.silences))
    times = _times(segments)
    usage = _sums([asdict(segment.answer.usage) for segment in segments])
    answered = [segment.answer for segment in segments]
    n_decoded = sum(answer.timings.n_decoded for answer in answered)
    rate = n_decoded / times["decode_seconds"] if n_decoded else 0.0
    lines = [
        f"speech  {recording.seconds:.1f} s, {silent:.1f} s of it silent; pieces: {len(recording.pieces)} "
        f"(found by {recording.splitter}); done in {seconds:.1f} s, real-time factor {seconds / recording.seconds:.2f}",
        f"media   {usage.get('audio_tokens', 0)} audio tokens; reading {times['processor_seconds']:.2f} s, "
        f"encoders {times['encoder_seconds']:.2f} s",
        f"prompt  {usage.get('prompt_tokens', 0)} tokens, {times['prefill_seconds']:.2f} s",
        f"answer  {usage.get('completion_tokens', 0)} tokens, {times['decode_seconds']:.2f} s, {rate:.1f} tokens/s",
    ]
    if answered and answered[0].merged_adapter is not None:
        lines.append(f"adapter {answered[0].merged_adapter}, merged into the weights")
    if answered and answered[0].adapter is not None:
        lines.append(f"adapter {answered[0].adapter}, scale {answered[0].adapter_scale:g}")
    peak = machine.peak_memory()
    return lines if peak is None else [*lines, f"memory  {output.bytes_text(peak)} at most"]


def _times(segments: Sequence[Segment]) -> dict[str, float]:
    return {name: sum(getattr(segment.answer.timings, name) for segment in segments) for name in _TIMES}


def _sums(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {name: sum(each[name] for each in counts) for name in (counts[0] if counts else ())}
