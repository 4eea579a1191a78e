"""A bundle: a directory with a manifest, which says what each file beside it is, how long, and its SHA-256.

>>> bundle = Bundle.open("phi4-mini-q4")  # doctest: +SKIP
>>> bundle.part("backbone")  # doctest: +SKIP
PosixPath('phi4-mini-q4/backbone.gguf')
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from phi4edge.errors import BundleError, FileError
from phi4edge.strict_json import parse_object, read_bytes

MANIFEST = "manifest.json"
FORMAT = "phi4edge-bundle"
VERSION = 1
BACKBONE, VISION, AUDIO = "backbone", "vision", "audio"  # roles
ADAPTER_PREFIX = "adapter:"  # of the role of an adapter; its name follows
UNFINISHED_PREFIX = ".phi4edge-"  # files of a conversion that was killed; no part of the bundle, swept by the next one
# Names of parts that a conversion gives.  Where the manifest does not name one, a conversion was killed between giving
# it this name and replacing the manifest; nothing reads it, and the next conversion removes it.
PART_NAME = re.compile(r"backbone(\.2)?\.gguf|(vision|audio)(\.2)?\.onnx|[a-z0-9][a-z0-9_-]*(\.2)?\.lora\.gguf")

_PACKAGE = Path(__file__).parent  # in a bundle of the package, files may be links: some installers make them so
_LARGEST_MANIFEST = 4 << 20  # bytes
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BYTES_AT_ONCE = 4 << 20

Progress = Callable[[int, int], bool | None]  # (bytes done, bytes in all)


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a bundle.  ``details`` is for people and tools; the router alone reads "merged_adapter" in it."""

    role: str  # "backbone", "vision", "audio", or "adapter:" and the adapter's name
    file: str
    n_bytes: int
    sha256: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What ``manifest.json`` says."""

    variant: str
    parts: tuple[Part, ...]
    placeholders: Mapping[str, str] = field(default_factory=dict)  # "image" -> the token that stands for pictures
    # What a request has -> the adapter it needs and the projector of sounds: {"image": {"adapter": "vision"}, ...}.
    router: Mapping[str, Any] = field(default_factory=dict)
    processors: Mapping[str, Any] = field(default_factory=dict)  # numbers of the image and audio processors
    provenance: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def to_json(self) -> bytes:
        document = {
            "format": FORMAT,
            "version": self.version,
            "variant": self.variant,
            "parts": [asdict(part) for part in self.parts],
            "placeholders": dict(self.placeholders),
            "router": dict(self.router),
            "processors": dict(self.processors),
            "provenance": dict(self.provenance),
        }
        return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, path: str) -> Manifest:
        """Raises BundleError, which lists all wrong entries."""
        document = parse_object(data, path)
        if document.get("format") != FORMAT:
            raise BundleError(f"is not the manifest of a bundle: format is not '{FORMAT}'", path=path)
        version = document.get("version")
        if not _is_int(version) or version != VERSION:
            raise BundleError(
                f"version {version!r} cannot be read, only {VERSION}",
                path=path,
                field="version",
                hint="update phi4edge, or convert the checkpoint again",
            )
        problems: list[str] = []
        if not isinstance(document.get("variant"), str):
            problems.append("variant is not a string")
        tables = {name: document.get(name, {}) for name in ("placeholders", "router", "processors", "provenance")}
        problems += [f"{name} is not an object" for name, value in tables.items() if not isinstance(value, dict)]
        entries = document.get("parts")
        if not isinstance(entries, list) or not entries:
            problems.append("parts is not a list of parts")
            entries = []
        parts = [part for index, entry in enumerate(entries) if (part := _part(entry, index, problems))]
        for what in ("role", "file"):
            values = [getattr(part, what).casefold() for part in parts]
            problems += [f"two parts have the {what} '{value}'" for value in {v for v in values if values.count(v) > 1}]
        _raise_if(problems, path)
        return cls(document["variant"], tuple(parts), **tables)


@dataclass(frozen=True, slots=True)
class Bundle:
    directory: Path
    manifest: Manifest

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Bundle:
        """Reads the manifest and checks that all parts are there in their sizes; the contents are not read.

        Raises FileError, BundleError.
        """
        root = Path(directory)
        path = root / MANIFEST
        if path.is_symlink() and root.parent != _PACKAGE:
            raise BundleError("is a symbolic link", path=str(path), hint="a bundle holds its files itself")
        bundle = cls(root, Manifest.from_json(read_bytes(path, at_most=_LARGEST_MANIFEST), str(path)))
        _raise_if(bundle._problems_of_sizes(), str(root))
        return bundle

    def part(self, role: str) -> Path:
        """The file with this role; BundleError when the bundle has none."""
        for part in self.manifest.parts:
            if part.role == role:
                return self.directory / part.file
        raise BundleError(f"has no {role}", path=str(self.directory))

    def adapters(self) -> dict[str, Path]:
        """The files of the adapters by name."""
        return {
            part.role.removeprefix(ADAPTER_PREFIX): self.directory / part.file
            for part in self.manifest.parts
            if part.role.startswith(ADAPTER_PREFIX)
        }

    def verify(self, progress: Progress | None = None, *, others_allowed: bool = False) -> None:
        """Reads every part; BundleError lists each file that is damaged or, unless allowed, does not belong here."""
        known = {MANIFEST, *(part.file for part in self.manifest.parts)}
        present = [] if others_allowed else sorted(os.listdir(self.directory))  # noqa: PTH208 - names are all we want
        problems = [
            f"'{name}' is not in the manifest"
            for name in present
            if name not in known and not name.startswith(UNFINISHED_PREFIX) and not PART_NAME.fullmatch(name)
        ]
        done, total = 0, sum(part.n_bytes for part in self.manifest.parts)
        for part in self.manifest.parts:

            def show(n_bytes: int, before: int = done) -> None:
                if progress is not None:
                    progress(before + n_bytes, total)

            if _sha256_of(self.directory / part.file, show) != part.sha256:
                problems.append(f"'{part.file}' is damaged: its SHA-256 is not the one in the manifest")
            done += part.n_bytes
        _raise_if(problems, str(self.directory))

    def _problems_of_sizes(self) -> list[str]:
        problems = []
        for part in self.manifest.parts:
            try:
                status = (self.directory / part.file).stat(follow_symlinks=self.directory.parent == _PACKAGE)
            except FileNotFoundError:
                problems.append(f"'{part.file}' is missing")
                continue
            except OSError as error:
                problems.append(f"'{part.file}' cannot be read: {error.strerror}")
                continue
            if not stat.S_ISREG(status.st_mode):
                kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a regular file"
                problems.append(f"'{part.file}' is {kind}")
            elif status.st_size != part.n_bytes:
                problems.append(f"'{part.file}' has {status.st_size} bytes instead of {part.n_bytes}")
        return problems


def bundle_at(path: str | os.PathLike[str]) -> Bundle | None:
    """The bundle in a directory; None when the path is something else, such as a GGUF file."""
    return Bundle.open(path) if (Path(path) / MANIFEST).is_file() else None


def backbone_of(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The backbone of a bundle directory; any other path is returned as it is."""
    bundle = bundle_at(path)
    return path if bundle is None else bundle.part(BACKBONE)


