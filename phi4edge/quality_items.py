"""Questions with their right answers, to measure a model with: read from JSON, nothing of which is believed.

An entry is an object with these fields; others are left alone, so a file may say more than we read::

    {"id": "turns03", "family": "vision", "task": "colour", "adapter": "vision",
     "prompt": "<|user|><|image_1|>What shape is it?<|end|><|assistant|>a cross<|end|><|user|>And the colour?<|end|>"
               "<|assistant|>",
     "images": ["img03.png"], "audio": null, "expected": "green"}

The prompt is what the model reads, so it says where one turn ends and which turn a picture or a sound belongs to; the
messages that the chat template makes it from are found again here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from phi4edge.errors import BundleError, FileError, InputError
from phi4edge.prompt import MEDIA
from phi4edge.strict_json import read_list

CHECKPOINT = "checkpoint"  # the folder beside the items

_NANO = Path("tests", "data", "nano")  # in a clone of the repository
_LARGEST_FILE = 64 << 20  # bytes
_LONGEST_TEXT = 1 << 20  # characters of a prompt or an answer
_NAME = re.compile(r"\w[\w .+-]{0,63}")  # of an item, a family, a task or an adapter: they are printed in tables
_FILE = re.compile(r"[\w .+/-]{1,200}")
_ROLES = ("system", "user", "assistant")
_TURN = re.compile(rf"<\|({'|'.join(_ROLES)})\|>(.*?)<\|end\|>", re.DOTALL)
_ANSWER = "<|assistant|>"  # ends a prompt
_TOOLS, _TOOLS_END = "<|tool|>", "<|/tool|>"  # in the turn of the system
_PLACEHOLDER = re.compile(r"<\|(image|audio)_([0-9]{1,4})\|>")
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON may have one alone
_SPECIAL = re.compile(r"<\|[^|<>]{1,40}\|>")


@dataclass(frozen=True, eq=False, slots=True)
class Item:
    """A question with its right answer.  Each is itself alone, so it may be the key of a dictionary."""

    name: str
    family: str
    task: str
    messages: list[dict[str, Any]]
    adapter: str | None  # that a model needs for it
    expected: str  # the answer; special tokens in it are those tokens
    prompt: str  # as it is in the file
    path: str  # of the file
    field: str  # where it is in it, such as "items[3]"

    @property
    def has_media(self) -> bool:
        return _PLACEHOLDER.search(self.prompt) is not None


def nano_folder(start: Path | None = None) -> Path:
    """The trained tiny checkpoint of the clone of the repository that ``start``, or the current directory, is in.

    Raises FileError.
    """
    with _file_errors("the current directory"):
        start = Path.cwd() if start is None else start.absolute()
    for directory in (start, *start.parents):
        if os.path.isdir(directory / _NANO / CHECKPOINT):  # noqa: PTH112 - where we may not look there is none
            return directory / _NANO
    raise FileError(
        f"no clone of the phi4edge repository here: neither this directory nor one above it has {_NANO.as_posix()}",
        path=str(start),
        hint="clone the repository and go there, or give the folder itself",
    )


def item_files(folder: Path) -> list[Path]:
    """``NAME/NAME.json`` in a folder that has a ``checkpoint`` too.  Raises FileError."""
    what = f"a folder with {CHECKPOINT}/ and questions in files such as heldout/heldout.json is needed"
    with _file_errors(str(folder)):
        if not (folder / CHECKPOINT).is_dir():
            raise FileError(
                f"has no folder '{CHECKPOINT}'" if folder.is_dir() else "is no folder", path=str(folder), hint=what
            )
        names = sorted(path.name for path in folder.iterdir() if path.name != CHECKPOINT)
        files = [path for name in names if (path := folder / name / f"{name}.json").is_file()]
    if not files:
        raise FileError("has no questions", path=str(folder), hint=what)
    return files


def read_items(path: str | os.PathLike[str]) -> list[Item]:
    """The items of a file; pictures and sounds are beside it or below, and must be there.  No two have the same id.

    Raises FileError, InputError; both name the entry and its field.

    Example: ``read_items("heldout/heldout.json")[0].messages``.
    """
    file = Path(path)
    try:
        entries = read_list(file, at_most=_LARGEST_FILE)
    except BundleError as error:  # it is no part of a model
        raise InputError(error.problem, path=error.path, field=error.field, hint=error.hint) from error
    if not entries:
        raise InputError("has no entries", path=str(file))
    found: dict[str, Item] = {}
    for index, entry in enumerate(entries):
        item = _Entry(entry, file, f"items[{index}]").item()
        if (other := found.setdefault(item.name, item)) is not item:
            raise InputError(f"'{item.name}' is the id of {other.field} too", path=str(file), field=f"{item.field}.id")
    return list(found.values())


def some_of(items: Sequence[Item], n_most: int | None) -> list[Item]:
    """At most so many of each family, evenly spread, so that every task has its share; None is all."""
    if n_most is None:
        return list(items)
    chosen: set[Item] = set()
    for family in families(items):
        of_family = sorted((item for item in items if item.family == family), key=lambda item: item.task)
        n_taken = min(n_most, len(of_family))
        chosen.update(of_family[index * len(of_family) // n_taken] for index in range(n_taken))
    return [item for item in items if item in chosen]


def families(items: Sequence[Item]) -> list[str]:
    """In the order in which they come first."""
    return list(dict.fromkeys(item.family for item in items))


def adapters(items: Sequence[Item]) -> list[str]:
    """Those that items need, in the order in which they come first."""
    return list(dict.fromkeys(item.adapter for item in items if item.adapter is not None))


def require_adapters(items: Sequence[Item], known: Sequence[str]) -> None:
    """InputError for the first item that needs an adapter which is not known."""
    for item in items:
        if item.adapter is not None and item.adapter not in known:
            names = ", ".join(known) or "none"
            raise InputError(
                f"the checkpoint has no adapter '{item.adapter}'",
                path=item.path,
                field=f"{item.field}.adapter",
                hint=f"its adapters are {names}; null is for none of them",
            )


class _Entry:
    """One entry of a file, while it is checked."""

    def __init__(self, entry: Any, file: Path, field: str) -> None:
        self._file, self._field = file, field
        if not isinstance(entry, dict):
            self._refuse(f"must be an object, got {type(entry).__name__}")
        self._entry = entry

    def item(self) -> Item:
        files = {"image": self._names("images"), "audio": self._names("audio")}
        messages, n_used = self._messages(files)
        for kind, names in files.items():
            if n_used[kind] != len(names):
                field = "images" if kind == "image" else "audio"
                self._refuse(f"names {len(names)}, and the prompt has a place for {n_used[kind]}", field)
        adapter = self._entry.get("adapter")
        return Item(
            self._name("id"),
            self._name("family"),
            self._name("task"),
            messages,
            None if adapter is None else self._name("adapter"),
            self._text("expected"),
            self._text("prompt"),
            str(self._file),
            self._field,
        )

    def _messages(self, files: dict[str, list[Path]]) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """The messages of the prompt, and how many files of each kind they took."""
        prompt = self._text("prompt")
        turns = prompt.removesuffix(_ANSWER)
        n_used = dict.fromkeys(files, 0)
        messages: list[dict[str, Any]] = []
        end = 0
        while match := _TURN.match(turns, end):
            end = match.end()
            messages.append(self._message(match[1], match[2], files, n_used))
        if end != len(turns) or not prompt.endswith(_ANSWER) or not messages or messages[-1]["role"] != "user":
            self._refuse(
                f"is no conversation from character {end} on",
                "prompt",
                hint=f"write <|user|>...<|end|> for each turn, with {', '.join(_ROLES)} as roles, the user's last, and "
                f"{_ANSWER} after them",
            )
        return messages, n_used

    def _message(self, role: str, text: str, files: dict[str, list[Path]], n_used: dict[str, int]) -> dict[str, Any]:
        if role == "system" and _TOOLS in text and text.endswith(_TOOLS_END):
            content, _, tools = text.removesuffix(_TOOLS_END).partition(_TOOLS)
            return {"role": role, "content": self._plain(content), "tools": self._plain(tools)}
        parts = []
        while role == "user" and (match := _PLACEHOLDER.match(text)):
            parts.append(self._part(match[1], int(match[2]), files, n_used))
            text = text[match.end() :]
        kinds = [part["type"] for part in parts]
        if kinds != sorted(kinds, key=MEDIA.index):  # as the template puts them
            self._refuse("has a sound before an image in the same turn", "prompt", hint="put the images first")
        content = self._plain(text)
        if parts:
            return {"role": role, "content": [*parts, *([{"type": "text", "text": content}] if content else [])]}
        return {"role": role, "content": content}

    def _part(self, kind: str, number: int, files: dict[str, list[Path]], n_used: dict[str, int]) -> dict[str, Any]:
        n_used[kind] += 1
        if number != n_used[kind]:
            self._refuse(f"has <|{kind}_{number}|> where number {n_used[kind]} is the next", "prompt")
        if number > len(files[kind]):
            field = "images" if kind == "image" else "audio"
            self._refuse(f"names {len(files[kind])}, and the prompt has <|{kind}_{number}|>", field)
        return {"type": kind, kind: str(files[kind][number - 1])}

    def _plain(self, text: str) -> str:
        """The text of a message, in which the chat template lets no special token be one."""
        special = _SPECIAL.search(text)
        if special is not None:
            where = "images and sounds stand before the text of a user" if _PLACEHOLDER.match(special[0]) else ""
            self._refuse(f"has {special[0]} within the text of a turn", "prompt", hint=where)
        return text

    def _text(self, field: str) -> str:
        value = self._entry.get(field)
        if not isinstance(value, str) or not value:
            self._refuse("is missing" if value is None else f"must be a text, got {_shown(value)}", field)
        if len(value) > _LONGEST_TEXT:
            self._refuse(f"has {len(value)} characters; the limit is {_LONGEST_TEXT}", field)
        if _SURROGATE.search(value):
            self._refuse("has half a character, between \\ud800 and \\udfff", field)
        return value

    def _name(self, field: str) -> str:
        value = self._text(field)
        if not _NAME.fullmatch(value):
            self._refuse(f"{value[:40]!r} is not a short plain name", field)
        return value

    def _names(self, field: str) -> list[Path]:
        """Files that an entry names: a list, or a single one, or null."""
        value = self._entry.get(field)
        names = [] if value is None else value if isinstance(value, list) else [value]
        return [
            self._existing(name, f"{field}[{i}]" if isinstance(value, list) else field) for i, name in enumerate(names)
        ]

    def _existing(self, name: Any, field: str) -> Path:
        if not isinstance(name, str):
            self._refuse(f"must be the name of a file, got {_shown(name)}", field)
        relative = PurePosixPath(name)
        if not _FILE.fullmatch(name) or relative.is_absolute() or ".." in relative.parts:
            self._refuse(f"{name[:80]!r} is not the plain name of a file beside this one", field)
        path = self._file.parent / relative
        where = f"{self._field}.{field}"
        with _file_errors(str(self._file), where, what=f"'{name}' "):
            if not path.is_file():
                raise FileError(f"there is no file '{name}'", path=str(self._file), field=where)
            if not path.resolve().is_relative_to(self._file.parent.resolve()):
                self._refuse(f"'{name}' is a link to a file elsewhere", field)
        return path

    def _refuse(self, problem: str, field: str = "", *, hint: str = "") -> NoReturn:
        where = f"{self._field}.{field}" if field else self._field
        raise InputError(problem, path=str(self._file), field=where, hint=hint)


@contextmanager
def _file_errors(path: str, field: str = "", *, what: str = "") -> Iterator[None]:
    """What the system says about a file, as FileError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{what}cannot be read: {error.strerror}", path=path, field=field) from error


def _shown(value: Any) -> str:
    return "an empty one" if value == "" else type(value).__name__
