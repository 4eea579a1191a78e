"""Checkpoints from the Hugging Face hub to a directory on this disk, so that a download that was cut goes on later.

The library huggingface_hub knows the protocol, the token and the layout of the cache; download.py fetches.
"""

from __future__ import annotations

import errno
import fnmatch
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from phi4edge.converters.checkpoint import INDEX, SINGLE_FILE
from phi4edge.converters.download import Download, RemoteFile, transport_error
from phi4edge.converters.files import Progress
from phi4edge.converters.variants import VARIANTS
from phi4edge.errors import BundleError, DiskError, FileError, Phi4EdgeError, UsageError
from phi4edge.strict_json import read_object

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

# What a conversion reads.  Never code, never pickles.
_FILES = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json"),
)
_ADAPTER_FOLDERS = ("vision-lora", "speech-lora")
_ADAPTER_FILES = ("adapter_config.json", "*.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST_LENGTHS = {40, 64}  # of a git blob (SHA-1), of a large file (SHA-256)
_LARGEST_JSON = 64 << 20
_MOST_FILES = 10_000
_LARGEST_FILE = 50_000_000_000  # bytes; the hub gives no larger one by plain HTTP
_TIMEOUT_SECONDS = 20.0
_DISK_FAULTS = {getattr(errno, name, errno.ENOSPC) for name in ("ENOSPC", "EDQUOT", "EIO", "EFBIG")}


@dataclass(frozen=True)
class Pulled:
    """A checkpoint on this disk."""

    directory: Path
    commit: str  # of the repository; empty when it is not known


def pull(
    repo: str,
    *,
    revision: str = "main",
    directory: str | os.PathLike[str] | None = None,
    offline: bool = False,
    progress: Progress = lambda name, done, total: None,
) -> Pulled:
    """Fetches what a conversion needs of a repository (``microsoft/Phi-4-mini-instruct``) and returns where it is.

    Files go to the hub's cache, or to ``directory``.  One that is there with the right hash is not fetched again, and a
    part of one is continued.  With ``offline`` no connection is opened: what was fetched before is found, or an error.

    Raises UsageError (the name, the revision), FileError (network, access, what is missing), BundleError (a checkpoint
    that cannot be converted, bytes that do not fit their hash), DiskError.
    """
    repo, revision = _checked_names(repo, revision)
    with _hub_errors(repo, revision):
        if offline or _is_true(os.environ.get("HF_HUB_OFFLINE")):
            return _find(repo, revision, directory)
        return _fetch(repo, revision, directory, progress)


# --- what is here already


def _find(repo: str, revision: str, directory: str | os.PathLike[str] | None) -> Pulled:
    if directory is not None:
        found, commit = Path(directory), ""
    else:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            found = Path(
                snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns="config.json")
            )
        except LocalEntryNotFoundError:
            raise FileError(
                f"revision '{revision}' is not in the cache",
                path=repo,
                hint="run the command once without --offline, or convert a directory with 'phi4edge convert'",
            ) from None
        commit = found.name
    missing = _missing(found)
    if missing:
        raise FileError(f"lacks {missing}", path=str(found), hint="run the command once without --offline")
    return Pulled(found, commit)


def _missing(directory: Path) -> str:
    """The first file without which no conversion can begin."""
    if not (directory / "config.json").exists():
        return "config.json"
    if (directory / SINGLE_FILE).exists():
        return ""
    if not (directory / INDEX).exists():
        return SINGLE_FILE
    places = read_object(directory / INDEX, at_most=_LARGEST_JSON).get("weight_map")
    shards = sorted({str(shard) for shard in places.values()}) if isinstance(places, dict) else []
    return next((shard for shard in shards if not (directory / shard).exists()), "")


# --- the network


def _fetch(repo: str, revision: str, directory: str | os.PathLike[str] | None, progress: Progress) -> Pulled:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_SECONDS)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, HfHubHTTPError):  # one of them is a ValueError
            raise
        raise _odd_answer() from None
    commit, files = _listing(repo, info)
    if directory is None:
        places = {file.name: _storage(repo) / "blobs" / file.digest for file in files}
    else:
        places = {file.name: Path(directory, *file.name.split("/")) for file in files}
    config = next(file for file in files if file.name == "config.json")
    Download(repo, commit, [config], places, progress).run(trust_hashed_names=directory is None)
    if _model_type(repo, places["config.json"]) == "phi4mm":  # its own files hold the adapters
        files = [file for file in files if "/" not in file.name]
    Download(repo, commit, files, places, progress).run(trust_hashed_names=directory is None)
    if directory is not None:
        return Pulled(Path(directory), commit)
    return Pulled(_in_cache(repo, revision, commit, {file.name: places[file.name] for file in files}), commit)


def _in_cache(repo: str, revision: str, commit: str, places: Mapping[str, Path]) -> Path:
    """A directory with the names of a commit, as links to the bytes, and the note that the revision is this commit.

    This is the layout that huggingface_hub documents: its tools find what we fetched, and we what they did.
    """
    storage = _storage(repo)
    snapshot = storage / "snapshots" / commit
    for name, blob in places.items():
        link = snapshot.joinpath(*name.split("/"))
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.exists():
            continue
        link.unlink(missing_ok=True)  # it may point to a file that was removed
        try:
            link.symlink_to(os.path.relpath(blob, link.parent))
        except (OSError, NotImplementedError):  # Windows, without the right to make such links
            link.hardlink_to(blob)
    if revision != commit:
        note = storage.joinpath("refs", *revision.split("/"))
        note.parent.mkdir(parents=True, exist_ok=True)
        new = note.with_name(f"{note.name}.{os.getpid()}.tmp")
        new.write_text(commit, encoding="ascii")
        new.replace(note)
    return snapshot


