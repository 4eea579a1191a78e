"""Full-size models of random weights, written in seconds: for measuring speed and memory without a download.

``python -m benchmarks.random_gguf phi4-mini.gguf --shape phi4-mini --mix Q4_K_M``

Nothing is quantized. The blocks are random bits with scales that give each matrix the deviation of a trained one, so
activations stay finite and logits vary. Types are spread over the tensors as llama.cpp does for the same mix.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, TokenType

from phi4edge.converters.mixes import MIXES, Mix

Bytes = npt.NDArray[np.uint8]

BYTES_AT_ONCE = 64 << 20


@dataclass(frozen=True)
class Shape:
    """A phi3 model. Partial rotary and LongRoPE as in Phi-4-mini unless said otherwise."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool = True
    rotary_fraction: float = 0.75
    context: int = 131072
    original_context: int = 4096
    special_tokens_at: int = 0  # id of <|endoftext|>; the rest follows at the distances of Phi-4-mini

    def matrices(self) -> Iterator[tuple[str, int, int, int]]:
        """(role, layer, rows, columns); -1 for what is in no layer."""
        yield "token_embd", -1, self.vocab, self.hidden
        head = self.hidden // self.heads
        for layer in range(self.layers):
            yield "attn_qkv", layer, (self.heads + 2 * self.kv_heads) * head, self.hidden
            yield "attn_output", layer, self.hidden, self.hidden
            yield "ffn_up", layer, 2 * self.ffn, self.hidden
            yield "ffn_down", layer, self.hidden, self.ffn
        if not self.tied:
            yield "output", -1, self.vocab, self.hidden


SHAPES = {
    "phi4-mini": Shape(3072, 32, 24, 8, 8192, 200064, special_tokens_at=199999),
    "phi3-mini": Shape(3072, 32, 32, 32, 8192, 32064, tied=False, rotary_fraction=1.0, special_tokens_at=32000),
    "nano": Shape(256, 4, 4, 2, 768, 1216, context=8192, original_context=1024, special_tokens_at=1180),
}
SPECIAL_TOKENS = {
    0: "<|endoftext|>",
    20: "<|assistant|>",
    21: "<|end|>",
    22: "<|user|>",
    23: "<|system|>",
    24: "<|tool|>",
    25: "<|/tool|>",
    26: "<|tool_call|>",
    27: "<|/tool_call|>",
    28: "<|tool_response|>",
}


# --- random blocks

# Where a block keeps its half-precision scales: (byte of the scale, byte of the minimum or None, minimum / scale that
# makes the mean zero). All other bits are free, apart from Q8_0's.
SCALES: dict[str, tuple[int, int | None, float]] = {
    "Q4_0": (0, None, 0.0),
    "Q4_1": (0, 2, -7.5),
    "Q5_0": (0, None, 0.0),
    "Q5_1": (0, 2, -15.5),
    "Q8_0": (0, None, 0.0),
    "Q2_K": (80, 82, 1.5),
    "Q3_K": (108, None, 0.0),
    "Q4_K": (0, 2, 7.5),
    "Q5_K": (0, 2, 15.5),
    "Q6_K": (208, None, 0.0),
    "IQ4_NL": (0, None, 0.0),
    "IQ4_XS": (0, None, 0.0),
}


