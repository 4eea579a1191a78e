"""ONNX graphs built node by node, and written without ever holding all weights.

A model is a protobuf message, in which a field may follow at any time: everything but the initializers is serialized
as usual, and the initializers are appended one after the other, each read from the checkpoint just before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from phi4edge.converters.files import HashedFile, hashed_file
from phi4edge.converters.onnx_weights import Weight
from phi4edge.errors import BundleError

PRECISIONS = ("fp32", "fp16", "int8")
_OPSETS = {"": 17, "com.microsoft": 1}
IR_VERSION = 8
LARGEST_FILE = (1 << 31) - 1  # bytes; protobuf reads no more

_LARGEST_HALF = 65504.0
_N_OUTLIERS = 16  # channels of a linear layer's input
# Field numbers of onnx.proto, with the wire type of a length-delimited field.
_MODEL_GRAPH = 7 << 3 | 2
_GRAPH_INITIALIZER = 5 << 3 | 2
_TENSOR_RAW_DATA = 9 << 3 | 2

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Initializer:
    """A constant of the graph; ``values`` is called once, when it is written, in the order of creation."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    values: Callable[[], Array]

    def header(self) -> bytes:
        """A TensorProto up to its data."""
        proto = onnx.TensorProto(dims=self.shape, data_type=helper.np_dtype_to_tensor_dtype(self.dtype), name=self.name)
        return bytes(proto.SerializeToString()) + bytes([_TENSOR_RAW_DATA]) + _varint(self.n_bytes)

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def n_bytes_in_graph(self) -> int:
        n_bytes = len(self.header()) + self.n_bytes
        return 1 + len(_varint(n_bytes)) + n_bytes


