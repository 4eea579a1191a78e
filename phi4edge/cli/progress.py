"""A progress bar on standard error that appears only for work that takes a while, and only on a terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from phi4edge.cli import output

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_PATIENCE = 0.3  # seconds of work before a bar is worth showing


class ProgressBar:
    """A callable ``(done, total)``, which is what the library calls; :meth:`close` wipes the bar.

    ``title`` may be set to tell what is worked on now.
    """

    def __init__(self, title: str, *, in_bytes: bool = False) -> None:
        self.title = self._work = title
        self._in_bytes = in_bytes
        self._started = time.monotonic()
        self._enabled = output.is_terminal(sys.stderr)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __call__(self, done: int, total: int) -> None:
        if not self._enabled:
            return
        if self._progress is None:
            if time.monotonic() - self._started < _PATIENCE or done >= total:
                return
            self._progress = self._open()
            self._task = self._progress.add_task(self.title, total=total)
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total, description=self.title)

    def item(self, name: str, done: int, total: int) -> None:
        """Progress with the name of what is worked on; without one, the bar has its first title again."""
        self.title = name or self._work
        self(done, total)

    def close(self) -> None:
        self._enabled = False
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _open(self) -> Progress:
        from rich import progress as rich_progress
        from rich.console import Console

        is_bytes = self._in_bytes
        progress = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.DownloadColumn(binary_units=True) if is_bytes else rich_progress.MofNCompleteColumn(),
            *((rich_progress.TransferSpeedColumn(),) if is_bytes else ()),
            rich_progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,  # answers go there while the bar is shown
            refresh_per_second=4,  # drawing takes time from the threads that work
        )
        progress.start()
        return progress