def _part(entry: Any, index: int, problems: list[str]) -> Part | None:
    where = f"part {index}"
    if not isinstance(entry, dict):
        problems.append(f"{where} is not an object")
        return None
    values: list[Any] = [entry.get(name) for name in ("role", "file", "n_bytes", "sha256")]
    role, file, n_bytes, sha256 = values
    details = entry.get("details", {})
    found = len(problems)
    if not isinstance(role, str) or not _PLAIN_NAME.fullmatch(role.removeprefix(ADAPTER_PREFIX)):
        problems.append(f"{where}: role {role!r:.80} is not a name")
    if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file) or file == MANIFEST:
        problems.append(f"{where}: file {file!r:.80} is not the plain name of a file in the bundle")
    if not _is_int(n_bytes) or not 0 <= n_bytes < 1 << 63:
        problems.append(f"{where}: n_bytes {n_bytes!r:.80} is not a size")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        problems.append(f"{where}: sha256 is not 64 hexadecimal digits")
    if not isinstance(details, dict):
        problems.append(f"{where}: details is not an object")
    return None if len(problems) > found else Part(role, file, n_bytes, sha256, details)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _raise_if(problems: list[str], path: str) -> None:
    if problems:
        raise BundleError("; ".join(problems), path=path, hint="copy the bundle again, or convert the checkpoint again")


def _sha256_of(path: Path, progress: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    done = 0
    try:
        with path.open("rb") as file:
            while piece := file.read(_BYTES_AT_ONCE):
                digest.update(piece)
                done += len(piece)
                progress(done)
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror}", path=str(path)) from error
    return digest.hexdigest()
