"""Adapters by name: in Python, from a bundle, on the command line; and a cache that never mixes them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phi4edge
import processes
from lora_files import merged, random_pairs, write_adapter
from phi4edge.bundle import MANIFEST, Manifest, Part
from phi4edge.converters.convert import convert
from phi4edge.errors import BundleError, Cancelled, FileError, UsageError
from reference import relative_difference
from tiny_adapters import peft_model
from tiny_checkpoints import tiny_checkpoint
from tiny_models import tiny_gguf, transformers_logits

TOKENS = np.random.default_rng(3).integers(0, 256, 60).tolist()
ODD_SHAPE: dict[str, Any] = {"layers": 3, "hidden": 320, "heads": 5, "kv_heads": 1, "ffn": 352, "vocab": 320}
PEFT: dict[str, dict[str, Any]] = {
    "rank 7": {"r": 7, "lora_alpha": 10},
    "rslora and ranks of their own": {"r": 8, "lora_alpha": 3, "use_rslora": True, "rank_pattern": {"o_proj": 3}},
}


@pytest.fixture(scope="module")
def base(models: Path) -> Path:
    return tiny_gguf(models, rotary_fraction=0.75)


@pytest.fixture(scope="module")
def files(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of different seeds, by name."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(folder / f"{name}.lora.gguf", random_pairs(base, 8, seed=seed), "F16")
        for seed, name in enumerate(("red", "blue"))
    }


@pytest.fixture
def model(base: Path, files: dict[str, Path]) -> Iterator[phi4edge.Model]:
    with phi4edge.load(base, context=256, kv_type="f32", threads=2) as loaded:
        for name, path in files.items():
            loaded.load_adapter(name, path)
        yield loaded


@pytest.fixture(scope="module")
def bundle(base: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the model, both adapters, and one that is damaged."""
    folder = tmp_path_factory.mktemp("bundle")
    contents = {"backbone": ("backbone.gguf", base.read_bytes())}
    contents |= {f"adapter:{name}": (f"{name}.lora.gguf", path.read_bytes()) for name, path in files.items()}
    contents["adapter:broken"] = ("broken.lora.gguf", b"GGUF")
    parts = []
    for role, (name, data) in contents.items():
        (folder / name).write_bytes(data)
        parts.append(Part(role, name, len(data), hashlib.sha256(data).hexdigest()))
    (folder / MANIFEST).write_bytes(Manifest("tiny", tuple(parts)).to_json())
    return folder


def test_logits_with_an_adapter_equal_merged_weights(model: phi4edge.Model, base: Path, files: dict[str, Path]) -> None:
    assert model.adapters == ("red", "blue")
    for name, scale in (("red", 1.0), ("blue", 1.0), ("red", -0.5)):
        expected = merged(base, files[name], scale).logits(TOKENS)
        assert relative_difference(model.logits(TOKENS, adapter=name, adapter_scale=scale), expected) <= 1e-4
        session = model.session(adapter=name, adapter_scale=scale)
        assert relative_difference(session.extend(TOKENS, "all"), expected) <= 1e-4


def test_a_prefix_is_reused_only_under_the_same_adapter_and_scale(model: phi4edge.Model, base: Path) -> None:
    requests: list[dict[str, Any]] = [{}, {"adapter": "red"}, {"adapter": "red", "adapter_scale": 0.5}]
    requests += [{"adapter": "blue"}, {"adapter": "blue"}, {}, {}]
    answers = [model.generate(TOKENS, max_tokens=8, **request) for request in requests]
    assert [answer.usage.cached_tokens for answer in answers] == [0, 0, 0, 0, 59, 0, 59]
    assert [answer.adapter for answer in answers] == [None, "red", "red", "blue", "blue", None, None]
    assert len({answer.tokens for answer in answers}) == 4, "the adapters answer alike: the test shows nothing"
    for request, answer in zip(requests, answers, strict=True):
        tokens: list[int] = []
        while len(tokens) < len(answer.tokens):  # by logits that know no cache
            row = model.logits([*TOKENS, *tokens], **request)[-1]
            row[list(model.tokenizer.unused_ids)] = -np.inf
            tokens.append(int(row.argmax()))
        assert tuple(tokens) == answer.tokens


def test_L3_a_change_while_streaming_is_for_the_next_request(model: phi4edge.Model, files: dict[str, Path]) -> None:
    expected = model.generate(TOKENS, max_tokens=12, adapter="red").tokens
    stream = model.stream(TOKENS, max_tokens=12, adapter="red")
    tokens = list(next(stream).tokens)
    model.unload_adapter("red")
    model.load_adapter("red", files["blue"])
    for piece in stream:
        tokens += piece.tokens
    assert tuple(tokens) == expected
    other = model.generate(TOKENS, max_tokens=12, adapter="red").tokens
    assert other == model.generate(TOKENS, max_tokens=12, adapter="blue").tokens != expected


def test_L3_names_are_unique_and_known(model: phi4edge.Model, files: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="'red' is taken"):
        model.load_adapter("red", files["blue"])
    with pytest.raises(UsageError, match="'none' is taken"):
        model.load_adapter("none", files["blue"])
    for name in ("", " ", None, 5):
        with pytest.raises(UsageError, match="adapter"):
            model.load_adapter(name, files["blue"])  # type: ignore[arg-type]
    for name in ("green", 5, ""):
        with pytest.raises(UsageError, match=r"no adapter .*red, blue"):
            model.generate(TOKENS, adapter=name)
    with pytest.raises(UsageError, match="no adapter"):
        model.unload_adapter("green")
    for scale in (np.nan, np.inf, "1", None, True):
        with pytest.raises(UsageError, match="finite"):
            model.generate(TOKENS, adapter="red", adapter_scale=scale)
    with pytest.raises(FileError, match="nowhere"):
        model.load_adapter("green", "nowhere.gguf")
    with pytest.raises(Cancelled):
        model.load_adapter("green", files["red"], progress=lambda done, total: False)
    assert model.adapters == ("red", "blue")
    model.close()
    with pytest.raises(UsageError, match="closed"):
        model.load_adapter("green", files["red"])


