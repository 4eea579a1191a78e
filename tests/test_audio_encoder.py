"""The audio encoder gives the embeddings of transformers, from both layouts, and refuses what it cannot compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from peers import require
from phi4edge.converters.audio import build_audio, write_audio
from phi4edge.converters.checkpoint import Checkpoint
from phi4edge.converters.files import Written
from phi4edge.converters.variants import variant_of
from phi4edge.errors import BundleError
from tiny_checkpoints import write_json
from tiny_media import MEDIA, MEDIA_LAYOUTS, MediaShape, media_model, media_tensors, original_name, tiny_multimodal

Array = npt.NDArray[np.float32]

SHAPES = {
    "usual": MediaShape(),
    "odd": MediaShape(audio_hidden=21, audio_heads=3, audio_ffn=17, audio_blocks=1, audio_channels=5, seed=1),
    "wide": MediaShape(audio_hidden=96, audio_heads=4, audio_ffn=160, audio_blocks=3, audio_channels=67, seed=2),
}
N_FRAMES = (1, 7, 8, 9, 98, 368, 4000, 4001, 4498)
TOKENS_OF_A_WINDOW = 500
TOLERANCE = 5e-6  # of the largest value: ten times what rounding does, half of what one wrong bias of 1000 does
BRANCHES = ("speech", "vision_speech")
ENCODER = f"{MEDIA}audio_embed.encoder."
BLOCK = f"{ENCODER}encoders.1."


@cache
def model(shape: MediaShape) -> Any:
    return media_model(shape).model.embed_tokens_extend.audio_embed


def reference(shape: MediaShape, features: Array, branch: int) -> Array:
    """What transformers computes from one clip, as a whole and without a mask: [tokens, hidden]."""
    torch, audio = require("torch"), model(shape)
    up, down = (getattr(audio, f"{part}_proj_for_{BRANCHES[branch]}") for part in ("up", "down"))
    with torch.no_grad():
        hidden = audio.encoder(torch.from_numpy(features)[None], None)
        return np.asarray(down(torch.nn.functional.gelu(up(hidden)))[0])


def sound(n_frames: int, seed: int = 0) -> Array:
    """Log-mels of a likely size, with what changes slowly and what does not."""
    rng = np.random.default_rng([n_frames, seed])
    slow = np.cumsum(rng.standard_normal((n_frames, 1)), axis=0) / np.sqrt(np.arange(1, n_frames + 1))[:, None]
    return np.asarray(18 + 2 * slow + 3 * rng.standard_normal((n_frames, 80)), np.float32)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Written]]:
    """Converts a tiny checkpoint; returns the file."""

    @cache
    def convert(shape: MediaShape, precision: str, layout: str = MEDIA_LAYOUTS[0]) -> tuple[Path, Written]:
        directory = tmp_path_factory.mktemp("checkpoint")
        tiny_multimodal(directory, layout, **{name: getattr(shape, name) for name in MediaShape.__dataclass_fields__})
        return write(directory, precision)

    return convert


def write(directory: Path, precision: str = "fp32") -> tuple[Path, Written]:
    path = directory / "audio.onnx"
    with Checkpoint(directory) as checkpoint:
        hidden = checkpoint.config["hidden_size"]
        plan = build_audio(checkpoint, variant_of(checkpoint), hidden, precision)
        return path, write_audio(path, plan, lambda name, done, total: None)


def session(path: Path) -> Callable[..., Array]:
    onnxruntime = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(features: Array, branch: int, skip: int = 0, window: int = 0) -> Array:
        numbers = {"skip": skip, "window": window, "branch": branch}
        inputs = {name: np.array(value, np.int64) for name, value in numbers.items()}
        return np.asarray(opened.run(["embeddings"], {"features": features, **inputs})[0])

    return run


def in_windows(run: Callable[..., Array], features: Array, branch: int) -> Array:
    """A clip of any length; each window but the first gets the 8 frames before it, for the convolutions."""
    n_tokens = -(-len(features) // 8)
    if n_tokens <= TOKENS_OF_A_WINDOW:
        return np.asarray(run(features[None], branch)[0])
    parts = []
    for first in range(0, n_tokens, TOKENS_OF_A_WINDOW):
        frames = features[max(0, 8 * first - 8) : 8 * (first + TOKENS_OF_A_WINDOW)]
        parts.append(run(frames[None], branch, skip=int(first > 0), window=TOKENS_OF_A_WINDOW)[0])
    return np.concatenate(parts)


def cosines(a: Array, b: Array) -> Array:
    """Of each row."""
    return np.asarray((a * b).sum(axis=-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("branch", [0, 1], ids=BRANCHES)
def test_embeddings_are_those_of_transformers(encoder: Any, name: str, branch: int) -> None:
    shape = SHAPES[name]
    run = session(encoder(shape, "fp32")[0])
    for n_frames in N_FRAMES if name == "usual" else (1, 57, 1203):
        features = sound(n_frames)
        expected, got = reference(shape, features, branch), in_windows(run, features, branch)
        assert got.shape == (-(-n_frames // 8), shape.hidden)
        assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max(), n_frames


@pytest.mark.parametrize(("precision", "least"), [("fp16", 0.99999), ("int8", 0.999)])
@pytest.mark.parametrize("name", SHAPES)
def test_narrow_weights_give_nearly_the_same(encoder: Any, name: str, precision: str, least: float) -> None:
    path, written = encoder(SHAPES[name], precision)
    if name == "wide":  # of the others, most is graph
        assert written.n_bytes < 0.75 * encoder(SHAPES[name], "fp32")[1].n_bytes
    run = session(path)
    for branch in (0, 1):
        for n_frames in (5, 368):
            features = sound(n_frames)
            assert cosines(run(features[None], branch)[0], reference(SHAPES[name], features, branch)).min() >= least


def test_several_windows_at_once_are_those_one_by_one(encoder: Any) -> None:
    run = session(encoder(SHAPES["usual"], "fp32")[0])
    windows = np.stack([sound(203, seed) for seed in range(3)])
    for numbers in ({}, {"skip": 1}, {"window": 40}, {"skip": 1, "window": 25}):
        together = run(windows, 1, **numbers)
        assert together.shape == (3, 26 - numbers.get("skip", 0), SHAPES["usual"].hidden)
        alone = np.concatenate([run(one[None], 1, **numbers) for one in windows])
        np.testing.assert_allclose(together, alone, atol=1e-5 * np.abs(alone).max())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_both_layouts_give_the_same_file_which_is_valid_onnx(encoder: Any, precision: str) -> None:
    onnx = require("onnx")
    (path, written), (other, _) = (encoder(SHAPES["usual"], precision, layout) for layout in MEDIA_LAYOUTS)
    assert path.read_bytes() == other.read_bytes()
    assert path.stat().st_size == written.n_bytes
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(str(path))
    assert proto.ir_version <= 10
    assert {entry.key: entry.value for entry in proto.metadata_props} == {
        "phi4edge.kind": "audio",
        "phi4edge.version": "1",
        "phi4edge.precision": precision,
        "phi4edge.hidden": str(SHAPES["usual"].hidden),
    }
    assert not any(tensor.external_data for tensor in proto.graph.initializer)
    assert {node.domain for node in proto.graph.node} <= {"", "com.microsoft"}
    # No loops and branches: nothing holds another graph.
    assert not any(attribute.HasField("g") for node in proto.graph.node for attribute in node.attribute)


def test_progress_names_every_tensor_and_may_stop_the_writing(tmp_path: Path) -> None:
    class StoppedError(Exception):
        pass

    def stop(name: str, done: int, total: int) -> None:
        seen.append((name, done, total))
        if done > total / 2:
            raise StoppedError

    tiny_multimodal(tmp_path)
    names = [name for name in media_tensors(MediaShape()) if "audio_embed" in name]
    with Checkpoint(tmp_path) as checkpoint:
        plan = build_audio(checkpoint, variant_of(checkpoint), MediaShape().hidden, "fp32")
        n_source = sum(checkpoint.tensors[name].n_bytes for name in names)
        seen: list[tuple[str, int, int]] = []
        write_audio(tmp_path / "a.onnx", plan, lambda *step: seen.append(step))
        assert {name for name, _, _ in seen} - {""} == set(names)
        assert {total for _, _, total in seen} == {n_source}
        assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
        plan = build_audio(checkpoint, variant_of(checkpoint), MediaShape().hidden, "fp32")
        seen = []
        with pytest.raises(StoppedError):
            write_audio(tmp_path / "b.onnx", plan, stop)
        assert len(seen) < len(names)


BAD_TENSORS: dict[str, tuple[str, Callable[[Array], Array | None], str]] = {
    "no bias table": (
        f"{ENCODER}relative_attention_bias_layer.bias_values.weight",
        lambda old: None,
        "lacks the tensor",
    ),
    "no projector": (f"{MEDIA}audio_embed.up_proj_for_vision_speech.bias", lambda old: None, "lacks the tensor"),
    "a block without queries": (f"{BLOCK}self_attn.q_proj.weight", lambda old: None, "lacks the tensor"),
    "a flat bias table": (
        f"{ENCODER}relative_attention_bias_layer.bias_values.weight",
        np.ravel,
        "expected 2 sizes",
    ),
    "a convolution of no channel": (f"{ENCODER}embed.conv.0.weight", lambda old: old[:0], "expected 4 sizes"),
    "a transposed matrix": (f"{BLOCK}feed_forward_in.down_proj.weight", np.transpose, "has the shape"),
    "a short norm": (f"{BLOCK}layer_norm.weight", lambda old: old[:-1], "has the shape"),
    "a wide convolution": (f"{ENCODER}embed.conv.2.weight", lambda old: np.tile(old, 2), "has the shape"),
    "other log-mels": (f"{ENCODER}encoder_embedding.global_mean", lambda old: old[:40], "has the shape"),
    "a narrow projector": (f"{MEDIA}audio_embed.down_proj_for_speech.weight", lambda old: old[1:], "has the shape"),
    "a NaN": (f"{BLOCK}conv.glu.b2", lambda old: old * np.float32("nan"), "NaN"),
    "an infinity": (f"{ENCODER}embed.out.bias", lambda old: old + np.float32("inf"), "infinity"),
}


@pytest.mark.parametrize("layout", MEDIA_LAYOUTS)
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_bad_tensor_is_an_error_that_names_it(tmp_path: Path, layout: str, case: str) -> None:
    name, change, problem = BAD_TENSORS[case]
    in_file = original_name(name) if layout == "phi4mm" else name
    tiny_multimodal(tmp_path, layout, changes={in_file: change(media_tensors(MediaShape())[name])})
    with pytest.raises(BundleError) as caught:
        write(tmp_path)
    shown = name.removeprefix(MEDIA) if problem.startswith("lacks") else in_file  # there it has no name of its own
    assert shown in str(caught.value)
    assert problem in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ("encoders.1.adapter.weight", "no use that we know: '.*adapter.weight'"),
        ("encoders.x.layer_norm.weight", "no use that we know: '.*x.layer_norm.weight'"),
        ("encoders.2.layer_norm.weight", "num_blocks: 2 contradicts"),
    ],
)
def test_a_tensor_of_no_use_is_an_error_before_anything_is_written(tmp_path: Path, extra: str, problem: str) -> None:
    tiny_multimodal(tmp_path, changes={ENCODER + extra: np.ones(48, np.float32)})
    with pytest.raises(BundleError, match=problem):
        write(tmp_path)
    assert not (tmp_path / "audio.onnx").exists()


BAD_CONFIGS: dict[str, tuple[str, object]] = {
    "other heads": ("audio_config.num_attention_heads", 3),
    "heads as text": ("audio_config.num_attention_heads", "2"),
    "other distance": ("audio_config.bias_max_distance", 1000),
    "more blocks": ("audio_config.num_blocks", 24),
    "other activation": ("audio_config.activation", "gelu"),
    "chunks": ("audio_config.chunk_size", 18),
    "a number that is true": ("audio_config.depthwise_multiplier", True),
    "symmetric": ("audio_config.bias_symmetric", True),
    "no object": ("audio_config", []),
    "original heads": ("audio_processor.config.attention_heads", 3),
    "original distance": ("audio_processor.config.relative_attention_bias_args.t5_bias_max_distance", 499),
    "original channels": ("audio_processor.config.nemo_conv_settings.conv_channels", {}),
    "original reduction": ("audio_processor.config.time_reduction", 4),
    "original projector": ("embd_layer.audio_embd_layer.projection_cls", "linear"),
    "original query former": ("embd_layer.audio_embd_layer.use_qformer", True),
    "original without": ("audio_processor", None),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_means_another_encoder_is_an_error_that_names_the_field(tmp_path: Path, case: str) -> None:
    field, value = BAD_CONFIGS[case]
    tiny_multimodal(tmp_path, MEDIA_LAYOUTS[0] if field.startswith("audio_config") else MEDIA_LAYOUTS[1])
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    *path, last = field.split(".")
    place = config
    for key in path:
        place = place[key]
    place[last] = value
    write_json(tmp_path / "config.json", config)
    with pytest.raises(BundleError) as caught:
        write(tmp_path)
    assert field in str(caught.value)
    assert "config.json" in str(caught.value)
    assert not (tmp_path / "audio.onnx").exists()