class Graph:
    """A graph under construction.  Values are named by strings; every method that makes one returns its name."""

    def __init__(self, name: str, precision: str) -> None:
        self.name = name
        self.precision = precision
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: list[Initializer] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._matrices: dict[str, tuple[str, ...]] = {}  # name of a weight of linear() -> the values that hold it

    def input(self, name: str, dtype: type[np.generic], shape: Sequence[int | str]) -> str:
        self._inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, value: str, name: str, dtype: type[np.generic], shape: Sequence[int | str]) -> None:
        self._nodes.append(helper.make_node("Identity", [value], [name], name=name))
        self._outputs.append(_value_info(name, dtype, shape))

    def op(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """A node with one output.  domain: "" for the standard, or "com.microsoft"."""
        return self.ops(op_type, *inputs, n_outputs=1, domain=domain, **attributes)[0]

    def ops(self, op_type: str, *inputs: str, n_outputs: int, domain: str = "", **attributes: Any) -> list[str]:
        name = f"{op_type}_{len(self._nodes)}"
        outputs = [name] if n_outputs == 1 else [f"{name}.{index}" for index in range(n_outputs)]
        self._nodes.append(helper.make_node(op_type, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs

    def constant(self, value: npt.ArrayLike, dtype: type[np.generic] = np.float32) -> str:
        """A small constant; equal ones are stored once."""
        array = np.asarray(value, dtype)
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self._constants:
            self._constants[key] = self._add(
                f"constant_{len(self._constants)}", array.dtype, array.shape, lambda: array
            )
        return self._constants[key]

    def parameter(
        self,
        weight: Weight,
        shape: tuple[int, ...] | None = None,
        change: Callable[[Array], Array] = lambda values: values,
    ) -> str:
        """A weight of the checkpoint, float32; at precision fp16 half of that in the file, and widened in the graph.

        ``change`` may reorder the values to ``shape``.
        """
        shape = shape or weight.shape
        name = weight.name
        if self.precision != "fp16" or len(shape) < 2:
            return self._add(name, np.dtype(np.float32), shape, lambda: change(weight.read()))
        half = self._add(name, np.dtype(np.float16), shape, lambda: change(weight.read(_LARGEST_HALF)))
        return self.op("Cast", half, to=onnx.TensorProto.FLOAT)

    def linear(self, x: str, weight: Weight, bias: Weight | None = None) -> str:
        """x [..., in] times a matrix [out, in], plus a bias [out].  A weight may be used several times."""
        n_out, n_in = weight.shape[:2]  # a pointwise convolution has a third axis of 1
        if self.precision == "int8":
            return self._int8_linear(x, weight, bias)
        if weight.name not in self._matrices:
            matrix = self.parameter(weight, (n_in, n_out), lambda w: w.reshape(n_out, n_in).T)
            self._matrices[weight.name] = (matrix,)
        product = self.op("MatMul", x, *self._matrices[weight.name])
        return self._plus(product, bias)

    def write(self, path: Path, metadata: Mapping[str, str]) -> HashedFile:
        """Writes the model.  BundleError when it would be larger than protobuf can be."""
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs)
        domains = sorted({"", *(node.domain for node in self._nodes)})
        model = onnx.ModelProto(
            ir_version=IR_VERSION,
            producer_name="phi4edge",
            opset_import=[helper.make_opsetid(domain, _OPSETS[domain]) for domain in domains],
        )
        helper.set_model_props(model, dict(metadata))
        start, nodes = model.SerializeToString(deterministic=True), graph.SerializeToString(deterministic=True)
        n_bytes = len(nodes) + sum(initializer.n_bytes_in_graph for initializer in self._initializers)
        if len(start) + n_bytes + 16 > LARGEST_FILE:
            raise BundleError(
                f"the {self.name} encoder takes {n_bytes} bytes at {self.precision}; an ONNX file holds {LARGEST_FILE}",
                hint="use --encoders fp16 or int8",
            )
        with hashed_file(path) as file:
            file.write(start + bytes([_MODEL_GRAPH]) + _varint(n_bytes))
            file.write(nodes)
            for initializer in self._initializers:
                header = initializer.header()
                file.write(bytes([_GRAPH_INITIALIZER]) + _varint(len(header) + initializer.n_bytes) + header)
                values = np.asarray(initializer.values(), initializer.dtype, order="C")
                if values.shape != initializer.shape:
                    raise RuntimeError(f"{initializer.name} has the shape {values.shape}, not {initializer.shape}")
                file.write(values)
        return file

    @property
    def n_bytes(self) -> int:
        """Of the file, about."""
        n_bytes = sum(initializer.n_bytes_in_graph for initializer in self._initializers)
        return n_bytes + int(sum(node.ByteSize() + 3 for node in self._nodes))

    def _int8_linear(self, x: str, weight: Weight, bias: Weight | None) -> str:
        """Activations in 8 bits with one scale, but for the channels with the largest values, which stay float.

        A few channels of a transformer are 20 to 50 times as large as the others, which would get two or three bits.
        Both the scale and the choice of channels are those of the whole of x.  Scales of rows or blocks of x, or
        MatMulNBits, are about as exact and slower.  Onnxruntime fuses the nodes in this order, bias included.
        """
        matrix, scale = self._int8_matrix(weight)
        n_in = weight.shape[1]
        outliers = self._outliers(x, n_in)
        keep = self.op(
            "ScatterElements",
            self.constant(np.ones(n_in)),
            outliers,
            self.constant(np.zeros(min(_N_OUTLIERS, n_in))),
            axis=0,
        )
        codes, x_scale, zero = self.ops("DynamicQuantizeLinear", self.op("Mul", x, keep), n_outputs=3)
        product = self.op("Cast", self.op("MatMulInteger", codes, matrix, zero), to=onnx.TensorProto.FLOAT)
        product = self._plus(self.op("Mul", product, self.op("Mul", x_scale, scale)), bias)
        rows = self.op("Cast", self.op("Gather", matrix, outliers, axis=0), to=onnx.TensorProto.FLOAT)
        rest = self.op("MatMul", self.op("Gather", x, outliers, axis=-1), self.op("Mul", rows, scale))
        return self.op("Add", product, rest)

    def _outliers(self, x: str, n_channels: int) -> str:
        """Indices of the channels of x [..., n_channels] with the largest values, int64 [n]."""
        rows = self.op("Reshape", x, self.constant([-1, n_channels], np.int64))
        highest = self.op("ReduceMax", rows, axes=[0], keepdims=0)
        lowest = self.op("Neg", self.op("ReduceMin", rows, axes=[0], keepdims=0))
        count = self.constant([min(_N_OUTLIERS, n_channels)], np.int64)
        return self.ops("TopK", self.op("Max", highest, lowest), count, n_outputs=2)[1]

    def _int8_matrix(self, weight: Weight) -> tuple[str, ...]:
        """Weights [in, out] in int8, and a scale for each output."""
        if weight.name in self._matrices:
            return self._matrices[weight.name]
        n_out, n_in = weight.shape[:2]
        scales: list[Array] = []

        def codes() -> Array:
            w = weight.read().reshape(n_out, n_in)
            scale = np.maximum(np.abs(w).max(axis=1), np.float32(1e-30)) / np.float32(127)
            scales.append(scale)
            rounded: Array = np.rint(w / scale[:, None]).astype(np.int8).T
            return rounded

        matrix = self._add(weight.name, np.dtype(np.int8), (n_in, n_out), codes)
        scale = self._add(f"{weight.name}.scale", np.dtype(np.float32), (n_out,), scales.pop)
        self._matrices[weight.name] = matrix, scale
        return matrix, scale

    def _plus(self, x: str, bias: Weight | None) -> str:
        if bias is None:
            return x
        if bias.name not in self._matrices:
            self._matrices[bias.name] = (self.parameter(bias),)
        return self.op("Add", x, *self._matrices[bias.name])

    def _add(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], values: Callable[[], Array]) -> str:
        self._initializers.append(Initializer(name, dtype, shape, values))
        return name


def _value_info(name: str, dtype: type[np.generic], shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