def test_L3_sixty_four_adapters_and_one_file_under_two_names(model: phi4edge.Model, files: dict[str, Path]) -> None:
    for number in range(62):
        model.load_adapter(f"copy {number}", files["red"])
    assert len(model.adapters) == 64
    expected = model.logits(TOKENS, adapter="red")
    for name in ("copy 0", "copy 61"):
        np.testing.assert_array_equal(model.logits(TOKENS, adapter=name), expected)


def test_the_adapters_of_a_bundle_are_there_by_name(bundle: Path, model: phi4edge.Model) -> None:
    with phi4edge.load(bundle, context=256, kv_type="f32") as loaded:
        assert loaded.adapters == ("red", "blue", "broken")
        np.testing.assert_array_equal(loaded.logits(TOKENS, adapter="red"), model.logits(TOKENS, adapter="red"))
        loaded.load_adapter("blue")  # ahead of its first use
        loaded.unload_adapter("red")
        with pytest.raises(UsageError, match="'blue' is taken"):
            loaded.load_adapter("blue", bundle / "red.lora.gguf")
        np.testing.assert_array_equal(loaded.logits(TOKENS, adapter="red"), model.logits(TOKENS, adapter="red"))
        with pytest.raises(BundleError, match=r"broken.lora.gguf"):
            loaded.generate(TOKENS, adapter="broken")
        assert loaded.generate(TOKENS, max_tokens=2).tokens == model.generate(TOKENS, max_tokens=2).tokens


@pytest.mark.parametrize("name", PEFT)
def test_a_converted_adapter_gives_the_logits_of_peft(name: str, tmp_path: Path) -> None:
    theirs = peft_model(tmp_path / "lora", PEFT[name], **ODD_SHAPE)
    convert(
        tiny_checkpoint(tmp_path / "base", **ODD_SHAPE),
        tmp_path / "bundle",
        "F32",
        user_adapters={"mine": tmp_path / "lora"},
        adapter_quant="F32",
    )
    expected = transformers_logits(theirs, TOKENS)
    with phi4edge.load(tmp_path / "bundle", kv_type="f32") as loaded:
        assert relative_difference(loaded.logits(TOKENS, adapter="mine"), expected) <= 1e-4
        assert relative_difference(loaded.logits(TOKENS), expected) > 1e-2


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return processes.run("run", *arguments, "--max-tokens", "12")


def answer_of(*arguments: str) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_the_command_line_takes_names_and_files(bundle: Path, files: dict[str, Path]) -> None:
    plain = answer_of(str(bundle), "the cat")
    assert plain["adapter"] is None
    red = answer_of(str(bundle), "the cat", "--adapter", "red")
    assert red["adapter"] == {"name": "red", "scale": 1.0} and red["tokens"] != plain["tokens"]
    for text, name in ((f"mine={files['red']}", "mine"), (str(files["red"]), "red")):
        answer = answer_of(str(bundle / "backbone.gguf"), "the cat", "--adapter", text)
        assert answer["adapter"]["name"] == name and answer["tokens"] == red["tokens"]
    half = answer_of(str(bundle), "the cat", "--adapter", "red", "--adapter-scale", "0")
    assert half["tokens"] == plain["tokens"]
    told = run(str(bundle), "the cat", "--adapter", "blue", "--stats")
    assert told.returncode == 0 and "adapter blue, scale 1" in told.stderr


def test_the_command_line_tells_what_is_wrong_with_an_adapter(bundle: Path, files: dict[str, Path]) -> None:
    for text, code, message in (
        ("green", 2, "--adapter: there is no adapter 'green'; the adapters are red, blue, broken"),
        (str(files["red"]), 2, "--adapter: the name 'red' is taken"),
        ("nowhere.gguf", 3, "nowhere.gguf"),
        ("broken", 4, "broken.lora.gguf"),
        (f"base={bundle / 'backbone.gguf'}", 4, "general.type"),
    ):
        done = run(str(bundle), "the cat", "--adapter", text)
        assert done.returncode == code and message in done.stderr, done.stderr
        assert done.stdout == "" and processes.is_one_error_line(done.stderr)
    for options in (["--adapter", "red", "--adapter-scale", "nan"], ["--adapter-scale", "0.5"]):
        done = run(str(bundle), "the cat", *options)
        assert done.returncode == 2 and "--adapter-scale: " in done.stderr, done.stderr


def test_a_chat_has_the_adapter_in_every_turn(bundle: Path) -> None:
    def chat(*arguments: str) -> str:
        done = processes.run("chat", str(bundle), *arguments, "--max-tokens", "8", text="the cat\nthe mat\n")
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert chat("--adapter", "red") == chat("--adapter", "red") != chat()


def test_threads_at_work_do_not_break_the_end_of_the_program(base: Path) -> None:
    program = (
        "import sys, threading, time, phi4edge\n"
        f"model = phi4edge.load({str(base)!r}, context=2048)\n"
        "def work():\n"
        "    while True: model.session().extend(list(range(500)) * 4)\n"
        "for _ in range(3): threading.Thread(target=work, daemon=True).start()\n"
        "time.sleep(0.2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=processes.ROOT, capture_output=True, timeout=processes.DEADLINE
    )
    assert done.returncode == 0, done.stderr
