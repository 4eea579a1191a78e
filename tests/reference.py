"""The exact answer: a forward pass in plain NumPy on the dequantized weights of a phi3 or llama GGUF file.

One call sees the whole sequence, so LongRoPE's factors follow from its length. No cache, no tricks, nothing shared with
the decoder under test.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]  # or float64, as the caller of Reference likes


LAYER_TENSORS = ["attn_norm", "attn_qkv", "attn_q", "attn_k", "attn_v", "attn_output"]
LAYER_TENSORS += ["ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]


class Reference:
    """Weights of a file as floats, and their logits.

    round_keys, round_values: what storing does to keys (rotated) and values, [heads, n_tokens, head_dim].

    Example: ``Reference("model.gguf").logits([1, 2, 3])`` is float32 [3, vocab].
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        dtype: npt.DTypeLike = np.float32,
        round_keys: Callable[[Floats], Floats] = lambda rows: rows,
        round_values: Callable[[Floats], Floats] = lambda rows: rows,
    ) -> None:
        self._round_keys, self._round_values = round_keys, round_values
        reader = gguf.GGUFReader(path)
        self._fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tok")}
        self.architecture: str = self._fields["general.architecture"]
        self.weights: dict[str, Floats] = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(dtype, copy=False)
            for tensor in reader.tensors
        }
        self.embedding = self.weights["token_embd.weight"]
        self.n_heads = int(self._key("attention.head_count"))
        self.n_kv_heads = int(self._key("attention.head_count_kv"))
        self.head_dim = int(self._key("attention.key_length", self.embedding.shape[1] // self.n_heads))
        self.rotary_dims = int(self._key("rope.dimension_count", self.head_dim))
        self.epsilon = float(self._key("attention.layer_norm_rms_epsilon"))
        self.sliding_window = int(self._key("attention.sliding_window", 0))

    def _key(self, name: str, default: Any = None) -> Any:
        value = self._fields.get(f"{self.architecture}.{name}", default)
        assert value is not None, name
        return value

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """float32 [n_tokens, vocab]."""
        rows: Floats = self.embedding[np.asarray(tokens)]
        return self.logits_of_rows(rows)

    def logits_of_rows(self, x: Floats) -> npt.NDArray[np.float32]:
        """The same for embedding rows [n_tokens, hidden]."""
        cos, sin = self._rotation(len(x))
        for layer in range(int(self._key("block_count"))):
            weights = {name: self.weights.get(f"blk.{layer}.{name}.weight") for name in LAYER_TENSORS}
            x = x + self._attention(self._norm(x, weights["attn_norm"]), weights, cos, sin)
            x = x + self._ffn(self._norm(x, weights["ffn_norm"]), weights)
        head = self.weights.get("output.weight", self.embedding)
        logits: Floats = self._norm(x, self.weights["output_norm.weight"]) @ head.T
        return np.asarray(logits, np.float32)

    def _norm(self, x: Floats, weight: Any) -> Floats:
        scale: Floats = np.sqrt((x * x).mean(-1, keepdims=True) + x.dtype.type(self.epsilon))
        return np.asarray(x / scale * weight)

    def _rotation(self, n_tokens: int) -> tuple[Floats, Floats]:
        """cos and sin, [n_tokens, rotary_dims / 2], times the attention factor."""
        exponents = np.arange(0, self.rotary_dims, 2) / self.rotary_dims
        frequencies = float(self._key("rope.freq_base", 10000.0)) ** -exponents
        original = int(self._key("rope.scaling.original_context_length", 0))
        length = "long" if n_tokens > original else "short"
        factors = self.weights.get(f"rope_factors_{length}.weight", self.weights.get("rope_freqs.weight"))
        if factors is not None:
            frequencies = frequencies / factors.astype(np.float64)
        if self._fields.get(f"{self.architecture}.rope.scaling.type") == "linear":
            frequencies = frequencies / float(self._key("rope.scaling.factor"))
        angles = np.arange(n_tokens)[:, None] * frequencies
        factor = float(self._key("rope.scaling.attn_factor", 1.0))
        dtype = self.embedding.dtype
        return (factor * np.cos(angles)).astype(dtype), (factor * np.sin(angles)).astype(dtype)

    def _rotate(self, x: Floats, cos: Floats, sin: Floats) -> Floats:
        """x: [heads, n_tokens, head_dim]. llama files pair (2i, 2i + 1), phi3 files (i, i + half); the rest stays."""
        half = self.rotary_dims // 2
        if self.architecture == "llama":
            first, second = slice(0, self.rotary_dims, 2), slice(1, self.rotary_dims, 2)
        else:
            first, second = slice(0, half), slice(half, self.rotary_dims)
        out = x.copy()
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., second] * cos + x[..., first] * sin
        return np.asarray(out)

    def _attention(self, x: Floats, weights: dict[str, Any], cos: Floats, sin: Floats) -> Floats:
        n_tokens, head_dim = len(x), self.head_dim
        if weights["attn_qkv"] is not None:
            stacked = x @ weights["attn_qkv"].T
        else:
            stacked = np.concatenate([x @ weights[f"attn_{name}"].T for name in "qkv"], axis=1)
        heads = stacked.reshape(n_tokens, -1, head_dim).swapaxes(0, 1)
        q, k, v = np.split(heads, [self.n_heads, self.n_heads + self.n_kv_heads])
        q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
        k, v = self._round_keys(k), self._round_values(v)
        distance = np.arange(n_tokens)[:, None] - np.arange(n_tokens)
        hidden_keys = distance < 0
        if self.sliding_window:
            hidden_keys |= distance >= self.sliding_window
        out = np.empty_like(q)
        for head in range(self.n_heads):
            kv_head = head * self.n_kv_heads // self.n_heads
            scores = q[head] @ k[kv_head].T / np.sqrt(x.dtype.type(head_dim))
            scores[hidden_keys] = -np.inf
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            out[head] = scores / scores.sum(-1, keepdims=True) @ v[kv_head]
        result: Floats = out.swapaxes(0, 1).reshape(n_tokens, -1) @ weights["attn_output"].T
        return result

    def _ffn(self, x: Floats, weights: dict[str, Any]) -> Floats:
        up = x @ weights["ffn_up"].T
        if weights["ffn_gate"] is None:  # fused: the gate's rows come first
            gate, up = np.split(up, 2, axis=1)
        else:
            gate = x @ weights["ffn_gate"].T
        result: Floats = (gate / (1 + np.exp(-np.maximum(gate, -80))) * up) @ weights["ffn_down"].T
        return result


# --- how far two answers are apart


def relative_difference(logits: Floats, expected: Floats) -> float:
    """The largest difference as a share of the range of the expected logits."""
    assert logits.shape == expected.shape, (logits.shape, expected.shape)
    assert np.isfinite(logits).all()
    return float(np.abs(logits - expected).max() / (expected.max() - expected.min()))


def log_probabilities(logits: Floats) -> npt.NDArray[np.float32]:
    shifted = logits - logits.max(-1, keepdims=True)
    total: npt.NDArray[np.float64] = np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64))
    return np.asarray(shifted - total, np.float32)


def mean_divergence(expected: Floats, other: Floats) -> float:
    """Mean over positions of KL(expected || other), in nats; both are log-probabilities [n_tokens, vocab]."""
    return float((np.exp(expected) * (expected - other)).sum(-1, dtype=np.float64).mean())


def same_choices(expected: Floats, other: Floats) -> float:
    """The share of positions at which both have the same likeliest token."""
    return float((expected.argmax(-1) == other.argmax(-1)).mean())
