"""Execution providers of the encoders: what was asked for runs, or the user is told what runs instead; and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

import peers
import phi4edge
from phi4edge.bundle import Bundle
from phi4edge.converters.convert import convert
from phi4edge.encoders import AudioEncoder, VisionEncoder
from phi4edge.errors import OutOfMemoryError, UnsupportedError, UsageError
from phi4edge.media import Media
from phi4edge.prompt import MediaPart
from phi4edge.providers import CPU, PROVIDERS
from processes import ROOT, run
from tiny_media import tiny_multimodal
from tiny_models import tiny_gguf
from tiny_onnx import CROP_SIZE, HIDDEN, audio_model, audio_tokens, save, vision_model, vision_tokens

MISSING = next(name for name, each in PROVIDERS.items() if each.name not in onnxruntime.get_available_providers())
PRECISIONS = {"fp32": 1e-4, "int8": 0.05}  # and how far the embeddings of providers may be apart


def run_python(code: str, *arguments: Any, first: Sequence[Path] = (), directory: Path) -> Any:
    """What the code prints, from JSON; modules in ``first`` hide others of their name."""
    path = os.pathsep.join(map(str, [*first, ROOT]))
    answer = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=directory,  # Python looks there before anywhere else
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (answer.returncode, answer.stderr) == (0, "")
    return json.loads(answer.stdout)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_multimodal(tmp_path_factory.mktemp("providers") / "checkpoint")


@pytest.fixture(scope="module")
def bundles(checkpoint: Path) -> dict[str, Path]:
    """By the precision of the encoders."""
    found = {precision: checkpoint.parent / precision for precision in PRECISIONS}
    for precision, path in found.items():
        convert(checkpoint, path, "F32", encoders=precision, adapter_quant="F32")
    return found


# --- the choice


def test_the_names_of_the_table_are_those_of_onnxruntime() -> None:
    assert {each.name for each in PROVIDERS.values()} <= set(onnxruntime.get_all_providers())


def test_this_onnxruntime_runs_on_the_cpu_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    assert CPU in phi4edge.encoder_providers()
    path = save(vision_model(), tmp_path / "vision.onnx")
    for name in ("auto", "cpu"):
        with VisionEncoder(path, HIDDEN, provider=name) as encoder:
            assert (encoder.provider, encoder.warnings) == ("cpu", ())


def test_version_lists_the_providers() -> None:
    assert json.loads(run("version", "--json").stdout)["encoder_providers"] == phi4edge.encoder_providers()
    assert f"encoders {', '.join(phi4edge.encoder_providers())}\n" in run("version").stdout


def test_a_provider_that_is_not_there_is_an_error_that_lists_the_others(tmp_path: Path) -> None:
    path = save(audio_model(), tmp_path / "audio.onnx")
    with pytest.raises(UnsupportedError, match=rf"'{MISSING}'.*\bcpu\b.*{PROVIDERS[MISSING].hint}"):
        AudioEncoder(path, HIDDEN, provider=MISSING)
    with pytest.raises(UsageError, match=r"'abacus' is not one of auto, .*cpu"):
        AudioEncoder(path, HIDDEN, provider="abacus")


def test_a_missing_provider_is_found_before_the_model_is_loaded(bundles: dict[str, Path]) -> None:
    for name, error in ((MISSING, UnsupportedError), ("abacus", UsageError)):
        seen: list[int] = []
        with pytest.raises(error, match=name):
            phi4edge.load(bundles["fp32"], provider=name, progress=lambda done, total: seen.append(done))  # noqa: B023
        assert not seen


def test_a_model_file_alone_needs_no_provider(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path)
    with phi4edge.load(path, provider=MISSING) as model:
        assert model.generate("the", max_tokens=1).encoders == {}
    wrong: Any
    for wrong in ("abacus", "", "CPU", None, ["cpu"]):
        with pytest.raises(UsageError, match="is not one of auto"):
            phi4edge.load(path, provider=wrong)


def test_the_answer_tells_what_ran_its_encoders(bundles: dict[str, Path]) -> None:
    sound = {"type": "audio", "audio": (np.zeros(8000, np.float32), 16000)}
    image = {"type": "image", "image": np.zeros((50, 60, 3), np.uint8)}
    with phi4edge.load(bundles["fp32"]) as model:
        answer = model.generate([{"role": "user", "content": [image, sound]}], max_tokens=1)
        assert answer.encoders == answer.as_json()["encoders"] == {"vision": "cpu", "audio": "cpu"}
        assert not answer.warnings
        again = model.generate([{"role": "user", "content": [image, sound]}], max_tokens=1)
        assert again.encoders == {}  # nothing had to run
        assert model.generate("the cat", max_tokens=1).encoders == {}


# --- another provider for real: OpenVINO on this processor

ENCODE = """
import json, sys
import numpy as np, onnxruntime
from phi4edge.encoders import AudioEncoder, VisionEncoder
inputs, hidden, *paths = sys.argv[1:]
inputs, outputs, facts = np.load(inputs), {}, {}
for number, path in enumerate(paths):
    kind = VisionEncoder if path.endswith("vision.onnx") else AudioEncoder
    encoder = kind(path, int(hidden), threads=2, provider="openvino")
    facts[path] = encoder._session.get_providers(), encoder.provider, encoder.warnings
    if kind is VisionEncoder:
        outputs[path] = encoder.encode(inputs["pixels"], inputs["mask"]).crops
    else:
        for name in inputs:
            if name.startswith("mels"):
                outputs[path + name] = encoder.encode(inputs[name], "speech")
