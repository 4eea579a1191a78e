"""ONNX files that are damaged or want more than an encoder may: one error each, before onnxruntime runs (row L5)."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnxruntime
import pytest

from phi4edge.encoders import VisionEncoder
from phi4edge.errors import BundleError, FileError, Phi4EdgeError
from phi4edge.onnx_file import OPS, inspect_onnx
from processes import ROOT
from tiny_onnx import HIDDEN, audio_model, save, vision_model

EXTERNAL = {
    "in the parent directory": {"location": "../canary"},
    "absolute": {"location": "/canary"},
    "symbolic link": {"location": "symlink"},
    "hard link": {"location": "hardlink"},
    "pipe": {"location": "pipe"},
    "past the end": {"location": "hardlink", "offset": str(1 << 40), "length": str(1 << 40)},
    "no location": {"offset": "0"},
}


def external(tensor: Any, entries: dict[str, str], *, location: bool = True) -> None:
    tensor.ClearField("raw_data")
    for key, value in entries.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    if location:
        tensor.data_location = 1


def constant(model: Any, **fields: Any) -> Any:
    """Adds a node with one attribute, and returns that."""
    node = onnx.helper.make_node("Constant", [], ["added"])
    node.attribute.add(name="value", **fields)
    model.graph.node.insert(0, node)
    return model.graph.node[0].attribute[0]


def _in_initializer(entries: dict[str, str]) -> Callable[[Any], None]:
    return lambda model: external(model.graph.initializer[0], entries)


def _entries_alone(model: Any) -> None:
    external(model.graph.initializer[0], {"location": "../canary"}, location=False)


def _location_alone(model: Any) -> None:
    model.graph.initializer[0].data_location = 1


def _in_attribute(model: Any) -> None:
    tensor = constant(model, type=4).t
    tensor.dims[:], tensor.data_type = [1], 1
    external(tensor, {"location": "../canary"})


def _in_subgraph(model: Any) -> None:
    node = model.graph.node.add(op_type="If", input=["condition"], output=["either"])
    tensor = node.attribute.add(name="then_branch", type=5).g.initializer.add(name="x", dims=[1], data_type=1)
    external(tensor, {"location": "../canary"})


def _in_function(model: Any) -> None:
    function = model.functions.add(name="f", domain="", output=["y"])
    tensor = function.node.add(op_type="Constant", output=["y"]).attribute.add(name="value", type=4).t
    external(tensor, {"location": "../canary"})


def _op(op: str, domain: str = "", version: int = 0) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.graph.node[0].op_type, model.graph.node[0].domain = op, domain
        if version:
            model.opset_import.add(domain=domain, version=version)

    return change


def _opset(version: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.opset_import[0].version = version

    return change


def _ir_version(version: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.ir_version = version

    return change


def _initializer(**fields: Any) -> Callable[[Any], None]:
    return lambda model: model.graph.initializer.add(**({"name": "added", "data_type": 1} | fields))


def _deep_type(model: Any) -> None:
    kind = model.graph.value_info.add(name="deep").type
    for _ in range(50):
        kind = kind.sequence_type.elem_type
    kind.tensor_type.elem_type = 1


def _negative_axis(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1


def _twice(message: str) -> Callable[[Any], None]:
    """Appends a copy of the last of a repeated message."""

    def change(model: Any) -> None:
        owner = model
        *path, last = message.split(".")
        for name in path:
            owner = getattr(owner, name)
            owner = owner[0] if hasattr(owner, "append") else owner
        getattr(owner, last).append(getattr(owner, last)[-1])

    return change


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    **{f"external data: {name}": (_in_initializer(entries), "external data") for name, entries in EXTERNAL.items()},
    "external data without saying so": (_entries_alone, "external data"),
    "external data without entries": (_location_alone, "external data"),
    "external data in an attribute": (_in_attribute, "external data"),
    "external data in a subgraph": (_in_subgraph, "If"),
    "external data in a function": (_in_function, "functions"),
    "graph in an attribute": (lambda model: constant(model, type=5).g.node.add(op_type="Add"), "subgraphs"),
    "graphs in an attribute": (lambda model: constant(model, type=10).graphs.add(name="g"), "subgraphs"),
    "sparse attribute": (lambda model: constant(model, type=11).sparse_tensor.dims.append(1), "sparse"),
    "sparse attributes": (lambda model: constant(model, type=12).sparse_tensors.add(dims=[1]), "sparse"),
    "type in an attribute": (lambda model: constant(model, type=13).tp.tensor_type.SetInParent(), "field 14"),
    "reference to a function's attribute": (lambda model: constant(model, ref_attr_name="x"), "field 21"),
    "sparse initializer": (lambda model: model.graph.sparse_initializer.add(dims=[4]), "sparse"),
    "training": (lambda model: model.training_info.add(), "training"),
    "quantization by annotation": (lambda model: model.graph.quantization_annotation.add(), "field 14"),
    "sequences of sequences": (_deep_type, "field 4"),
    "opset 16": (_opset(16), "version 16"),
    "opset 99": (_opset(99), "version 99"),
    "opset -1": (_opset(-1), "version -1"),
    "no opset": (lambda model: model.ClearField("opset_import"), "lacks an opset"),
    "opset twice": (_twice("opset_import"), "comes twice"),
    "ir_version 3": (_ir_version(3), "ir_version"),
    "ir_version 11": (_ir_version(11), "ir_version"),
    "no ir_version": (lambda model: model.ClearField("ir_version"), "ir_version"),
    "no graph": (lambda model: model.ClearField("graph"), "graph"),
    "unknown op": (_op("Explode"), "'Explode'"),
    "loop": (_op("Loop"), "'Loop'"),
    "op of a domain that is not imported": (_op("MatMulNBits", "com.microsoft"), "'com.microsoft'"),
    "other op of Microsoft": (_op("Inverse", "com.microsoft", 1), "'Inverse'"),
    "custom domain": (_op("Add", "evil.example", 1), "'evil.example'"),
    "two lines in a name": (_op("Add\nphi4edge: all is well"), r"Add\n"),
    "initializer twice": (_twice("graph.initializer"), "comes twice"),
    "output of two nodes": (_twice("graph.node"), "comes twice"),
    "input twice": (_twice("graph.input"), "comes twice"),
    "output twice": (_twice("graph.output"), "same name"),
    "attribute twice": (_twice("graph.node.attribute"), "comes twice"),
    "metadata twice": (_twice("metadata_props"), "comes twice"),
    "initializer named as an input": (_initializer(name="pixel_values", dims=[0]), "comes twice"),
    "initializer without a name": (_initializer(name="", dims=[0]), "empty"),
    "negative axis of an input": (_negative_axis, "impossible"),
    "too few bytes": (_initializer(dims=[3], raw_data=bytes(11)), "takes 12"),
    "too few values": (_initializer(dims=[3], float_data=[1, 2]), "takes 3"),
    "values in another type's list": (_initializer(dims=[2], raw_data=bytes(8), int32_data=[1, 2]), "twice"),
    "no data": (_initializer(dims=[1 << 30]), "takes"),
    "negative axis": (_initializer(dims=[-1, -1], raw_data=bytes(4)), "impossible"),
    "shape that wraps": (_initializer(dims=[1 << 31, 1 << 31, 4]), "impossible"),
    "shape that wraps to 0": (_initializer(dims=[1 << 30, 1 << 30, 1 << 4]), "takes"),
    "nine axes": (_initializer(dims=[1] * 9, raw_data=bytes(4)), "impossible"),
    "strings": (_initializer(data_type=8, dims=[1], string_data=[b"x"]), "field 6"),
    "unknown type": (_initializer(data_type=99, dims=[0]), "element type 99"),
    "long name": (_initializer(name="x" * 100_000, dims=[0]), "100000 bytes"),
}


def field(number: int, data: bytes) -> bytes:
    """A length-delimited field of protobuf, written by hand."""
    out, length = bytearray([number << 3 | 2]), len(data)
    while length > 0x7F:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes(out) + bytes([length]) + data


HEADER = b"\x08\x08" + field(8, b"\x10\x11")  # ir_version 8, opset 17


def model_bytes() -> bytes:
    return bytes(vision_model().SerializeToString())


DAMAGED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "byte"),
    "GGUF": (lambda: b"GGUF" + bytes(100), "byte"),
    "zeros": (lambda: bytes(100), "field 0"),
    "one byte short": (lambda: model_bytes()[:-1], "past the end"),
    "half": (lambda: model_bytes()[: len(model_bytes()) // 2], "past the end"),
    "length of 2^63": (lambda: b"\x3a" + b"\x80" * 9 + b"\x01", "past the end"),
    "length of 2^70": (lambda: b"\x3a" + b"\xff" * 9 + b"\x7f", "64 bits"),
    "endless number": (lambda: b"\x08" + b"\x80" * 100, "64 bits"),
    "number that is cut": (lambda: b"\x08\x80", "is cut"),
    "group": (lambda: b"\x0b\x0c", "wire type 3"),
    "graph that is a number": (lambda: b"\x38\x01", "wire type 0"),
    "version that is a text": (lambda: field(1, b"8"), "wire type 2"),
    "two graphs": (lambda: model_bytes() + field(7, b""), "graph of a model comes twice"),
    "two versions": (lambda: model_bytes() + b"\x08\x08", "ir_version of a model comes twice"),
    "newer field": (lambda: model_bytes() + field(15, b""), "field 15"),
    "name that is not UTF-8": (lambda: model_bytes() + field(4, b"\xff"), "UTF-8"),
    "axis with a length and a name": (
        lambda: (
            HEADER + field(7, field(11, field(2, field(1, b"\x08\x01" + field(2, field(1, b"\x08\x02\x12\x01n"))))))
        ),
        "impossible",
    ),
    "float that is cut": (lambda: HEADER + field(7, field(1, field(5, b"\x15\0\0") + field(4, b"Add"))), "is cut"),
    "floats of 7 bytes": (lambda: HEADER + field(7, field(5, field(4, bytes(7)))), "7 bytes"),
    # What would take much memory or time if it were read as it comes.
    "many fields": (lambda: HEADER + field(7, field(1, b"") * 110_000), "more than 100000 fields"),
    "many values": (lambda: HEADER + field(7, field(5, field(1, bytes(60_000)) * 2)), "more than 100000 fields"),
    "long list": (lambda: HEADER + field(7, field(5, field(7, bytes(100_000)))), "a list of ints has 100000 bytes"),
    "much text": (lambda: HEADER + field(7, field(1, field(1, bytes(16_000)) * 3000)), "all have more than"),
}


def cases() -> Iterator[tuple[str, Callable[[], bytes], str]]:
    for name, (change, words) in REFUSED.items():

        def changed(change: Callable[[Any], object] = change) -> bytes:
            model = vision_model()
            change(model)
            return bytes(model.SerializeToString())

        yield name, changed, words
    for name, (make, words) in DAMAGED.items():
        yield name, make, words


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A place for a model among files that it must not touch."""
    inner = tmp_path / "bundle"
    inner.mkdir()
    (tmp_path / "canary").write_bytes(bytes(1000))
    (inner / "symlink").symlink_to(tmp_path / "canary")
    os.link(tmp_path / "canary", inner / "hardlink")
    os.mkfifo(inner / "pipe")
    return inner


