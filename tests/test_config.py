"""Hyperparameters of GGUF files: what is read, what contradicts the tensors, and what we cannot run.

Errors show both numbers of a contradiction and name the key or the tensor.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from phi4edge import _core
from phi4edge.errors import BundleError, Cancelled

HIDDEN, LAYERS, HEADS, KV_HEADS, FFN, VOCAB, CONTEXT = 256, 2, 4, 2, 512, 96, 4096
HEAD_DIM = HIDDEN // HEADS
Tensors = dict[str, npt.NDArray[Any]]


class TinyFile:
    """A GGUF file in the making: change `keys` (without the architecture) and `tensors`, then write()."""

    def __init__(self, architecture: str = "phi3", quantized: bool = False) -> None:
        rng = np.random.default_rng(1)
        self.architecture = architecture
        self.weight_type = gguf.GGMLQuantizationType.Q8_0 if quantized else gguf.GGMLQuantizationType.F32
        self.keys: dict[str, Any] = {
            "context_length": CONTEXT,
            "embedding_length": HIDDEN,
            "block_count": LAYERS,
            "feed_forward_length": FFN,
            "attention.head_count": HEADS,
            "attention.head_count_kv": KV_HEADS,
            "attention.layer_norm_rms_epsilon": 1e-5,
        }
        self.n_tokens = VOCAB
        self.wide_integers = False  # u64 even where u32 would do
        self.tensors: Tensors = {}

        def add(name: str, *shape: int) -> None:
            self.tensors[name + ".weight"] = rng.standard_normal(shape).astype(np.float32)

        add("token_embd", VOCAB, HIDDEN)
        for layer in range(LAYERS):
            block = f"blk.{layer}."
            add(block + "attn_norm", HIDDEN)
            add(block + "ffn_norm", HIDDEN)
            kv_rows = KV_HEADS * HEAD_DIM
            if architecture == "llama":
                add(block + "attn_q", HIDDEN, HIDDEN)
                add(block + "attn_k", kv_rows, HIDDEN)
                add(block + "attn_v", kv_rows, HIDDEN)
                add(block + "ffn_gate", FFN, HIDDEN)
                add(block + "ffn_up", FFN, HIDDEN)
            else:
                add(block + "attn_qkv", HIDDEN + 2 * kv_rows, HIDDEN)
                add(block + "ffn_up", 2 * FFN, HIDDEN)
            add(block + "attn_output", HIDDEN, HIDDEN)
            add(block + "ffn_down", HIDDEN, FFN)
        add("output_norm", HIDDEN)

    def write(self, path: Path) -> str:
        """Python types choose the types in the file; lists become arrays."""
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in self.keys.items():
            name = f"{self.architecture}.{key}"
            if isinstance(value, bool):
                writer.add_bool(name, value)
            elif isinstance(value, int):
                wide = self.wide_integers or value >= 2**32
                (writer.add_uint64 if wide else writer.add_uint32)(name, value)
            elif isinstance(value, float):
                writer.add_float32(name, value)
            elif isinstance(value, str):
                writer.add_string(name, value)
            else:
                writer.add_array(name, value)
        if self.n_tokens:
            writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(self.n_tokens)])
        for name, values in self.tensors.items():
            if values.ndim == 1 or values.dtype != np.float32:
                writer.add_tensor(name, values)
            else:
                data = gguf.quants.quantize(values, self.weight_type)
                writer.add_tensor(name, data, raw_dtype=self.weight_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return str(path)


@pytest.fixture
def tiny() -> TinyFile:
    return TinyFile()


def load(file: TinyFile, tmp_path: Path, n_threads: int = 1, **options: Any) -> _core.Model:
    return _core.Model(_core.GgufFile(file.write(tmp_path / "tiny.gguf")), n_threads, **options)


def assert_refused(file: TinyFile, tmp_path: Path, field: str, *parts: str) -> None:
    """A BundleError for that field, which names the file and has all the parts in its message."""
    with pytest.raises(BundleError) as caught:
        load(file, tmp_path)
    message = str(caught.value)
    assert caught.value.field == field, message
    assert message.startswith(str(tmp_path / "tiny.gguf")), message
    for part in parts:
        assert part in message
    assert "\n" not in message


def long_rope(file: TinyFile, original: int = 1024) -> None:
    """Adds LongRoPE: short factors 1, long factors 1 to 4."""
    file.keys["rope.scaling.original_context_length"] = original
    file.tensors["rope_factors_short.weight"] = np.ones(HEAD_DIM // 2, np.float32)
    file.tensors["rope_factors_long.weight"] = np.linspace(1, 4, HEAD_DIM // 2, dtype=np.float32)


# --- what is read


def test_a_phi3_file_is_read(tiny: TinyFile, tmp_path: Path) -> None:
    config = load(tiny, tmp_path).config
    assert (config.architecture, config.n_layers, config.hidden_size, config.ffn_size) == ("phi3", LAYERS, HIDDEN, FFN)
    assert (config.n_heads, config.n_kv_heads, config.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
    assert (config.vocab_size, config.context_length, config.tied_head) == (VOCAB, CONTEXT, True)
    assert config.rms_epsilon == pytest.approx(1e-5)
    assert (config.rope.n_dims, config.rope.base, config.rope.interleaved) == (HEAD_DIM, 10000.0, False)
    assert (config.rope.attention_factor, config.rope.original_context, config.rope.position_scale) == (1.0, 0, 1.0)


def test_a_llama_file_has_interleaved_rope_and_separate_tensors(tmp_path: Path) -> None:
    file = TinyFile("llama")
    file.tensors["output.weight"] = file.tensors["token_embd.weight"].copy()
    config = load(file, tmp_path).config
    assert config.rope.interleaved
    assert not config.tied_head


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_weights_take_at_least_what_the_file_holds(tmp_path: Path, quantized: bool, n_threads: int) -> None:
    file = _core.GgufFile(TinyFile("llama", quantized).write(tmp_path / "tiny.gguf"))
    model = _core.Model(file, n_threads)
    assert model.weight_bytes >= 0.9 * sum(tensor.n_bytes for tensor in file.tensors)
    assert model.weight_bytes == _core.memory_need(file, 1).weights


def test_head_count_kv_defaults_to_head_count(tmp_path: Path) -> None:
    file = TinyFile("llama")
    del file.keys["attention.head_count_kv"]
    for layer in range(LAYERS):
        for part in "kv":
            file.tensors[f"blk.{layer}.attn_{part}.weight"] = np.ones((HIDDEN, HIDDEN), np.float32)
    assert load(file, tmp_path).config.n_kv_heads == HEADS


def test_equal_numbers_per_layer_are_one_number(tiny: TinyFile, tmp_path: Path) -> None:
    tiny.keys["attention.head_count_kv"] = [KV_HEADS] * LAYERS
    tiny.keys["feed_forward_length"] = [FFN] * LAYERS
    assert load(tiny, tmp_path).config.n_kv_heads == KV_HEADS


def test_key_length_overrides_the_head_size(tmp_path: Path) -> None:
    file = TinyFile("llama")
    file.keys |= {"attention.key_length": 32, "attention.value_length": 32}
    for layer in range(LAYERS):
        file.tensors[f"blk.{layer}.attn_q.weight"] = np.ones((HEADS * 32, HIDDEN), np.float32)
        file.tensors[f"blk.{layer}.attn_k.weight"] = np.ones((KV_HEADS * 32, HIDDEN), np.float32)
        file.tensors[f"blk.{layer}.attn_v.weight"] = np.ones((KV_HEADS * 32, HIDDEN), np.float32)
        file.tensors[f"blk.{layer}.attn_output.weight"] = np.ones((HIDDEN, HEADS * 32), np.float32)
    config = load(file, tmp_path).config
    assert (config.head_dim, config.rope.n_dims) == (32, 32)


@pytest.mark.parametrize(("window", "expected"), [(0, 0), (CONTEXT, 0), (2 * CONTEXT, 0), (100, 100)])
def test_a_sliding_window_counts_only_when_it_is_smaller_than_the_context(
    tiny: TinyFile, tmp_path: Path, window: int, expected: int
) -> None:
    tiny.keys["attention.sliding_window"] = window
    assert load(tiny, tmp_path).config.sliding_window == expected


def test_longrope_attention_factor_follows_from_the_contexts(tiny: TinyFile, tmp_path: Path) -> None:
    long_rope(tiny, original=1024)
    rope = load(tiny, tmp_path).config.rope
    assert rope.original_context == 1024
    assert rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(4096 / 1024) / math.log(1024)))
    np.testing.assert_array_equal(rope.factors_short, np.ones(HEAD_DIM // 2))
    np.testing.assert_array_equal(rope.factors_long, np.linspace(1, 4, HEAD_DIM // 2, dtype=np.float32))


def test_the_attention_factor_of_the_file_wins(tiny: TinyFile, tmp_path: Path) -> None:
    long_rope(tiny)
    tiny.keys["rope.scaling.attn_factor"] = 1.25
    assert load(tiny, tmp_path).config.rope.attention_factor == 1.25


def test_one_set_of_rope_factors_never_switches(tmp_path: Path) -> None:
    file = TinyFile("llama")
    file.tensors["rope_freqs.weight"] = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    rope = load(file, tmp_path).config.rope
    np.testing.assert_array_equal(rope.factors_short, rope.factors_long)
    assert len(rope.factors_short) == HEAD_DIM // 2
    assert (rope.original_context, rope.attention_factor) == (0, 1.0)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 0.25),
        ({"rope.scaling.factor": 4.0}, 0.25),
        ({"rope.scale_linear": 2.0}, 0.5),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, 1.0),
        ({"rope.scaling.type": "linear"}, 1.0),
    ],
)
def test_linear_scaling_of_positions(tiny: TinyFile, tmp_path: Path, keys: dict[str, Any], expected: float) -> None:
    tiny.keys |= keys
    assert load(tiny, tmp_path).config.rope.position_scale == expected


def test_the_file_is_read_to_the_end_and_progress_never_falls(tiny: TinyFile, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> bool:
        calls.append((done, total))
        return True

    load(tiny, tmp_path, n_threads=2, progress=progress)
    assert calls[0][0] == 0
    assert calls[-1][0] == calls[-1][1]
    assert calls == sorted(calls)


def test_progress_that_returns_false_cancels(tiny: TinyFile, tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        load(tiny, tmp_path, n_threads=2, progress=lambda done, total: False)


# --- G17: numbers that contradict each other


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("block_count", 0, ["found 0"]),
        ("block_count", 1_000_000, ["1000000", "1024"]),
        ("block_count", 1, ["is 1", "blk.0 to blk.1"]),
        ("block_count", 3, ["is 3", "blk.0 to blk.1"]),
        ("attention.head_count", 0, ["found 0"]),
        ("attention.head_count", 5, ["is 5", "divide", "5"]),
        ("attention.head_count_kv", 3, ["is 3", "head_count 4"]),
        ("attention.head_count_kv", 8, ["is 8", "head_count 4"]),
        ("embedding_length", 128, ["is 128", "256"]),
        ("embedding_length", 2**31, ["2147483648", "65536"]),
        ("feed_forward_length", 2**40, ["1099511627776", "1048576"]),
        ("rope.dimension_count", 66, ["is 66", "64"]),
        ("rope.dimension_count", 63, ["is 63", "even"]),
        ("rope.freq_base", 0.0, ["is 0"]),
        ("context_length", 0, ["found 0"]),
        ("context_length", 2**31, ["2147483648", "16777216"]),
        ("expert_count", 3, ["is 3", "mixture of experts"]),
        ("attention.value_length", 32, ["is 32", "64"]),
        ("attention.layer_norm_rms_epsilon", 0.0, ["is 0"]),
        ("attention.causal", False, ["is false"]),
        ("final_logit_softcapping", 30.0, ["is 30", "capped logits"]),
        ("rope.scaling.attn_factor", -1.0, ["is -1"]),
        ("rope.scaling.factor", -4.0, ["is -4"]),
    ],
)
def test_G17_a_number_that_does_not_fit_is_refused(
    tiny: TinyFile, tmp_path: Path, key: str, value: float, parts: list[str]
) -> None:
    tiny.keys[key] = value
    if key == "attention.head_count" and value == 5:
        tiny.keys["attention.head_count_kv"] = 5
    assert_refused(tiny, tmp_path, f"phi3.{key}", *parts)


@pytest.mark.parametrize(
    ("key", "value", "tensor", "parts"),
    [
        ("feed_forward_length", 511, "blk.0.ffn_up.weight", ["256 x 1024", "256 x 1022", "feed_forward_length 511"]),
        ("attention.head_count_kv", 4, "blk.0.attn_qkv.weight", ["256 x 512", "256 x 768", "head_count_kv 4"]),
        ("attention.key_length", 32, "blk.0.attn_qkv.weight", ["256 x 512", "256 x 256", "head size 32"]),
    ],
)
def test_G17_a_tensor_of_another_shape_is_refused(
    tiny: TinyFile, tmp_path: Path, key: str, value: int, tensor: str, parts: list[str]
) -> None:
    tiny.keys[key] = value
    assert_refused(tiny, tmp_path, f"tensor '{tensor}'", *parts)


def test_G17_a_head_of_another_size_than_the_embedding_is_refused(tiny: TinyFile, tmp_path: Path) -> None:
    tiny.tensors["output.weight"] = np.ones((VOCAB + 16, HIDDEN), np.float32)
    assert_refused(tiny, tmp_path, "tensor 'output.weight'", "256 x 112", "256 x 96")


def test_G17_layers_of_different_sizes_are_refused(tiny: TinyFile, tmp_path: Path) -> None:
    tiny.keys["attention.head_count_kv"] = [2, 4]
    assert_refused(tiny, tmp_path, "phi3.attention.head_count_kv", "2 and 4")


def test_G17_a_number_per_layer_for_another_number_of_layers_is_refused(tiny: TinyFile, tmp_path: Path) -> None:
    tiny.keys["attention.head_count"] = [4, 4, 4]
    assert_refused(tiny, tmp_path, "phi3.attention.head_count", "3 entries", "is 2")


def test_G17_another_number_of_tokens_than_embeddings_is_refused(tiny: TinyFile, tmp_path: Path) -> None:
    tiny.n_tokens = 90
    assert_refused(tiny, tmp_path, "tokenizer.ggml.tokens", "90", "96")


@pytest.mark.parametrize(
    ("tensor", "value", "parts"),
    [
        ("rope_factors_long.weight", np.ones(30, np.float32), ["30", "32"]),
        ("rope_factors_long.weight", np.full(32, np.nan, np.float32), ["entry 0", "nan"]),
        ("rope_factors_short.weight", np.zeros(32, np.float32), ["entry 0", "is 0"]),
        ("rope_factors_short.weight", np.ones(32, np.float16), ["F32"]),
        ("rope_factors_short.weight", None, ["missing"]),
    ],
)
def test_G17_bad_rope_factors_are_refused(
    tiny: TinyFile, tmp_path: Path, tensor: str, value: npt.NDArray[Any] | None, parts: list[str]
) -> None:
    long_rope(tiny)
    if value is None:
        del tiny.tensors[tensor]
    else:
        tiny.tensors[tensor] = value
    assert_refused(tiny, tmp_path, f"tensor '{tensor}'", *parts)


@pytest.mark.parametrize("original", [0, 1, 2**40])
def test_G17_an_original_context_out_of_range_is_refused(tiny: TinyFile, tmp_path: Path, original: int) -> None:
    long_rope(tiny, original)
    assert_refused(tiny, tmp_path, "phi3.rope.scaling.original_context_length", str(original), "16777216")


# --- G18: keys that are missing or of another type


@pytest.mark.parametrize(
    "key",
    [
        "context_length",
        "block_count",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_G18_a_missing_key_is_named(tiny: TinyFile, tmp_path: Path, key: str) -> None:
    del tiny.keys[key]
    assert_refused(tiny, tmp_path, f"phi3.{key}", "missing")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", "2"),
        ("block_count", 2.0),
        ("embedding_length", True),
        ("attention.layer_norm_rms_epsilon", "small"),
        ("attention.head_count", ["4", "4"]),
        ("rope.scaling.type", 1),
        ("attention.causal", 1),
    ],
)
def test_G18_a_value_of_another_kind_is_refused(tiny: TinyFile, tmp_path: Path, key: str, value: Any) -> None:
    tiny.keys[key] = value
    assert_refused(tiny, tmp_path, f"phi3.{key}", "expected")


def test_G18_a_64_bit_integer_that_fits_is_accepted(tiny: TinyFile, tmp_path: Path) -> None:
    tiny.wide_integers = True
    assert load(tiny, tmp_path).config.n_layers == LAYERS


# --- G20: what we do not have


def test_G20_an_unknown_architecture_lists_the_known_ones(tmp_path: Path) -> None:
    assert_refused(TinyFile("mamba"), tmp_path, "general.architecture", "'mamba'", "phi3", "llama")


@pytest.mark.parametrize("scaling", ["yarn", "dynamic"])
def test_G20_an_unknown_rope_scaling_lists_the_known_ones(tiny: TinyFile, tmp_path: Path, scaling: str) -> None:
    tiny.keys["rope.scaling.type"] = scaling
    assert_refused(tiny, tmp_path, "phi3.rope.scaling.type", f"'{scaling}'", "linear", "longrope")


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("blk.0.attn_qkv.bias", "biases"),
        ("output_norm.bias", "biases"),
        ("blk.1.ffn_gate_inp.weight", "mixture of experts"),
        ("blk.1.attn_q_norm.weight", "normalised queries and keys"),
        ("blk.0.attn_q.weight", "contradicts"),
        ("v.patch_embd.weight", "an operation"),
    ],
)
def test_G20_a_tensor_that_we_would_have_to_ignore_is_refused(
    tiny: TinyFile, tmp_path: Path, name: str, meaning: str
) -> None:
    tiny.tensors[name] = np.ones(HIDDEN, np.float32)
    assert_refused(tiny, tmp_path, f"tensor '{name}'", meaning)


@pytest.mark.parametrize("name", ["blk.1.attn_qkv.weight", "blk.0.ffn_norm.weight", "output_norm.weight"])
def test_G20_a_missing_tensor_is_named(tiny: TinyFile, tmp_path: Path, name: str) -> None:
    del tiny.tensors[name]
    assert_refused(tiny, tmp_path, f"tensor '{name}'", "missing")


def test_G20_a_type_that_we_do_not_read_lists_the_others(tiny: TinyFile, tmp_path: Path) -> None:
    tiny.tensors["blk.0.ffn_down.weight"] = np.ones((HIDDEN, FFN), np.float64)
    assert_refused(tiny, tmp_path, "tensor 'blk.0.ffn_down.weight'", "F64", "Q4_K", "requantize")


# --- G22: norms


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_G22_a_norm_that_is_not_finite_is_refused(tiny: TinyFile, tmp_path: Path, bad: float) -> None:
    tiny.tensors["blk.1.ffn_norm.weight"][77] = bad
    assert_refused(tiny, tmp_path, "tensor 'blk.1.ffn_norm.weight'", "entry 77", str(bad))


def test_G22_a_quantized_norm_is_refused(tiny: TinyFile, tmp_path: Path) -> None:
    tiny.tensors["output_norm.weight"] = np.ones((1, HIDDEN), np.float32)
    tiny.weight_type = gguf.GGMLQuantizationType.Q8_0
    assert_refused(tiny, tmp_path, "tensor 'output_norm.weight'", "Q8_0", "F32")


def test_G22_half_precision_norms_are_read(tiny: TinyFile, tmp_path: Path) -> None:
    tiny.tensors["output_norm.weight"] = tiny.tensors["output_norm.weight"].astype(np.float16)
    assert load(tiny, tmp_path).config.n_layers == LAYERS
