"""``phi4edge pull``: a checkpoint from the Hugging Face hub, and the bundle made of it."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phi4edge.cli import output
from phi4edge.cli.convert import Conversion, Force, Threads, converted_as_json, converted_lines, mix_name
from phi4edge.cli.options import Json
from phi4edge.cli.progress import ProgressBar

if TYPE_CHECKING:
    from phi4edge.converters.pull import Pulled

EXAMPLES = """
    phi4edge pull microsoft/Phi-4-mini-instruct
    phi4edge pull microsoft/Phi-4-multimodal-instruct phi4-mm-q4 --quant q4_k_m --encoders int8
    phi4edge pull microsoft/Phi-4-mini-instruct --revision main --download-only --checkpoint-dir Phi-4-mini
    phi4edge pull microsoft/Phi-4-mini-instruct phi4-mini-q3 --bits 3 --offline
"""


def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Its name on the hub, as owner/name.")],
    conversion: Conversion,
    bundle: Annotated[
        str | None, typer.Argument(metavar="BUNDLE_DIR", help="The directory to make. [default: NAME-MIX, here]")
    ] = None,
    revision: Annotated[str, typer.Option(metavar="REV", help="A branch, a tag or a commit.")] = "main",
    checkpoint_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Keep the checkpoint here. [default: the cache of the hub's own tools]"),
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Open no connection: use what was pulled before.")] = False,
    download_only: Annotated[bool, typer.Option("--download-only", help="Do not convert.")] = False,
    force: Force = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Fetch a checkpoint from the Hugging Face hub and convert it.  What was cut is continued, not begun again."""
    name = mix_name(conversion.quant, conversion.bits).lower()
    target = bundle or f"{repo.rstrip('/').rpartition('/')[2]}-{name}"
    if not download_only:  # before gigabytes are fetched for nothing
        from phi4edge.converters.bundle_writer import require_target

        conversion.options()
        require_target(Path(target), Path(target).absolute().parent, force=force)
    pulled = _download(repo, revision, checkpoint_dir, offline)
    if download_only:
        place = {"checkpoint": str(pulled.directory), "commit": pulled.commit}
        if as_json:
            output.write_json(place)
        else:
            output.write_text(f"{pulled.directory} is ready: phi4edge convert {pulled.directory} {target}\n")
        return
    done = conversion.run(str(pulled.directory), target, force=force, threads=threads)
    if as_json:
        origin: dict[str, Any] = {"checkpoint": str(pulled.directory), "commit": pulled.commit}
        output.write_json(converted_as_json(target, done) | origin)
    else:
        output.write_text("\n".join(converted_lines(target, done)) + "\n")


def _download(repo: str, revision: str, directory: str | None, offline: bool) -> Pulled:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the library is imported
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    from phi4edge.converters.pull import pull as pull_checkpoint

    with closing(ProgressBar("Fetching", in_bytes=True)) as bar:
        return pull_checkpoint(repo, revision=revision, directory=directory, offline=offline, progress=bar.item)
