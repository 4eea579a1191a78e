"""Valid GGUF files with typed fields replaced: either refused, or read as the ``gguf`` package reads them."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gguf_builder import KEYS, TENSORS, Built, Key, Tensor, build, reference
from phi4edge._core import GgufFile
from phi4edge.errors import BundleError

RICH_KEYS: list[Key] = [
    *KEYS,
    ("general.alignment", "u32", 16),
    ("demo.bytes", "[u8]", [1, 2, 3, 255]),
    ("demo.numbers", "[i64]", [-1, 2**62]),
    ("demo.floats", "[f32]", [1.0, -2.0, 0.25]),
    ("demo.big", "u64", 2**63),
]
RICH_TENSORS = [*TENSORS, Tensor("k", (512, 2), 12), Tensor("i", (3, 2, 2, 2), 24), Tensor("unreadable", (256,), 16)]
BASES = [
    build(KEYS, TENSORS),
    build(RICH_KEYS, RICH_TENSORS, alignment=16),
    build(KEYS, TENSORS, version=2),
    build([], []),
]

EDGES = [0, 1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 255, 256, 65535, 65536, -1, -2, -32]
EDGES += [2**n + d for n in (24, 28, 31, 32, 40, 56, 60, 61, 62, 63, 64) for d in (-1, 0, 1, 32)]


@st.composite
def mutants(draw: st.DrawFn) -> bytes:
    base = BASES[draw(st.integers(0, len(BASES) - 1))]
    out = Built(base.data, base.fields)
    for _ in range(draw(st.integers(1, 3))):
        field = draw(st.sampled_from(sorted(base.fields)))
        old = base.number(field)
        near = st.integers(old - 9, old + 9) | st.sampled_from([old + 32 * n for n in range(-4, 5)])
        new = draw(st.sampled_from(EDGES) | near)
        out.data = out.patched(field, new)
    change = draw(st.sampled_from(["keep", "keep", "keep", "cut", "extend", "byte"]))
    if change == "cut":
        out.data = out.data[: draw(st.integers(0, len(out.data)))]
    elif change == "extend":
        out.data += bytes(draw(st.sampled_from([1, 31, 32, 4096, 1 << 20])))
    elif change == "byte":
        at = draw(st.integers(0, len(out.data) - 1))
        out.data = out.data[:at] + bytes([draw(st.integers(0, 255))]) + out.data[at + 1 :]
    return out.data


def read_all(path: Path) -> tuple[dict[str, Any], list[tuple[str, int, tuple[int, ...], bytes]]]:
    file = GgufFile(path)
    tensors = [(t.name, t.type_id, tuple(t.shape), file.read(t.name).tobytes()) for t in file.tensors]
    return file.metadata, tensors


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutations") / "mutant.gguf"


@settings(max_examples=2000, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=mutants())
def test_mutants_are_refused_or_read_as_the_gguf_package_reads_them(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        ours = read_all(path)
    except BundleError as error:
        assert error.path == str(path)
        assert error.field and error.hint
        return
    finally:
        assert time.process_time() - start < 2
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
    try:
        expected = reference(path)
    except UnicodeDecodeError:  # we keep such text, with surrogates
        return
    assert repr(ours) == repr(expected)  # NaN is not equal to itself


def test_every_field_with_every_edge_value(path: Path) -> None:
    """The same, without chance: one field at a time."""
    outcomes = {"read": 0, "refused": 0}
    base = BASES[1]
    for field in base.fields:
        for data in {base.patched(field, value) for value in EDGES}:
            path.write_bytes(data)
            try:
                read_all(path)
                outcomes["read"] += 1
            except BundleError:
                outcomes["refused"] += 1
    assert outcomes["refused"] > 1000 and outcomes["read"] > 100


def test_a_file_that_shrinks_while_it_is_opened(path: Path) -> None:
    """Sizes are checked against the file as it was; reading past its new end is an error, not a crash."""
    data = build(RICH_KEYS, RICH_TENSORS, alignment=16).data
    for size in range(0, len(data), 7):
        path.write_bytes(data)
        file = GgufFile(path)
        os.truncate(path, size)
        for tensor in file.tensors:
            if tensor.offset + tensor.n_bytes > size:
                with pytest.raises(BundleError, match="became shorter"):
                    file.read(tensor.name)
            else:
                assert len(file.read(tensor.name)) == tensor.n_bytes
