"""An answer on its way to the user: streamed text, and what there is to tell about it afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from phi4edge import machine
from phi4edge.cli import output
from phi4edge.cli.progress import ProgressBar
from phi4edge.errors import InputError

if TYPE_CHECKING:
    from phi4edge.generation import Generation, GenerationConfig, TokenLogprob
    from phi4edge.model import Message, Model
    from phi4edge.tokenizer import Tokenizer


def stream_answer(
    model: Model,
    prompt: str | Sequence[Message] | Sequence[int],
    config: GenerationConfig,
    *,
    show: bool = True,
    **options: Any,
) -> Generation:
    """Generates an answer, printed as it comes if ``show``; what was printed ends in a newline, whatever comes.

    options: more of ``Model.stream``, such as the adapter.
    """
    bar = ProgressBar("Reading the prompt")
    shown = ""  # the latest text on standard output
    with closing(bar), closing(model.stream(prompt, config, progress=bar, **options)) as pieces:
        try:
            for piece in pieces:
                bar.close()
                if show and piece.text:
                    shown = piece.text  # first: a signal may end the next line half-way
                    output.write_text(piece.text)
        except BaseException:
            if shown and not shown.endswith("\n"):
                output.write_text("\n")
            raise
    if show and not shown.endswith("\n"):  # an empty answer is an empty line
        output.write_text("\n")
    if model.last is None:
        raise InputError("no answer was generated")
    return model.last


def answer_as_json(answer: Generation, tokenizer: Tokenizer) -> dict[str, Any]:
    """The answer as ``--json`` prints it."""
    document = answer.as_json() | {"peak_memory_bytes": machine.peak_memory()}
    del document["logprobs"]
    if answer.logprobs:
        document["logprobs"] = [_logprob_as_json(step, tokenizer) for step in answer.logprobs]
    return document


def stats_lines(answer: Generation) -> list[str]:
    """Counts and speeds, for people."""
    usage, timings = answer.usage, answer.timings
    cached = f" ({usage.cached_tokens} known already)" if usage.cached_tokens else ""
    lines = [
        f"prompt  {usage.prompt_tokens} tokens{cached}, {timings.prefill_seconds:.2f} s, "
        f"{timings.prefill_rate:.1f} tokens/s; first token after {timings.first_token_seconds:.2f} s",
        f"answer  {usage.completion_tokens} tokens, {timings.decode_seconds:.2f} s, "
        f"{timings.decode_rate:.1f} tokens/s; finish: {answer.finish_reason}",
    ]
    if usage.drafted_tokens:
        lines.append(f"drafts  {usage.drafted_tokens} tokens guessed, {usage.accepted_tokens} of them right")
    if usage.image_tokens or usage.audio_tokens:
        lines.append(
            f"media   {usage.image_tokens} image tokens, {usage.audio_tokens} audio tokens; "
            f"reading {timings.processor_seconds:.2f} s, encoders {timings.encoder_seconds:.2f} s"
            + "".join(f", {role} on {provider}" for role, provider in answer.encoders.items())
        )
    if answer.merged_adapter is not None:
        lines.append(f"adapter {answer.merged_adapter}, merged into the weights")
    if answer.adapter is not None:
        lines.append(f"adapter {answer.adapter}, scale {answer.adapter_scale:g}")
    peak = machine.peak_memory()
    memory = "" if peak is None else f"; memory {output.bytes_text(peak)} at most"
    return [*lines, f"loaded in {timings.load_seconds:.2f} s{memory}"]


def logprob_lines(steps: Iterable[TokenLogprob], tokenizer: Tokenizer) -> list[str]:
    """One line per token: the token, its log probability, and the likeliest tokens there."""
    return [
        f"{_text_of(step.token, tokenizer)!r} {step.logprob:.4f}  "
        + " ".join(f"{_text_of(token, tokenizer)!r}:{logprob:.4f}" for token, logprob in step.top)
        for step in steps
    ]


def _text_of(token: int, tokenizer: Tokenizer) -> str:
    return tokenizer.token_bytes(token, special=True).decode("utf-8", "replace")


def _logprob_as_json(step: TokenLogprob, tokenizer: Tokenizer) -> dict[str, Any]:
    """As :meth:`TokenLogprob.as_json`, with the texts of the tokens."""
    document = step.as_json() | {"text": _text_of(step.token, tokenizer)}
    for entry in document["top"]:
        entry["text"] = _text_of(entry["token"], tokenizer)
    return document