def block_maker(type_name: str, deviation: float, rng: np.random.Generator) -> Callable[[int], Bytes]:
    """A function of a number of blocks that returns as many random ones, whose weights have the given deviation."""
    block_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[type_name]][1]
    if type_name in ("F32", "F16", "BF16"):
        return lambda n: _random_floats(type_name, deviation, n, rng)
    scale_at, minimum_at, ratio = SCALES[type_name]

    def put(blocks: Bytes, at: int, values: npt.NDArray[np.float32]) -> None:
        blocks[:, at : at + 2] = values.astype(np.float16).view(np.uint8).reshape(-1, 2)

    def make(n_blocks: int, scale: float) -> Bytes:
        words = rng.integers(0, 2**64, -(-n_blocks * block_bytes // 8), dtype=np.uint64)
        blocks: Bytes = words.view(np.uint8)[: n_blocks * block_bytes].reshape(n_blocks, block_bytes)
        if type_name == "Q8_0":
            blocks[blocks == 128] = 129  # -128 is no weight: quantizers end at -127 and kernels rely on it
        scales = (scale * rng.uniform(0.75, 1.25, n_blocks)).astype(np.float32)
        put(blocks, scale_at, scales)
        if minimum_at is not None:
            put(blocks, minimum_at, scales * np.float32(ratio))
        return blocks

    unit = gguf.quants.dequantize(make(4096, 2.0**-6), GGMLQuantizationType[type_name]).std() * 2.0**6
    return lambda n: make(n, deviation / float(unit))


def _random_floats(type_name: str, deviation: float, n_values: int, rng: np.random.Generator) -> Bytes:
    values = rng.standard_normal(n_values, np.float32) * np.float32(deviation)
    return np.asarray(gguf.quants.quantize(values, GGMLQuantizationType[type_name])).view(np.uint8)


def deviation_of(role: str, n_columns: int) -> float:
    """Logits get a deviation of 2; other matrices keep the size of what they multiply."""
    return (2.0 if role in ("token_embd", "output") else 1.0) / math.sqrt(n_columns)


# --- the file


def write_model(path: Path, shape: Shape, mix_name: str, seed: int = 0) -> None:
    """Writes the model, tensor by tensor and in pieces of 64 MiB."""
    writer = gguf.GGUFWriter(str(path), "phi3")
    _add_config(writer, shape, mix_name)
    _add_tokenizer(writer, shape)
    tensors = [*_matrix_pieces(shape, MIXES[mix_name], np.random.Generator(np.random.SFC64(seed)))]
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:  # the directory is written: the data may come in pieces
        file.seek(0, 2)
        for tensor in tensors:
            file.write(b"\0" * (-file.tell() % writer.data_alignment))
            for piece in tensor.pieces():
                piece.tofile(file)
        file.write(b"\0" * (-file.tell() % writer.data_alignment))


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]  # numpy order: rows first
    type: GGMLQuantizationType
    make: Callable[[int], npt.NDArray[Any]]  # number of blocks -> their bytes

    @property
    def n_bytes(self) -> int:
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block_values * block_bytes

    def pieces(self) -> Iterator[npt.NDArray[Any]]:
        block_bytes = gguf.GGML_QUANT_SIZES[self.type][1]
        n_blocks, most = self.n_bytes // block_bytes, BYTES_AT_ONCE // block_bytes
        for start in range(0, n_blocks, most):
            yield self.make(min(most, n_blocks - start))


def _matrix_pieces(shape: Shape, mix: Mix, rng: np.random.Generator) -> Iterator[_Tensor]:
    makers: dict[tuple[str, float], Callable[[int], Bytes]] = {}

    def vector(name: str, values: npt.NDArray[np.float32]) -> _Tensor:
        return _Tensor(name, values.shape, GGMLQuantizationType.F32, lambda _: values)

    def norm(name: str) -> _Tensor:
        return vector(name, rng.uniform(0.75, 1.25, shape.hidden).astype(np.float32))

    # First, as in converted files: llama.cpp reads head_dim / 2 factors, and at the end of a file it crashes.
    n_pairs = _rotary_dims(shape) // 2
    yield vector("rope_factors_long.weight", np.geomspace(1.0, 48.0, n_pairs).astype(np.float32))
    yield vector("rope_factors_short.weight", np.ones(n_pairs, np.float32))
    for role, layer, n_rows, n_columns in shape.matrices():
        prefix = "" if layer < 0 else f"blk.{layer}."
        if role in ("attn_qkv", "ffn_up"):
            yield norm(prefix + ("attn_norm.weight" if role == "attn_qkv" else "ffn_norm.weight"))
        key = mix.type_of(role, layer, shape.layers, tied=shape.tied), deviation_of(role, n_columns)
        maker = makers.setdefault(key, block_maker(*key, rng))
        yield _Tensor(f"{prefix}{role}.weight", (n_rows, n_columns), GGMLQuantizationType[key[0]], maker)
    yield norm("output_norm.weight")


def _rotary_dims(shape: Shape) -> int:
    return int(shape.rotary_fraction * shape.hidden) // shape.heads


def _add_config(writer: gguf.GGUFWriter, shape: Shape, mix_name: str) -> None:
    scale = math.log(shape.context / shape.original_context) / math.log(shape.original_context)
    writer.add_name("random weights")
    writer.add_context_length(shape.context)
    writer.add_rope_scaling_orig_ctx_len(shape.original_context)
    writer.add_rope_scaling_attn_factors(math.sqrt(1 + scale))
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(_rotary_dims(shape))
    writer.add_rope_freq_base(10000.0)
    writer.add_sliding_window(262144)
    named = f"MOSTLY_{mix_name}" if mix_name != "F32" else "ALL_F32"
    writer.add_file_type(gguf.LlamaFileType[named])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: gguf.GGUFWriter, shape: Shape) -> None:
    """As many entries as the real tokenizer: bytes, made-up words without merges, a few pairs with, and specials."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    tokens = [chr(byte) for byte in printable] + [chr(256 + row) for row in range(len(others))]
    pairs = [(one, other) for one in "theranios" for other in "theranios"]
    tokens += [one + other for one, other in pairs]
    types = [TokenType.NORMAL] * shape.vocab
    tokens += [f"Ġword{token}" for token in range(len(tokens), shape.vocab)]
    for distance, text in SPECIAL_TOKENS.items():
        tokens[shape.special_tokens_at + distance] = text
        types[shape.special_tokens_at + distance] = TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([f"{one} {other}" for one, other in pairs])
    writer.add_bos_token_id(shape.special_tokens_at)
    writer.add_eos_token_id(shape.special_tokens_at)
    writer.add_chat_template(
        "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="phi4-mini")
    parser.add_argument("--mix", choices=MIXES, default="Q4_K_M")
    parser.add_argument("--layers", type=int, help="fewer or more layers than the shape has")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.layers is not None:
        shape = replace(shape, layers=options.layers)
    write_model(options.path, shape, options.mix, options.seed)
    print(f"{options.path}: {options.path.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
