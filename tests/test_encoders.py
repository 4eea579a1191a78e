"""Encoders: the right embeddings for any crops and lengths, and every wrong file or input is one error of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from phi4edge.encoders import AudioEncoder, VisionEncoder
from phi4edge.errors import BundleError, Cancelled, InputError, OutOfMemoryError, Phi4EdgeError, UsageError
from processes import ROOT
from tiny_onnx import (
    CROP_SIZE,
    HIDDEN,
    SEPARATORS,
    audio_model,
    audio_tokens,
    save,
    vision_model,
    vision_tokens,
)

N_PATCHES = CROP_SIZE // 14


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> VisionEncoder:
    return VisionEncoder(save(vision_model(), tmp_path_factory.mktemp("vision") / "vision.onnx"), HIDDEN)


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> AudioEncoder:
    return AudioEncoder(save(audio_model(), tmp_path_factory.mktemp("audio") / "audio.onnx"), HIDDEN, threads=2)


def crops(n: int, seed: int = 0) -> tuple[Any, Any]:
    """Random crops whose valid patches are rectangles of any size."""
    random = np.random.default_rng(seed)
    n_rows, n_columns = random.integers(1, N_PATCHES + 1, (2, n, 1, 1))
    ranks = np.arange(N_PATCHES)
    pixels = random.standard_normal((n, 3, CROP_SIZE, CROP_SIZE)).astype(np.float32)
    return pixels, (ranks[:, None] < n_rows) & (ranks < n_columns)


def frames(n: int) -> Any:
    return np.random.default_rng(n).standard_normal((n, 80)).astype(np.float32)


@pytest.mark.parametrize("n_crops", [1, 2, 9])
def test_each_crop_gets_its_embeddings(vision: VisionEncoder, n_crops: int) -> None:
    pixels, mask = crops(n_crops)
    seen: list[tuple[int, int]] = []
    features = vision.encode(pixels, mask, progress=lambda done, total: seen.append((done, total)))
    assert vision.crop_size == CROP_SIZE
    assert features.crops.dtype == np.float32
    np.testing.assert_allclose(features.crops, vision_tokens(pixels, mask), atol=1e-5)
    np.testing.assert_array_equal([features.row_separator, features.view_separator], SEPARATORS)
    assert seen == [(done, n_crops) for done in range(n_crops + 1)]


def test_crops_may_lie_in_memory_in_any_order(vision: VisionEncoder) -> None:
    pixels, mask = crops(3)
    channels_last = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    features = vision.encode(channels_last, np.asfortranarray(mask))
    np.testing.assert_allclose(features.crops, vision_tokens(pixels, mask), atol=1e-5)


@pytest.mark.parametrize("n_frames", [1, 7, 8, 9, 98, 4000, 4001, 4008, 8000, 8001, 12345])
def test_a_recording_of_any_length_is_one_sequence(audio: AudioEncoder, n_frames: int) -> None:
    features = frames(n_frames)
    for number, branch in enumerate(("speech", "vision")):
        embeddings = audio.encode(features, branch)  # type: ignore[arg-type]
        assert embeddings.shape == (-(-n_frames // 8), HIDDEN) and embeddings.dtype == np.float32
        # Each token comes from the 15 frames around it, also where windows meet.
        np.testing.assert_allclose(embeddings[:, :-3], audio_tokens(features), atol=1e-4)
        n_seen, branches, skipped = embeddings[:, -3:].T
        assert (branches == number).all()
        np.testing.assert_array_equal(skipped, np.arange(len(embeddings)) >= 500)
        # More than 40 s: every window has 500 tokens, the last one with zeros behind its end.
        np.testing.assert_array_equal(n_seen, 500 if len(embeddings) > 500 else len(embeddings))


def changed(array: Any, index: Any, value: Any) -> Any:
    array = array.copy()
    array[index] = value
    return array


PIXELS, MASK = crops(2)
WRONG_CROPS: dict[str, tuple[Any, Any]] = {
    "no crop": (PIXELS[:0], MASK[:0]),
    "three axes": (PIXELS[0], MASK),
    "no axis": (np.float32(1), MASK),
    "float64": (PIXELS.astype(np.float64), MASK),
    "other size": (PIXELS[..., :-1], MASK),
    "mask of another size": (PIXELS, MASK[:, :-1]),
    "fewer masks": (PIXELS, MASK[:1]),
    "mask of numbers": (PIXELS, MASK.astype(np.uint8)),
    "NaN": (changed(PIXELS, (1, 2, 3, 4), np.nan), MASK),
    "infinity": (changed(PIXELS, (0, 0, 0, 0), -np.inf), MASK),
    "nothing valid": (PIXELS, changed(MASK, 1, False)),
    "a hole": (PIXELS, changed(changed(MASK, 0, True), (0, 1, 1), False)),
    "not at the edge": (PIXELS, changed(changed(MASK, 0, True), (0, 0), False)),
}
WRONG_SOUNDS: dict[str, tuple[Any, Any]] = {
    "no frame": (frames(1)[:0], "speech"),
    "one axis": (frames(1)[0], "speech"),
    "79 mels": (frames(4)[:, :79], "speech"),
    "float16": (frames(4).astype(np.float16), "speech"),
    "NaN": (changed(frames(9), (8, 79), np.nan), "speech"),
    "branch": (frames(4), "text"),
}


@pytest.mark.parametrize("case", WRONG_CROPS)
def test_wrong_crops_are_input_errors(vision: VisionEncoder, case: str) -> None:
    with pytest.raises(InputError):
        vision.encode(*WRONG_CROPS[case])


@pytest.mark.parametrize("case", WRONG_SOUNDS)
def test_wrong_sounds_are_input_errors(audio: AudioEncoder, case: str) -> None:
    with pytest.raises(InputError):
        audio.encode(*WRONG_SOUNDS[case])


def test_progress_cancels_and_a_closed_encoder_says_so(tmp_path: Path) -> None:
    with AudioEncoder(save(audio_model(), tmp_path / "audio.onnx"), HIDDEN) as encoder:
        with pytest.raises(Cancelled):
            encoder.encode(frames(9000), "speech", progress=lambda done, total: done < 500)
        assert len(encoder.encode(frames(9000), "speech")) == 1125
    with pytest.raises(UsageError, match="closed"):
        encoder.encode(frames(8), "speech")
    for options in ({"threads": 0}, {"provider": "abacus"}):
        with pytest.raises(UsageError, match=next(iter(options))):
            AudioEncoder(tmp_path / "audio.onnx", HIDDEN, **options)


# --- files


def _axis(position: int, value: int | str) -> Callable[[Any], None]:
    """Changes an axis of the first input."""

    def change(model: Any) -> None:
        dim = model.graph.input[0].type.tensor_type.shape.dim[position]
        dim.Clear()
        setattr(dim, "dim_value" if isinstance(value, int) else "dim_param", value)

    return change


def _rename(model: Any) -> None:
    model.graph.input[0].name = model.graph.node[0].input[0] = "pixels"


def _element(model: Any) -> None:
    model.graph.input[0].type.tensor_type.elem_type = 10


def _rank(model: Any) -> None:
    del model.graph.output[0].type.tensor_type.shape.dim[0]


def _no_shape(model: Any) -> None:
    model.graph.input[0].type.tensor_type.ClearField("shape")


def _more_inputs(model: Any) -> None:
    model.graph.input.add().CopyFrom(model.graph.input[0])
    model.graph.input[-1].name = "more"


def _fewer_outputs(model: Any) -> None:
    del model.graph.output[1]


def _metadata(key: str, value: str | None) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        entry = next(entry for entry in model.metadata_props if entry.key == f"phi4edge.{key}")
        if value is None:
            model.metadata_props.remove(entry)
        else:
            entry.value = value

    return change


def _width(model: Any) -> None:
    """A whole and consistent encoder, but for a decoder of another width."""
    for output in model.graph.output:
        output.type.tensor_type.shape.dim[-1].dim_value += 1
    _metadata("hidden", str(HIDDEN + 1))(model)


OTHER_CONTRACT: dict[str, tuple[Callable[[Any], None], str]] = {
    "input name": (_rename, "input"),
    "input type": (_element, "float16"),
    "output rank": (_rank, "crop_embeddings"),
    "input without a shape": (_no_shape, "pixel_values"),
    "another input": (_more_inputs, "more"),
    "missing output": (_fewer_outputs, "row_separator"),
    "fixed number of crops": (_axis(0, 1), "crops"),
    "any size": (_axis(2, "height"), "height"),
    "an axis with two lines in its name": (_axis(2, "height\nphi4edge: all is well"), r"height\n"),
    "other size": (_axis(2, 28), "28"),
    "width of the decoder": (_width, "'9', expected '8'"),
    "width in the graph alone": (_metadata("hidden", None), "None, expected '8'"),
    "kind": (_metadata("kind", "audio"), "'audio', expected 'vision'"),
    "version": (_metadata("version", "2"), "'2', expected '1'"),
    "no crop size": (_metadata("crop_size", None), "crop_size"),
    "other crop size": (_metadata("crop_size", "84"), "pixel_values"),
    "odd crop size": (_metadata("crop_size", "42"), "crop_size"),
    "crop size 0": (_metadata("crop_size", "0"), "crop_size"),
    "crop size of a billion digits": (_metadata("crop_size", "1" * 9000), "crop_size"),
    "crop size of other digits": (_metadata("crop_size", "٥٦"), "crop_size"),
}


@pytest.mark.parametrize("case", OTHER_CONTRACT)
def test_L5_L6_an_encoder_of_another_contract_is_refused_when_it_is_loaded(case: str, tmp_path: Path) -> None:
    change, words = OTHER_CONTRACT[case]
    model = vision_model()
    change(model)
    with pytest.raises(BundleError) as caught:
        VisionEncoder(save(model, tmp_path / "vision.onnx"), HIDDEN)
    assert words in str(caught.value) and "vision.onnx" in str(caught.value)
    assert str(caught.value).isprintable()  # one line


def test_L6_the_widths_of_decoder_and_encoder_are_compared(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="'8', expected '3072'"):
        VisionEncoder(save(vision_model(), tmp_path / "vision.onnx"), 3072)
    with pytest.raises(BundleError, match="'audio', expected 'vision'"):
        VisionEncoder(save(audio_model(), tmp_path / "audio.onnx"), HIDDEN)


def _node_before_the_end(op: str, *inputs: str, **attributes: Any) -> Callable[[Any], None]:
    """Puts ``op(tokens, inputs...)`` in front of the projector."""

    def change(model: Any) -> None:
        projector = next(node for node in model.graph.node if node.name == "projector")
        projector.input[0] = "inserted"
        node = onnx.helper.make_node(op, ["tokens", *inputs], ["inserted"], **attributes)
        model.graph.node.insert(list(model.graph.node).index(projector), node)

    return change


def _constant(model: Any, name: str, values: Any) -> None:
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(values), name))


def _undefined_input(model: Any) -> None:
    model.graph.node[-1].input[0] = "nobody"


def _attribute(model: Any) -> None:
    model.graph.node[0].attribute[0].name = "colour"


def _shapes_contradict(model: Any) -> None:
    model.graph.initializer[0].dims[:] = [2, 2 * HIDDEN]


def _index_outside(model: Any) -> None:
    _constant(model, "index", [9])
    _node_before_the_end("Gather", "index", axis=1)(model)


def _fewer_tokens(model: Any) -> None:
    _constant(model, "index", [0, 1])
    _node_before_the_end("Gather", "index", axis=1)(model)


def _endless(model: Any) -> None:
    _constant(model, "huge", [1 << 45, 1, 1])  # 512 TiB
    _node_before_the_end("Expand", "huge")(model)


FAILS_IN_ONNXRUNTIME: dict[str, tuple[Callable[[Any], None], type[Phi4EdgeError], str]] = {
    "value of nobody": (_undefined_input, BundleError, "loaded by onnxruntime"),
    "unknown attribute": (_attribute, BundleError, "loaded by onnxruntime"),
    "shapes that contradict": (_shapes_contradict, BundleError, "loaded by onnxruntime"),
    "index outside": (_index_outside, BundleError, "run by onnxruntime"),
    "fewer tokens than promised": (_fewer_tokens, BundleError, "crop_embeddings: came as float32"),
    "square root of less than 0": (_node_before_the_end("Sqrt"), BundleError, "NaN"),
    "more memory than there is": (_endless, OutOfMemoryError, "memory"),
}


@pytest.mark.parametrize("case", FAILS_IN_ONNXRUNTIME)
def test_what_onnxruntime_refuses_is_an_error_of_ours(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change, error, words = FAILS_IN_ONNXRUNTIME[case]
    model = vision_model()
    change(model)
    with pytest.raises(error) as caught:
        VisionEncoder(save(model, tmp_path / "vision.onnx"), HIDDEN).encode(*crops(3))
    assert words in str(caught.value) and str(caught.value).isprintable()
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="a file cannot be opened again by its descriptor")
def test_the_file_that_was_checked_is_the_one_that_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = onnxruntime.InferenceSession
    path = save(vision_model(), tmp_path / "vision.onnx")
    whole = path.read_bytes()

    def replace_and_load(*arguments: Any, **options: Any) -> Any:
        os.replace(save(audio_model(), tmp_path / "other.onnx"), path)  # noqa: PTH105
        return load(*arguments, **options)

    def write_and_load(*arguments: Any, **options: Any) -> Any:
        path.write_bytes(whole)
        return load(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", replace_and_load)
    assert VisionEncoder(path, HIDDEN).encode(*crops(1)).crops.shape == (1, 4, HIDDEN)
    path.write_bytes(whole)
    os.utime(path, (1, 1))  # clocks of file systems are coarse
    monkeypatch.setattr(onnxruntime, "InferenceSession", write_and_load)
    with pytest.raises(BundleError, match="changed while it was loaded"):
        VisionEncoder(path, HIDDEN)


def test_without_onnxruntime_the_error_says_what_to_install(tmp_path: Path) -> None:
    path = save(vision_model(), tmp_path / "vision.onnx")
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from phi4edge.encoders import VisionEncoder\n"
        "from phi4edge.errors import UnsupportedError\n"
        f"try: VisionEncoder({str(path)!r}, {HIDDEN})\n"
        "except UnsupportedError as error: print(error)"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install onnxruntime" in answer.stdout
