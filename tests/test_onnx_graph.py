"""Graphs that are written piece by piece: linear layers in every precision, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from phi4edge.converters.checkpoint import Checkpoint
from phi4edge.converters.onnx_graph import PRECISIONS, Graph
from phi4edge.converters.onnx_weights import Weights, stack
from phi4edge.converters.variants import MEDIA_PREFIX, media_tensors, variant_of
from phi4edge.errors import BundleError
from tiny_checkpoints import Tensors, write_json, write_safetensors
from tiny_models import Array


def checkpoint(directory: Path, tensors: Tensors, dtype: str = "F32") -> Path:
    directory.mkdir(exist_ok=True)
    write_safetensors(directory / "model.safetensors", {f"{MEDIA_PREFIX}x.{k}": v for k, v in tensors.items()}, dtype)
    write_json(directory / "config.json", {"model_type": "phi4_multimodal"})
    return directory


def linear(directory: Path, precision: str, tensors: Tensors) -> Path:
    """y = a x and z = [a; b] x + c, for the tensors a, b [n_out, n_in] and c [2 n_out]."""
    n_out, n_in = tensors["a"].shape
    path = directory / f"{precision}.onnx"
    with Checkpoint(checkpoint(directory / "checkpoint", tensors)) as source:
        weights = Weights(source, media_tensors(source, variant_of(source)), "x.")
        graph = Graph("test", precision)
        x = graph.input("x", np.float32, ["batch", "rows", n_in])
        a, b, c = weights.take("a", n_out, n_in), weights.take("b", n_out, n_in), weights.take("c", 2 * n_out)
        for name, value, width in (
            ("y", graph.linear(x, a), n_out),
            ("z", graph.linear(x, stack("x.both", a, b), c), 2 * n_out),
            ("again", graph.linear(graph.linear(x, a), weights.take("square", n_out, n_out)), n_out),
            ("twice", graph.linear(x, a), n_out),
        ):
            graph.output(value, name, np.float32, ["batch", "rows", width])
        n_bytes = graph.n_bytes
        assert abs(graph.write(path, {"key": "value"}).n_bytes - n_bytes) < 1024
    return path


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("n_in", [3, 54, 269])
def test_a_linear_layer_is_the_product_of_numpy(n_in: int, precision: str, tmp_path: Path) -> None:
    """Also where a channel of the input is 40 times as large as the others, and where all are 0."""
    rng = np.random.default_rng(n_in)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    tensors = {"a": normal(21, n_in), "b": normal(21, n_in), "c": normal(42), "square": normal(21, 21)}
    path = linear(tmp_path, precision, tensors)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = normal(2, 5, n_in)
    x[..., 1] *= 40
    both = np.concatenate([tensors["a"], tensors["b"]])
    y = x @ tensors["a"].T
    wanted = {"y": y, "z": x @ both.T + tensors["c"], "again": y @ tensors["square"].T, "twice": y}
    found = session.run(list(wanted), {"x": x})
    for (name, reference), values in zip(wanted.items(), found, strict=True):
        error = np.linalg.norm(values - reference) / np.linalg.norm(reference)
        assert error < {"fp32": 1e-6, "fp16": 1e-3, "int8": 1.5e-2}[precision], name
    zeros = session.run(["y", "z"], {"x": np.zeros((1, 2, n_in), np.float32)})
    np.testing.assert_allclose(zeros[0], 0)
    np.testing.assert_allclose(zeros[1], np.broadcast_to(tensors["c"], (1, 2, 42)))


def test_a_weight_too_large_for_half_precision_is_named(tmp_path: Path) -> None:
    tensors = {name: np.ones((2, 2), np.float32) for name in ("a", "b", "square")} | {"c": np.ones(4, np.float32)}
    tensors["b"][1, 1] = 70000
    with pytest.raises(BundleError, match=r"x\.b'.*7e\+04, too large for fp16; use --encoders fp32"):
        linear(tmp_path, "fp16", tensors)


def test_what_protobuf_cannot_hold_is_refused_before_it_is_written(tmp_path: Path) -> None:
    """A file of 2 GiB without a block on the disk; nothing of it may be read."""
    directory = checkpoint(tmp_path / "checkpoint", {"a": np.zeros((1, 1), np.float32)})
    path = directory / "model.safetensors"
    n_columns = 1 << 19
    header = b'{"%sx.a":{"dtype":"F16","shape":[1024,%d],"data_offsets":[0,%d]}}' % (
        MEDIA_PREFIX.encode(),
        n_columns,
        n_columns * 2048,
    )
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + n_columns * 2048)
    with Checkpoint(directory) as source:
        weights = Weights(source, media_tensors(source, variant_of(source)), "x.")
        for precision in PRECISIONS:
            graph = Graph("test", precision)
            x = graph.input("x", np.float32, ["rows", n_columns])
            graph.output(graph.linear(x, weights.take("a", 1024, n_columns)), "y", np.float32, ["rows", 1024])
            if precision == "fp32":
                with pytest.raises(BundleError, match=r"2147.*use --encoders fp16 or int8"):
                    graph.write(tmp_path / "large.onnx", {})
                assert not (tmp_path / "large.onnx").exists()
            else:
                assert graph.n_bytes < 1 << 31
