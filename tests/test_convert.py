"""Checkpoints to bundles: equal to transformers and llama.cpp, and safe against bad input, full disks and signals."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import phi4edge
from peers import LlamaCpp, llama_cpp
from phi4edge import _core
from phi4edge.bundle import UNFINISHED_PREFIX, Bundle
from phi4edge.converters.convert import convert
from phi4edge.converters.mixes import CONVERTIBLE, fitting_type
from phi4edge.errors import BundleError, DiskError, FileError, Phi4EdgeError, UsageError
from processes import COMMAND, DEADLINE, ROOT, is_one_error_line, run
from tiny_checkpoints import LAYOUTS, tiny_checkpoint, tiny_tensors, write_json, write_tokenizer
from tiny_models import Array, TinyShape, quantized_gguf, tiny_gguf, tiny_transformers, transformers_logits

LONG_ROPE: dict[str, Any] = {"original_context": 64, "rotary_fraction": 0.75}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "long rope": LONG_ROPE,
    "untied, 3 layers": {"layers": 3, "tied": False, **LONG_ROPE},
    "5 query heads, 1 key head": {"layers": 3, "hidden": 320, "heads": 5, "kv_heads": 1, "ffn": 352},
    "wide heads": {"head_dim": 96, "sliding_window": 100_000},
}
TOKENS = [int(token) for token in np.random.default_rng(1).integers(0, 300, 48)]


def snapshot(directory: Path) -> dict[str, bytes]:
    """Names and contents of everything in a directory."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())} if directory.exists() else {}


def backbone(bundle: Path) -> Path:
    return Bundle.open(bundle).part("backbone")


# --- the weights are those of the checkpoint


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
def test_logits_equal_those_of_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    peer = tiny_transformers(**options)
    peer.save_pretrained(tmp_path / "checkpoint")
    write_tokenizer(tmp_path / "checkpoint", TinyShape(**options).vocab)
    convert(tmp_path / "checkpoint", tmp_path / "bundle", "f32")
    expected = transformers_logits(peer, TOKENS)
    with phi4edge.load(tmp_path / "bundle", context=128, kv_type="f32", threads=1) as model:
        np.testing.assert_allclose(model.logits(TOKENS), expected, rtol=0, atol=1e-4 * np.ptp(expected))


def test_sharded_output_of_transformers_is_read(tmp_path: Path) -> None:
    peer = tiny_transformers(**LONG_ROPE)
    for name, shard_size in (("one", "5GB"), ("many", "1MB")):
        peer.save_pretrained(tmp_path / name, max_shard_size=shard_size)
        write_tokenizer(tmp_path / name, 512)
        convert(tmp_path / name, tmp_path / f"{name}-bundle", "f32")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert snapshot(tmp_path / "one-bundle") == snapshot(tmp_path / "many-bundle")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_backbone(tmp_path: Path, layout: str) -> None:
    checkpoint = tiny_checkpoint(tmp_path / layout, layout, **LONG_ROPE)
    done = convert(checkpoint, tmp_path / "bundle", "f32", adapters="none", encoders="none")
    reference = tiny_gguf(tmp_path, **LONG_ROPE)
    with phi4edge.load(tmp_path / "bundle", threads=1) as ours, phi4edge.load(reference, threads=1) as theirs:
        np.testing.assert_array_equal(ours.logits(TOKENS), theirs.logits(TOKENS))
    n_unused = {"phi3": 0, "phi4_multimodal": 1, "phi4mm": 1 + 2 * 4 * 2 * 2}[layout]
    assert sum(map(len, done.unused.values())) == n_unused


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_half_precision_checkpoint_is_kept_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", dtype=dtype)
    convert(checkpoint, tmp_path / "bundle", dtype.lower())
    source = (checkpoint / "model.safetensors").read_bytes()
    for tensor in gguf.GGUFReader(backbone(tmp_path / "bundle")).tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType[dtype]:
            assert tensor.data.tobytes() in source, tensor.name


