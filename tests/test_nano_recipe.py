"""The recipe of the tiny checkpoint: what it tests on was never trained on, it can be repeated, and it runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nano import evaluate, export, joint_stage, loop, picture_stages, pictures, sounds, text_stage, tokens, train
from nano.words import COMMANDS, NUMBERS, PRINTED, TEST, TRAIN, split_of
from nano_items import CHECKPOINT, HELD_OUT, TEST_SET
from peers import require, with_program
from phi4edge.converters.convert import convert

ENTRIES = [entry for path in (TEST_SET, HELD_OUT) for entry in json.loads(path.read_text(encoding="utf-8"))]


def of_family(family: str) -> list[dict[str, Any]]:
    found = [entry for entry in ENTRIES if entry["family"] == family]
    assert len(found) >= 200
    return found


def test_texts_were_never_asked_in_training() -> None:
    asked = evaluate.asked_in_training()
    assert len(asked) > 100_000
    for entry in of_family("text"):
        key = "\n".join(re.findall(r"<\|user\|>(.*?)<\|end\|>", entry["prompt"]))
        assert split_of(key) == TEST and key not in asked


def test_words_and_long_numbers_in_the_pictures_are_in_no_other_split() -> None:
    for entry in of_family("vision") + of_family("vision-speech"):
        shown = entry["expected"]
        if entry["task"] in {"word", "sign"} and not shown.isdigit():
            assert shown in PRINTED and split_of(f"W{shown}", 8) == TEST
        elif entry["task"] in {"number", "sign"} and len(shown) > 2:
            assert split_of(f"N{shown}") == TEST


def test_spoken_sequences_are_in_no_other_split() -> None:
    to_english = {words[0]: word for word, words in NUMBERS.items()}
    for entry in of_family("speech"):
        words = entry["expected"].split()
        if entry["task"] != "transcribe":
            words = [to_english[word] for word in words]
        if len(words) > 1 and " ".join(words) not in COMMANDS:
            assert split_of(f"S{' '.join(words)}") == TEST


def test_the_tokenizer_is_the_one_of_the_recipe() -> None:
    stored = json.loads((CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8"))
    made = tokens.make_tokenizer()
    assert (stored["model"]["vocab"], stored["added_tokens"]) == (made["model"]["vocab"], made["added_tokens"])
    assert [tuple(pair) for pair in stored["model"]["merges"]] == [tuple(pair) for pair in made["model"]["merges"]]


class StoppedError(Exception):
    pass


def _weights_after(folder: Path, stop_at: int | None = None) -> Any:
    """Those of a small layer after six steps towards numbers that depend on the step; or an error on the way."""
    torch = require("torch")
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 6)
    stage = loop.Stage("layer", folder, 6, 1e-2, muon=("weight",), modules={"layer": layer})

    def loss_of(step: int) -> tuple[Any, dict[str, list[float]]]:
        if step == stop_at:
            raise StoppedError
        inputs = torch.tensor([[stage.random(step).random() for _ in range(6)]])
        return ((layer(inputs) - step) ** 2).mean(), {}

    loop.train(stage, loss_of, dict)
    return layer.weight.detach()


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = require("torch")
    monkeypatch.setattr(loop, "_STORE", 2)
    expected = _weights_after(tmp_path / "straight")
    with pytest.raises(StoppedError):
        _weights_after(tmp_path / "stopped", stop_at=5)
    assert torch.equal(_weights_after(tmp_path / "stopped"), expected)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A training of three steps a stage, on few recordings; one thread, as in the real one."""
    torch = require("torch")
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(sounds, "COUNTS", {TRAIN: (280, 10, 200), "watch": (2, 1, 40), TEST: (2, 1, 40)})
    monkeypatch.setattr(train, "STEPS", dict.fromkeys(train.STEPS, 3))
    for module in (text_stage, picture_stages, joint_stage):
        monkeypatch.setattr(module, "WATCHED", 2)
    for name in ("_TALKS", "_PICTURES", "_SPOKEN"):
        monkeypatch.setattr(evaluate, name, 3)
    yield
    torch.set_num_threads(n_threads)


@pytest.mark.usefixtures("short")
def test_a_short_training_leaves_a_checkpoint_that_converts(tmp_path: Path) -> None:
    with_program("espeak-ng")
    shutil.copyfile(CHECKPOINT / "tokenizer.json", tmp_path / "tokenizer.json")
    for stage in train.STAGES.values():
        stage(tmp_path)
    export.export(tmp_path)
    accuracy = evaluate.accuracy(evaluate.Checkpoint(tmp_path / "checkpoint"), tmp_path)
    assert set(accuracy) == {"text", "vision", "speech", "vision-speech"}
    assert all(0 <= family["all"]["right"] <= 1 for family in accuracy.values())
    convert(tmp_path / "checkpoint", tmp_path / "bundle")
    shapes = _shapes(CHECKPOINT), _shapes(tmp_path / "checkpoint")
    assert shapes[0] == shapes[1]


def _shapes(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        with require("safetensors").safe_open(path, "np") as file:
            found |= {name: file.get_slice(name).get_shape() for name in list(file.keys())}
    return found


def test_every_word_in_pictures_can_be_drawn_and_labelled() -> None:
    assert all(2 <= len(word) <= 5 and set(word) <= set(pictures.GLYPHS) for word in PRINTED)
