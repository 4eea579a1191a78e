"""Protobuf messages in a file, read with a table of their fields: what is not in the table is an error.

A message is walked with seeks and what is large is skipped, so memory stays small however large the file is.

The table says for each number of a field its kind and name, e.g. ``{"model": {1: "int version", 7: "graph graph"}}``.
Kinds: ``int``; ``float`` (its value is not kept); ``text`` (short, UTF-8); ``blob`` (skipped); ``no``, to be refused by
name; or another message of the table.  A ``*`` behind the kind: any number of times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from phi4edge.errors import BundleError

# Of a whole file.  The full-size encoders have up to 30,000 values; each takes some microseconds and a little memory.
_MOST_VALUES = 100_000
_MOST_TEXT = 32 << 20  # bytes

_LONGEST_TEXT = 1 << 14  # bytes
_LONGEST_LIST = 1 << 16  # bytes of a packed list
_VARINT, _BYTES, _FIXED32 = 0, 2, 5  # wire types


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes ``start`` to ``end`` of the file, and what they hold: a message of the table, or ``blob``."""

    kind: str
    start: int
    end: int

    @property
    def n_bytes(self) -> int:
        return self.end - self.start


class MessageReader:
    """Reads the messages of one file.  All that is wrong with it is a BundleError with ``path`` and ``hint``."""

    def __init__(self, file: BinaryIO, table: Mapping[str, Mapping[int, str]], *, path: str, hint: str) -> None:
        self._file = file
        self._table = table
        self._path = path
        self._hint = hint
        self._n_values = 0
        self._n_text_bytes = 0

    def fields(self, message: Span) -> dict[str, Any]:
        """The fields that are there, by name: int, str or Span, in a list where the table has a ``*``."""
        found: dict[str, Any] = {}
        position = message.start
        while position < message.end:
            tag, position = self._varint(position, message.end)
            number, wire = tag >> 3, tag & 7
            kind, _, name = self._table[message.kind].get(number, "").partition(" ")
            if not kind:
                self._damaged(position, f"a {message.kind} has a field {number}, which ours never have")
            if kind == "no":
                self.refuse(f"has {name}, which ours never have", message.kind)
            values, position = self._values(kind, wire, position, message.end)
            if kind.endswith("*"):
                found.setdefault(name, []).extend(values)
            elif name in found:  # readers differ in what they take: the last, or both merged
                self._damaged(position, f"{name} of a {message.kind} comes twice")
            else:
                found[name] = values[0]
            self._n_values += max(1, len(values))
            if self._n_values > _MOST_VALUES:
                self._damaged(position, f"there are more than {_MOST_VALUES} fields")
        return found

    def refuse(self, problem: str, field: str) -> NoReturn:
        raise BundleError(problem, path=self._path, field=field, hint=self._hint)

    def _values(self, kind: str, wire: int, position: int, end: int) -> tuple[list[Any], int]:
        """One field's values, several if a list is packed, and where the next field begins."""
        is_list, kind = kind.endswith("*"), kind.removesuffix("*")
        if kind == "int" and wire == _VARINT:
            value, position = self._varint(position, end)
            return [_signed(value)], position
        if kind == "float" and wire == _FIXED32 and position + 4 <= end:
            return [None], position + 4
        if wire != _BYTES or (kind in ("int", "float") and not is_list):
            self._damaged(position, f"a field has wire type {wire}, which does not fit it, or is cut")
        length, position = self._varint(position, end)
        stop = position + length
        if stop > end:
            self._damaged(position, f"a field ends at byte {stop}, past the end of what holds it ({end})")
        if kind in ("int", "float") and length > _LONGEST_LIST:
            self._damaged(position, f"a list of {kind}s has {length} bytes, more than {_LONGEST_LIST}")
        if kind == "int":
            return self._packed(position, stop), stop
        if kind == "float":
            if length % 4:
                self._damaged(position, f"{length} bytes are not a list of floats")
            return [None] * (length // 4), stop
        if kind == "text":
            return [self._text(position, length)], stop
        return [Span(kind, position, stop)], stop

    def _packed(self, position: int, stop: int) -> list[int]:
        values = []
        while position < stop:
            value, position = self._varint(position, stop)
            values.append(_signed(value))
        return values

    def _text(self, position: int, length: int) -> str:
        self._n_text_bytes += length
        if length > _LONGEST_TEXT or self._n_text_bytes > _MOST_TEXT:
            self._damaged(position, f"a name or text has {length} bytes, or all have more than {_MOST_TEXT}")
        self._file.seek(position)
        try:
            return self._file.read(length).decode("utf-8")
        except UnicodeDecodeError:
            self._damaged(position, "a name or text is not UTF-8")

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        """An unsigned number of up to 64 bits, seven in a byte, the lowest first; and where it ends."""
        self._file.seek(position)
        value = 0
        for index, byte in enumerate(self._file.read(min(10, end - position))):
            value |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                if value >> 64:
                    break
                return value, position + index + 1
        return self._damaged(position, "a number is cut or longer than 64 bits")

    def _damaged(self, position: int, problem: str) -> NoReturn:
        self.refuse(problem, f"byte {position}")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
