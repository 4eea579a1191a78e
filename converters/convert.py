"""A checkpoint directory to a bundle directory, so that at any moment the old bundle or the new one is there, whole.

A new part never takes the place of a part of the bundle that is there: it gets the other of two names.  Then the
manifest is replaced, which is the one moment of change, and the old part goes.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import phi4edge
from phi4edge.bundle import BACKBONE, MANIFEST, UNFINISHED_PREFIX, Bundle, Manifest, Part
from phi4edge.converters.backbone import BackbonePlan, Progress, Written, plan_backbone, write_backbone
from phi4edge.converters.checkpoint import Checkpoint
from phi4edge.converters.mixes import CONVERTIBLE
from phi4edge.converters.variants import variant_of
from phi4edge.errors import BundleError, DiskError, FileError, UsageError

_PART_NAMES = ("backbone.gguf", "backbone-2.gguf")
_SPARE_BYTES = 1 << 20  # beside the weights: header, vocabulary, manifest
_DISK_FAULTS = {getattr(errno, name, errno.ENOSPC) for name in ("ENOSPC", "EDQUOT", "EIO", "EFBIG")}


@dataclass(frozen=True)
class Converted:
    bundle: Bundle
    plan: BackbonePlan


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    mix: str,
    *,
    force: bool = False,
    n_threads: int = 1,
    progress: Progress = lambda tensor, done, total: None,
) -> Converted:
    """Converts the backbone of a checkpoint with one of the type mixes ("Q4_K_M"); replaces a bundle only if ``force``.

    Raises FileError, BundleError, UsageError, DiskError, UnsupportedError; then the target is as it was before.
    """
    root = Path(target)
    mix = mix.upper()
    if mix not in CONVERTIBLE:
        raise UsageError(f"'{mix}' is no type mix", hint=f"choose one of {', '.join(CONVERTIBLE).lower()}")
    with Checkpoint(source) as checkpoint:
        old = _old_manifest(root, checkpoint.directory, force)
        plan = plan_backbone(checkpoint, variant_of(checkpoint), mix)
        with _disk_errors(root), _directory(root), _lock(root):
            old = _old_manifest(root, checkpoint.directory, force)  # another writer may have been quicker
            _sweep(root)
            free = shutil.disk_usage(root).free
            if free < plan.n_bytes + _SPARE_BYTES:
                raise DiskError(f"{plan.n_bytes + _SPARE_BYTES} bytes are needed and {free} are free", path=str(root))
            manifest = _write(root, checkpoint, plan, mix, old, n_threads, progress)
    return Converted(Bundle(root, manifest), plan)


def _write(
    root: Path,
    checkpoint: Checkpoint,
    plan: BackbonePlan,
    mix: str,
    old: Manifest | None,
    n_threads: int,
    progress: Progress,
) -> Manifest:
    old_names = {part.file for part in old.parts} if old else set()
    with _temporary(root) as temporary:
        written = write_backbone(temporary, checkpoint, plan, n_threads=n_threads, progress=progress)
        name = next(name for name in _PART_NAMES if name not in old_names)
        manifest = _manifest(plan, written, name, mix)
        os.replace(temporary, root / name)  # noqa: PTH105
    try:
        with _temporary(root) as temporary:
            with temporary.open("wb") as file:
                file.write(manifest.to_json())
                file.flush()
                os.fsync(file.fileno())
            _sync_directory(root)  # the part must be there before the manifest that names it
            os.replace(temporary, root / MANIFEST)  # noqa: PTH105
    except BaseException:
        # Unless the manifest was already replaced when we were interrupted.
        if not _names_part(root, name):
            (root / name).unlink(missing_ok=True)
        raise
    _sync_directory(root)
    for leftover in old_names - {name}:
        (root / leftover).unlink(missing_ok=True)
    return manifest


def _manifest(plan: BackbonePlan, written: Written, name: str, mix: str) -> Manifest:
    n_values = sum(values for values, _ in plan.bytes_by_type().values())
    details = {
        "mix": mix,
        "types": {type_name: n_bytes for type_name, (_, n_bytes) in plan.bytes_by_type().items()},
        "bits_per_weight": round(8 * plan.n_bytes / n_values, 4),
    }
    provenance = {
        "source_sha256": written.source_sha256,
        "tool": f"phi4edge {phi4edge.__version__}",
        "options": {"quant": mix},
        "unused_tensors": {reason: len(names) for reason, names in plan.unused.items()},
    }
    part = Part(BACKBONE, name, written.n_bytes, written.sha256, details)
    return Manifest(plan.variant.name, (part,), plan.variant.placeholders, provenance)


def _old_manifest(root: Path, source: Path, force: bool) -> Manifest | None:
    """The manifest that will be replaced.  UsageError when the target is something that must stay."""
    if not root.exists() and not root.is_symlink():
        if not root.absolute().parent.is_dir():
            raise FileError("does not exist", path=str(root.absolute().parent), hint="make the directory first")
        return None
    if not root.is_dir():
        raise UsageError("exists and is not a directory", path=str(root))
    if root.samefile(source):
        raise UsageError("is the checkpoint itself", path=str(root), hint="give another directory for the bundle")
    if not (root / MANIFEST).exists():
        names = {path.name for path in root.iterdir() if not path.name.startswith(UNFINISHED_PREFIX)}
        if names - set(_PART_NAMES):
            raise UsageError("is neither empty nor a bundle", path=str(root), hint="give a new directory")
        if names and not force:  # of a conversion that was killed just before its end, or the user's own
            raise UsageError(f"has a {min(names)} and no manifest", path=str(root), hint="--force replaces it")
        return None
    if not force:
        raise UsageError("is there already", path=str(root), hint="--force replaces it")
    try:
        return Bundle.open(root).manifest
    except BundleError:  # damaged: nothing of it needs to survive, but its files may not be taken for ours
        parts = tuple(Part("damaged", name, 0, "") for name in _PART_NAMES if (root / name).exists())
        return Manifest("", parts[:1])


def _sweep(root: Path) -> None:
    """Removes what a killed conversion left: temporary files, and parts that no manifest names."""
    for path in root.iterdir():
        if path.name.startswith(UNFINISHED_PREFIX) or (path.name in _PART_NAMES and not _names_part(root, path.name)):
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
    """A new file in the directory, gone afterwards unless it was renamed."""
    descriptor, name = tempfile.mkstemp(prefix=UNFINISHED_PREFIX, dir=root)
    try:
        os.close(descriptor)
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)  # as any other new file
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def _directory(root: Path) -> Iterator[None]:
    """Makes the directory if it is missing, and removes it again when nothing came of it."""
    made = not root.exists()
    root.mkdir(exist_ok=True)
    try:
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


@contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except (DiskError, FileError):
        raise
    except OSError as error:
        kind = DiskError if error.errno in _DISK_FAULTS else FileError
        raise kind(f"cannot be written: {error.strerror}", path=str(root)) from error


def _sync_directory(root: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(root, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
