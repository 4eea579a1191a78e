"""GGUF reading against the ``gguf`` package, and every way a file can be wrong.  G1, G2, ...: kinds of bad input."""

from __future__ import annotations

import faulthandler
import os
import resource
import shutil
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gguf_builder import KEYS, TENSORS, VALUE_TYPES, Built, Key, Tensor, build, reference, sample
from phi4edge._core import GgufFile
from phi4edge.errors import BundleError, FileError, Phi4EdgeError

BOUNDARIES = (2**31, 2**32, 2**56, 2**63, 2**64 - 1)


@pytest.fixture(autouse=True)
def never_blocks() -> Iterator[None]:
    """A reader that hangs ends the test run with a traceback instead of keeping it for ever."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def fails(tmp_path: Path) -> Callable[..., str]:
    """Opens bytes that are no valid file, cheaply; returns the message."""

    def check(data: bytes, *words: str) -> str:
        path = tmp_path / "broken.gguf"
        path.write_bytes(data)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with pytest.raises(BundleError) as caught:
            GgufFile(path)
        assert time.process_time() - start < 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
        message = str(caught.value)
        assert message.startswith(f"{path}: ") and "\n" not in message
        assert caught.value.field and caught.value.hint and caught.value.exit_code == 4
        for word in words:
            assert word in message
        return message

    return check


def opens(path: Path, data: bytes) -> GgufFile:
    path.write_bytes(data)
    return GgufFile(path)


def assert_equals_reference(file: GgufFile, path: Path) -> None:
    metadata, tensors = reference(path)
    assert list(file.metadata.items()) == list(metadata.items())
    ours = [(t.name, t.type_id, tuple(t.shape), file.read(t.name).tobytes()) for t in file.tensors]
    assert ours == tensors
    data = path.read_bytes()
    assert all(data[t.offset : t.offset + t.n_bytes] == file.read(t.name).tobytes() for t in file.tensors)


# --- Valid files ---


@pytest.mark.parametrize("version", [2, 3])
def test_a_valid_file_reads_as_the_gguf_package_reads_it(tmp_path: Path, version: int) -> None:
    path = tmp_path / "model.gguf"
    file = opens(path, build(KEYS, TENSORS, version=version).data)
    assert_equals_reference(file, path)
    assert (file.version, file.paths, file.warnings) == (version, [str(path)], [])
    assert file.size_on_disk == path.stat().st_size
    assert [t.type_name for t in file.tensors] == ["F32", "Q8_0", "F16"]


EXTREMES: dict[str, list[Any]] = {
    "f32": [0.0, -1.5, 3.4028234663852886e38, float("inf")],
    "f64": [0.0, 1e308, -5e-324, float("-inf")],
    "bool": [True, False],
    "str": ["", "text", "日本語 😀", "a\0b", "x" * 70_000],
}
for bits in (8, 16, 32, 64):
    EXTREMES[f"u{bits}"] = [0, 1, (1 << bits) - 1]
    EXTREMES[f"i{bits}"] = [0, -1, -(1 << (bits - 1)), (1 << (bits - 1)) - 1]


@pytest.mark.parametrize("kind", [kind for kind in VALUE_TYPES if kind != "array"])
def test_values_of_every_type_and_arrays_of_them(tmp_path: Path, kind: str) -> None:
    keys: list[Key] = [(f"value.{i}", kind, value) for i, value in enumerate(EXTREMES[kind])]
    keys += [("all", f"[{kind}]", EXTREMES[kind]), ("none", f"[{kind}]", []), ("many", f"[{kind}]", EXTREMES[kind] * 3)]
    path = tmp_path / "model.gguf"
    file = opens(path, build(keys, []).data)
    assert_equals_reference(file, path)
    assert [type(value) for value in file.metadata.values()] == [type(v) for v in EXTREMES[kind]] + [list] * 3


@pytest.mark.parametrize("ggml_type", [t for t in gguf.GGMLQuantizationType if t.name != "Q8_1"], ids=lambda t: t.name)
def test_every_ggml_type_has_the_size_that_the_gguf_package_gives_it(tmp_path: Path, ggml_type: Any) -> None:
    block_values, _ = gguf.GGML_QUANT_SIZES[ggml_type]
    path = tmp_path / "model.gguf"
    file = opens(path, build([], [Tensor("a", (block_values * 2, 3), int(ggml_type)), Tensor("b", (1,))]).data)
    assert_equals_reference(file, path)
    assert file.tensors[0].type_name == ggml_type.name


def test_a_file_of_the_gguf_writer(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "demo")
    writer.add_custom_alignment(128)
    writer.add_array("demo.list", [1, 2, 3])
    for name, shape in [("one", (7,)), ("two", (3, 5)), ("four", (2, 1, 3, 4))]:
        writer.add_tensor(name, np.random.default_rng(1).standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(path)
    assert_equals_reference(file, path)
    assert tuple(file.tensors[2].shape) == (4, 3, 1, 2)
    assert all(t.offset % 128 == 0 for t in file.tensors)


def test_text_that_is_not_utf8_round_trips(tmp_path: Path) -> None:
    file = opens(tmp_path / "model.gguf", build([("a", "str", b"\xff\x80ok"), ("b", "[str]", [b"\xc3"])], []).data)
    assert file.metadata["a"].encode(errors="surrogateescape") == b"\xff\x80ok"
    assert file.metadata["b"] == ["\udcc3"]


def test_paths_of_any_kind(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff \xc3\xbc.gguf"
    Path(os.fsdecode(path)).write_bytes(sample().data)
    assert GgufFile(path).paths == GgufFile(os.fsdecode(path)).paths == [os.fsdecode(path)]
    with pytest.raises(TypeError):
        not_a_path: Any = 3
        GgufFile(not_a_path)
    for wrong in ("a\0b", ""):
        with pytest.raises((ValueError, FileError)):
            GgufFile(wrong)


def test_reading_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="'nothing'"):
        opens(tmp_path / "model.gguf", sample().data).read("nothing")


def test_tensors_and_bytes_outlive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    file = opens(path, sample().data)
    tensors, data = file.tensors, file.read("blocks")
    del file
    assert tensors[1].name == "blocks" and data.tobytes() == TENSORS[1].data()


# --- Invalid files ---


def test_G1_header_cut_anywhere(fails: Callable[..., str]) -> None:
    built = sample()
    header_end = built.fields["tensor.2.offset"][0] + 8
    fails(b"", "truncated header")
    fails(b"xyz", "truncated header")
    for size in range(header_end):
        fails(built.data[:size], "truncated header")


@pytest.mark.parametrize(
    ("start", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "git lfs pull"),
        (b"PK\x03\x04", "zip"),
        (b"\x80\x02}q", "pickle"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"\n  <html>", "HTML"),
        (b'{"error": "not found"}', "JSON"),
        (struct.pack("<Q", 0x3C) + b'{"__metadata__":{}}', "safetensors"),
        (struct.pack("<Q", 123456) + b'{"a":{}}', "safetensors"),
        (b"GGML", "GGML"),
        (b"lmgg", "GGML"),
        (b"tjgg\x03\0\0\0", "GGML"),
        (b"fmgg", "GGML"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (bytes(64), "did not finish"),
        (b"GGUX", "no GGUF file"),
    ],
)
def test_G2_other_files_are_recognized(fails: Callable[..., str], start: bytes, word: str) -> None:
    fails(start, word)
    fails(start + bytes(100), word)


def test_G3_versions(fails: Callable[..., str]) -> None:
    for version in (0, 1, 4, 65535, 2**32 - 1):
        fails(sample().patched("version", version), f"version {version}", "2 and 3")
    fails(sample().patched("version", 3 << 24), "big-endian")
    fails(b"GGUF" + struct.pack(">I", 3) + sample().data[8:], "big-endian")


@pytest.mark.parametrize("count", BOUNDARIES)
@pytest.mark.parametrize("field", ["n_tensors", "n_keys"])
def test_G4_counts_beyond_the_file(fails: Callable[..., str], field: str, count: int) -> None:
    fails(sample().patched(field, count), field, str(count))
    fails(sample().patched(field, 1000), field, "truncated header")  # more than fit in what remains


def test_G4_counts_off_by_one(fails: Callable[..., str], tmp_path: Path) -> None:
    fails(sample().patched("n_keys", len(KEYS) - 1))
    fails(sample().patched("n_keys", len(KEYS) + 1))
    fails(sample().patched("n_tensors", len(TENSORS) + 1))
    # One tensor too few is a valid file, with its data elsewhere and bytes left over.
    path = tmp_path / "model.gguf"
    file = opens(path, sample().patched("n_tensors", len(TENSORS) - 1))
    assert_equals_reference(file, path)
    assert "after the last tensor" in file.warnings[0]


@pytest.mark.parametrize("length", [0, 65536, 2**62, *BOUNDARIES])
def test_G5_key_lengths(fails: Callable[..., str], length: int) -> None:
    fails(sample().patched("key.1.length", length), "key 1")


def test_G5_keys_of_65535_bytes_are_the_longest(fails: Callable[..., str], tmp_path: Path) -> None:
    assert opens(tmp_path / "model.gguf", build([("k" * 65535, "u8", 1)], []).data).metadata == {"k" * 65535: 1}
    fails(build([("k" * 65536, "u8", 1)], []).data, "65536", "65535")


@pytest.mark.parametrize("key", [b"", "schlüssel", b"a\0b", b"\xff", b"line\nbreak", b"\x7f"])
def test_G5_keys_are_printable_ascii(fails: Callable[..., str], key: bytes | str) -> None:
    fails(build([("a", "u8", 1), (key, "u8", 1)], []).data, "key 1")


def test_G5_duplicate_key(fails: Callable[..., str]) -> None:
    fails(build([("same", "u8", 1), ("other", "u8", 1), ("same", "u8", 1)], []).data, "same", "twice")


@pytest.mark.parametrize("value_type", [13, 255, -1])
def test_G6_unknown_value_types(fails: Callable[..., str], value_type: int) -> None:
    fails(sample().patched("key.1.type", value_type), "demo.block_count", str(value_type % 2**32))
    fails(sample().patched("key.2.value.type", value_type), "demo.flags", str(value_type % 2**32))


def test_G6_booleans_are_0_or_1(fails: Callable[..., str]) -> None:
    fails(sample().patched("key.2.value.1", 2), "demo.flags", "is 2")
    fails(build([("b", "bool", True)], []).patched("key.0.value", 255), "255")


@pytest.mark.parametrize("length", [1000, (16 << 20) + 1, *BOUNDARIES])
def test_G7_string_lengths(fails: Callable[..., str], length: int) -> None:
    fails(sample().patched("key.0.value.length", length), "general.architecture", str(length))
    fails(sample().patched("key.3.value.1.length", length), "demo.names", str(length))


def test_G7_strings_of_16_mib_are_the_longest(fails: Callable[..., str], tmp_path: Path) -> None:
    limit = 16 << 20
    assert len(opens(tmp_path / "model.gguf", build([("a", "str", b"x" * limit)], []).data).metadata["a"]) == limit
    fails(build([("a", "str", b"x" * (limit + 1))], []).data, str(limit))


@pytest.mark.parametrize("count", [2**20, 2**40, 2**60, *BOUNDARIES])
def test_G8_array_counts(fails: Callable[..., str], count: int) -> None:
    fails(sample().patched("key.2.value.count", count), "demo.flags", str(count))
    fails(sample().patched("key.3.value.count", count), "demo.names", str(count))
    unknown = Built(sample().patched("key.2.value.count", count), sample().fields)
    fails(unknown.patched("key.2.value.type", 99), "demo.flags", "99")


def test_G8_nested_arrays(fails: Callable[..., str]) -> None:
    fails(build([("a", "[[u32]]", [[1], [2]])], []).data, "nested")
    value: list[Any] = []
    for _ in range(100):
        value = [value]
    fails(build([("deep", "[" * 101 + "u8" + "]" * 101, value)], []).data, "nested")


def test_G8_a_header_over_256_mib(fails: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    built = build([("a", "[f64]", [])], [])
    built.data = built.patched("key.0.value.count", 40 << 20)  # 320 MiB, in a file that has them as a hole
    path.write_bytes(built.data)
    os.truncate(path, 400 << 20)
    with pytest.raises(BundleError, match="room for"):
        GgufFile(path)
    path.write_bytes(built.patched("key.0.value.count", (64 << 20) + 1))
    os.truncate(path, 1 << 30)
    with pytest.raises(BundleError, match=str(64 << 20)):
        GgufFile(path)


@pytest.mark.parametrize("alignment", [0, 1, 3, 4, 48, 8192, 2**20, 0x80000000])
def test_G9_alignments_that_are_not(fails: Callable[..., str], alignment: int) -> None:
    fails(build([("general.alignment", "u32", alignment)], TENSORS).data, "general.alignment", str(alignment))


@pytest.mark.parametrize("kind", ["u8", "u64", "i32", "f32", "str", "[u32]"])
def test_G9_alignment_of_another_type(fails: Callable[..., str], kind: str) -> None:
    value = {"str": "32", "[u32]": [32]}.get(kind, 32)
    fails(build([("general.alignment", kind, value)], TENSORS).data, "general.alignment", "type")


@pytest.mark.parametrize("alignment", [8, 16, 64, 4096])
def test_G9_alignments_that_are(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "model.gguf"
    built = build([*KEYS, ("general.alignment", "u32", alignment)], TENSORS, alignment=alignment)
    assert_equals_reference(opens(path, built.data), path)


@pytest.mark.parametrize("n_dims", [0, 5, 2**31, 2**32 - 1])
def test_G10_numbers_of_dimensions(fails: Callable[..., str], n_dims: int) -> None:
    fails(sample().patched("tensor.1.n_dims", n_dims), "'blocks'", str(n_dims))


@pytest.mark.parametrize("size", [0, -1, -(2**63), 2**62, 2**63, 2**63 - 32])
def test_G10_dimensions(fails: Callable[..., str], size: int) -> None:
    for field in ("tensor.0.dim.0", "tensor.1.dim.0", "tensor.1.dim.1", "tensor.2.dim.2"):
        fails(sample().patched(field, size), "tensor '")


@pytest.mark.parametrize(
    "shape",
    [
        (2**32, 2**31),  # 2^63 values
        (2**32, 2**32),  # 2^64: wraps to 0
        (2**61,),  # times 4 bytes: 2^63
        (2**62 + 8,),  # times 4 bytes wraps to 32
        (2**61 - 1,),  # 2^63 - 4 bytes: the padding would not fit in a signed number
        (2**16, 2**16, 2**16, 2**15),
    ],
)
def test_G10_sizes_that_wrap(fails: Callable[..., str], shape: tuple[int, ...]) -> None:
    fails(build([], [Tensor("huge", shape, 0, n_bytes=32), Tensor("next", (1,))]).data, "tensor '")


@pytest.mark.parametrize("type_id", [4, 5, 31, 32, 33, 36, 37, 38, 42, 200, -1])
def test_G11_unknown_and_removed_types(fails: Callable[..., str], type_id: int) -> None:
    fails(sample().patched("tensor.1.type", type_id), "unsupported type", str(type_id % 2**32), "'blocks'")


@pytest.mark.parametrize(("columns", "type_id"), [(31, 2), (33, 2), (1, 8), (255, 12), (128, 14), (257, 10)])
def test_G12_rows_of_part_blocks(fails: Callable[..., str], columns: int, type_id: int) -> None:
    fails(build([], [Tensor("part", (columns, 256), type_id, n_bytes=4096)]).data, "'part'", str(columns))


@pytest.mark.parametrize(
    ("offset", "word"),
    [
        *[(1, "multiple"), (33, "multiple"), (2**64 - 1, "multiple"), (0, "overlapping"), (32, "overlapping")],
        *[(288, "hole"), (2**40, "hole"), (2**63, "hole"), (2**64 - 32, "hole")],
    ],
)
def test_G13_offsets(fails: Callable[..., str], offset: int, word: str) -> None:
    assert sample().number("tensor.2.offset") == 32 + 224
    fails(sample().patched("tensor.2.offset", offset), "'halves'", word)


def test_G13_the_first_tensor_starts_at_0(fails: Callable[..., str]) -> None:
    fails(sample().patched("tensor.0.offset", 32), "'norm'", "hole")


@pytest.mark.parametrize("name", ["", "n" * 64, b"a\0b", b"\xff", "../../etc/passwd", "a/../b", "a\nb"])
def test_G14_tensor_names(fails: Callable[..., str], name: str | bytes) -> None:
    fails(build([], [Tensor("fine", (1,)), Tensor(name, (1,))]).data, "tensor")


@pytest.mark.parametrize("length", BOUNDARIES)
def test_G14_tensor_name_lengths(fails: Callable[..., str], length: int) -> None:
    fails(sample().patched("tensor.1.length", length), "tensor 1", str(length))


def test_G14_duplicate_tensor_name(fails: Callable[..., str]) -> None:
    fails(build([], [Tensor("same", (1,)), Tensor("other", (1,)), Tensor("same", (1,))]).data, "'same'", "twice")


def test_G14_names_of_63_bytes_are_the_longest(tmp_path: Path) -> None:
    assert opens(tmp_path / "model.gguf", build([], [Tensor("n" * 63, (1,))]).data).tensors[0].name == "n" * 63


def test_G15_file_cut_at_tensor_boundaries(fails: Callable[..., str], tmp_path: Path) -> None:
    built = sample()
    end = built.tensor_ends[-1]
    starts = [built.data_start, *(built.data_start + built.number(f"tensor.{i}.offset") for i in range(3))]
    for boundary in (*starts, *built.tensor_ends):
        for size in range(boundary - 1, min(boundary + 2, end)):
            fails(built.data[:size], f"{end - size} bytes short", "download it again")
    for size in range(end, len(built.data) + 1):  # the padding of the last tensor may be missing
        assert opens(tmp_path / "model.gguf", built.data[:size]).warnings == []


def test_G16_trailing_bytes_are_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    file = opens(path, sample().data + bytes(7))
    assert len(file.warnings) == 1 and str(path) in file.warnings[0] and " 7 bytes" in file.warnings[0]
    assert_equals_reference(file, path)


# --- Typed look-up and split files ---


def split(folder: Path, *, count: int = 3, name: str = "m", first: list[Key] | None = None) -> list[Path]:
    """A valid split model, one tensor per shard."""
    paths = [folder / f"{name}-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    for i, path in enumerate(paths):
        numbers: list[Key] = [
            ("split.no", "u16", i),
            ("split.tensors.count", "i32", count),
            ("split.count", "u16", count),
        ]
        keys = (KEYS if first is None else first) + numbers if i == 0 else numbers
        path.write_bytes(build(keys, [Tensor(f"{name}.{i}", (4 + i, 3))]).data)
    return paths


def test_G18_integers_of_any_width_are_accepted_where_they_fit(tmp_path: Path, fails: Callable[..., str]) -> None:
    for kind in ("u8", "i8", "u32", "i32", "u64", "i64"):
        assert opens(tmp_path / "model.gguf", build([("split.count", kind, 1)], []).data).paths
    wrong: list[tuple[str, Any]] = [("str", "1"), ("f32", 1.0), ("bool", True), ("[u16]", [1])]
    wrong += [("i16", -1), ("u64", 2**64 - 1), ("u32", 65536)]
    for kind, value in wrong:
        fails(build([("split.count", kind, value)], []).data, "split.count", "expected an integer")


def test_G21_a_split_model_is_one_file(tmp_path: Path) -> None:
    paths = split(tmp_path)
    file = GgufFile(paths[0])
    assert file.paths == [str(path) for path in paths]
    assert file.size_on_disk == sum(path.stat().st_size for path in paths)
    assert [(t.name, t.shard) for t in file.tensors] == [("m.0", 0), ("m.1", 1), ("m.2", 2)]
    expected = [tensor for path in paths for tensor in reference(path)[1]]
    assert [file.read(t.name).tobytes() for t in file.tensors] == [data for *_, data in expected]
    assert file.metadata == reference(paths[0])[0]


def assert_split_fails(path: Path, *words: str) -> None:
    with pytest.raises(BundleError) as caught:
        GgufFile(path)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_G21_a_later_shard_names_the_first(tmp_path: Path) -> None:
    paths = split(tmp_path)
    assert_split_fails(paths[1], "shard 2 of 3", str(paths[0]))
    assert_split_fails(paths[2].rename(tmp_path / "other.gguf"), "shard 3 of 3", "-00001-of-00003.gguf")


def test_G21_a_missing_shard_is_named(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[1].unlink()
    assert_split_fails(paths[0], "shard 2 of 3 is missing", str(paths[1]))


def test_G21_a_renamed_first_shard(tmp_path: Path) -> None:
    assert_split_fails(split(tmp_path)[0].rename(tmp_path / "model.gguf"), "-00001-of-00003.gguf")


def test_G21_a_damaged_shard_is_named(tmp_path: Path) -> None:
    paths = split(tmp_path)
    os.truncate(paths[2], paths[2].stat().st_size - 30)
    assert_split_fails(paths[0], f"{paths[2]}: ", "bytes short")


def test_G21_shards_of_different_models(tmp_path: Path) -> None:
    paths, others = split(tmp_path), split(tmp_path, name="x", count=4)
    shutil.copy(others[1], paths[1])
    assert_split_fails(paths[0], str(paths[1]), "split.count", "3", "4")
    shutil.copy(paths[2], paths[1])
    assert_split_fails(paths[0], str(paths[1]), "split.no", "expected 1, found 2")
    for key in (("general.architecture", "str", "other"), ("demo.flags", "[bool]", [False])):
        built = build([key, ("split.no", "u16", 1), ("split.count", "u16", 3)], [Tensor("m.1", (4,))])
        paths[1].write_bytes(built.data)
        assert_split_fails(paths[0], str(paths[1]), key[0], "another model")


def test_G21_tensors_must_be_as_many_as_announced_and_different(tmp_path: Path) -> None:
    paths = split(tmp_path)
    numbers: list[Key] = [("split.no", "u16", 1), ("split.count", "u16", 3)]
    paths[1].write_bytes(build(numbers, [Tensor("m.1", (4,)), Tensor("more", (4,))]).data)
    assert_split_fails(paths[0], "split.tensors.count", "expected 3", "hold 4")
    paths[1].write_bytes(build(numbers, [Tensor("m.0", (4,))]).data)
    assert_split_fails(paths[0], "'m.0'", str(paths[0]), str(paths[1]))


def test_G21_a_merged_file_keeps_a_count_of_0(tmp_path: Path) -> None:
    keys: list[Key] = [*KEYS, ("split.no", "u16", 0), ("split.count", "u16", 0), ("split.tensors.count", "i32", 3)]
    assert len(opens(tmp_path / "merged.gguf", build(keys, TENSORS).data).tensors) == 3


# --- The file system ---


def assert_file_error(path: Path | str, word: str) -> None:
    with pytest.raises(FileError, match=word) as caught:
        GgufFile(path)
    assert caught.value.exit_code == 3 and str(path) in str(caught.value)
    assert isinstance(caught.value, OSError) and isinstance(caught.value, Phi4EdgeError)


def test_G23_things_that_are_not_files(tmp_path: Path) -> None:
    assert_file_error(tmp_path, "directory")
    assert_file_error("/dev/zero", "device")
    assert_file_error(tmp_path / "missing.gguf", "No such file")
    assert_file_error(tmp_path / ("n" * 300), "too long")
    os.mkfifo(tmp_path / "pipe.gguf")
    assert_file_error(tmp_path / "pipe.gguf", "pipe")
    (tmp_path / "loop.gguf").symlink_to(tmp_path / "loop.gguf")
    assert_file_error(tmp_path / "loop.gguf", "symbolic links")
    (tmp_path / "linked.gguf").symlink_to(tmp_path / "pipe.gguf")
    assert_file_error(tmp_path / "linked.gguf", "pipe")
    assert_file_error(sys.executable + "/model.gguf", "Not a directory")


def test_G23_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s.gguf")
        assert_file_error("s.gguf", "socket")


def test_G23_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(sample().data)
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        assert_file_error(path, "Permission denied")
    finally:
        os.seteuid(user)


def test_G23_a_shard_that_is_a_pipe(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[2].unlink()
    os.mkfifo(paths[2])
    with pytest.raises(FileError, match="pipe") as caught:
        GgufFile(paths[0])
    assert caught.value.path == str(paths[2])


def test_a_failed_open_leaves_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(sample().patched("version", 9))
    paths = split(tmp_path)
    paths[2].write_bytes(b"GGUF")
    before = len(os.listdir("/dev/fd"))  # noqa: PTH208
    for _ in range(10):
        for wrong in (path, paths[0]):
            with pytest.raises(BundleError):
                GgufFile(wrong)
    assert len(os.listdir("/dev/fd")) == before  # noqa: PTH208


def test_G24_truncated_while_open(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    built = sample()
    file = opens(path, built.data)
    os.truncate(path, built.tensor_ends[1] - 1)
    assert file.read("norm").tobytes() == TENSORS[0].data()
    for name in ("blocks", "halves"):
        with pytest.raises(BundleError, match="became shorter") as caught:
            file.read(name)
        assert caught.value.field == f"tensor '{name}'" and caught.value.path == str(path)
    os.truncate(path, 0)
    with pytest.raises(BundleError, match="became shorter"):
        file.read("norm")


def test_G25_replaced_by_rename_while_open(tmp_path: Path) -> None:
    path, new = tmp_path / "model.gguf", tmp_path / "new.gguf"
    file = opens(path, sample().data)
    new.write_bytes(b"something else")
    new.rename(path)
    assert [file.read(t.name).tobytes() for t in file.tensors] == [t.data() for t in TENSORS]
