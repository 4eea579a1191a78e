"""The command line: ``phi4edge run``, ``chat``, ``pull``, ``convert``, ``quantize``, ``imatrix``, ``verify`` and so on.

The answer goes to standard output and everything else to standard error.  One file per command; nothing heavy is
imported before a command needs it, so that ``--help`` is immediate on a small computer.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line (``sys.argv[1:]`` unless given) and returns its exit code.

    >>> main(["version"])  # doctest: +SKIP
    0
    """
    try:
        from phi4edge.cli.app import run_app

        return run_app(arguments)
    except KeyboardInterrupt:  # while the modules above were loading
        return 130