@pytest.mark.parametrize(("make", "words"), [case[1:] for case in cases()], ids=[case[0] for case in cases()])
def test_L5_what_an_encoder_never_has_is_refused(make: Callable[[], bytes], words: str, directory: Path) -> None:
    path = directory / "vision.onnx"
    path.write_bytes(make())
    tracemalloc.start()
    try:
        with pytest.raises(BundleError) as caught:
            inspect_onnx(path)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert words in text and text.startswith(str(path)) and text.isprintable() and len(text) < len(str(path)) + 400


def test_L5_refused_files_never_reach_onnxruntime(directory: Path) -> None:
    for name, make, _ in cases():
        (directory / f"{name.replace('/', ' ')}.onnx").write_bytes(make())
    code = (
        "import pathlib, sys\n"
        "from phi4edge.encoders import VisionEncoder\n"
        "from phi4edge.errors import BundleError\n"
        f"for path in pathlib.Path({str(directory)!r}).glob('*.onnx'):\n"
        f"    try: VisionEncoder(path, {HIDDEN})\n"
        "    except BundleError: print('refused')\n"
        "print('onnxruntime' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["refused"] * len([*cases()]) + ["False"]


@pytest.mark.parametrize("place", ["missing", "directory", "pipe", "device"])
def test_L5_what_is_no_regular_file_is_a_file_error(place: str, directory: Path) -> None:
    path = Path("/dev/zero") if place == "device" else directory if place == "directory" else directory / place
    with pytest.raises(FileError, match=r"regular|cannot be read"):
        inspect_onnx(path)


def test_L5_a_file_of_2_GiB_is_refused_unread(tmp_path: Path) -> None:
    path = save(vision_model(), tmp_path / "vision.onnx")
    os.truncate(path, 1 << 31)  # a hole: it takes no space
    with pytest.raises(BundleError, match="2147483648 bytes"):
        inspect_onnx(path)


@pytest.mark.parametrize("make", [vision_model, audio_model])
def test_the_summary_says_what_onnx_says(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    constant(model, type=6, floats=[1.5, 2.5])
    constant(model, type=4, t=onnx.numpy_helper.from_array(np.arange(3, dtype=np.float16))).name = "value"
    model.graph.node[0].output[0] = "another"
    model.opset_import.add(domain="com.microsoft", version=1)
    summary = inspect_onnx(save(model, tmp_path / "model.onnx"))

    assert summary.ir_version == model.ir_version
    assert summary.opsets == {entry.domain: entry.version for entry in model.opset_import}
    assert summary.metadata == {entry.key: entry.value for entry in model.metadata_props}
    assert summary.ops == Counter(node.op_type for node in model.graph.node)
    for found, expected in ((summary.inputs, model.graph.input), (summary.outputs, model.graph.output)):
        assert [(info.name, info.element, info.shape) for info in found] == [
            (
                value.name,
                str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
                tuple(
                    getattr(dim, str(dim.WhichOneof("value") or "WhichOneof"))
                    for dim in value.type.tensor_type.shape.dim
                ),
            )
            for value in expected
        ]
    sizes: Counter[str] = Counter()
    for array in map(onnx.numpy_helper.to_array, model.graph.initializer):
        sizes[str(array.dtype)] += array.nbytes
    assert summary.n_bytes == sizes


def test_large_weights_are_not_read(tmp_path: Path) -> None:
    model = vision_model()
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((1 << 12, 1 << 12), np.float32)))
    model.graph.initializer[-1].name = "large"
    path = save(model, tmp_path / "vision.onnx")
    tracemalloc.start()
    try:
        assert inspect_onnx(path).n_bytes["float32"] > 1 << 26
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_every_op_of_the_list_exists() -> None:
    assert {op for op in OPS[""] if not onnx.defs.has(op)} == set()
    schemas = onnxruntime.capi.onnxruntime_pybind11_state.get_all_operator_schema()
    assert OPS["com.microsoft"] <= {schema.name for schema in schemas if schema.domain == "com.microsoft"}


def mutants(data: bytes, n_mutants: int) -> Iterator[bytes]:
    random = np.random.default_rng(7)
    for number in range(n_mutants):
        mutant = bytearray(data)
        if number % 4 == 3:
            del mutant[int(random.integers(len(data))) :]
        for _ in range(number % 3 + 1):
            if mutant:
                values = [0, 1, 0x7F, 0x80, 0xFF, int(random.integers(256))]
                mutant[int(random.integers(len(mutant)))] = int(random.choice(values))
        yield bytes(mutant)


def test_L5_mutants_are_read_as_others_read_them_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "vision.onnx"
    n_read = 0
    for mutant in mutants(model_bytes(), 300):
        path.write_bytes(mutant)
        try:
            summary = inspect_onnx(path)
        except BundleError as error:
            assert str(error).isprintable()
            continue
        n_read += 1
        model = onnx.load_from_string(mutant)
        assert summary.ops == Counter(node.op_type for node in model.graph.node)
        assert [info.name for info in summary.inputs] == [value.name for value in model.graph.input]
        try:
            VisionEncoder(path, HIDDEN).close()
        except Phi4EdgeError as error:
            assert str(error).isprintable()
    assert n_read > 30