np.savez("outputs.npz", **outputs)
print(json.dumps([onnxruntime.__file__, facts]))
"""


def encode_with_openvino(
    directory: Path, inputs: dict[str, Any], hidden: int, paths: Sequence[Path]
) -> tuple[Any, Any]:
    """Embeddings by path, and what is told about each file."""
    home = peers.openvino()
    np.savez(directory / "inputs.npz", **inputs)
    module, facts = run_python(ENCODE, "inputs.npz", hidden, *paths, first=[home], directory=directory)
    assert Path(module).is_relative_to(home)
    return np.load(directory / "outputs.npz"), facts


def media(crop_size: int, *n_frames: int) -> dict[str, Any]:
    random = np.random.default_rng(1)
    n_patches = crop_size // 14
    ranks = np.arange(n_patches)
    sizes = random.integers(1, n_patches + 1, (2, 3, 1, 1))
    pixels = random.uniform(-1, 1, (3, 3, crop_size, crop_size)).astype(np.float32)
    inputs = {"pixels": pixels, "mask": (ranks[:, None] < sizes[0]) & (ranks < sizes[1])}
    return inputs | {f"mels{n}": (10 + 2 * random.standard_normal((n, 80))).astype(np.float32) for n in n_frames}


def test_openvino_runs_a_whole_graph_and_nothing_is_reported(tmp_path: Path) -> None:
    path = save(audio_model(), tmp_path / "audio.onnx")
    inputs = media(CROP_SIZE, 1, 98, 9000)
    outputs, facts = encode_with_openvino(tmp_path, inputs, HIDDEN, [path])
    names, provider, warnings = facts[str(path)]
    assert names[0] == "OpenVINOExecutionProvider"
    assert (provider, warnings) == ("openvino", [])
    for n in (1, 98, 9000):
        embeddings = outputs[f"{path}mels{n}"]
        np.testing.assert_allclose(embeddings[:, :-3], audio_tokens(inputs[f"mels{n}"]), atol=1e-3)


def test_a_graph_that_openvino_refuses_runs_on_the_cpu(tmp_path: Path) -> None:
    path = save(vision_model(), tmp_path / "vision.onnx")  # OpenVINO 2025.4 does not take its separators
    inputs = media(CROP_SIZE)
    outputs, facts = encode_with_openvino(tmp_path, inputs, HIDDEN, [path])
    names, provider, warnings = facts[str(path)]
    if names[0] == "OpenVINOExecutionProvider":
        pytest.skip("this OpenVINO takes it")
    assert provider == "cpu"
    assert warnings == [f"{path}: openvino: cannot be loaded by onnxruntime (Fail), so the CPU runs it"]
    np.testing.assert_allclose(outputs[str(path)], vision_tokens(inputs["pixels"], inputs["mask"]), atol=1e-5)


def test_openvino_gives_the_embeddings_of_the_cpu(bundles: dict[str, Path], tmp_path: Path) -> None:
    inputs = media(112, 8, 201, 4100)
    paths = [bundle / f"{kind}.onnx" for bundle in bundles.values() for kind in ("vision", "audio")]
    outputs, facts = encode_with_openvino(tmp_path, inputs, 64, paths)
    for precision, bundle in bundles.items():
        vision, audio = bundle / "vision.onnx", bundle / "audio.onnx"
        compared = [(outputs[str(vision)], VisionEncoder(vision, 64).encode(inputs["pixels"], inputs["mask"]).crops)]
        with AudioEncoder(audio, 64) as encoder:
            for n in (8, 201, 4100):
                compared.append((outputs[f"{audio}mels{n}"], encoder.encode(inputs[f"mels{n}"], "speech")))
        differences = [float(np.abs(found - expected).max() / np.abs(expected).max()) for found, expected in compared]
        print(precision, differences)
        assert max(differences) < PRECISIONS[precision]
        assert facts[str(audio)][1:] == ["openvino", []]
        # Of the vision tower OpenVINO leaves the attention, an operator of onnxruntime's own, to the CPU.
        assert facts[str(vision)][1] == "openvino"
        (warning,) = facts[str(vision)][2]
        assert str(vision) in warning and "run on the CPU, not on openvino: MultiHeadAttention" in warning


FAIL = """
import dataclasses, json, sys
import numpy as np
from phi4edge.encoders import AudioEncoder, VisionEncoder
from phi4edge.errors import Phi4EdgeError
from phi4edge.providers import PROVIDERS
PROVIDERS["npu-with-fallback"] = dataclasses.replace(PROVIDERS["openvino-npu"], session={})
mels = np.ones((16, 80), np.float32)
facts = []
for path, provider, free in json.loads(sys.argv[1]):
    error, embeddings = "", []
    encoder = AudioEncoder(path, 8, provider=provider, free_memory=None if free is None else lambda: free)
    try:
        embeddings = encoder.encode(mels, "speech").tolist()
    except Phi4EdgeError as caught:
        error = str(caught)
    facts.append([encoder.provider, encoder.warnings, embeddings, error])
