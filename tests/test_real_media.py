"""Photographs and recorded speech go the whole way from file to answer, with the token counts of transformers.

The photographs come with scikit-image, the speech with Debian's package pocketsphinx-testdata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile

import phi4edge
import processes
from conversations import ask
from media_oracle import MediaOracle
from nano_items import CHECKPOINT
from peers import recorded_speech, require
from phi4edge.image_processor import ImageNumbers, load_image, process_image
from reference import relative_difference

# Tokens with crops of 112 pixels, as the trained tiny checkpoint has, and with the real model's 448; run with
# Phi4MultimodalImageProcessor.  They are RGB and grey, PNG and JPEG, and two have more pixels than 36 crops of 112.
PHOTOGRAPHS = {
    "astronaut.png": (441, 1329),
    "camera.png": (441, 1329),
    "chelsea.png": (261, 689),
    "coffee.png": (421, 673),
    "motorcycle_left.png": (572, 999),
    "page.png": (157, 409),
    "retina.jpg": (621, 4433),
    "rocket.jpg": (421, 673),
}
RECORDINGS = ("cards/001.wav", "cards/005.wav", "librivox/sense_and_sensibility_01_austen_64kb-0870.wav")


def photograph(name: str) -> Path:
    return Path(str(require("skimage").__file__)).parent / "data" / name


def recording(name: str) -> Path:
    return recorded_speech() / name


@pytest.fixture(scope="module")
def model(nano_bundle: Path) -> Iterator[phi4edge.Model]:
    with phi4edge.load(nano_bundle, context=2048, kv_type="f32", threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def oracle() -> MediaOracle:
    return MediaOracle.of_checkpoint(CHECKPOINT)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_photograph_takes_the_tokens_of_transformers(model: phi4edge.Model, name: str) -> None:
    path = photograph(name)
    small, real = PHOTOGRAPHS[name]
    answer = model.generate([ask("What is shown?", [path])], max_tokens=8)
    assert (answer.usage.image_tokens, answer.adapter) == (small, "vision") and answer.tokens
    numbers = ImageNumbers(448, 14, 36, (0.5,) * 3, (0.5,) * 3)
    assert process_image(load_image(path), numbers).n_tokens == real


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_recording_takes_the_tokens_of_transformers(model: phi4edge.Model, name: str) -> None:
    path = recording(name)
    require("torch")
    samples, rate = soundfile.read(path, dtype="float32")
    extractor = require("transformers").Phi4MultimodalFeatureExtractor()
    expected = extractor(samples, sampling_rate=rate, return_tensors="np")["audio_embed_sizes"][0]
    answer = model.generate([ask("Transcribe the audio.", sounds=[path])], max_tokens=8)
    assert (answer.usage.audio_tokens, answer.adapter) == (expected, "speech") and answer.tokens


def test_logits_of_photographs_are_those_of_transformers(model: phi4edge.Model, oracle: MediaOracle) -> None:
    messages = [ask("What is shown?", [photograph("chelsea.png"), photograph("rocket.jpg")])]
    expected = oracle.logits(model.encode(messages), messages, "vision")
    assert relative_difference(model.next_logits(messages), expected) <= 1e-3


def test_logits_of_speech_are_those_of_transformers(model: phi4edge.Model, oracle: MediaOracle) -> None:
    sounds = [recording(RECORDINGS[2])]
    for messages, adapter in (
        ([ask("Transcribe the audio.", sounds=sounds)], "speech"),
        ([ask("", [photograph("coffee.png")], sounds)], "vision"),
    ):
        expected = oracle.logits(model.encode(messages), messages, adapter)
        assert relative_difference(model.next_logits(messages), expected) <= 1e-3


def test_the_command_line_takes_both(nano_bundle: Path) -> None:
    image, audio = str(photograph("rocket.jpg")), str(recording(RECORDINGS[0]))
    done = processes.run("run", str(nano_bundle), "--image", image, "--audio", audio, "--json", "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["usage"]["image_tokens"] == PHOTOGRAPHS["rocket.jpg"][0]
    assert answer["usage"]["audio_tokens"] == 14
    assert answer["adapter"]["name"] == "vision" and answer["text"]
