"""ONNX files, checked before onnxruntime sees them.

Only the fields of the table below are accepted.  So whatever could reach beyond the file (external data), nest deeply
(subgraphs, functions, sequence types) or run other code (custom ops) is refused, with everything else that our encoders
do not need.  Weights are not read.

>>> inspect_onnx("vision.onnx").metadata["phi4edge.kind"]  # doctest: +SKIP
'vision'
"""

from __future__ import annotations

import math
import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from phi4edge.errors import BundleError, FileError
from phi4edge.protobuf import MessageReader, Span

OPSETS = range(17, 24)
IR_VERSIONS = range(4, 11)  # from 4 on, initializers are no inputs
N_BYTES_LIMIT = 1 << 31  # what protobuf can read

# What the graphs of converters/vision.py and converters/audio.py are made of, and their near relatives.  No op that
# holds a graph (If, Loop, Scan) and no op outside the two domains.
# fmt: off
OPS: Mapping[str, frozenset[str]] = {
    "": frozenset({
        "Abs", "Add", "And", "AveragePool", "Cast", "Clip", "Concat", "Constant", "ConstantOfShape", "Conv",
        "ConvInteger", "DequantizeLinear", "Div", "DynamicQuantizeLinear", "Equal", "Erf", "Expand", "Floor",
        "Gather", "GatherElements", "Gelu", "Gemm", "Identity", "LayerNormalization", "Less", "MatMul",
        "MatMulInteger", "Max", "Min", "Mul", "Neg", "Not", "Or", "Pad", "Pow", "QuantizeLinear", "Range",
        "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Relu", "Reshape", "Round", "ScatterElements",
        "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "TopK",
        "Transpose", "Unsqueeze", "Where",
    }),
    "com.microsoft": frozenset({"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits", "MultiHeadAttention"}),
}
# fmt: on

# TensorProto.DataType -> its name in NumPy's spelling and the bits of one value.
_ELEMENTS = {
    1: ("float32", 32),
    2: ("uint8", 8),
    3: ("int8", 8),
    6: ("int32", 32),
    7: ("int64", 64),
    9: ("bool", 8),
    10: ("float16", 16),
    11: ("float64", 64),
    12: ("uint32", 32),
    16: ("bfloat16", 16),
    21: ("uint4", 4),
    22: ("int4", 4),
}

# What is accepted of onnx.proto, in the words of protobuf.py.
_MESSAGES = {
    "model": {
        1: "int ir_version",
        2: "text producer_name",
        3: "text producer_version",
        4: "text domain",
        5: "int model_version",
        6: "blob doc_string",
        7: "graph graph",
        8: "opset* opset_import",
        14: "entry* metadata_props",
        20: "no training information",
        25: "no functions",
    },
    "opset": {1: "text domain", 2: "int version"},
    "entry": {1: "text key", 2: "text value"},
    "graph": {
        1: "node* node",
        2: "text name",
        5: "tensor* initializer",
        10: "blob doc_string",
        11: "value* input",
        12: "value* output",
        13: "value* value_info",
        15: "no sparse initializers",
        16: "entry* metadata_props",
    },
    "node": {
        1: "text* input",
        2: "text* output",
        3: "text name",
        4: "text op_type",
        5: "attribute* attribute",
        6: "blob doc_string",
        7: "text domain",
        9: "entry* metadata_props",
    },
    "attribute": {
        1: "text name",
        2: "float f",
        3: "int i",
        4: "blob s",
        5: "tensor t",
        6: "no subgraphs",
        7: "float* floats",
        8: "int* ints",
        9: "blob* strings",
        10: "tensor* tensors",
        11: "no subgraphs",
        13: "blob doc_string",
        20: "int type",
        22: "no sparse tensors",
        23: "no sparse tensors",
    },
    "tensor": {
        1: "int* dims",
        2: "int data_type",
        4: "float* float_data",
        5: "int* int32_data",
        7: "int* int64_data",
        8: "text name",
        9: "blob raw_data",
        12: "blob doc_string",
        13: "no external data",
        14: "int data_location",
        16: "entry* metadata_props",
    },
    "value": {1: "text name", 2: "type type", 3: "blob doc_string", 4: "entry* metadata_props"},
    "type": {1: "tensor_type tensor_type", 6: "text denotation"},
    "tensor_type": {1: "int elem_type", 2: "shape shape"},
    "shape": {1: "dim* dim"},
    "dim": {1: "int dim_value", 2: "text dim_param", 3: "text denotation"},
}
_MOST_DIMS = 8
_HINT = "copy the bundle again, or convert the checkpoint again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output.  An axis is a length, a name, or None for neither; ``shape`` is None when not given."""

    name: str
    element: str  # "float32", in NumPy's spelling
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True, slots=True)
class OnnxSummary:
    ir_version: int
    opsets: Mapping[str, int]  # domain -> version
    metadata: Mapping[str, str]
    ops: Mapping[str, int]  # "MatMul" or "com.microsoft.MatMulNBits" -> how many
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    n_bytes: Mapping[str, int]  # element type -> bytes of the initializers


