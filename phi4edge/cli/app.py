"""The commands and how they are started."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from phi4edge.cli import (
    bench,
    chat,
    convert,
    demo,
    errors,
    imatrix,
    info,
    output,
    pull,
    quantize,
    run,
    transcribe,
    verify,
    version,
)
from phi4edge.cli.help import HelpfulCommand
from phi4edge.cli.options import expand

app = typer.Typer(
    name="phi4edge",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
for module in (demo, run, chat, transcribe, pull, convert, quantize, imatrix, verify, info, bench, version):
    name = module.__name__.rpartition(".")[2]
    app.command(name, cls=HelpfulCommand, epilog=module.EXAMPLES)(expand(getattr(module, name)))


@app.callback(invoke_without_command=True)
def phi4edge(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Run Phi-4 and related models from GGUF files, on this computer's processor.

    Start with: phi4edge demo
    """
    if show_version:
        version.version(as_json=False, short=True)
        raise typer.Exit
    if context.invoked_subcommand is None:
        sys.stderr.write(context.get_help() + "\n")
        raise typer.Exit(2)


def run_app(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    output.prepare_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    if "_PHI4EDGE_COMPLETE" in os.environ:  # the shell asks for completions
        command.main(words, prog_name="phi4edge")

    def start() -> None:
        # Not command.main(): it would decide about Ctrl-C and closed pipes before we can.
        with command.make_context("phi4edge", words) as context:
            command.invoke(context)

    options = words[: words.index("--")] if "--" in words else words
    return errors.run_guarded(start, as_json="--json" in options)
