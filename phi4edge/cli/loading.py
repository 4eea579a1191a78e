"""A model and its adapter for a command: threads within what the machine has, and a progress bar."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from phi4edge import machine
from phi4edge.adapters import NO_ADAPTER
from phi4edge.cli import output
from phi4edge.cli.options import Runtime, named_as_option
from phi4edge.cli.progress import ProgressBar
from phi4edge.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from phi4edge.model import Model


_EMBEDDED = (
    "phi4edge: no model named: this is nano, the small embedded one; for the real one: "
    "phi4edge pull microsoft/Phi-4-multimodal-instruct phi4-mm-q4"
)


def tell_if_embedded(model: str | None) -> None:
    """A line on standard error when no model was named."""
    if model is None:
        output.note(_EMBEDDED)


def load_model(path: str | None, runtime: Runtime, *, context: int | None) -> Model:
    """The model at ``path``, ready to answer; None is the embedded one, and a line says so."""
    threads, warning = machine.clamp_threads(runtime.threads)
    if warning:
        output.warn(f"--threads: {warning}")
    with closing(ProgressBar("Loading", in_bytes=True)) as bar:
        from phi4edge.model import load

        try:
            model = load(
                path,
                context=context,
                threads=threads,
                kv_type=runtime.kv_type.value,
                isa=runtime.isa,
                provider=runtime.provider,
                progress=bar,
            )
        except (UsageError, UnsupportedError) as error:
            raise named_as_option(error, ("context", "kv_type", "provider", "threads")) from None
    tell_if_embedded(path)
    for text in model.warnings:
        output.warn(f"{model.path}: {text}")
    return model


def load_adapter(model: Model, text: str) -> str:
    """The name of the adapter that ``--adapter`` asks for, in memory now: NAME, FILE, NAME=FILE, or "none"."""
    if text == NO_ADAPTER:
        return text
    name, file = _name_and_file(model, text)
    with closing(ProgressBar("Loading the adapter", in_bytes=True)) as bar:
        try:
            model.load_adapter(name, file, progress=bar)
        except UsageError as error:
            raise named_as_option(error, ("adapter",)) from None
    return name


def _name_and_file(model: Model, text: str) -> tuple[str, str | None]:
    if text in model.adapters:
        return text, None
    name, equals, file = text.partition("=")
    if equals and not Path(text).is_file():
        return name, file
    if text.endswith(".gguf") or Path(text).is_file():
        return Path(text).name.removesuffix(".gguf").removesuffix(".lora"), text
    return text, None  # the error lists the names