def inspect_onnx(path: str | os.PathLike[str]) -> OnnxSummary:
    """What is in an ONNX file, after checking that it holds nothing that our encoders do not need.

    Raises FileError, and BundleError for a file that is damaged or not of our kind.
    """
    with open_onnx(path) as file:
        return inspect_file(file, os.fspath(path))


def open_onnx(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file.  A pipe or a device in its place would block us, and is refused with FileError."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror}", path=os.fspath(path)) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise FileError("is not a regular file", path=os.fspath(path))
    return file


def inspect_file(file: BinaryIO, path: str) -> OnnxSummary:
    """As :func:`inspect_onnx`, for a file that is open; ``path`` is for messages."""
    n_bytes = os.fstat(file.fileno()).st_size
    if n_bytes == 0:
        raise BundleError("is empty", path=path, hint=_HINT)
    if n_bytes >= N_BYTES_LIMIT:
        raise BundleError(f"has {n_bytes} bytes; an ONNX file has less than {N_BYTES_LIMIT}", path=path, hint=_HINT)
    try:
        return _Inspector(file, path).model(Span("model", 0, n_bytes))
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror}", path=path) from error


class _Inspector:
    def __init__(self, file: BinaryIO, path: str) -> None:
        reader = MessageReader(file, _MESSAGES, path=path, hint=_HINT)
        self._fields, self._refuse = reader.fields, reader.refuse
        self._names: set[str] = set()  # of all values of the graph

    def model(self, span: Span) -> OnnxSummary:
        model = self._fields(span)
        ir_version = model.get("ir_version", 0)
        if ir_version not in IR_VERSIONS:
            self._refuse(f"is {ir_version}; {_text(IR_VERSIONS)} can be read", "ir_version")
        opsets: dict[str, int] = {}
        for import_span in model.get("opset_import", []):
            opset = self._fields(import_span)
            domain, version = opset.get("domain", ""), opset.get("version", 0)
            known = {"": OPSETS, "com.microsoft": range(1, 2)}.get(domain)
            if known is None:
                self._refuse(f"the op domain {domain!r:.80} is not known here", "opset_import")
            if domain in opsets:
                self._refuse(f"the op domain {domain!r:.80} comes twice", "opset_import")
            if version not in known:
                self._refuse(f"has version {version} of {domain!r}; {_text(known)} can be read", "opset_import")
            opsets[domain] = version
        if "" not in opsets or "graph" not in model:
            self._refuse("lacks an opset or a graph; it is not an ONNX model", "")
        metadata = self._entries(model.get("metadata_props", []))
        return self._graph(self._fields(model["graph"]), ir_version, opsets, metadata)

    def _graph(
        self, graph: dict[str, Any], ir_version: int, opsets: dict[str, int], metadata: dict[str, str]
    ) -> OnnxSummary:
        inputs = tuple(self._value(span) for span in graph.get("input", []))
        for value in inputs:
            self._define(value.name, "input")
        n_bytes: Counter[str] = Counter()
        for span in graph.get("initializer", []):
            name, element, size = self._tensor(span, "initializer")
            self._define(name, "initializer")
            n_bytes[element] += size
        ops = Counter(self._node(span, opsets) for span in graph.get("node", []))
        outputs = tuple(self._value(span) for span in graph.get("output", []))
        for names in ([value.name for value in outputs], [self._value(s).name for s in graph.get("value_info", [])]):
            if len(set(names)) < len(names):
                self._refuse("two outputs or descriptions have the same name", "graph")
        self._entries(graph.get("metadata_props", []))
        return OnnxSummary(ir_version, opsets, metadata, dict(ops), inputs, outputs, dict(n_bytes))

    def _node(self, span: Span, opsets: dict[str, int]) -> str:
        """Checks a node; the name of its op."""
        node = self._fields(span)
        domain, op = node.get("domain", ""), node.get("op_type", "")
        field = f"node {node.get('name', '')!r:.80}"
        if domain not in opsets or op not in OPS[domain]:
            self._refuse(f"the op {op!r:.80} of the domain {domain!r:.80} is not one that our encoders use", field)
        for name in node.get("output", []):
            if name:  # an optional output that nobody wants has none
                self._define(name, field)
        seen = set()
        for attribute_span in node.get("attribute", []):
            attribute = self._fields(attribute_span)
            attribute_name = attribute.get("name", "")
            if attribute_name in seen:
                self._refuse(f"the attribute {attribute_name!r:.80} comes twice", field)
            seen.add(attribute_name)
            for tensor in [*attribute.get("tensors", []), *([attribute["t"]] if "t" in attribute else [])]:
                self._tensor(tensor, field)
        self._entries(node.get("metadata_props", []))
        return f"{domain}.{op}" if domain else op

    def _tensor(self, span: Span, field: str) -> tuple[str, str, int]:
        """Name, element type and size in bytes of a tensor, whose data are all there."""
        tensor = self._fields(span)
        name = tensor.get("name", "")
        field = f"{field} {name!r:.80}"
        if tensor.get("data_location", 0) != 0:
            self._refuse("has external data; an encoder is one file", field)
        element, bits = self._element(tensor.get("data_type", 0), field)
        dims: list[int] = tensor.get("dims", [])
        if len(dims) > _MOST_DIMS or any(not 0 <= dim < N_BYTES_LIMIT for dim in dims):
            self._refuse(f"the shape {dims[: _MOST_DIMS + 1]} is impossible", field)
        n_values = math.prod(dims)
        n_bytes = -(-n_values * bits // 8)
        data = [key for key in ("raw_data", "float_data", "int32_data", "int64_data") if key in tensor]
        if len(data) > 1:
            self._refuse("has its data twice", field)
        if data == ["raw_data"]:
            given, expected = tensor["raw_data"].n_bytes, n_bytes
        else:
            given, expected = (len(tensor[data[0]]) if data else 0), n_values
        if given != expected:
            self._refuse(f"has {given} bytes or values, but the shape {dims} of {element} takes {expected}", field)
        self._entries(tensor.get("metadata_props", []))
        return name, element, n_bytes

    def _value(self, span: Span) -> TensorInfo:
        value = self._fields(span)
        name = value.get("name", "")
        field = f"value {name!r:.80}"
        self._entries(value.get("metadata_props", []))
        kind = self._fields(value["type"]) if "type" in value else {}
        if "tensor_type" not in kind:
            self._refuse("is not a tensor", field)
        tensor = self._fields(kind["tensor_type"])
        element, _ = self._element(tensor.get("elem_type", 0), field)
        if "shape" not in tensor:
            return TensorInfo(name, element, None)
        dims = [self._fields(dim) for dim in self._fields(tensor["shape"]).get("dim", [])]
        lengths = [dim["dim_value"] for dim in dims if "dim_value" in dim]
        named = [dim["dim_param"] for dim in dims if "dim_param" in dim]
        if len(dims) > _MOST_DIMS or len(lengths) + len(named) > len(dims):
            self._refuse("has an impossible shape", field)
        if any(not 0 <= length < N_BYTES_LIMIT for length in lengths):
            self._refuse(f"has an impossible shape: {lengths}", field)
        return TensorInfo(name, element, tuple(dim.get("dim_value", dim.get("dim_param")) for dim in dims))

    def _entries(self, spans: list[Span]) -> dict[str, str]:
        entries: dict[str, str] = {}
        for span in spans:
            entry = self._fields(span)
            key = entry.get("key", "")
            if key in entries:
                self._refuse(f"the key {key!r:.80} comes twice", "metadata_props")
            entries[key] = entry.get("value", "")
        return entries

    def _element(self, data_type: int, field: str) -> tuple[str, int]:
        if data_type not in _ELEMENTS:
            self._refuse(f"element type {data_type} is not one that our encoders use", field)
        return _ELEMENTS[data_type]

    def _define(self, name: str, field: str) -> None:
        if not name or name in self._names:
            self._refuse(f"the name {name!r:.80} is empty or comes twice", field)
        self._names.add(name)


def _text(numbers: range) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