def _listing(repo: str, info: ModelInfo) -> tuple[str, list[RemoteFile]]:
    """The commit, and the files that we want, small ones first.  Names come from a stranger: only plain ones pass."""
    siblings = info.siblings or []
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha) or len(siblings) > _MOST_FILES:
        raise _odd_answer()
    names = [str(sibling.rfilename) for sibling in siblings]
    files = []
    for name, sibling in zip(names, siblings, strict=True):
        if not _is_wanted(name):
            continue
        size, digest = sibling.size, sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        is_digest = isinstance(digest, str) and len(digest) in _DIGEST_LENGTHS and re.fullmatch("[0-9a-f]+", digest)
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _LARGEST_FILE or not is_digest:
            raise _odd_answer()
        files.append(RemoteFile(name, size, str(digest)))
    if len({file.name for file in files}) != len(files):
        raise _odd_answer()
    _require_checkpoint(repo, names, files)
    return info.sha, sorted(files, key=lambda file: (file.n_bytes, file.name))


def _is_wanted(name: str) -> bool:
    *folders, last = name.split("/")
    if not all(_PLAIN_NAME.fullmatch(part) for part in (*folders, last)):
        return False
    patterns = _FILES if not folders else _ADAPTER_FILES if "/".join(folders) in _ADAPTER_FOLDERS else ()
    return any(fnmatch.fnmatchcase(last, pattern) for pattern in patterns)


def _require_checkpoint(repo: str, names: Sequence[str], files: Sequence[RemoteFile]) -> None:
    """BundleError before gigabytes are fetched for nothing."""
    own = [file.name for file in files if "/" not in file.name]
    if not any(name.endswith(".safetensors") for name in own):
        pickle = next((name for name in sorted(names) if PurePosixPath(name).suffix in _PICKLES), None)
        if pickle is not None:
            raise BundleError(
                f"pickle refused: {pickle[:200]} may run any code when it is read",
                path=repo,
                hint="use a repository with safetensors",
            )
        raise BundleError("has no safetensors", path=repo, hint="give the name of a repository with a checkpoint")
    if "config.json" not in own:
        raise BundleError("has no config.json", path=repo, hint="give the name of a repository with a checkpoint")


def _model_type(repo: str, config: Path) -> str:
    model_type = read_object(config, at_most=_LARGEST_JSON).get("model_type")
    known = [variant.model_type for variant in VARIANTS]
    if model_type not in known:
        raise BundleError(
            f"{model_type!r:.80} cannot be converted",
            path=f"{repo}/config.json",
            field="model_type",
            hint=f"supported are {', '.join(known)}",
        )
    return str(model_type)


def _storage(repo: str) -> Path:
    """Where the cache keeps a repository."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"))


# --- names and errors


def _checked_names(repo: str, revision: str) -> tuple[str, str]:
    parts = repo.split("/")
    if len(parts) > 2 or not all(_PLAIN_NAME.fullmatch(part) and ".." not in part for part in parts):
        hint = "to convert a directory use 'phi4edge convert'" if Path(repo).exists() else "it looks like owner/name"
        raise UsageError(f"'{repo[:200]}' is not the name of a repository", field="REPO", hint=hint)
    if not all(_PLAIN_NAME.fullmatch(part) for part in revision.split("/")):
        raise UsageError(f"'{revision[:200]}' is not a branch, a tag or a commit", field="--revision")
    return repo, revision


def _is_true(value: str | None) -> bool:
    return (value or "").upper() in ("1", "ON", "YES", "TRUE")


def _odd_answer() -> FileError:
    return FileError("what it answers is not what a hub answers", path=_host(), hint="check HF_ENDPOINT")


def _host() -> str:
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).hostname or "the hub"


@contextmanager
def _hub_errors(repo: str, revision: str) -> Iterator[None]:
    """What the library raises as errors of ours, without its words: they may quote a header, where the token is."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Phi4EdgeError:
        raise
    except (transport_error(), OSError) as error:
        raise _as_ours(error, repo, revision) from None
    finally:
        logger.setLevel(level)


def _as_ours(error: BaseException, repo: str, revision: str) -> Phi4EdgeError:
    from huggingface_hub import errors

    access = "accept its licence on its page if it has one, then run 'hf auth login' or set HF_TOKEN"
    again = "what has arrived is kept: run the command again to continue"
    chain = [error, *filter(None, (error.__cause__, error.__context__))]
    for found in chain:
        if isinstance(found, OSError) and found.errno in _DISK_FAULTS:
            return DiskError(f"cannot be written: {found.strerror}", path=str(found.filename or ""), hint=again)
        if isinstance(found, errors.RevisionNotFoundError):
            return FileError(f"has no revision '{revision}'", path=repo, hint="give a branch, a tag or a commit")
        if isinstance(found, errors.GatedRepoError):
            return FileError("is gated", path=repo, hint=access)
        response = getattr(found, "response", None)
        status = response.status_code if response is not None else None
        if status in (401, 403):
            return FileError(f"access was refused ({status}), or there is no such repository", path=repo, hint=access)
        if status == 404:
            return FileError("was not found", path=repo, hint=f"check the name; for a private one, {access}")
        if status is not None:
            return FileError(f"{_host()} answered {status}", path=repo, hint=again)
    if isinstance(error, (transport_error(), ConnectionError, TimeoutError)):
        problem = "did not answer in time" if "Timeout" in type(error).__name__ else "cannot be reached"
        return FileError(f"{_host()} {problem}", path=repo, hint=f"check the network; {again}, or use --offline")
    if isinstance(error, OSError) and error.strerror:
        return FileError(f"cannot be used: {error.strerror}", path=str(error.filename or repo))
    # The library's own, such as a size that is not the announced one.
    return FileError("could not be fetched whole", path=repo, hint=again)
