"""Files of the Hugging Face hub to this disk: a part that is there is continued, and every byte is in a hash.

huggingface_hub makes the connections.  Its own downloads throw a part of a file away when the process ends, and compare
sizes where hashes are known.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from phi4edge.converters.files import Progress
from phi4edge.errors import BundleError, DiskError, FileError, UsageError

_SPARE_BYTES = 1 << 20
_PIECE = 1 << 20
_PASSING_STATUSES = (408, 429, 500, 502, 503, 504)
_MOST_TRIES = 5  # without a byte in between


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.  ``digest`` is its SHA-256, or the SHA-1 that git has for a small file."""

    name: str
    n_bytes: int
    digest: str


class Download:
    """Some files of a commit, one after the other."""

    def __init__(
        self, repo: str, commit: str, files: Sequence[RemoteFile], places: Mapping[str, Path], progress: Progress
    ) -> None:
        self._repo = repo
        self._commit = commit
        self._files = files
        self._places = places
        self._progress = progress
        self._total = sum(file.n_bytes for file in files)
        self._done = 0

    def run(self, *, trust_hashed_names: bool) -> None:
        """With ``trust_hashed_names``, a file in place is right: it is named by its hash and came there by a rename."""
        absent = []
        for file in self._files:
            place = self._places[file.name]
            is_there = place.is_file() and place.stat().st_size == file.n_bytes
            if is_there and (trust_hashed_names or self._digest_of(place, file) == file.digest):
                self._done += file.n_bytes
            else:
                absent.append(file)
        self._require_space(absent)
        for file in absent:
            self._fetch(file)
        self._progress("", self._done, self._total)

    def _require_space(self, files: Sequence[RemoteFile]) -> None:
        for file in files:
            self._places[file.name].parent.mkdir(parents=True, exist_ok=True)
        needed = sum(file.n_bytes - _size(self._part(file)) for file in files)
        folder = self._places[self._files[0].name].parent
        free = shutil.disk_usage(folder).free if files else 0
        if files and free < needed + _SPARE_BYTES:
            raise DiskError(
                f"{needed + _SPARE_BYTES} bytes are needed and {free} are free",
                path=str(folder),
                hint="free some, or give another disk with --checkpoint-dir",
            )

    def _part(self, file: RemoteFile) -> Path:
        place = self._places[file.name]
        return place.with_name(f"{place.name}.{file.digest[:8]}.incomplete")

    def _fetch(self, file: RemoteFile) -> None:
        part = self._part(file)
        with _locked(part) as opened:
            digest = _new_digest(file)
            if self._hash(opened, file, digest) > file.n_bytes:
                digest = _start_again(opened, file)
            found = self._receive(opened, file, digest).hexdigest()
            opened.flush()
            os.fsync(opened.fileno())
        if found != file.digest:
            part.unlink()
            raise BundleError(
                f"what came is not what was promised: its hash is {found}, not {file.digest}",
                path=f"{self._repo}/{file.name}",
                hint="pull it again",
            )
        part.replace(self._places[file.name])
        self._done += file.n_bytes

    def _receive(self, opened: BinaryIO, file: RemoteFile, digest: Any) -> Any:
        """Appends what is missing, over as many connections as it takes; returns the digest of the whole."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError

        url = hf_hub_url(self._repo, file.name, revision=self._commit)
        n_tries = 0
        while (have := opened.tell()) < file.n_bytes:
            try:
                with _connection(url, have) as response:
                    if have and response.status_code != 206:  # all of it comes, not the rest
                        digest = _start_again(opened, file)
                    for piece in response.iter_bytes():
                        if opened.tell() + len(piece) > file.n_bytes:
                            raise self._wrong_size(file)
                        opened.write(piece)
                        digest.update(piece)
                        self._show(file, opened.tell())
                if opened.tell() < file.n_bytes:
                    raise self._wrong_size(file)
            except HfHubHTTPError as error:
                if error.response.status_code not in _PASSING_STATUSES or n_tries == _MOST_TRIES:
                    raise
            except transport_error():
                if n_tries == _MOST_TRIES:
                    raise
            if opened.tell() > have:
                n_tries = 0
            if opened.tell() < file.n_bytes:
                n_tries += 1
                time.sleep(min(2.0 ** (n_tries - 2), 8.0))
        return digest

    def _wrong_size(self, file: RemoteFile) -> FileError:
        return FileError(
            f"the server does not send the {file.n_bytes} bytes that it announced",
            path=f"{self._repo}/{file.name}",
            hint="pull it again",
        )

    def _hash(self, opened: BinaryIO, file: RemoteFile, digest: Any) -> int:
        """Adds what is in a file to the digest, and returns how much that is."""
        have = 0
        while piece := opened.read(_PIECE):
            digest.update(piece)
            have += len(piece)
            self._show(file, have)
        return have

    def _digest_of(self, place: Path, file: RemoteFile) -> str:
        digest = _new_digest(file)
        with place.open("rb") as opened:
            self._hash(opened, file, digest)
        return str(digest.hexdigest())

    def _show(self, file: RemoteFile, n_bytes: int) -> None:
        self._progress(file.name, self._done + min(n_bytes, file.n_bytes), self._total)


def _new_digest(file: RemoteFile) -> Any:
    if len(file.digest) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.n_bytes, usedforsecurity=False)  # what git names a file by


def _start_again(opened: BinaryIO, file: RemoteFile) -> Any:
    opened.seek(0)
    opened.truncate()
    return _new_digest(file)


@contextmanager
def _connection(url: str, start: int) -> Iterator[Any]:
    """The answer to a request for a file from a byte on.  Raises the library's errors."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff  # type: ignore[attr-defined]

    headers = build_hf_headers() | {"Accept-Encoding": "identity"}  # a part of a compressed file is no use
    if start:
        headers["Range"] = f"bytes={start}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with http_stream_backoff(
        "GET", url, headers=headers, timeout=timeout, retry_on_exceptions=(), retry_on_status_codes=()
    ) as response:
        hf_raise_for_status(response)
        yield response


def transport_error() -> type[BaseException]:
    """The base of all errors of the HTTP library below huggingface_hub, which changes with the latter's version."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


@contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """A file open for reading and writing that no other pull has; it stays, whatever happens."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(part, flags, 0o666), "r+b") as opened:
        try:
            import fcntl
        except ImportError:  # Windows refuses a second writer by itself when the part gets its name
            pass
        else:
            try:
                fcntl.flock(opened.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError("another pull is fetching it", path=str(part), hint="wait until it is done") from None
        yield opened


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