print(json.dumps(facts))
"""


def with_nodes_at_the_end(model: Any, *nodes: tuple[str, str, str]) -> Any:
    """The nodes are (operator, inputs, output); the first ones take "joined", the last one gives "embeddings"."""
    model.graph.node[-1].output[0] = "joined"
    for operator, inputs, output in nodes:
        model.graph.node.append(onnx.helper.make_node(operator, inputs.split(), [output]))
    return model


@pytest.mark.skipif(Path("/dev/accel").exists(), reason="this computer has an NPU")
def test_what_openvino_cannot_do_the_cpu_does_and_says_so(tmp_path: Path) -> None:
    path = save(audio_model(), tmp_path / "audio.onnx")
    roots = save(with_nodes_at_the_end(audio_model(), ("Sqrt", "joined", "embeddings")), tmp_path / "roots.onnx")
    size = path.stat().st_size
    cases = [(path, "openvino-npu", None), (path, "npu-with-fallback", None), (path, "openvino", 4 * size)]
    arguments = json.dumps([[str(path), *rest] for path, *rest in [*cases, (roots, "openvino", None)]])
    facts = run_python(FAIL, arguments, first=[peers.openvino()], directory=tmp_path)
    expected = audio_tokens(np.ones((16, 80), np.float32))
    reasons = ("openvino-npu: cannot be loaded", "npu-with-fallback does not start", "openvino: needs about")
    for (provider, warnings, embeddings, error), reason in zip(facts[:3], reasons, strict=True):
        assert (provider, error) == ("cpu", "")
        assert len(warnings) == 1
        assert reason in warnings[0] and warnings[0].endswith("so the CPU runs it")
        np.testing.assert_allclose(np.array(embeddings)[:, :-3], expected, atol=1e-4)
    provider, warnings, _, error = facts[3]  # it fails when it runs, on the CPU as well
    assert provider == "cpu" and "NaN" in error
    assert "openvino: embeddings has a NaN" in warnings[0]


def test_what_fails_only_when_it_runs_is_run_again_on_the_cpu(tmp_path: Path) -> None:
    """onnxruntime's CPU makes a 1 of the error function of a NaN, OpenVINO 2025.4 leaves it."""
    nodes = (
        ("Sub", "joined joined", "zeros"),
        ("Sub", "zeros unit", "negative"),
        ("Sqrt", "negative", "nan"),
        ("Erf", "nan", "ones"),
        ("Mul", "ones zeros", "none"),
        ("Add", "joined none", "embeddings"),
    )
    model = with_nodes_at_the_end(audio_model(), *nodes)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1, np.float32), "unit"))
    path = save(model, tmp_path / "audio.onnx")
    arguments = json.dumps([[str(path), "openvino", None]])
    ((provider, warnings, embeddings, error),) = run_python(
        FAIL, arguments, first=[peers.openvino()], directory=tmp_path
    )
    if provider == "openvino":
        pytest.skip("this OpenVINO computes it")
    assert (provider, error) == ("cpu", "")
    assert warnings == [f"{path}: openvino: embeddings has a NaN or an infinity, so the CPU runs it"]
    expected = audio_tokens(np.ones((16, 80), np.float32))
    np.testing.assert_allclose(np.array(embeddings)[:, :-3], expected, atol=1e-4)


