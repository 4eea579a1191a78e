"""One new file that is there whole or not at all, whatever happens on the way."""

from __future__ import annotations

import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from phi4edge.bundle import UNFINISHED_PREFIX
from phi4edge.errors import DiskError, FileError, UsageError

_DISK_FAULTS = {getattr(errno, name, errno.ENOSPC) for name in ("ENOSPC", "EDQUOT", "EIO", "EFBIG")}


def require_writable(target: Path, sources: Iterable[str | os.PathLike[str]], *, force: bool) -> None:
    """UsageError when the target is one of the sources, a directory, or there already without ``force``."""
    if not target.name:
        raise UsageError("is not the name of a file", path=str(target))
    if not target.parent.is_dir():
        raise FileError("does not exist", path=str(target.parent), hint="make the directory first")
    if not os.path.lexists(target):
        return
    for source in sources:
        if target.exists() and Path(source).exists() and target.samefile(source):
            raise UsageError("is the input itself", path=str(target), hint="give another name for the output")
    if target.exists() and not target.is_file():
        raise UsageError("exists and is not a regular file", path=str(target))
    if not force:
        raise UsageError("is there already", path=str(target), hint="--force replaces it")


@contextmanager
def new_file(target: Path, n_bytes: int, *, force: bool) -> Iterator[Path]:
    """An empty file beside the target; it takes the target's name when the block ends without an exception.

    n_bytes: how long it will be.  The block must sync what it writes.  Raises DiskError, FileError, UsageError.
    """
    with disk_errors(target):
        _sweep(target)
        require_free(target.parent, n_bytes)
        temporary, descriptor = target.parent / f"{_prefix(target)}{secrets.token_hex(4)}", -1
        try:  # from before the file is made, so that Ctrl-C at any moment leaves none
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
            _try_lock(descriptor)
            yield temporary
            require_writable(target, (), force=force)  # another writer may have been quicker
            os.replace(temporary, target)  # noqa: PTH105
            sync_directory(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
            if descriptor >= 0:
                os.close(descriptor)


def _prefix(target: Path) -> str:
    return f"{UNFINISHED_PREFIX}{target.name[:100]}-"


def _sweep(target: Path) -> None:
    """Removes what was left when a writer of the same target was killed: files that nobody holds locked."""
    for path in target.parent.glob(f"{glob.escape(_prefix(target))}????????"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
            try:
                if _try_lock(descriptor):
                    path.unlink()
            finally:
                os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # not on Windows, where a file that is open cannot be removed anyway
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked by another, or a file system without locks
        return False
    return True


def require_free(directory: Path, n_bytes: int) -> None:
    """DiskError unless so much can be written."""
    free = shutil.disk_usage(directory).free
    if free < n_bytes:
        raise DiskError(f"{n_bytes} bytes are needed and {free} are free", path=str(directory))


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """What the system says about writing, as DiskError or FileError."""
    try:
        yield
    except (DiskError, FileError):
        raise
    except OSError as error:
        kind = DiskError if error.errno in _DISK_FAULTS else FileError
        raise kind(f"cannot be written: {error.strerror}", path=str(target)) from error


def sync_directory(directory: Path) -> None:
    """Puts the names in a directory on the disk."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
