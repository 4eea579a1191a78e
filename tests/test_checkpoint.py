"""Checkpoints that are damaged, incomplete or hostile: one error each, before anything is read or run (rows C1-C4)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peers import require
from phi4edge.converters.checkpoint import Checkpoint, SafetensorsFile, row_pieces, to_float32
from phi4edge.converters.variants import read_config, variant_of
from phi4edge.errors import BundleError, FileError
from tiny_checkpoints import safetensors_bytes, tiny_checkpoint, tiny_config, write_json, write_safetensors
from tiny_models import TinyShape


def entry(shape: Any = (2,), begin: Any = 0, end: Any = 8, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def header(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


EIGHT = b"\0" * 8
DAMAGED = {
    "empty file": (b"", "0 bytes"),
    "no length": (b"\x02\0\0", "3 bytes"),
    "length 0": (b"\0" * 8, "impossible"),
    "length over 100 MB": ((100_000_001).to_bytes(8, "little"), "impossible"),
    "length 2^64 - 1": (b"\xff" * 8, "impossible"),
    "length past the end": ((500).to_bytes(8, "little") + b"{}", "past the end"),
    "not an object": (safetensors_bytes(b"[]"), "begin with"),
    "spaces first": (safetensors_bytes(b" {}"), "begin with"),
    "cut JSON": (safetensors_bytes(b'{"a": '), "JSON"),
    "deep JSON": (safetensors_bytes(b'{"a":' + b"[" * 200_000), "JSON"),
    "long number": (safetensors_bytes(b'{"a": ' + b"9" * 10_000 + b"}"), "JSON"),
    "NaN": (safetensors_bytes(b'{"a": NaN}'), "JSON"),
    "bad UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "UTF-8"),
    "duplicate key": (
        safetensors_bytes(b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2), EIGHT),
        "twice",
    ),
    "metadata not strings": (safetensors_bytes(header(__metadata__={"format": 1})), "__metadata__"),
    "metadata not an object": (safetensors_bytes(header(__metadata__=[])), "__metadata__"),
    "entry not an object": (safetensors_bytes(header(a=3)), "described"),
    "entry without dtype": (safetensors_bytes(header(a={"shape": [], "data_offsets": [0, 0]})), "described"),
    "unknown dtype": (safetensors_bytes(header(a=entry(dtype="F7")), EIGHT), "dtype"),
    "dtype not a string": (safetensors_bytes(header(a=entry(dtype=["F32"])), EIGHT), "dtype"),
    "negative shape": (safetensors_bytes(header(a=entry([-2])), EIGHT), "shape"),
    "fractional shape": (safetensors_bytes(header(a=entry([2.0])), EIGHT), "shape"),
    "boolean shape": (safetensors_bytes(header(a=entry([True, 2])), EIGHT), "shape"),
    "shape that wraps": (safetensors_bytes(header(a=entry([1 << 62, 4, 2])), EIGHT), "takes"),
    "shape that wraps to 0": (safetensors_bytes(header(a=entry([1 << 62, 4], 0, 0))), "takes"),
    "shape and span differ": (safetensors_bytes(header(a=entry([3])), EIGHT), "takes 12 bytes"),
    "offsets reversed": (safetensors_bytes(header(a=entry(begin=8, end=0)), EIGHT), "not in the file"),
    "offsets past the end": (safetensors_bytes(header(a=entry()), EIGHT[:4]), "not in the file"),
    "negative offset": (safetensors_bytes(header(a=entry(begin=-8, end=0)), EIGHT), "data_offsets"),
    "three offsets": (
        safetensors_bytes(header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}), EIGHT),
        "data_offsets",
    ),
    "overlap": (safetensors_bytes(header(a=entry(), b=entry(begin=4, end=12)), EIGHT + EIGHT[:4]), "overlaps"),
    "same place": (safetensors_bytes(header(a=entry(), b=entry()), EIGHT), "overlaps"),
    "hole": (safetensors_bytes(header(a=entry(), b=entry(begin=12, end=20)), EIGHT * 2 + EIGHT[:4]), "hole"),
    "bytes at the end": (safetensors_bytes(header(a=entry()), EIGHT + b"x"), "belong to none"),
}


@pytest.mark.parametrize("data, problem", DAMAGED.values(), ids=DAMAGED.keys())
def test_C1_a_damaged_safetensors_file_is_a_bundle_error(tmp_path: Path, data: bytes, problem: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(BundleError, match=problem) as caught:
        SafetensorsFile(path)
    assert caught.value.path == str(path)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_C1_a_changed_header_is_an_error_or_a_file_within_its_bounds(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    write_safetensors(path, {"a": np.ones((2, 3), np.float32), "b": np.zeros(5, np.float32)})
    content = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 45), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    try:
        file = SafetensorsFile(path)
    except BundleError:
        return
    for tensor in file.tensors.values():
        assert len(file.read(tensor.offset, tensor.n_bytes)) == tensor.n_bytes
    file.close()


def test_safetensors_reads_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    numpy_writer = require("safetensors.numpy")
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal(7).astype(np.float16),
    }
    numpy_writer.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "np"})
    write_json(tmp_path / "config.json", {})
    with Checkpoint(tmp_path) as checkpoint:
        for name, expected in tensors.items():
            tensor = checkpoint.tensors[name]
            n_rows = expected.shape[0] if expected.ndim > 1 else 1
            read = to_float32(checkpoint.raw(tensor, 0, n_rows), tensor.dtype).reshape(expected.shape)
            np.testing.assert_array_equal(read, expected.astype(np.float32))
        rows = to_float32(checkpoint.raw(checkpoint.tensors["a"], 1, 2), "F32").reshape(2, 5)
        np.testing.assert_array_equal(rows, tensors["a"][1:])


def test_bfloat16_is_the_upper_half_of_a_float() -> None:
    raw = np.array([0x3F80, 0xC000, 0x0001], np.uint16).tobytes()
    np.testing.assert_array_equal(to_float32(raw, "BF16"), np.array([1.0, -2.0, 2.0**-133], np.float32))


def test_row_pieces_cover_every_row_once() -> None:
    for n_rows, n_columns in ((1, 10), (7, 3), (5, 1000)):
        pieces = list(row_pieces(n_rows, n_columns, 10))
        assert [row for first, n in pieces for row in range(first, first + n)] == list(range(n_rows))


# --- shards


def break_index(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    write_json(path, index)


def first(places: dict[str, str]) -> str:
    return next(iter(places))


BROKEN_INDEXES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing shard": (lambda p: p.update(dict.fromkeys([first(p)], "model-9.safetensors")), "missing"),
    "path upwards": (lambda p: p.update({first(p): "../model.safetensors"}), "plain name"),
    "absolute path": (lambda p: p.update({first(p): "/etc/passwd"}), "plain name"),
    "not a string": (lambda p: p.update({first(p): 3}), "weight_map"),
    "another shard": (lambda p: p.update({first(p): p[list(p)[-1]]}), "is in"),
    "tensor too many": (lambda p: p.update({"nobody": p[first(p)]}), "no file"),
    "tensor not listed": (lambda p: p.pop(first(p)), "the index"),
}


@pytest.mark.parametrize("change, problem", BROKEN_INDEXES.values(), ids=BROKEN_INDEXES.keys())
def test_C2_a_wrong_index_is_a_bundle_error(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    checkpoint = tiny_checkpoint(tmp_path, n_shards=2)
    break_index(checkpoint, change)
    with pytest.raises(BundleError, match=problem):
        Checkpoint(checkpoint)


def test_C2_a_tensor_in_two_shards_is_a_bundle_error(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, n_shards=2)
    shards = sorted(checkpoint.glob("*.safetensors"))
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(BundleError, match=f"is in {shards[0].name} too"):
        Checkpoint(checkpoint)


def test_C2_the_same_tensor_twice_in_the_index_is_a_bundle_error(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, n_shards=2)
    index = checkpoint / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(BundleError, match="twice"):
        Checkpoint(checkpoint)


def test_open_files_are_closed_after_an_error(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, n_shards=3)
    (checkpoint / "model-00003-of-00003.safetensors").write_bytes(b"damaged!")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(BundleError):
        Checkpoint(checkpoint)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- the configuration


def test_C3_a_missing_or_broken_config_is_a_bundle_error(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    for content in (b"{", b"[]", b'{"a": 1, "a": 2}', b"\xff\xfe", b'{"model_type": "phi3"} x'):
        (checkpoint / "config.json").write_bytes(content)
        with pytest.raises(BundleError, match=r"config\.json"):
            Checkpoint(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(BundleError, match="has no config"):
        Checkpoint(checkpoint)


@pytest.mark.parametrize("model_type", ["llama", None, 3, "phi3\n"])
def test_C3_a_wrong_model_type_is_a_bundle_error(tmp_path: Path, model_type: object) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a": np.ones(2, np.float32)})
    write_json(tmp_path / "config.json", {"model_type": model_type})
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(BundleError, match="supported are phi3"):
        variant_of(checkpoint)


def test_C3_code_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    (checkpoint / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    write_json(checkpoint / "config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "modeling_evil.Config"}})
    with Checkpoint(checkpoint) as opened, pytest.raises(BundleError, match="code of its own"):
        variant_of(opened)
    assert not (tmp_path / "ran").exists()


BROKEN_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no layers": ({"num_hidden_layers": None}, "num_hidden_layers: is missing"),
    "layers as text": ({"num_hidden_layers": "2"}, "num_hidden_layers"),
    "more layers than tensors": (
        {"num_hidden_layers": 2_000_000_000},
        "num_hidden_layers: 2000000000 layers need more",
    ),
    "boolean heads": ({"num_attention_heads": True}, "num_attention_heads"),
    "negative size": ({"hidden_size": -256}, "hidden_size"),
    "heads do not divide": ({"num_attention_heads": 6}, "divide"),
    "key heads do not divide": ({"num_key_value_heads": 3}, "divide"),
    "no theta": ({"rope_theta": None}, "rope_theta: is missing"),
    "odd rotary dims": ({"partial_rotary_factor": 0.05}, "rotary dims"),
    "other activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "biases": ({"attention_bias": True}, "attention_bias"),
    "other rope": ({"rope_scaling": {"type": "yarn"}}, "yarn"),
    "rope not an object": ({"rope_scaling": [1]}, "rope_scaling"),
    "no factors": ({"rope_scaling": {"type": "longrope"}}, "short_factor"),
    "negative factor": (
        {"rope_scaling": {"type": "su", "short_factor": [1.0] * 32, "long_factor": [-1.0] * 32}},
        "long_factor",
    ),
    "tied as text": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
}


@pytest.mark.parametrize("change, problem", BROKEN_CONFIGS.values(), ids=BROKEN_CONFIGS.keys())
def test_C3_a_config_that_makes_no_sense_names_the_entry(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    shape = TinyShape(original_context=128)
    checkpoint = tiny_checkpoint(tmp_path, original_context=128)
    write_json(checkpoint / "config.json", tiny_config(shape, "phi3") | change)
    with Checkpoint(checkpoint) as opened, pytest.raises(BundleError, match=problem):
        read_config(opened)


def test_both_spellings_of_the_rope_and_its_old_name_are_the_same(tmp_path: Path) -> None:
    shape = TinyShape(original_context=128, rotary_fraction=0.75)
    old = tiny_config(shape, "phi3")
    rope = {"rope_theta": old["rope_theta"], "partial_rotary_factor": 0.75, "original_max_position_embeddings": 128}
    new = {key: value for key, value in old.items() if key not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {**old["rope_scaling"], "rope_type": "longrope", **rope}
    checkpoint = tiny_checkpoint(tmp_path)
    found = []
    for config in (old, new, tiny_config(shape, "phi3", rope_type="su")):
        write_json(checkpoint / "config.json", config)
        with Checkpoint(checkpoint) as opened:
            found.append(read_config(opened))
    assert found[0] == found[1] == found[2]
    assert found[0].rotary_dims == 48
    assert found[0].attention_factor == pytest.approx(shape.attention_factor)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_C4_a_pickle_is_refused(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / "config.json", {"model_type": "phi3"})
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(BundleError, match="pickle refused"):
        Checkpoint(tmp_path)


def test_a_directory_without_weights_and_a_file_are_errors(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "phi3"})
    with pytest.raises(BundleError, match="neither"):
        Checkpoint(tmp_path)
    with pytest.raises(FileError, match="does not exist"):
        Checkpoint(tmp_path / "nothing")
    with pytest.raises(FileError, match="not a directory"):
        Checkpoint(tmp_path / "config.json")
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(FileError, match="not a regular file"):
        Checkpoint(tmp_path)
