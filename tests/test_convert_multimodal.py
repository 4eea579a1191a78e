"""A whole Phi-4-multimodal checkpoint to a bundle with adapters and encoders; its parts have tests of their own."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phi4edge
from peers import require
from phi4edge.bundle import Bundle
from phi4edge.converters.convert import convert
from phi4edge.errors import BundleError, Phi4EdgeError
from processes import COMMAND, DEADLINE, ROOT, is_one_error_line, run
from tiny_media import MEDIA_LAYOUTS, MediaShape, lora_tensors, media_model, tiny_multimodal

PARTS = ["backbone", "adapter:vision", "adapter:speech", "vision", "audio"]
TOKENS = [5, 9, 200, 31, 77, 420, 3, 3, 150]


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()} if directory.exists() else {}


@pytest.mark.parametrize("layout", MEDIA_LAYOUTS)
def test_a_bundle_has_every_part_and_says_how_to_use_them(tmp_path: Path, layout: str) -> None:
    checkpoint, bundle = str(tiny_multimodal(tmp_path / layout, layout)), str(tmp_path / "bundle")
    made = run("convert", checkpoint, bundle, "--quant", "q8_0", "--json")
    assert (made.returncode, made.stderr) == (0, "")
    document = json.loads(made.stdout)
    assert [part["role"] for part in document["parts"]] == PARTS
    assert run("verify", bundle).returncode == 0
    manifest = Bundle.open(bundle).manifest
    assert manifest.router == {
        "text": {},
        "image": {"adapter": "vision"},
        "audio": {"adapter": "speech", "audio_branch": "speech"},
        "image+audio": {"adapter": "vision", "audio_branch": "vision"},
    }
    assert manifest.placeholders == {"image": "<|endoftext10|>", "audio": "<|endoftext11|>"}
    assert manifest.processors["image"] == {
        "crop_size": 112,
        "patch_size": 14,
        "max_crops": 36,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    assert manifest.processors["audio"]["hop_length"] == 160
    assert manifest.provenance["options"]["adapters"] == "switchable"
    # Every tensor is in a part, or named: those of the last vision layer, which the model does not use.
    unused = [name for names in document["unused_tensors"].values() for name in names]
    assert unused and all("embed_tokens_extend.image_embed.img_processor." in name for name in unused)
    shown = run("info", bundle).stdout
    assert all(part in shown for part in (*PARTS, "vision.onnx", "speech.lora.gguf"))
    assert json.loads(run("info", bundle, "--json").stdout)["bundle"]["router"]["image"] == {"adapter": "vision"}


def test_both_layouts_give_the_same_parts(tmp_path: Path) -> None:
    for layout in MEDIA_LAYOUTS:
        convert(tiny_multimodal(tmp_path / layout, layout), tmp_path / f"{layout}-bundle", "q4_0")
    ours, original = (snapshot(tmp_path / f"{layout}-bundle") for layout in MEDIA_LAYOUTS)
    assert ours.keys() == original.keys()
    assert [name for name in ours if name != "manifest.json" and ours[name] != original[name]] == []


@pytest.mark.parametrize("adapter", ["vision", "speech"])
def test_a_merged_adapter_is_what_peft_computes(tmp_path: Path, adapter: str) -> None:
    torch, peft = require("torch"), require("peft")
    shape = MediaShape()
    checkpoint = tiny_multimodal(tmp_path / "checkpoint")
    convert(checkpoint, tmp_path / "bundle", "f32", adapters=f"merged:{adapter}", encoders="none")
    rank = shape.vision_rank if adapter == "vision" else shape.speech_rank
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=r"model\.layers\.\d+\.(self_attn\.(qkv|o)|mlp\.(gate_up|down))_proj"
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # peft asks transformers for something that is called otherwise now
        model = peft.get_peft_model(media_model(shape), config)
    state = {f"base_model.model.{name}": torch.from_numpy(rows) for name, rows in lora_tensors(shape, adapter).items()}
    peft.set_peft_model_state_dict(model, state)
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.tensor([TOKENS])).logits[0].numpy()
        plain = media_model(shape)(input_ids=torch.tensor([TOKENS])).logits[0].numpy()
    span = np.ptp(expected)
    assert np.abs(expected - plain).max() > 0.05 * span
    with phi4edge.load(tmp_path / "bundle", context=64, kv_type="f32", threads=1) as loaded:
        np.testing.assert_allclose(loaded.logits(TOKENS), expected, rtol=0, atol=1e-4 * span)
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert [part.role for part in manifest.parts] == ["backbone"]
    assert manifest.parts[0].details["merged_adapter"] == adapter


def test_an_adapter_of_a_users_own_is_a_part_like_the_others(tmp_path: Path) -> None:
    checkpoint, bundle = tiny_multimodal(tmp_path / "checkpoint"), tmp_path / "bundle"
    own = f"law={checkpoint / 'speech-lora'}"
    assert run("convert", str(checkpoint), str(bundle), "--adapter", own, "--encoders", "none").returncode == 0
    parts = snapshot(bundle)
    assert [part.role for part in Bundle.open(bundle).manifest.parts] == [*PARTS[:3], "adapter:law"]
    # The name is in the file; all else is equal.
    assert len(parts["law.lora.gguf"]) == len(parts["speech.lora.gguf"])
    taken = run("convert", str(checkpoint), str(bundle), "--force", "--adapter", own.replace("law", "vision"))
    assert taken.returncode == 2 and is_one_error_line(taken.stderr)
    assert snapshot(bundle) == parts


@pytest.mark.parametrize(
    "options, roles",
    [
        ({"adapters": "none"}, ["backbone", "vision", "audio"]),
        ({"encoders": "none"}, ["backbone", "adapter:vision", "adapter:speech"]),
        ({"adapters": "none", "encoders": "none"}, ["backbone"]),
    ],
)
@pytest.mark.parametrize("layout", MEDIA_LAYOUTS)
def test_what_is_left_out_as_asked_is_listed(
    tmp_path: Path, layout: str, options: dict[str, Any], roles: list[str]
) -> None:
    done = convert(tiny_multimodal(tmp_path / layout, layout), tmp_path / "bundle", "q8_0", **options)
    assert [part.role for part in done.bundle.manifest.parts] == roles
    unused = {name for names in done.unused.values() for name in names}
    assert any(".embed_tokens_extend.audio_embed." in name for name in unused) == ("encoders" in options)
    assert any(".lora_A.vision." in name for name in unused) == ("adapters" in options and layout == "phi4mm")


def test_a_part_that_is_missing_or_unknown_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    media = "model.embed_tokens_extend."
    lost = f"{media}audio_embed.encoder.encoder_embedding.global_mean"
    cases: list[tuple[dict[str, Any], str]] = [
        ({lost: None}, "global_mean"),
        ({f"{media}image_embed.extra.weight": np.ones(3, np.float32)}, "extra"),
        ({f"{media}other.weight": np.ones(3, np.float32)}, "no use that we know"),
    ]
    for number, (changes, problem) in enumerate(cases):
        checkpoint = tiny_multimodal(tmp_path / str(number), changes=changes)
        with pytest.raises(BundleError, match=problem):
            convert(checkpoint, tmp_path / "bundle", "q8_0")
        assert not (tmp_path / "bundle").exists()


def test_a_tokenizer_without_the_placeholders_is_an_error(tmp_path: Path) -> None:
    checkpoint = tiny_multimodal(tmp_path / "checkpoint")
    tokenizer = (checkpoint / "tokenizer.json").read_text()
    (checkpoint / "tokenizer.json").write_text(tokenizer.replace("<|endoftext11|>", "<|other|>"))
    with pytest.raises(BundleError, match=r"tokenizer\.json: has no token <\|endoftext11\|>"):
        convert(checkpoint, tmp_path / "bundle", "q8_0")
    convert(checkpoint, tmp_path / "bundle", "q8_0", encoders="none")


def start(checkpoint: Path, bundle: Path, *options: str) -> subprocess.Popen[str]:
    command = [*COMMAND, "convert", str(checkpoint), str(bundle), "--quant", "q4_0", "--force", *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_C6_twenty_kills_leave_the_old_bundle_the_new_one_or_none(tmp_path: Path) -> None:
    checkpoint = tiny_multimodal(
        tmp_path / "checkpoint", layers=12, hidden=128, ffn=384, audio_blocks=6, vision_layers=8
    )
    old, new = tmp_path / "bundle", tmp_path / "fresh"
    convert(checkpoint, old, "f16", encoders="fp16")
    begun = time.monotonic()
    with start(checkpoint, tmp_path / "whole") as process:
        process.communicate(timeout=DEADLINE)
    seconds = time.monotonic() - begun
    whole = snapshot(tmp_path / "whole")
    before = snapshot(old)
    rng = random.Random(0)
    for moment in range(20):
        bundle = (old, new)[moment % 2]
        with start(checkpoint, bundle) as process:
            time.sleep(seconds * rng.uniform(0.4, 1.0))  # the first part is spent on starting Python
            process.kill()
            process.communicate(timeout=DEADLINE)
        try:
            opened = Bundle.open(bundle)
            opened.verify()
        except Phi4EdgeError:
            assert bundle is new  # which was never whole, and is not taken for it
            continue
        contents = {part.file: (bundle / part.file).read_bytes() for part in opened.manifest.parts}
        # Names alternate, contents do not.
        sources = [before] if bundle is old else []
        assert any(sorted(contents.values()) == sorted(parts_of(source)) for source in (*sources, whole))
    convert(checkpoint, old, "q4_0", force=True)
    assert sorted(parts_of(snapshot(old))) == sorted(parts_of(whole))


def parts_of(files: dict[str, bytes]) -> list[bytes]:
    return [content for name, content in files.items() if name != "manifest.json"]


@pytest.mark.parametrize("n_bytes", [60_000, 150_000, 300_000])
def test_C5_a_disk_that_is_full_in_any_part_leaves_everything_as_it_was(tmp_path: Path, n_bytes: int) -> None:
    checkpoint, bundle = tiny_multimodal(tmp_path / "checkpoint"), tmp_path / "bundle"
    convert(checkpoint, bundle, "f16")
    before = snapshot(bundle)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))

    options = ("--quant", "q4_0", "--encoders", "fp32", "--force")
    done = run("convert", str(checkpoint), str(bundle), *options, preexec_fn=limit)
    assert done.returncode == 5, done.stderr
    assert is_one_error_line(done.stderr)
    assert snapshot(bundle) == before


def test_C9_too_little_memory_is_said_with_numbers_before_anything_is_written(tmp_path: Path) -> None:
    checkpoint, bundle = tiny_multimodal(tmp_path / "checkpoint"), tmp_path / "bundle"
    # Python itself takes what it takes; so little is left beside it that a conversion cannot begin.
    program = (
        "import resource, sys, re, phi4edge.converters.convert, phi4edge.converters.vision, phi4edge.converters.audio;"
        "from phi4edge.cli import main;"
        "pages = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize();"
        "resource.setrlimit(resource.RLIMIT_AS, (pages + (200 << 20),) * 2);"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [COMMAND[0], "-c", program, "convert", str(checkpoint), str(bundle)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 6, done.stderr
    assert is_one_error_line(done.stderr) and "384 MiB" in done.stderr
    assert not bundle.exists()