def test_the_vocabulary_and_the_template_are_those_of_the_same_gguf_file(tmp_path: Path) -> None:
    convert(tiny_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle", "f32")
    ours, reference = phi4edge.inspect(tmp_path / "bundle"), phi4edge.inspect(tiny_gguf(tmp_path))
    assert ours.tokenizer.special_ids == reference.tokenizer.special_ids
    assert ours.template == reference.template
    ours_file, reference_file = _core.GgufFile(backbone(tmp_path / "bundle")), _core.GgufFile(reference.path)
    for key in ("tokens", "token_type", "merges", "model", "pre"):
        assert ours_file.metadata[f"tokenizer.ggml.{key}"] == reference_file.metadata[f"tokenizer.ggml.{key}"], key


def test_metadata_are_as_llama_cpp_writes_them(tmp_path: Path) -> None:
    shape = TinyShape(**LONG_ROPE)
    convert(tiny_checkpoint(tmp_path / "checkpoint", **LONG_ROPE), tmp_path / "bundle", "f32")
    metadata = _core.GgufFile(backbone(tmp_path / "bundle")).metadata
    assert metadata["general.architecture"] == "phi3"
    assert metadata["general.type"] == "model"
    assert "phi-3" not in metadata["general.name"].lower()
    assert metadata["phi3.rope.dimension_count"] == 48
    assert metadata["phi3.rope.scaling.attn_factor"] == pytest.approx(shape.attention_factor)
    assert metadata["phi3.rope.scaling.original_context_length"] == 64
    assert metadata["phi3.attention.sliding_window"] == 0
    absent = ("phi3.rope.scaling.type", "phi3.vocab_size", "phi3.attention.key_length", "tokenizer.ggml.add_bos_token")
    assert not set(absent) & set(metadata)


@pytest.mark.parametrize("mix", CONVERTIBLE)
def test_llama_cpp_loads_every_mix_and_agrees(tmp_path: Path, mix: str) -> None:
    convert(tiny_checkpoint(tmp_path / "checkpoint", layers=3), tmp_path / "bundle", mix)
    with (
        phi4edge.load(tmp_path / "bundle", threads=1) as model,
        closing(LlamaCpp(backbone(tmp_path / "bundle"))) as peer,
    ):
        ours, theirs = (_log_softmax(logits) for logits in (model.logits(TOKENS), peer.logits(TOKENS)))
    assert float(np.mean(np.sum(np.exp(theirs) * (theirs - ours), axis=1))) <= 5e-3


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


# For Q2_K_S llama.cpp wants an importance matrix.
@pytest.mark.parametrize("mix", [mix for mix in CONVERTIBLE if mix not in ("F32", "F16", "BF16", "Q2_K_S")])
def test_types_are_those_that_llama_cpp_gives(tmp_path: Path, mix: str) -> None:
    llama_cpp()
    shape: dict[str, Any] = {"layers": 17, "ffn": 256}
    convert(tiny_checkpoint(tmp_path / "checkpoint", **shape), tmp_path / "bundle", mix)
    theirs = quantized_gguf(tiny_gguf(tmp_path, **shape), f"MOSTLY_{mix}", tmp_path / "theirs.gguf")
    found = [
        {t.name: t.type_name for t in _core.GgufFile(path).tensors} for path in (backbone(tmp_path / "bundle"), theirs)
    ]
    assert found[0] == found[1]


def test_rows_that_no_large_block_divides_get_a_type_of_smaller_blocks() -> None:
    assert [fitting_type(name, 320) for name in ("Q4_K", "Q6_K", "Q8_0", "F16")] == ["IQ4_NL", "Q8_0", "Q8_0", "F16"]
    assert [fitting_type(name, 100) for name in ("Q4_K", "Q8_0", "F32", "BF16")] == ["F16", "F16", "F32", "BF16"]


# --- the commands


def test_a_bundle_takes_the_place_of_a_file_in_every_command(tmp_path: Path) -> None:
    checkpoint, bundle = str(tiny_checkpoint(tmp_path / "checkpoint")), str(tmp_path / "bundle")
    made = run("convert", checkpoint, bundle, "--bits", "8")
    assert (made.returncode, made.stderr) == (0, "")
    assert "Q8_0" in made.stdout and "bits per weight" in made.stdout
    assert run("verify", bundle).stdout.endswith(f"{bundle} is whole\n")
    assert run("run", bundle, "the cat", "-n", "4").returncode == 0
    assert run("chat", bundle, "-n", "4", text="the cat\n").returncode == 0
    assert json.loads(run("info", bundle, "--check", "--json").stdout)["path"] == bundle
    assert json.loads(run("bench", bundle, "-p", "8", "-n", "2", "-r", "1", "--json").stdout)["model"] == bundle


def test_convert_json_says_what_was_made_and_what_was_left_out(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", "phi4mm")
    options = ("--quant", "f16", "--adapters", "none", "--encoders", "none", "--json")
    document = json.loads(run("convert", str(checkpoint), str(tmp_path / "bundle"), *options).stdout)
    (part,) = document["parts"]
    assert (part["role"], part["mix"]) == ("backbone", "F16")
    assert part["sha256"] == hashlib.sha256((tmp_path / "bundle" / part["file"]).read_bytes()).hexdigest()
    names = [name for group in document["unused_tensors"].values() for name in group]
    assert "model.layers.0.mlp.down_proj.lora_A.vision.weight" in names


@pytest.mark.parametrize(
    "options",
    [
        ("--bits", "5"),
        ("--quant", "q9"),
        ("--quant", "q8_0", "--bits", "8"),
        ("--bits", "x"),
        ("--head", "q9"),
        ("--adapters", "all"),
        ("--adapters", "merged:vision"),  # this checkpoint has none
        ("--adapter", "law"),
        ("--adapter", "law=x", "--adapter", "law=y"),
        ("--adapter-quant", "q2_k"),
        ("--encoders", "int4"),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(tmp_path: Path, options: tuple[str, ...]) -> None:
    done = run("convert", str(tiny_checkpoint(tmp_path / "checkpoint")), str(tmp_path / "bundle"), *options)
    assert done.returncode == 2
    assert is_one_error_line(done.stderr)
    assert options[0] in done.stderr
    assert not (tmp_path / "bundle").exists()


def test_the_head_has_a_type_of_its_own(tmp_path: Path) -> None:
    for tied, name in ((True, "token_embd.weight"), (False, "output.weight")):
        checkpoint = tiny_checkpoint(tmp_path / f"checkpoint-{tied}", tied=tied)
        for head, expected in (("", "Q6_K"), ("q8_0", "Q8_0"), ("f16", "F16")):
            bundle = tmp_path / f"bundle-{tied}-{head}"
            convert(checkpoint, bundle, "q4_k_m", head=head)
            assert {t.name: t.type_name for t in _core.GgufFile(backbone(bundle)).tensors}[name] == expected


# --- bad input


def with_value(name: str, value: float) -> dict[str, Array | None]:
    tensor = tiny_tensors(TinyShape(), "phi3")[name].copy()
    tensor.flat[-1] = value
    return {name: tensor}


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("name", [DOWN, "model.norm.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_C10_a_value_that_is_not_finite_names_its_tensor(tmp_path: Path, name: str, value: float) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", changes=with_value(name, value))
    with pytest.raises(BundleError, match=f"tensor '{name}'.*NaN or an infinity"):
        convert(checkpoint, tmp_path / "bundle", "q8_0")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("mix", ["f16", "q8_0", "q4_k_m", "q2_k"])
def test_C10_a_weight_that_is_too_large_names_its_tensor(tmp_path: Path, mix: str) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", changes=with_value(DOWN, -1e38))
    with pytest.raises(BundleError, match=f"tensor '{DOWN}'.*1e\\+38, too large"):
        convert(checkpoint, tmp_path / "bundle", mix)
    convert(checkpoint, tmp_path / "bundle", "bf16")


@pytest.mark.parametrize("value", [0.0, 1e-40, 65504.0])
def test_C10_zero_subnormal_and_large_tensors_stay_finite(tmp_path: Path, value: float) -> None:
    changes: dict[str, Array | None] = {DOWN: np.full((256, 768), value, np.float32)}
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", changes=changes)
    for mix in ("q8_0", "q4_k_m", "q2_k"):
        convert(checkpoint, tmp_path / "bundle", mix, force=True)
        phi4edge.info.check(tmp_path / "bundle")


BROKEN_TENSORS: dict[str, tuple[dict[str, Array | None], str]] = {
    "missing": ({DOWN: None}, f"lacks '{DOWN}'"),
    "wrong shape": ({DOWN: np.ones((256, 767), np.float32)}, "shape"),
    "transposed": ({DOWN: np.ones((768, 256), np.float32)}, "shape"),
    "unknown": ({"model.layers.0.mlp.extra.weight": np.ones(3, np.float32)}, "no use that we know"),
    "a layer too many": ({"model.layers.2.input_layernorm.weight": np.ones(256, np.float32)}, "no use that we know"),
    "a LoRA of a user's own": (
        {"base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight": np.ones((4, 256), np.float32)},
        "--adapter NAME=DIR",
    ),
}


@pytest.mark.parametrize("changes, problem", BROKEN_TENSORS.values(), ids=BROKEN_TENSORS.keys())
def test_tensors_are_checked_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Array | None], problem: str
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", changes=changes)
    with pytest.raises(BundleError, match=problem):
        convert(checkpoint, tmp_path / "bundle", "f32")
    assert not (tmp_path / "bundle").exists()


def test_a_tensor_of_integers_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="I32, expected BF16, F16, F32"):
        convert(tiny_checkpoint(tmp_path / "checkpoint", dtype="I32"), tmp_path / "bundle", "f32")


def edit_tokenizer(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = checkpoint / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    change(tokenizer)
    write_json(path, tokenizer)


BROKEN_TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no model": (lambda t: t.pop("model"), "byte-level BPE"),
    "sentencepiece": (lambda t: t["model"].update(byte_fallback=True), "byte-level BPE"),
    "vocab a list": (lambda t: t["model"].update(vocab=[1]), "model.vocab"),
    "id too large": (lambda t: t["model"]["vocab"].update(xyz=512), "not below 512"),
    "id twice": (lambda t: t["model"]["vocab"].update(xyz=0), "taken"),
    "id negative": (lambda t: t["model"]["vocab"].update(xyz=-1), "model.vocab"),
    "added id taken": (lambda t: t["added_tokens"].append({"id": 0, "content": "<|x|>"}), "taken"),
    "added text twice": (lambda t: t["added_tokens"].append({"id": 511, "content": "!"}), "two ids"),
    "added not objects": (lambda t: t.update(added_tokens=["x"]), "added_tokens"),
    "merge of three": (lambda t: t["model"]["merges"].append("a b c"), "not a pair"),
    "merge of nothing": (lambda t: t["model"]["merges"].append(["z", "\u0120zz"]), "no token"),
    "other split": (lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\w+"}), "split text"),
    "normalizer": (lambda t: t.update(normalizer={"type": "Lowercase"}), "split text"),
}


@pytest.mark.parametrize("change, problem", BROKEN_TOKENIZERS.values(), ids=BROKEN_TOKENIZERS.keys())
def test_a_tokenizer_that_cannot_be_converted_is_a_bundle_error(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    edit_tokenizer(checkpoint, change)
    with pytest.raises(BundleError, match=problem):
        convert(checkpoint, tmp_path / "bundle", "f32")
    assert not (tmp_path / "bundle").exists()


# --- the place it goes to


def test_C7_an_output_that_must_stay_is_a_usage_error(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "backbone.gguf").write_text("my own")
    file = tmp_path / "file"
    file.write_text("x")
    convert(checkpoint, tmp_path / "bundle", "f16")
    before = {path: snapshot(path) for path in (checkpoint, mine, tmp_path / "bundle")}
    for target, problem in (
        (checkpoint, "the checkpoint itself"),
        (file, "not a directory"),
        (mine, "no manifest"),
        (tmp_path / "bundle", "there already"),
    ):
        with pytest.raises(UsageError, match=problem):
            convert(checkpoint, target, "f32")
    (mine / "notes.txt").write_text("x")
    for target in (mine, tmp_path):
        with pytest.raises(UsageError, match="neither empty nor a bundle"):
            convert(checkpoint, target, "f32", force=True)
    with pytest.raises(FileError, match="does not exist"):
        convert(checkpoint, tmp_path / "no" / "where", "f32")
    (mine / "notes.txt").unlink()
    assert before == {path: snapshot(path) for path in before}


def test_C7_two_writers_on_one_output_are_a_usage_error(tmp_path: Path) -> None:
    checkpoint, bundle = tiny_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle"
    bundle.mkdir()
    descriptor = os.open(bundle, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another conversion"):
            convert(checkpoint, bundle, "f32")
    finally:
        os.close(descriptor)
    assert snapshot(bundle) == {}
    convert(checkpoint, bundle, "f32")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_C7_a_read_only_output_is_a_file_error(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir(mode=0o500)
    with pytest.raises(FileError, match="cannot be written"):
        convert(tiny_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle", "f32")


def test_force_replaces_a_bundle_also_a_damaged_one(tmp_path: Path) -> None:
    checkpoint, bundle = tiny_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle"
    for mix in ("f32", "q8_0", "f16"):
        convert(checkpoint, bundle, mix, force=True)
        opened = Bundle.open(bundle)
        opened.verify()
        assert opened.manifest.parts[0].details["mix"] == mix.upper()
    for damage in (lambda: backbone(bundle).unlink(), lambda: (bundle / "manifest.json").write_text("{")):
        damage()
        convert(checkpoint, bundle, "f16", force=True)
        Bundle.open(bundle).verify()
        assert len(snapshot(bundle)) == 2


def test_C12_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, n_threads in (("one", 1), ("two", 2)):
        checkpoint = tiny_checkpoint(tmp_path / f"checkpoint-{name}", layers=3)
        convert(checkpoint, tmp_path / name, "q4_k_m", n_threads=n_threads)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


# --- interruptions


@pytest.mark.parametrize("n_bytes", [0, 1000, 20_000, 300_000, 3_000_000])
@pytest.mark.parametrize("has_old", [False, True], ids=["new", "old"])
def test_C5_a_disk_that_is_full_leaves_everything_as_it_was(tmp_path: Path, n_bytes: int, has_old: bool) -> None:
    checkpoint, bundle = tiny_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle"
    if has_old:
        convert(checkpoint, bundle, "f16")
    before = snapshot(bundle)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))

    done = run("convert", str(checkpoint), str(bundle), "--quant", "f32", "--force", preexec_fn=limit)
    assert done.returncode == 5, done.stderr
    assert is_one_error_line(done.stderr)
    assert snapshot(bundle) == before
    assert bundle.exists() == has_old


def test_C5_too_little_space_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr("phi4edge.converters.new_file.shutil.disk_usage", lambda path: usage)
    with pytest.raises(DiskError, match="are free"):
        convert(tiny_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle", "f32")
    assert not (tmp_path / "bundle").exists()


class Stopped(Exception):  # noqa: N818 - not an error of anything
    pass


@pytest.mark.parametrize("step", ["os.replace", "os.fsync"])
@pytest.mark.parametrize("nth", [0, 1, 2])
def test_a_failure_at_any_step_leaves_the_old_bundle_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, nth: int
) -> None:
    checkpoint, bundle = tiny_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle"
    convert(checkpoint, bundle, "f16")
    before = snapshot(bundle)
    calls = iter(range(1000))
    original = getattr(os, step.removeprefix("os."))

    def fail(*arguments: Any) -> Any:
        if next(calls) == nth:
            raise Stopped
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        try:
            convert(checkpoint, bundle, "f32", force=True)
        except Stopped:
            assert snapshot(bundle) == before
    Bundle.open(bundle).verify()


def start_slow(checkpoint: Path, bundle: Path) -> subprocess.Popen[str]:
    command = [*COMMAND, "convert", str(checkpoint), str(bundle), "--quant", "f32", "--force"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_temporary(process: subprocess.Popen[str], bundle: Path) -> None:
    deadline = time.monotonic() + DEADLINE
    while process.poll() is None and not any(name.startswith(UNFINISHED_PREFIX) for name in snapshot_names(bundle)):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def snapshot_names(bundle: Path) -> list[str]:
    return [path.name for path in bundle.iterdir()] if bundle.exists() else []


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_C8_a_signal_leaves_everything_as_it_was(tmp_path: Path, number: signal.Signals, code: int) -> None:
    checkpoint, bundle = tiny_checkpoint(tmp_path / "checkpoint", layers=40, vocab=20_000), tmp_path / "bundle"
    with start_slow(checkpoint, bundle) as process:
        wait_for_temporary(process, bundle)
        process.send_signal(number)
        _, shown = process.communicate(timeout=DEADLINE)
    assert process.returncode == code, shown
    assert "Traceback" not in shown
    assert not bundle.exists()


def test_C6_a_kill_leaves_the_old_bundle_or_the_new_one(tmp_path: Path) -> None:
    checkpoint, bundle = tiny_checkpoint(tmp_path / "checkpoint", layers=20, vocab=10_000), tmp_path / "bundle"
    convert(checkpoint, bundle, "f16")
    rng = random.Random(0)
    for _ in range(8):
        with start_slow(checkpoint, bundle) as process:
            wait_for_temporary(process, bundle)
            time.sleep(rng.uniform(0.0, 0.1))
            process.kill()
            process.communicate(timeout=DEADLINE)
        Bundle.open(bundle).verify()
    convert(checkpoint, bundle, "f16", force=True)
    assert len(snapshot_names(bundle)) == 2


def test_C6_a_bundle_that_was_never_finished_is_not_accepted(tmp_path: Path) -> None:
    checkpoint, bundle = tiny_checkpoint(tmp_path / "checkpoint", layers=20, vocab=10_000), tmp_path / "bundle"
    with start_slow(checkpoint, bundle) as process:
        wait_for_temporary(process, bundle)
        process.kill()
        process.communicate(timeout=DEADLINE)
    if process.returncode != 0:
        with pytest.raises(Phi4EdgeError):
            Bundle.open(bundle)
    convert(checkpoint, bundle, "f16", force=process.returncode == 0)
    Bundle.open(bundle).verify()


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """200 MB of weights through pieces of 16 MiB."""
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", layers=1, vocab=200_000)
    command = "import sys; from phi4edge.cli import main; main(sys.argv[1:]); import re; "
    command += "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr)"
    arguments = [COMMAND[0], "-c", command, "convert", str(checkpoint), str(tmp_path / "bundle"), "--quant", "f16"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE, check=True)
    assert int(done.stderr) < 400 << 10  # KiB
