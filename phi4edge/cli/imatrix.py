"""``phi4edge imatrix``: which columns of the weights matter on a text, for ``quantize`` and ``convert``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from phi4edge import machine
from phi4edge.cli import output
from phi4edge.cli.options import Json, RequiredModelPath, named_as_option
from phi4edge.cli.progress import ProgressBar
from phi4edge.errors import InputError, UsageError

EXAMPLES = """
    phi4edge imatrix phi4-mini-f16.gguf --text corpus.txt -o phi4-mini.imatrix
    phi4edge imatrix phi4-mini-q8.gguf --text corpus.txt -o phi4-mini.imatrix --chunks 100
    phi4edge quantize phi4-mini-f16.gguf phi4-mini-q2.gguf --quant q2_k --imatrix phi4-mini.imatrix
"""

_LONGEST_TEXT = 256 << 20  # bytes
_SHORTEST_CHUNK = 16  # tokens


def imatrix(
    model: RequiredModelPath,
    text: Annotated[
        str, typer.Option(metavar="FILE", help="A text of the kind that the model will read and write; 100 kB or more.")
    ],
    target: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The importance matrix to make.")],
    chunks: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Read only the first N chunks. [default: the whole text]")
    ] = None,
    context: Annotated[
        int,
        typer.Option(
            "--context", "-c", metavar="TOKENS", min=_SHORTEST_CHUNK, help="Tokens of a chunk, which is read by itself."
        ),
    ] = 512,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")] = False,
    threads: Annotated[
        int | None,
        typer.Option("--threads", "-t", metavar="N", help="Threads to compute with. [default: one per physical core]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compute an importance matrix: how much each column of the weights matters on a text."""
    from phi4edge.bundle import backbone_of
    from phi4edge.converters.imatrix import collect_imatrix, write_imatrix
    from phi4edge.converters.new_file import require_writable

    require_writable(Path(target), (backbone_of(model), text), force=force)
    words = _read(text)
    n_threads, warning = machine.clamp_threads(threads)
    if warning:
        output.warn(f"--threads: {warning}")

    def tokens_of(metadata: Mapping[str, Any]) -> list[list[int]]:
        return _chunks(metadata, model, words, context)[:chunks]

    with closing(ProgressBar("Loading", in_bytes=True)) as loading, closing(ProgressBar("Reading")) as reading:

        def show(done: int, total: int) -> None:
            loading.close()
            reading(done, total)

        try:
            found = collect_imatrix(
                model,
                tokens_of,
                chunk_size=context,
                dataset=Path(text).name,
                n_threads=n_threads,
                loading=loading,
                progress=show,
            )
        except UsageError as error:
            raise named_as_option(error, ("context",)) from None
    n_bytes = write_imatrix(target, found, force=force)
    n_tokens = max(squares.n_tokens for squares in found.matrices.values())
    if as_json:
        counts = {"chunks": found.n_chunks, "chunk_size": found.chunk_size, "tokens": n_tokens}
        output.write_json({"imatrix": target, "n_bytes": n_bytes, "matrices": len(found.matrices), **counts})
    else:
        output.write_text(
            f"{target}: {len(found.matrices)} matrices, {n_tokens:,} tokens in {found.n_chunks} chunks, "
            f"{output.bytes_text(n_bytes)}\n"
        )


def _read(path: str) -> str:
    from phi4edge.strict_json import read_bytes

    data = read_bytes(Path(path), at_most=_LONGEST_TEXT)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 at byte {error.start}", path=path, hint="save the text as UTF-8") from error


def _chunks(metadata: Mapping[str, Any], path: str, text: str, size: int) -> list[list[int]]:
    """Token ids of the text in pieces of ``size``, each with the token that begins a text where the model wants it."""
    from phi4edge.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_metadata(metadata, path)
    ids = tokenizer.encode(text, add_bos=False)
    start = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    step = size - len(start)
    return [start + ids[first : first + step] for first in range(0, len(ids), step)]
