"""``phi4edge run --prompts``: a file of requests, a JSON object in each line, and a line with the answer to each."""

from __future__ import annotations

import codecs
import re
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from phi4edge.cli import answers, output
from phi4edge.cli.progress import ProgressBar
from phi4edge.errors import BundleError, InputError, Phi4EdgeError
from phi4edge.strict_json import parse_object, read_bytes

if TYPE_CHECKING:
    from phi4edge.generation import Generation, GenerationConfig
    from phi4edge.model import Model
    from phi4edge.together import Event

_LARGEST_FILE = 64 << 20  # bytes
_MOST_LINES = 100_000

_TOKEN_ID = re.compile("[0-9]{1,10}")

Request = dict[str, Any] | Phi4EdgeError


def read_requests(path: Path) -> list[Request]:
    """The objects in the lines that are not empty; in the place of a line that is none, the error.

    Raises FileError, InputError.
    """
    try:
        data = read_bytes(path, at_most=_LARGEST_FILE).removeprefix(codecs.BOM_UTF8)
    except BundleError as error:
        raise InputError(error.problem, path=error.path, hint="give it in parts") from error
    if data.count(b"\n") >= _MOST_LINES:
        raise InputError(f"has more than {_MOST_LINES} lines", path=str(path), hint="give it in parts")
    found: list[Request] = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(_with_token_ids(parse_object(line, str(path), f"line {number}")))
        except BundleError as error:
            found.append(InputError(error.problem, path=error.path, field=error.field))
    if not found:
        raise InputError("has no requests", path=str(path), hint='write {"prompt": "..."} in each line')
    return found


def _with_token_ids(request: dict[str, Any]) -> dict[str, Any]:
    """The request with numbers for the keys of logit_bias, which JSON can only have as texts."""
    bias = request.get("logit_bias")
    if isinstance(bias, dict):
        request["logit_bias"] = {int(key) if _TOKEN_ID.fullmatch(key) else key: bias[key] for key in bias}
    return request


def answer_all(
    model: Model, requests: list[Request], config: GenerationConfig, at_once: int, *, stats: bool, **options: Any
) -> None:
    """Writes the answers as JSON, or the errors, in the order of the requests, each as soon as its turn has come.

    options: as for ``Model.together``.  Ends with the exit code of the first error, if there is one.
    """
    started = time.perf_counter()
    good = {i: request for i, request in enumerate(requests) if not isinstance(request, Phi4EdgeError)}
    places = list(good)
    together = model.together(good.values(), config, at_once=at_once, **options)
    events = ((places[index], event) for index, event in together)
    first_error: Phi4EdgeError | None = None
    n_failed = n_tokens = 0
    shows_bar = not sys.stdout.isatty()  # the answers there show how far it is
    with closing(ProgressBar("Answering")) as bar:
        for n_done, outcome in enumerate(_in_order(requests, events), 1):
            if shows_bar:
                bar(n_done, len(requests))
            if isinstance(outcome, Phi4EdgeError):
                first_error, n_failed = first_error or outcome, n_failed + 1
                output.write_json(outcome.as_json())
            else:
                n_tokens += outcome.usage.completion_tokens
                output.write_json(answers.answer_as_json(outcome, model.tokenizer))
    if stats:
        seconds = time.perf_counter() - started
        rate = n_tokens / seconds
        output.note(f"{len(requests)} requests, {n_tokens} tokens of answers, {seconds:.2f} s, {rate:.1f} tokens/s")
    if first_error:
        output.note(f"phi4edge: {n_failed} of {len(requests)} requests failed; the first: {first_error}")
        raise typer.Exit(first_error.exit_code)


def _in_order(requests: list[Request], events: Iterator[tuple[int, Event]]) -> Iterator[Generation | Phi4EdgeError]:
    """What each request ended with, as soon as it and those before it have ended."""
    from phi4edge.generation import Piece

    ended: dict[int, Generation | Phi4EdgeError] = {
        i: request for i, request in enumerate(requests) if isinstance(request, Phi4EdgeError)
    }
    at = 0
    while at in ended:
        yield ended.pop(at)
        at += 1
    for index, event in events:
        if not isinstance(event, Piece):
            ended[index] = event
        while at in ended:
            yield ended.pop(at)
            at += 1
