"""``phi4edge run``: one prompt, one answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phi4edge.cli import answers, output
from phi4edge.cli.loading import load_adapter, load_model
from phi4edge.cli.options import (
    Adaptation,
    Attachments,
    Context,
    Json,
    ModelPath,
    Runtime,
    Sampling,
    Stats,
    System,
    named_as_option,
)
from phi4edge.cli.words import model_and_prompt
from phi4edge.embedded import model_path
from phi4edge.errors import InputError, UsageError

if TYPE_CHECKING:
    from phi4edge.model import Message

EXAMPLES = """
    phi4edge run "What does the image say?" --image sign.png
    phi4edge run model.gguf "Why is the sky blue?"
    phi4edge run model.gguf "Write a haiku" --temperature 0.8 --seed 7
    git diff | phi4edge run model.gguf --system "Summarize this change in one line."
    phi4edge run model.gguf - --json < question.txt
    phi4edge run model.gguf "Summarize § 7." --adapter legal.lora.gguf
    phi4edge run BUNDLE "What is written here?" --image photo.jpg
    phi4edge run BUNDLE --image chart.png --audio question.wav
    phi4edge run BUNDLE "What happens?" --video clip.mp4 --frames 8
    phi4edge run model.gguf --raw "Once upon a time" --max-tokens 64
    phi4edge run BUNDLE --prompts requests.jsonl --together 8 > answers.jsonl
"""

_LONGEST_PROMPT = 16 << 20  # bytes; far beyond any context, and an end to `yes | phi4edge run`


def run(
    attachments: Attachments,
    sampling: Sampling,
    adaptation: Adaptation,
    runtime: Runtime,
    model: ModelPath = None,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="What to ask; '-', or nothing in a pipe, reads standard input. With --audio it may be left out.",
        ),
    ] = None,
    system: System = None,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw",
            help="No chat template: the model continues the prompt, in which special tokens count.",
            rich_help_panel="The answer",
        ),
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Many requests: a JSON object in each line, {"prompt": TEXT or MESSAGES, "max_tokens": 64, ...}. '
            "Writes a line of JSON for each, in their order.",
            rich_help_panel="Many requests",
        ),
    ] = None,
    together: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="So many of --prompts are answered at the same time. [default: 4]",
            rich_help_panel="Many requests",
            show_default=False,
        ),
    ] = None,
    context: Context = None,
    stats: Stats = False,
    as_json: Json = False,
) -> None:
    """Answer one prompt, or a file of them.

    With one argument alone, that is the PROMPT, unless it exists, ends in .gguf, begins with a directory or is a single
    word as files are named: then it is the MODEL.  To ask the embedded model one word, name it: run nano Hello.
    """
    if together is not None and prompts is None:
        raise UsageError("there are no --prompts", field="--together", hint="give a file of them")
    if prompts is not None:
        has_media = attachments.image or attachments.audio or attachments.video
        if prompt is not None or raw or system is not None or has_media:
            problem = "the prompts are in the file, with their system messages, images and sounds"
            raise UsageError(problem, field="--prompts", hint="give the model and options of the answer alone")
        _run_many(prompts, 4 if together is None else together, model, sampling, adaptation, runtime, context, stats)
        return
    model, prompt = model_and_prompt(model, prompt)
    if raw and system is not None:
        raise UsageError("a raw prompt has no place for a system message", field="--system", hint="leave it out")
    if raw and (attachments.image or attachments.audio or attachments.video):
        raise UsageError("a raw prompt has no place for images, sounds and videos", field="--raw", hint="leave it out")
    config = sampling.config()
    text = "" if prompt is None and attachments.audio else read_prompt(prompt, model)
    attachments.require(model_path(model))
    with load_model(model, runtime, context=context) as loaded:
        ready = loaded.tokenizer.encode(text, special=True) if raw else _messages(attachments.content(text), system)
        adapter = None if adaptation.adapter is None else load_adapter(loaded, adaptation.adapter)
        try:
            answer = answers.stream_answer(
                loaded,
                ready,
                config,
                show=not as_json,
                adapter=adapter,
                adapter_scale=adaptation.adapter_scale,
                max_crops=attachments.max_crops,
            )
        except UsageError as error:
            raise named_as_option(error, ("max_crops",)) from None
        for warning in answer.warnings:
            output.warn(warning)
        if as_json:
            output.write_json({"model": loaded.path, **answers.answer_as_json(answer, loaded.tokenizer)})
        else:
            for line in answers.logprob_lines(answer.logprobs, loaded.tokenizer):
                output.note(line)
            if answer.finish_reason == "length":
                output.hint("[cut; --max-tokens or --context allow more]")
        for line in answers.stats_lines(answer) if stats else ():
            output.note(line)


def _run_many(
    path: Path,
    at_once: int,
    model: str | None,
    sampling: Sampling,
    adaptation: Adaptation,
    runtime: Runtime,
    context: int | None,
    stats: bool,
) -> None:
    from phi4edge.cli.run_many import answer_all, read_requests
    from phi4edge.together import MOST_AT_ONCE

    if not 1 <= at_once <= MOST_AT_ONCE:
        raise UsageError(f"is {at_once}, expected 1 to {MOST_AT_ONCE}", field="--together")
    config, requests = sampling.config(), read_requests(path)
    with load_model(model, runtime, context=context) as loaded:
        adapter = None if adaptation.adapter is None else load_adapter(loaded, adaptation.adapter)
        answer_all(
            loaded, requests, config, at_once, stats=stats, adapter=adapter, adapter_scale=adaptation.adapter_scale
        )


def _messages(content: Any, system: str | None) -> list[Message]:
    messages: list[Message] = [] if system is None else [{"role": "system", "content": clean(system)}]
    return [*messages, {"role": "user", "content": content}]


def read_prompt(argument: str | None, model: str | None) -> str:
    """The prompt from the command line, or from standard input for ``-`` and in a pipe.

    model: what was named; a word alone may have been meant as the prompt, so errors name it.
    """
    taken = "" if argument is not None or model is None else f": '{model:.80}' was taken for the model"
    if argument is not None and argument != "-":
        text = clean(argument)
    elif argument is None and sys.stdin.isatty():
        raise UsageError(f"there is no prompt{taken}", hint="give one after the model, or pipe one in")
    else:
        data = sys.stdin.buffer.read(_LONGEST_PROMPT + 1)
        if len(data) > _LONGEST_PROMPT:
            raise InputError(f"the prompt is longer than {output.bytes_text(_LONGEST_PROMPT)}", path="standard input")
        text = data.decode("utf-8-sig", "replace").removesuffix("\n").removesuffix("\r")
    if not text:
        raise InputError(f"the prompt is empty{taken}", hint="give one after the model, or pipe one in")
    return text


def clean(argument: str) -> str:
    """A command-line argument as valid Unicode: bytes that were not UTF-8 become U+FFFD."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
