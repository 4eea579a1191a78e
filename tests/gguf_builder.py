"""GGUF files for the tests: valid ones, and ones with a chosen field broken.

Every number that is written has a name, such as ``tensor.0.offset`` or ``key.2.value.count``, and can be patched by it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

# In the order of their numbers, with their struct codes.
CODES = {
    "u8": "B",
    "i8": "b",
    "u16": "H",
    "i16": "h",
    "u32": "I",
    "i32": "i",
    "f32": "f",
    "bool": "?",
    "str": "",
    "array": "",
}
CODES |= {"u64": "Q", "i64": "q", "f64": "d"}
VALUE_TYPES = {name: number for number, name in enumerate(CODES)}
Key = tuple["str | bytes", str, Any]  # name, kind ("u32", "str", "[u32]" for an array of them), value


@dataclass(frozen=True)
class Tensor:
    name: str | bytes
    shape: Sequence[int]  # ggml order: the row length first
    type_id: int = 0
    n_bytes: int | None = None  # None: what the shape and the type need

    def data(self) -> bytes:
        size = self.n_bytes
        if size is None:
            block_values, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(self.type_id)]
            size = block_bytes
            for dimension in self.shape:
                size *= dimension
            size //= block_values
        return hashlib.shake_128(repr(self.name).encode()).digest(size)


@dataclass
class Built:
    """A file's bytes; ``fields`` maps the name of each number to its place and its ``struct`` code."""

    data: bytes = b""
    fields: dict[str, tuple[int, str]] = field(default_factory=dict)
    data_start: int = 0
    tensor_ends: list[int] = field(default_factory=list)  # without padding

    def put(self, name: str, code: str, value: Any) -> None:
        self.fields[name] = (len(self.data), code)
        self.data += struct.pack("<" + code, value)

    def put_string(self, name: str, value: str | bytes) -> None:
        encoded = value if isinstance(value, bytes) else value.encode()
        self.put(f"{name}.length", "Q", len(encoded))
        self.data += encoded

    def put_value(self, name: str, kind: str, value: Any) -> None:
        if kind == "str":
            self.put_string(name, value)
        elif kind.startswith("["):
            self.put(f"{name}.type", "I", VALUE_TYPES["array" if kind[1] == "[" else kind[1:-1]])
            self.put(f"{name}.count", "Q", len(value))
            for i, item in enumerate(value):
                self.put_value(f"{name}.{i}", kind[1:-1], item)
        else:
            self.put(name, CODES[kind], value)

    def patched(self, name: str, value: int) -> bytes:
        """The bytes with one number replaced; the value is cut to the bits that the field has."""
        offset, code = self.fields[name]
        size = struct.calcsize(code)
        encoded = (value % (1 << 8 * size)).to_bytes(size, "little")
        return self.data[:offset] + encoded + self.data[offset + size :]

    def number(self, name: str) -> int:
        """The field as an unsigned integer."""
        offset, code = self.fields[name]
        return int.from_bytes(self.data[offset : offset + struct.calcsize(code)], "little")


def build(keys: Sequence[Key], tensors: Sequence[Tensor], *, version: int = 3, alignment: int = 32) -> Built:
    """Builds a file.  ``alignment`` only places the data: say it in ``keys`` as well."""
    out = Built(b"GGUF")
    out.put("version", "I", version)
    out.put("n_tensors", "Q", len(tensors))
    out.put("n_keys", "Q", len(keys))
    for i, (name, kind, value) in enumerate(keys):
        out.put_string(f"key.{i}", name)
        out.put(f"key.{i}.type", "I", VALUE_TYPES["array" if kind[0] == "[" else kind])
        out.put_value(f"key.{i}.value", kind, value)
    data = b""
    for i, tensor in enumerate(tensors):
        out.put_string(f"tensor.{i}", tensor.name)
        out.put(f"tensor.{i}.n_dims", "I", len(tensor.shape))
        for d, dimension in enumerate(tensor.shape):
            out.put(f"tensor.{i}.dim.{d}", "Q", dimension)
        out.put(f"tensor.{i}.type", "I", tensor.type_id)
        out.put(f"tensor.{i}.offset", "Q", len(data))
        data += tensor.data()
        out.tensor_ends.append(len(data))
        data += bytes(-len(data) % alignment)
    out.data += bytes(-len(out.data) % alignment)
    out.data_start = len(out.data)
    out.tensor_ends = [out.data_start + end for end in out.tensor_ends]
    out.data += data
    return out


KEYS: list[Key] = [
    ("general.architecture", "str", "demo"),
    ("demo.block_count", "u32", 2),
    ("demo.flags", "[bool]", [True, False]),
    ("demo.names", "[str]", ["a", "", "übung"]),
    ("demo.scale", "f32", 0.5),
]
TENSORS = [Tensor("norm", (5,)), Tensor("blocks", (64, 3), 8), Tensor("halves", (6, 2, 2), 1)]


def sample() -> Built:
    """A small valid file: five keys, and three tensors whose ends are not aligned."""
    return build(KEYS, TENSORS)


def reference(path: Path) -> tuple[dict[str, Any], list[tuple[str, int, tuple[int, ...], bytes]]]:
    """What the ``gguf`` package reads: the metadata, and name, type, shape and bytes of each tensor."""
    reader = gguf.GGUFReader(path)
    metadata = {name: entry.contents() for name, entry in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = [
        (tensor.name, int(tensor.tensor_type), tuple(int(d) for d in tensor.shape), tensor.data.tobytes())
        for tensor in reader.tensors
    ]
    return metadata, tensors
