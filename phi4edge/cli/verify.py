"""``phi4edge verify``: whether a bundle is whole."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from phi4edge.cli import output
from phi4edge.cli.loading import tell_if_embedded
from phi4edge.cli.options import Json
from phi4edge.cli.progress import ProgressBar

EXAMPLES = """
    phi4edge verify
    phi4edge verify phi4-mini-q4
    phi4edge verify phi4-mini-q4 && phi4edge chat phi4-mini-q4
"""


def verify(
    bundle: Annotated[
        str | None,
        typer.Argument(
            metavar="BUNDLE_DIR",
            help="A directory that 'convert' made. [default: nano, the small one embedded in phi4edge]",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that a bundle is whole: every file there, of its size and SHA-256, and no other."""
    from phi4edge.bundle import Bundle
    from phi4edge.embedded import model_path

    path = model_path(bundle)
    opened = Bundle.open(path)
    with closing(ProgressBar("Verifying", in_bytes=True)) as bar:
        opened.verify(bar)
    tell_if_embedded(bundle)
    parts = opened.manifest.parts
    if as_json:
        output.write_json({"bundle": path, "whole": True, "parts": [part.file for part in parts]})
        return
    for part in parts:
        output.write_text(f"{part.file}  {output.bytes_text(part.n_bytes)}  sha256 {part.sha256}\n")
    output.write_text(f"{path} is whole\n")
