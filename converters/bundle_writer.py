"""Writing a bundle so that at any moment the old one or the new one is there, whole.

A new part never takes the place of a part of the bundle that is there: it gets the other of two names.  Then the
manifest is replaced, which is the one moment of change, and the old parts go.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4edge import _core
from phi4edge.bundle import MANIFEST, PART_NAME, UNFINISHED_PREFIX, Bundle, Manifest, Part
from phi4edge.converters.files import Progress, Written, hashed_file
from phi4edge.converters.new_file import disk_errors, require_free, sync_directory
from phi4edge.errors import BundleError, FileError, OutOfMemoryError, UsageError

_SPARE_BYTES = 1 << 20  # beside the weights: headers, vocabulary, manifest
WORKING_BYTES = 384 << 20  # of memory: pieces of a few large tensors, in the source's type, in float32 and converted


@dataclass(frozen=True)
class PlannedPart:
    """A part that is known but for its bytes."""

    role: str
    stem: str  # the file is stem + suffix, or stem + ".2" + suffix where the bundle in place uses the former
    suffix: str
    n_bytes: int  # of the new file, about
    source_bytes: int  # that will be read for it, about
    details: Mapping[str, Any]
    write: Callable[[Path, Progress], Written]

    @property
    def names(self) -> tuple[str, str]:
        return self.stem + self.suffix, f"{self.stem}.2{self.suffix}"


def require_target(root: Path, source: Path, *, force: bool) -> None:
    """UsageError, FileError unless a bundle may be written here; what is in place stays as it is."""
    _old_names(root, source, force)


def write_bundle(
    root: Path,
    source: Path,
    parts: Sequence[PlannedPart],
    manifest: Callable[[tuple[Part, ...], tuple[Written, ...]], Manifest],
    *,
    force: bool,
    progress: Progress,
) -> Bundle:
    """Writes the parts and the manifest.  Whatever happens on the way, the bundle that was there is still whole."""
    if (available := _core.available_memory()) < WORKING_BYTES:
        raise OutOfMemoryError(
            f"a conversion needs about {WORKING_BYTES >> 20} MiB of memory, but {available >> 20} MiB are available",
            hint="close other programs",
        )
    with disk_errors(root), _directory(root), _lock(root):
        old_names = _old_names(root, source, force)
        _sweep(root)
        require_free(root, sum(part.n_bytes for part in parts) + _SPARE_BYTES)
        with ExitStack() as temporaries:
            made: list[tuple[Path, Part, Written]] = []
            for part, show in zip(parts, _part_progress(parts, progress), strict=True):
                temporary = temporaries.enter_context(_temporary(root))
                written = part.write(temporary, show)
                name = next(name for name in part.names if name not in old_names)
                made.append((temporary, Part(part.role, name, written.n_bytes, written.sha256, part.details), written))
            document = manifest(tuple(part for _, part, _ in made), tuple(written for _, _, written in made))
            manifest_file = temporaries.enter_context(_temporary(root))
            with hashed_file(manifest_file) as file:
                file.write(document.to_json())
            try:
                for temporary, new, _ in made:
                    os.replace(temporary, root / new.file)  # noqa: PTH105
                sync_directory(root)  # the parts must be there before the manifest that names them
                os.replace(manifest_file, root / MANIFEST)  # noqa: PTH105
            except BaseException:
                for _, new, _ in made:
                    if not _names_part(root, new.file):  # unless the manifest was just replaced
                        (root / new.file).unlink(missing_ok=True)
                raise
        sync_directory(root)
        _sweep(root)  # the old parts
    return Bundle(root, document)


def _part_progress(parts: Sequence[PlannedPart], progress: Progress) -> Iterator[Progress]:
    """For each part a progress function that counts on from the parts before it."""
    total = sum(part.source_bytes for part in parts)
    before = 0
    for part in parts:

        def show(name: str, done: int, of: int, before: int = before, weight: int = part.source_bytes) -> None:
            progress(name, before + (weight * done // of if of else 0), total)

        yield show
        before += part.source_bytes


def _old_names(root: Path, source: Path, force: bool) -> set[str]:
    """The files of the bundle that will be replaced.  UsageError when the target is something that must stay."""
    if not root.exists() and not root.is_symlink():
        if not root.absolute().parent.is_dir():
            raise FileError("does not exist", path=str(root.absolute().parent), hint="make the directory first")
        return set()
    if not root.is_dir():
        raise UsageError("exists and is not a directory", path=str(root))
    if root.samefile(source):
        raise UsageError("is the checkpoint itself", path=str(root), hint="give another directory for the bundle")
    if not (root / MANIFEST).exists():
        names = {path.name for path in root.iterdir() if not path.name.startswith(UNFINISHED_PREFIX)}
        if not all(PART_NAME.fullmatch(name) for name in names):
            raise UsageError("is neither empty nor a bundle", path=str(root), hint="give a new directory")
        if names and not force:  # of a conversion that was killed just before its end, or the user's own
            raise UsageError(f"has a {min(names)} and no manifest", path=str(root), hint="--force replaces it")
        return set()
    if not force:
        raise UsageError("is there already", path=str(root), hint="--force replaces it")
    try:
        return {part.file for part in Bundle.open(root).manifest.parts}
    except BundleError:  # damaged: nothing of it needs to survive, and no part of it is taken for one of ours
        return set()


def _sweep(root: Path) -> None:
    """Removes what a killed conversion left: temporary files, and parts that no manifest names."""
    for path in root.iterdir():
        if path.name.startswith(UNFINISHED_PREFIX) or (
            PART_NAME.fullmatch(path.name) and not _names_part(root, path.name)
        ):
            path.unlink()


def _names_part(root: Path, name: str) -> bool:
    """Whether the manifest in place names this file.  One that cannot be read names everything."""
    try:
        return name in {part.file for part in Bundle.open(root).manifest.parts}
    except FileError:
        return False
    except BundleError:
        return True


@contextmanager
def _temporary(root: Path) -> Iterator[Path]:
    """The name of a file to make, gone afterwards unless it was renamed.  The directory is ours: see _lock."""
    path = root / f"{UNFINISHED_PREFIX}{secrets.token_hex(8)}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _directory(root: Path) -> Iterator[None]:
    """Makes the directory if it is missing, and removes it again when nothing came of it."""
    made = not root.exists()
    try:  # from before it is made, so that Ctrl-C at any moment leaves none
        root.mkdir(exist_ok=True)
        yield
    except BaseException:
        if made:
            with suppress(OSError):  # not empty: another writer is at work
                root.rmdir()
        raise


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    """One writer at a time.  The directory itself is locked, so no file stays behind, whatever happens to us."""
    try:
        import fcntl
    except ImportError:  # not on Windows; two writers there have names of their own until the manifest
        yield
        return
    descriptor = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError("another conversion writes here", path=str(root), hint="wait until it is done") from None
        yield
    finally:
        os.close(descriptor)
