"""The small model that is a part of the package: what answers where no model is named.

>>> phi4edge.load()  # doctest: +SKIP
<phi4edge.Model 'Phi-4-multimodal' from '.../phi4edge/nano', context 8192, 2 threads, x86_avx2>
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from phi4edge.errors import BundleError, FileError, InputError

NAME = "nano"
DIRECTORY = Path(__file__).parent / NAME
SAMPLES = Path(__file__).parent / "samples"  # questions for it, with their pictures and recordings


def model_path(model: str | os.PathLike[str] | None) -> str:
    """Where a model is: as given, or the embedded one for None, and for its name where there is no such path.

    FileError, BundleError when the embedded one is damaged; it is read whole, once in a process.
    """
    path = NAME if model is None else os.fspath(model)
    if model is None or (path == NAME and not os.path.lexists(path)):
        _require_whole(DIRECTORY)
        return str(DIRECTORY)
    return path


@contextmanager
def part_of_the_installation() -> Iterator[None]:
    """Makes an error about a file of the package say that it is not the user's."""
    try:
        yield
    except (FileError, BundleError, InputError) as error:
        raise type(error)(
            f"this installation of phi4edge is damaged: {error.problem}",
            path=error.path,
            field=error.field,
            hint="install phi4edge again",
        ) from error


@cache
def _require_whole(directory: Path) -> None:
    from phi4edge.bundle import Bundle  # not needed for --help

    with part_of_the_installation():
        Bundle.open(directory).verify(others_allowed=True)