def test_the_command_line_tells_what_ran_and_warns(bundles: dict[str, Path], tmp_path: Path) -> None:
    Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(tmp_path / "black.png")
    command = [sys.executable, "-m", "phi4edge", "run", str(bundles["fp32"]), "the cat", "--image", "black.png"]
    path = os.pathsep.join(map(str, [peers.openvino(), ROOT]))
    answer = subprocess.run(
        [*command, "--provider", "openvino", "--json", "--stats", "--max-tokens", "2"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    document = json.loads(answer.stdout)
    assert document["encoders"] == {"vision": "openvino"}
    (warning,) = document["warnings"]
    assert f"phi4edge: warning: {warning}\n" in answer.stderr
    assert "vision on openvino" in answer.stderr


SEVERITY = """
import json, os, sys, tempfile
import onnxruntime
from phi4edge.encoders import AudioEncoder

def warnings():
    \"\"\"What onnxruntime writes to stderr about a setting that is made twice.\"\"\"
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            options = onnxruntime.SessionOptions()
            options.add_session_config_entry("session.disable_prepacking", "0")
            options.add_session_config_entry("session.disable_prepacking", "1")
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        return file.read().decode()

before = warnings()
AudioEncoder(sys.argv[1], 8, provider="openvino").close()
after = warnings()
try:
    AudioEncoder(sys.argv[1], 8, provider="openvino-npu").close()
finally:
    print(json.dumps([before, after, warnings()]))
"""


def test_a_provider_leaves_the_log_of_the_process_as_it_was(tmp_path: Path) -> None:
    path = save(audio_model(), tmp_path / "audio.onnx")
    told = run_python(SEVERITY, path, first=[peers.openvino()], directory=tmp_path)
    assert ["session.disable_prepacking" in each for each in told] == [True] * 3


def test_the_command_line_names_its_option_for_every_wrong_provider(bundles: dict[str, Path]) -> None:
    for name, code, problem in (
        (MISSING, 9, "this onnxruntime does not have"),
        ("abacus", 2, "'abacus' is not one of"),
    ):
        done = run("run", str(bundles["fp32"]), "the cat", "--provider", name)
        assert done.returncode == code
        assert done.stderr.startswith(f"phi4edge: error: --provider: {problem}")


# --- memory


def test_too_little_memory_is_an_error_with_numbers_before_the_encoder_is_opened(tmp_path: Path) -> None:
    path = save(vision_model(), tmp_path / "vision.onnx")
    size = path.stat().st_size
    with pytest.raises(OutOfMemoryError, match=r"vision.onnx: needs about 0.0 MiB, but 0.0 MiB are available; close"):
        VisionEncoder(path, HIDDEN, free_memory=lambda: size)
    with VisionEncoder(path, HIDDEN, free_memory=lambda: 2 * size) as encoder:
        assert encoder.is_open


def test_a_model_goes_on_when_there_was_no_memory_for_an_encoder(bundles: dict[str, Path]) -> None:
    free = [0]
    with phi4edge.load(bundles["fp32"]) as model:
        special_tokens = model.tokenizer.special_tokens
    media = Media(Bundle.open(bundles["fp32"]), 64, 1, special_tokens, free_memory=lambda: free[0])
    (item,) = media.read(MediaPart("image", np.zeros((50, 60, 3), np.uint8), "image 1"), None)
    with pytest.raises(OutOfMemoryError, match=r"vision.onnx: needs about"):
        media.encode(item)
    free[0] = 1 << 30
    assert media.encode(item).shape == (item.n_tokens, 64)


RELEASE = """
import json, os, sys
import onnxruntime
from phi4edge.encoders import VisionEncoder

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

sizes = [resident()]
for _ in range(2):
    encoder = VisionEncoder(sys.argv[1], 8)
    sizes.append(resident())
    encoder.close()
    sizes.append(resident())
print(json.dumps(sizes))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is read from /proc")
def test_a_released_encoder_gives_its_memory_back(tmp_path: Path) -> None:
    model = vision_model()
    n_layers, width = 16, 1024
    random = np.random.default_rng(0)
    shapes = [(4, width), *[(width, width)] * n_layers, (width, 4)]
    previous = "tokens"
    for number, shape in enumerate(shapes):
        values = (random.standard_normal(shape) / 32).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, f"weight{number}"))
        node = onnx.helper.make_node("MatMul", [previous, f"weight{number}"], [f"hidden{number}"])
        model.graph.node.insert(7 + number, node)
        previous = f"hidden{number}"
    projector = next(node for node in model.graph.node if node.name == "projector")
    projector.input[0] = previous
    n_bytes = 4 * n_layers * width * width
    start, *sizes = run_python(RELEASE, save(model, tmp_path / "vision.onnx"), directory=tmp_path)
    for loaded, released in zip(sizes[::2], sizes[1::2], strict=True):
        assert loaded - start > n_bytes  # it was there
        assert released - start < n_bytes / 4


TEXT_ONLY = """
import json, sys
from pathlib import Path
import phi4edge

def state():
    maps = Path("/proc/self/maps")
    files = maps.read_text() if maps.exists() else ""
    names = [each for each in ("onnxruntime", "PIL", "soundfile", "soxr") if each in sys.modules]
    return [names, ".onnx" in files, ".lora.gguf" in files]

model = phi4edge.load(sys.argv[1])
model.generate("the cat", max_tokens=2)
text = state()
image = {"type": "image", "image": sys.argv[2]}
model.generate([{"role": "user", "content": [image]}], max_tokens=1)
print(json.dumps([text, state()]))
"""


def test_a_text_needs_the_backbone_alone(bundles: dict[str, Path], tmp_path: Path) -> None:
    Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(tmp_path / "black.png")
    text, image = run_python(TEXT_ONLY, bundles["fp32"], "black.png", directory=tmp_path)
    assert text == [[], False, False]
    assert {"onnxruntime", "PIL"} <= set(image[0])
