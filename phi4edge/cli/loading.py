"""A model for a command: threads within what the machine has, and a progress bar."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from phi4edge import machine
from phi4edge.cli import output
from phi4edge.cli.options import Runtime, named_as_option
from phi4edge.cli.progress import ProgressBar
from phi4edge.errors import UsageError

if TYPE_CHECKING:
    from phi4edge.model import Model


def load_model(path: str, runtime: Runtime, *, context: int | None) -> Model:
    """The model at ``path``, ready to answer."""
    threads, warning = machine.clamp_threads(runtime.threads)
    if warning:
        output.warn(f"--threads: {warning}")
    with closing(ProgressBar("Loading", in_bytes=True)) as bar:
        from phi4edge.model import load

        try:
            model = load(
                path, context=context, threads=threads, kv_type=runtime.kv_type.value, isa=runtime.isa, progress=bar
            )
        except UsageError as error:
            raise named_as_option(error, ("context", "kv_type", "threads")) from None
    for text in model.warnings:
        output.warn(f"{path}: {text}")
    return model
