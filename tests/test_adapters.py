"""LoRA adapters: what PEFT computes with them, as GGUF files that llama.cpp reads, and safe against bad input."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from peers import LlamaCpp
from phi4edge.converters.adapters import (
    Adapter,
    adapter_bytes,
    built_in_adapters,
    read_peft_adapter,
    write_adapter,
)
from phi4edge.converters.checkpoint import Checkpoint
from phi4edge.converters.files import Written
from phi4edge.converters.mixes import ADAPTER_TYPES, fitting_type
from phi4edge.converters.variants import BackboneConfig, read_config, variant_of
from phi4edge.errors import BundleError, FileError, UsageError
from tiny_adapters import (
    PREFIX,
    STEMS,
    gguf_name,
    lora_tensors,
    peft_config,
    peft_model,
    set_llama_cpp_adapter,
    take_values_of_file,
    tiny_multimodal,
    write_adapter_folder,
)
from tiny_checkpoints import Tensors, tiny_checkpoint, write_json, write_safetensors
from tiny_models import Array, TinyShape, tiny_gguf, tiny_transformers, transformers_logits

ODD_SHAPE: dict[str, Any] = {"layers": 3, "hidden": 320, "heads": 5, "kv_heads": 1, "ffn": 352, "vocab": 320}
SMALL: dict[str, Any] = {"layers": 2, "hidden": 64, "ffn": 96, "vocab": 300}
TOKENS = [int(token) for token in np.random.default_rng(1).integers(0, 300, 48)]
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"o_proj": 4, r"^model\.layers\.1\.mlp\.(down|gate_up)_proj": 3, "down_proj": 5},
    "alpha_pattern": {"_proj": 99, "layers.0.self_attn.qkv_proj": 1, r"mlp\..*": 24},
}
LORAS: dict[str, dict[str, Any]] = {
    "rank 7": {"r": 7, "lora_alpha": 10},
    "rank 320": {"r": 320, "lora_alpha": 640},
    "rslora": {"r": 16, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 8, "lora_alpha": 16, **PATTERNS},
    "rslora, patterns": {"r": 8, "lora_alpha": 3, "use_rslora": True, **PATTERNS},
    "some modules of a layer": {"r": 8, "lora_alpha": 16, "target_modules": ["o_proj", "down_proj"]}
    | {"layers_to_transform": [1]},
}


def base_config(directory: Path, **options: Any) -> BackboneConfig:
    with Checkpoint(tiny_checkpoint(directory, **options)) as checkpoint:
        return read_config(checkpoint)


def deltas(adapter: Adapter, n_layers: int) -> Tensors:
    """Of every linear that gets one, put together from pieces of uneven size."""
    found: Tensors = {}
    for stem in (f"blk.{layer}.{role}" for layer in range(n_layers) for role in STEMS.values()):
        n_rows = adapter.modules[stem].b.shape[0] if stem in adapter.modules else 1
        pieces = [adapter.delta(stem, first, min(37, n_rows - first)) for first in range(0, n_rows, 37)]
        whole = [piece for piece in pieces if piece is not None]
        if whole:
            found[stem] = np.concatenate(whole)
    return found


def write(path: Path, adapter: Adapter, type_name: str, n_threads: int = 1) -> Written:
    return write_adapter(path, adapter, type_name, n_threads=n_threads, progress=lambda tensor, done, total: None)


def read_gguf(path: Path) -> Tensors:
    reader = gguf.GGUFReader(path)
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


# --- the adapter is what PEFT makes of it


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS.keys())
def test_deltas_and_logits_equal_those_of_peft(tmp_path: Path, lora: dict[str, Any]) -> None:
    theirs = peft_model(tmp_path / "lora", lora, **ODD_SHAPE)
    merged = tiny_transformers(**ODD_SHAPE)
    config = base_config(tmp_path / "base", **ODD_SHAPE)
    with read_peft_adapter("mine", tmp_path / "lora", config) as adapter:
        ours = deltas(adapter, config.layers)
        write(tmp_path / "mine.gguf", adapter, "F32")
        alpha = gguf.GGUFReader(tmp_path / "mine.gguf").fields["adapter.lora.alpha"].contents()
    in_file = read_gguf(tmp_path / "mine.gguf")
    n_modules = 0
    for layer in range(config.layers):
        for linear, role in STEMS.items():
            stem = f"blk.{layer}.{role}"
            module = theirs.get_submodule(f"base_model.model.model.layers.{layer}.{linear}")
            if not hasattr(module, "get_delta_weight"):
                assert stem not in ours and f"{stem}.weight.lora_a" not in in_file
                continue
            expected = module.get_delta_weight("default").detach().numpy()
            error = 1e-6 * np.ptp(expected)
            np.testing.assert_allclose(ours[stem], expected, rtol=0, atol=error, err_msg=stem)
            a, b = in_file[f"{stem}.weight.lora_a"], in_file[f"{stem}.weight.lora_b"]
            np.testing.assert_allclose(alpha / a.shape[0] * b @ a, expected, rtol=0, atol=error, err_msg=stem)
            merged.get_submodule(f"model.layers.{layer}.{linear}").weight.data += module.weight.new_tensor(ours[stem])
            n_modules += 1
    assert len(in_file) == 2 * n_modules
    expected = transformers_logits(theirs, TOKENS)
    np.testing.assert_allclose(transformers_logits(merged, TOKENS), expected, rtol=0, atol=1e-5 * np.ptp(expected))
    assert np.abs(transformers_logits(tiny_transformers(**ODD_SHAPE), TOKENS) - expected).max() > 0.05 * np.ptp(
        expected
    )


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("prefix, label", [("", ""), (PREFIX, ""), (PREFIX, ".default"), ("", ".my-own")])
def test_every_spelling_of_names_gives_the_same_adapter(tmp_path: Path, prefix: str, label: str, dtype: str) -> None:
    config, shape = base_config(tmp_path / "base", **SMALL), TinyShape(**SMALL)
    plain = write_adapter_folder(tmp_path / "plain", lora_tensors(shape, 8), peft_config(8), dtype)
    other = lora_tensors(shape, 8, prefix=prefix, label=label)
    spelled = write_adapter_folder(tmp_path / "other", dict(reversed(other.items())), peft_config(8), dtype)
    with read_peft_adapter("a", plain, config) as first, read_peft_adapter("a", spelled, config) as second:
        assert list(first.modules) == list(second.modules) == list(deltas(first, config.layers))
        np.testing.assert_equal(deltas(first, config.layers), deltas(second, config.layers))
        assert write(tmp_path / "first", first, "Q8_0").sha256 == write(tmp_path / "second", second, "Q8_0").sha256


def test_both_layouts_of_a_multimodal_checkpoint_hold_the_same_two_adapters(tmp_path: Path) -> None:
    found: dict[str, dict[str, Tensors]] = {}
    for layout in ("phi4_multimodal", "phi4mm"):
        directory = tiny_multimodal(tmp_path / layout, layout, {"vision": 8, "speech": 10}, **SMALL)
        with Checkpoint(directory) as checkpoint, ExitStack() as opened:
            config = read_config(checkpoint)
            adapters = built_in_adapters(checkpoint, variant_of(checkpoint), config)
            for adapter in adapters.values():
                opened.enter_context(adapter)
            assert [(name, adapter.name, adapter.alpha) for name, adapter in adapters.items()] == [
                ("vision", "vision", 16.0),
                ("speech", "speech", 20.0),
            ]
            found[layout] = {name: deltas(adapter, config.layers) for name, adapter in adapters.items()}
    np.testing.assert_equal(found["phi4_multimodal"], found["phi4mm"])
    tensors = lora_tensors(TinyShape(**SMALL), 10, prefix="", seed=1)
    stem = "model.layers.1.mlp.gate_up_proj"
    expected = np.float32(2.0) * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
    np.testing.assert_allclose(found["phi4mm"]["speech"]["blk.1.ffn_up"], expected, rtol=0, atol=1e-6)


def test_a_checkpoint_of_text_alone_has_no_adapters(tmp_path: Path) -> None:
    with Checkpoint(tiny_checkpoint(tmp_path, **SMALL)) as checkpoint:
        assert built_in_adapters(checkpoint, variant_of(checkpoint), read_config(checkpoint)) == {}


# --- the file


@pytest.mark.parametrize("type_name, bound", [("F16", 1e-4), ("Q8_0", 5e-3)])
@pytest.mark.parametrize("case", ["rank 320", "patterns"])
def test_llama_cpp_loads_the_adapter_and_agrees_with_peft(
    tmp_path: Path, case: str, type_name: str, bound: float
) -> None:
    theirs = peft_model(tmp_path / "lora", LORAS[case], **ODD_SHAPE)
    path = tmp_path / "mine.lora.gguf"
    with read_peft_adapter("mine", tmp_path / "lora", base_config(tmp_path / "base", **ODD_SHAPE)) as adapter:
        write(path, adapter, type_name)
    with closing(LlamaCpp(tiny_gguf(tmp_path, **ODD_SHAPE))) as peer:
        base = peer.logits(TOKENS)
        set_llama_cpp_adapter(peer, path)
        adapted = peer.logits(TOKENS)
    # Rounding to the file's type is not llama.cpp's doing: the file itself, run by PEFT, stands between the two.
    exact = log_softmax(transformers_logits(theirs, TOKENS))
    take_values_of_file(theirs, path)
    rounded = log_softmax(transformers_logits(theirs, TOKENS))
    assert divergence(exact, log_softmax(base)) > 0.5
    assert divergence(exact, rounded) <= bound
    assert divergence(rounded, log_softmax(adapted)) <= bound


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), np.float32)


def divergence(expected: Array, found: Array) -> float:
    """Mean KL divergence of rows of log-probabilities."""
    return float((np.exp(expected) * (expected - found)).sum(axis=1).mean())


@pytest.mark.parametrize("rank", [7, 64])
@pytest.mark.parametrize("type_name", ADAPTER_TYPES)
def test_the_file_holds_the_source_as_well_as_its_type_can(tmp_path: Path, type_name: str, rank: int) -> None:
    """Each matrix as near as the quantizer of the gguf package comes; for IQ4_NL, as its Q4_0 comes."""
    source = lora_tensors(TinyShape(**SMALL), rank)
    folder = write_adapter_folder(tmp_path / "lora", source, peft_config(rank))
    path = tmp_path / "mine.gguf"
    with read_peft_adapter("mine", folder, base_config(tmp_path / "base", **SMALL)) as adapter:
        written = write(path, adapter, type_name)
        expected_bytes = adapter_bytes(adapter, type_name)
    assert (written.n_bytes, written.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields.pop("general.file_type") >= 0 and fields.pop("general.quantization_version") == 2
    assert fields.pop("phi4edge.adapter.format", None) == (
        type_name if type_name in ("Q5_0", "Q4_0", "IQ4_NL") else None
    )
    assert fields == {
        "general.architecture": "phi3",
        "general.type": "adapter",
        "general.name": "mine",
        "adapter.type": "lora",
        "adapter.lora.alpha": 2.0 * rank,
    }
    assert sum(tensor.n_bytes for tensor in reader.tensors) == expected_bytes
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(source)
    for name, values in source.items():
        tensor = tensors[gguf_name(name)]
        assert tensor.tensor_type.name == fitting_type(type_name, values.shape[1])
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        peer_type = gguf.GGMLQuantizationType[
            "Q4_0" if tensor.tensor_type.name == "IQ4_NL" else tensor.tensor_type.name
        ]
        peer = gguf.quants.dequantize(gguf.quants.quantize(values, peer_type), peer_type)
        assert np.square(found - values).sum() <= 1.0001 * np.square(peer - values).sum(), tensor.name


def test_the_same_adapter_gives_the_same_bytes_and_another_strength_others(tmp_path: Path) -> None:
    config, tensors = base_config(tmp_path / "base", **SMALL), lora_tensors(TinyShape(**SMALL), 8)
    written = []
    for name, alpha, n_threads in (("one", 16, 1), ("two", 16, 2), ("strong", 32, 1)):
        folder = write_adapter_folder(tmp_path / name, tensors, peft_config(8, lora_alpha=alpha))
        with read_peft_adapter("mine", folder, config) as adapter:
            written.append(write(tmp_path / f"{name}.gguf", adapter, "Q5_0", n_threads))
    assert written[0] == written[1]
    assert written[0].sha256 != written[2].sha256 and written[0].source_sha256 != written[2].source_sha256


def test_progress_counts_the_source_and_can_stop_the_writing(tmp_path: Path) -> None:
    tensors = lora_tensors(TinyShape(**SMALL), 8)
    folder = write_adapter_folder(tmp_path / "lora", tensors, peft_config(8), "BF16")
    seen: list[tuple[str, int, int]] = []
    with read_peft_adapter("mine", folder, base_config(tmp_path / "base", **SMALL)) as adapter:
        write_adapter(tmp_path / "x", adapter, "F16", n_threads=1, progress=lambda *step: seen.append(step))
        n_bytes = 2 * sum(values.size for values in tensors.values())
        assert {name for name, _, _ in seen} == {*tensors, ""}
        assert (seen[0][1:], seen[-1][1:]) == ((0, n_bytes), (n_bytes, n_bytes))
        with pytest.raises(KeyboardInterrupt):
            write_adapter(tmp_path / "y", adapter, "F16", n_threads=1, progress=interrupt)


def interrupt(tensor: str, done: int, total: int) -> None:
    if done > total // 2:
        raise KeyboardInterrupt


def test_memory_does_not_grow_with_the_adapter(tmp_path: Path) -> None:
    """60 MB in half precision, of which one matrix is 50 MB."""
    shape: dict[str, Any] = {"layers": 1, "hidden": 128, "ffn": 50_000, "vocab": 300}
    tensors = lora_tensors(TinyShape(**shape), 256)
    folder = write_adapter_folder(tmp_path / "lora", tensors, peft_config(256), "F16")
    config = replace(base_config(tmp_path / "base", **SMALL), layers=1, hidden=128, ffn=50_000, heads=4, head_dim=32)
    del tensors
    tracemalloc.start()
    try:
        with read_peft_adapter("mine", folder, config) as adapter:
            for first in range(0, 100_000, 10_000):
                adapter.delta("blk.0.ffn_up", first, 10_000)
            write(tmp_path / "mine.gguf", adapter, "Q8_0")
        assert tracemalloc.get_traced_memory()[1] < 60 << 20
    finally:
        tracemalloc.stop()


# --- bad input

QKV = f"{PREFIX}model.layers.0.self_attn.qkv_proj"
DOWN = f"{PREFIX}model.layers.1.mlp.down_proj"
RANK = 8


def moved(old: str, new: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def changed(name: str, change: Callable[[Array], Array]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def ranks(n_rows: int, n_columns: int) -> Callable[[Tensors], object]:
    """Other ranks for the A and the B of one module."""
    return lambda tensors: tensors.update(
        {
            f"{DOWN}.lora_A.weight": np.ones((n_rows, 96), np.float32),
            f"{DOWN}.lora_B.weight": np.ones((64, n_columns), np.float32),
        }
    )


BAD_TENSORS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "only A": (lambda t: t.pop(f"{DOWN}.lora_B.weight"), "down_proj.lora_A.*no lora_B"),
    "only B": (lambda t: t.pop(f"{DOWN}.lora_A.weight"), "down_proj.lora_B.*no lora_A"),
    "all A": (lambda t: [t.pop(name) for name in [*t] if "lora_B" in name], "no lora_B"),
    "none": (lambda t: t.clear(), "no tensors"),
    "A of another rank": (ranks(9, 8), "rank 8, but .*lora_A.* has 9"),
    "B of another rank": (ranks(8, 9), "rank 9, but .*lora_A.* has 8"),
    "rank that the config does not say": (ranks(9, 9), "rank 9, but r of .*adapter_config.json says 8"),
    "rank 0": (ranks(0, 0), "no matrix"),
    "a vector": (changed(f"{DOWN}.lora_A.weight", lambda a: a[0]), "no matrix"),
    "A of another base": (changed(f"{QKV}.lora_A.weight", lambda a: a[:, :-1]), r"qkv_proj.*\[8, 63\] is added to \["),
    "B of another base": (changed(f"{QKV}.lora_B.weight", lambda b: b[:-1]), r"qkv_proj.*does not fit the base"),
    "A transposed": (changed(f"{QKV}.lora_A.weight", lambda a: a.T.copy()), "has 64"),
    "layer too many": (
        moved(f"{QKV}.lora_A.weight", f"{QKV.replace('0', '2')}.lora_A.weight"),
        "more layers than the 2",
    ),
    "layer 00": (moved(f"{QKV}.lora_A.weight", f"{QKV.replace('0', '00')}.lora_A.weight"), "layers.00.*is not the"),
    "split projection": (
        moved(f"{QKV}.lora_A.weight", f"{QKV.replace('qkv', 'q')}.lora_A.weight"),
        "q_proj.*is not the",
    ),
    "embedding": (
        lambda t: t.update({f"{PREFIX}model.embed_tokens.lora_embedding_A": np.ones((8, 300), np.float32)}),
        "embed_tokens.*is not the",
    ),
    "head": (
        lambda t: t.update({f"{PREFIX}lm_head.lora_A.weight": np.ones((8, 64), np.float32)}),
        "lm_head.*is not the",
    ),
    "DoRA": (lambda t: t.update({f"{QKV}.lora_magnitude_vector": np.ones(9, np.float32)}), "magnitude.*is not the"),
    "bias": (lambda t: t.update({f"{QKV}.lora_B.bias": np.ones(9, np.float32)}), "lora_B.bias.*is not the"),
    "saved module": (lambda t: t.update({f"{PREFIX}model.norm.weight": np.ones(64, np.float32)}), "norm.*is not the"),
    "same twice": (
        lambda t: t.update({f"{QKV.removeprefix(PREFIX)}.lora_A.weight": t[f"{QKV}.lora_A.weight"]}),
        "qkv_proj.*is there as",
    ),
    "two adapters": (moved(f"{QKV}.lora_A.weight", f"{QKV}.lora_A.other.weight"), "several adapters.*other"),
}


@pytest.mark.parametrize("change, problem", BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_L2_tensors_that_do_not_make_a_lora_for_the_base(
    tmp_path: Path, change: Callable[[Tensors], object], problem: str
) -> None:
    tensors = lora_tensors(TinyShape(**SMALL), RANK)
    change(tensors)
    folder = write_adapter_folder(tmp_path / "lora", tensors, peft_config(RANK))
    with pytest.raises(BundleError, match=problem) as caught:
        read_peft_adapter("mine", folder, base_config(tmp_path / "base", **SMALL))
    assert str(folder / "adapter_model.safetensors") in caught.value.path and "\n" not in str(caught.value)


BAD_CONFIGS: dict[str, dict[str, Any]] = {
    "alpha missing": {"lora_alpha": None},
    "alpha 0": {"lora_alpha": 0},
    "alpha negative": {"lora_alpha": -16},
    "alpha a string": {"lora_alpha": "16"},
    "alpha true": {"lora_alpha": True},
    "alpha infinite": {"lora_alpha": 10**400},
    "alpha no float32": {"lora_alpha": 1e-60},
    "rank missing": {"r": None},
    "rank 0": {"r": 0},
    "rank a float": {"r": 8.0},
    "rank huge": {"r": 1 << 40},
    "kind missing": {"peft_type": None},
    "another kind": {"peft_type": "ADALORA"},
    "DoRA": {"use_dora": True},
    "biases": {"bias": "all"},
    "bias of B": {"lora_bias": True},
    "transposed": {"fan_in_fan_out": True},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1, 2]},
    "layers twice": {"layer_replication": [[0, 2], [1, 2]]},
    "after a token": {"alora_invocation_tokens": [1]},
    "weights changed at the start": {"init_lora_weights": "pissa_niter_4"},
    "rslora a string": {"use_rslora": "false"},
    "unknown setting": {"use_magic": True},
    "alphas a list": {"alpha_pattern": [1]},
    "alpha by pattern 0": {"alpha_pattern": {"o_proj": 0}},
    "rank by pattern a string": {"rank_pattern": {"o_proj": "8"}},
    "no pattern": {"rank_pattern": {"(o_proj": 8}},
    "pattern too long": {"rank_pattern": {"o" * 501: 8}},
    "pattern that takes forever": {"alpha_pattern": {r"(\w|\w\w|\w\w\w|\.)+[a-i.]": 8}},
}


@pytest.mark.parametrize("changes", BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_L2_settings_that_are_wrong_or_make_no_plain_lora(tmp_path: Path, changes: dict[str, Any]) -> None:
    tensors = lora_tensors(TinyShape(**SMALL), RANK)
    config = peft_config(RANK, **changes)
    folder = write_adapter_folder(tmp_path / "lora", tensors, config)
    with pytest.raises(BundleError) as caught:
        read_peft_adapter("mine", folder, base_config(tmp_path / "base", **SMALL))
    assert caught.value.path == str(folder / "adapter_config.json")
    assert caught.value.field == next(iter(changes)), caught.value


@pytest.mark.parametrize("text", ["", "{", "[]", '{"lora_alpha": NaN}', '{"r": 8, "r": 9}'])
def test_L2_a_config_that_is_not_json(tmp_path: Path, text: str) -> None:
    folder = write_adapter_folder(tmp_path / "lora", lora_tensors(TinyShape(**SMALL), RANK), {})
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(BundleError, match=r"adapter_config\.json: is not"):
        read_peft_adapter("mine", folder, base_config(tmp_path / "base", **SMALL))


WEIGHTS = "adapter_model.safetensors"


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "C4 pickle": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), BundleError, "pickle refused"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), BundleError, f"has no {WEIGHTS}"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), BundleError, "has no adapter_config.json"),
    "more weights": (lambda f: (f / "x.safetensors").write_bytes(b""), BundleError, "has x.safetensors too"),
    "C1 cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), BundleError, f"{WEIGHTS}.*lora"),
    "integers": (
        lambda f: write_safetensors(f / WEIGHTS, lora_tensors(TinyShape(**SMALL), RANK), "I32"),
        BundleError,
        "tensor '.*lora_A.weight': is I32",
    ),
    "missing": (lambda f: f.rename(f.parent / "other"), FileError, "does not exist"),
    "a directory": (lambda f: replace_by_directory(f / WEIGHTS), FileError, "regular file"),
}


@pytest.mark.parametrize("damage, kind, problem", BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_L2_a_folder_that_is_no_adapter(
    tmp_path: Path, damage: Callable[[Path], object], kind: type[Exception], problem: str
) -> None:
    folder = write_adapter_folder(tmp_path / "lora", lora_tensors(TinyShape(**SMALL), RANK), peft_config(RANK))
    damage(folder)
    config = base_config(tmp_path / "base", **SMALL)
    n_open = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(kind, match=f"{folder}.*{problem}"):
        read_peft_adapter("mine", folder, config)
    assert len(list(Path("/proc/self/fd").iterdir())) == n_open


@pytest.mark.parametrize("name", ["", "a.b", "../x", "-x", "A", "x" * 41, "a b", "x\n"])
def test_a_name_that_is_no_plain_word_is_a_usage_error(tmp_path: Path, name: str) -> None:
    folder = write_adapter_folder(tmp_path / "lora", lora_tensors(TinyShape(**SMALL), RANK), peft_config(RANK))
    with pytest.raises(UsageError, match="no name for an adapter"):
        read_peft_adapter(name, folder, base_config(tmp_path / "base", **SMALL))


@pytest.mark.parametrize("name", [f"{DOWN}.lora_A.weight", f"{DOWN}.lora_B.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38])
def test_C10_a_value_that_cannot_be_used_names_its_tensor(tmp_path: Path, name: str, value: float) -> None:
    tensors = lora_tensors(TinyShape(**SMALL), RANK)
    tensors[name].flat[-1] = value
    folder = write_adapter_folder(tmp_path / "lora", tensors, peft_config(RANK))
    with read_peft_adapter("mine", folder, base_config(tmp_path / "base", **SMALL)) as adapter:
        with pytest.raises(BundleError, match=f"{WEIGHTS}: tensor '{name}'.*(NaN or an infinity|1e\\+38, too large)"):
            write(tmp_path / "mine.gguf", adapter, "Q8_0")
        if np.isfinite(value):
            write(tmp_path / "mine.gguf", adapter, "F32")
        else:
            with pytest.raises(BundleError, match=f"{WEIGHTS}: tensor '{name}'.*NaN or an infinity"):
                deltas(adapter, 2)


def test_C10_a_product_that_is_too_large_names_its_tensor(tmp_path: Path) -> None:
    tensors = lora_tensors(TinyShape(**SMALL), RANK)
    for matrix in "AB":
        tensors[f"{DOWN}.lora_{matrix}.weight"][:] = 1e30
    folder = write_adapter_folder(tmp_path / "lora", tensors, peft_config(RANK))
    problem = f"tensor '{DOWN}.lora_B.weight': has a NaN or an infinity"
    config = base_config(tmp_path / "base", **SMALL)
    with read_peft_adapter("mine", folder, config) as adapter, pytest.raises(BundleError, match=problem):
        adapter.delta("blk.1.ffn_down", 0, 1)


BAD_CHECKPOINTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no folder": (
        "phi4_multimodal",
        lambda c: (c / "speech-lora").rename(c / "x"),
        "no folder speech-lora.*--adapters none",
    ),
    "folder without weights": (
        "phi4_multimodal",
        lambda c: (c / "vision-lora" / WEIGHTS).unlink(),
        f"has no {WEIGHTS}",
    ),
    "no strength": (
        "phi4mm",
        lambda c: edit_config(c, lambda t: t.pop("vision_lora")),
        "no vision_lora.*--adapters none",
    ),
    "no alpha": (
        "phi4mm",
        lambda c: edit_config(c, lambda t: t["speech_lora"].pop("lora_alpha")),
        "speech_lora.lora_alpha",
    ),
    "another rank": (
        "phi4mm",
        lambda c: edit_config(c, lambda t: t["speech_lora"].update(r=9)),
        "speech_lora.r .* says 9",
    ),
    "no tensors": ("phi4mm", lambda c: cut_speech(c, ".lora_"), "no tensors of the adapter 'speech'.*--adapters none"),
    "a layer less": ("phi4mm", lambda c: cut_speech(c, "model.layers.1."), "only 4 of the 8 pairs .*--adapters none"),
}


def edit_config(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    change(config)
    write_json(checkpoint / "config.json", config)


def cut_speech(checkpoint: Path, where: str) -> None:
    """Writes the adapters of the checkpoint again, without some of one."""
    tensors: Tensors = {}
    for name in ("vision", "speech"):
        own = lora_tensors(TinyShape(**SMALL), 8, prefix="", label=f".{name}")
        tensors |= {key: rows for key, rows in own.items() if name == "vision" or where not in key}
    write_safetensors(checkpoint / "model.safetensors", tensors)


@pytest.mark.parametrize("layout, damage, problem", BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS.keys())
def test_a_multimodal_checkpoint_without_one_of_its_adapters(
    tmp_path: Path, layout: str, damage: Callable[[Path], object], problem: str
) -> None:
    directory = tiny_multimodal(tmp_path / "checkpoint", layout, {"vision": 8, "speech": 8}, **SMALL)
    damage(directory)
    with Checkpoint(directory) as checkpoint, pytest.raises(BundleError, match=problem):
        built_in_adapters(checkpoint, variant_of(checkpoint), read_config(checkpoint))
