"""``phi4edge demo``: the embedded model answers a text, an image, a recording, and a spoken question about an image."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import phi4edge
from phi4edge import machine
from phi4edge.cli import answers, output, transcripts
from phi4edge.cli.loading import load_model
from phi4edge.cli.options import Json, Runtime
from phi4edge.embedded import SAMPLES, model_path, part_of_the_installation
from phi4edge.errors import BundleError, Phi4EdgeError

if TYPE_CHECKING:
    from phi4edge.generation import Generation
    from phi4edge.model import Model

EXAMPLES = """
    phi4edge demo
    phi4edge demo --json
"""

_LARGEST_LIST = 1 << 16  # bytes of samples.json


@dataclass(frozen=True)
class Sample:
    """A question with its right answer; the files are in :data:`SAMPLES`."""

    name: str
    command: str  # "run" or "transcribe"
    expected: str
    prompt: str = ""
    image: str = ""
    audio: str = ""
    spoken: str = ""  # what is asked in the recording

    @property
    def files(self) -> dict[str, str]:
        """ "image", "audio" -> path."""
        return {kind: str(SAMPLES / name) for kind, name in (("image", self.image), ("audio", self.audio)) if name}

    @property
    def words(self) -> list[str]:
        """What a user would type after the name of the program."""
        if self.command == "transcribe":
            return [self.command, self.files["audio"]]
        options = [word for kind, path in self.files.items() for word in (f"--{kind}", path)]
        return [self.command, *([self.prompt] if self.prompt else []), *options]


@dataclass(frozen=True)
class Shown:
    """A sample and what the model made of it: one answer, or one for each piece of a recording."""

    sample: Sample
    answers: Sequence[Generation]

    @property
    def text(self) -> str:
        return " ".join(answer.text for answer in self.answers)

    @property
    def is_right(self) -> bool:
        return self.text.split() == self.sample.expected.split()

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.sample.name,
            "command": shlex.join([*_program(), *self.sample.words]),
            "answer": self.text,
            "expected": self.sample.expected,
            "right": self.is_right,
            "adapter": self.answers[0].adapter if self.answers else None,
            "prompt_tokens": sum(answer.usage.prompt_tokens for answer in self.answers),
            "first_token_seconds": self.answers[0].timings.first_token_seconds if self.answers else None,
            "tokens_per_second": self.rate,
        }

    @property
    def rate(self) -> float:
        """Tokens per second after the first; 0 when there were none."""
        seconds = sum(answer.timings.decode_seconds for answer in self.answers)
        return sum(answer.timings.n_decoded for answer in self.answers) / seconds if seconds > 0 else 0.0

    @property
    def line(self) -> str:
        """The same for people."""
        facts = ["right" if self.is_right else f"WRONG, expected: {self.sample.expected}"]
        if self.answers:
            facts.append(f"adapter: {self.answers[0].adapter or 'none'}")
            facts.append(f"first token after {self.answers[0].timings.first_token_seconds:.2f} s")
            facts.append(f"{self.rate:,.0f} tokens/s")
        return " | ".join(facts)


def demo(as_json: Json = False) -> None:
    """Show what the embedded model can do, with each command to type; fail unless all answers are right."""
    started = time.perf_counter()
    samples = read_samples()
    with load_model(model_path(None), Runtime(), context=None) as model:
        if not as_json:
            output.write_text(f"{_heading(model)}\n")
        shown = [_show(model, sample, aloud=not as_json) for sample in samples]
        n_right = sum(each.is_right for each in shown)
        document = {
            "model": model.path,
            "version": phi4edge.__version__,
            "cpu": machine.cpu_name(),
            "isa": model.isa,
            "threads": model.threads,
            "samples": [each.as_json() for each in shown],
            "right": n_right,
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": machine.peak_memory(),
        }
    error = None if n_right == len(shown) else _wrong(len(shown) - n_right, len(shown))
    if as_json:
        output.write_json(document | (error.as_json() if error is not None else {}))
        if error is not None:
            raise typer.Exit(error.exit_code)
        return
    output.write_text("\n".join(_last_lines(document)) + "\n")
    if error is not None:
        raise error


def read_samples() -> list[Sample]:
    """What is asked.  FileError, BundleError when the installation is damaged."""
    from phi4edge.strict_json import read_object

    path = SAMPLES / "samples.json"
    with part_of_the_installation():
        entries = read_object(path, at_most=_LARGEST_LIST).get("samples")
        names = {field.name for field in fields(Sample)}
        if not isinstance(entries, list) or not entries or not all(_is_sample(entry, names) for entry in entries):
            raise BundleError("is not the list of samples that we expect", path=str(path), field="samples")
        return [Sample(**entry) for entry in entries]


def _is_sample(entry: Any, names: set[str]) -> bool:
    return (
        isinstance(entry, dict)
        and {"name", "command", "expected"} <= entry.keys() <= names
        and all(isinstance(value, str) for value in entry.values())
        and (entry["command"] == "run" or (entry["command"] == "transcribe" and "audio" in entry))
    )


def _show(model: Model, sample: Sample, *, aloud: bool) -> Shown:
    """Asks the model; the command, the answer as it comes, and the costs are printed if ``aloud``."""
    if aloud:
        spoken = f'  # spoken: "{sample.spoken}"' if sample.spoken else ""
        output.write_text(f"\n{sample.name}\n$ {shlex.join([*_program(), *sample.words])}{spoken}\n")
    with part_of_the_installation():  # nothing here comes from the user
        shown = Shown(sample, (_transcribe if sample.command == "transcribe" else _run)(model, sample, aloud))
    if aloud:
        output.write_text(f"  [{shown.line}]\n")
    return shown


def _run(model: Model, sample: Sample, aloud: bool) -> list[Generation]:
    from phi4edge.generation import GenerationConfig

    parts = [{"type": kind, kind: path} for kind, path in sample.files.items()]
    content = [*parts, *([{"type": "text", "text": sample.prompt}] if sample.prompt else [])]
    return [answers.stream_answer(model, [{"role": "user", "content": content}], GenerationConfig(), show=aloud)]


def _transcribe(model: Model, sample: Sample, aloud: bool) -> list[Generation]:
    from phi4edge.transcription import transcribe

    line = transcripts.Line()
    found = []
    for segment in transcribe(model, sample.files["audio"], on_text=line.write if aloud else None):
        line.end()
        found.append(segment.answer)
    return found


def _heading(model: Model) -> str:
    from phi4edge.bundle import Bundle

    n_bytes = sum(part.n_bytes for part in Bundle.open(model.path).manifest.parts)
    threads = "1 thread" if model.threads == 1 else f"{model.threads} threads"
    return (
        f"phi4edge {phi4edge.__version__} with nano, the small Phi-4-multimodal in the package "
        f"({output.bytes_text(n_bytes)} with its adapters and encoders)\n{machine.cpu_name()}, {threads}, {model.isa}"
    )


def _last_lines(document: dict[str, Any]) -> list[str]:
    peak = document["peak_memory_bytes"]
    memory = "unknown" if peak is None else output.bytes_text(peak)
    n_samples, program = len(document["samples"]), shlex.join(_program())
    return [
        "",
        f"{document['right']} of {n_samples} answers right in {document['seconds']:.1f} s; peak memory: {memory}",
        f"Talk with it: {program} chat",
        f"The real model: {program} pull microsoft/Phi-4-multimodal-instruct phi4-mm-q4",
    ]


def _wrong(n_wrong: int, n_samples: int) -> Phi4EdgeError:
    """The files are whole, so something here computes wrongly."""
    return Phi4EdgeError(
        f"{n_wrong} of {n_samples} answers of the embedded model are wrong",
        hint="please report this with what 'phi4edge version' and 'phi4edge demo --json' print",
    )


def _program() -> list[str]:
    """How this program was started, as one would type it."""
    started = sys.argv[0]
    if Path(started).stem != "phi4edge" or not Path(started).is_file():  # python -m phi4edge; or no path at all
        return [sys.executable, "-m", "phi4edge"]
    found = shutil.which("phi4edge")
    return ["phi4edge"] if found is not None and Path(found).samefile(started) else [started]
