"""The ``tokenizer.ggml.*`` keys of a GGUF file, checked: what both kinds of tokenizers are built from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from phi4edge.errors import BundleError

PREFIX = "tokenizer.ggml."
_MAX_TOKEN_CHARS = 1 << 16
_MAX_FLOAT = (2 - 2**-23) * 2.0**127
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# Texts of tokens that end a turn or a document in the families that llama.cpp knows.
_STOP_TEXTS = {
    *("<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>"),
    *("<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<|END_OF_TURN_TOKEN|>", "<|end_of_sentence|>"),
    *("</s>", "<eos>", "<end_of_turn>", "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    # Padding and the names of files in code models: llama.cpp stops at these too.
    *("<|fim_pad|>", "<|fim_repo|>", "<|repo_name|>", "<reponame>", "<REPO>", "<|file_sep|>"),
}
_STOPS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")


class TokenType(IntEnum):
    """As in GGUF, and with the same numbers in a sentencepiece model."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A vocabulary whose lists agree in length and whose ids are in range."""

    kind: str  # "bpe" or "spm"
    pre: str
    tokens: Sequence[str]  # surrogateescape where a token is not UTF-8
    types: Sequence[int]
    scores: Sequence[float]  # empty if there are none
    merges: Sequence[str]  # "left right", first is applied first
    ids: Mapping[str, int]  # of several tokens of one text the last
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    stop_ids: frozenset[int]
    add_bos: bool | None  # None: the file does not say
    add_space_prefix: bool
    path: str

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], path: str = "") -> Vocabulary:
        """Reads and checks the keys; ``BundleError`` names the one that is wrong."""
        keys = _Keys(metadata, path)
        kind = keys.choice("model", {"gpt2": "bpe", "llama": "spm"})
        tokens = keys.tokens()
        special = {name: keys.token_id(name, len(tokens)) for name in (*_STOPS, "bos", "unknown", "padding")}
        types = keys.types(tokens)
        if not types:  # an old file: only the ids tell which tokens are not text
            is_byte = [kind == "spm" and _BYTE_TOKEN.fullmatch(text) is not None for text in tokens]
            types = [int(TokenType.BYTE if byte else TokenType.NORMAL) for byte in is_byte]
            for name, token in special.items():
                if token is not None:
                    types[token] = int(TokenType.UNKNOWN if name == "unknown" and kind == "spm" else TokenType.CONTROL)
        if kind == "spm":
            for key in ("treat_whitespace_as_suffix", "remove_extra_whitespaces", "precompiled_charsmap"):
                if metadata.get(PREFIX + key):
                    raise keys.error(key, "is not supported for the tokenizer model 'llama'")
            for name, text in (("bos", "<s>"), ("eos", "</s>")):
                if special[name] is None and text in tokens:
                    special[name] = tokens.index(text)
        stops = {special[name] for name in _STOPS} - {None}
        stops |= {i for i, text in enumerate(tokens) if text in _STOP_TEXTS and types[i] == TokenType.CONTROL}
        return cls(
            kind=kind,
            pre=keys.text("pre", "default") if kind == "bpe" else "",
            tokens=tokens,
            types=types,
            scores=keys.scores(len(tokens), required=kind == "spm"),
            merges=keys.merges() if kind == "bpe" else (),
            ids={text: token for token, text in enumerate(tokens)},
            bos_id=special["bos"],
            eos_id=special["eos"],
            unknown_id=special["unknown"],
            stop_ids=frozenset(token for token in stops if token is not None),
            add_bos=keys.flag("add_bos_token"),
            add_space_prefix=kind == "spm" and keys.flag("add_space_prefix") is not False,
            path=path,
        )

    def error(self, key: str, problem: str) -> BundleError:
        return BundleError(problem, path=self.path, field=PREFIX + key)

    def byte_of(self, token: int) -> bytes:
        """The byte that a token of type BYTE stands for."""
        return bytes([int(self.tokens[token][3:5], 16)])


class _Keys:
    """Typed access to the metadata; every refusal names its key."""

    def __init__(self, metadata: Mapping[str, Any], path: str) -> None:
        self._metadata = metadata
        self._path = path

    def error(self, key: str, problem: str, hint: str = "") -> BundleError:
        return BundleError(problem, path=self._path, field=PREFIX + key, hint=hint)

    def choice(self, key: str, known: Mapping[str, str]) -> str:
        value = self.text(key, None)
        if value not in known:
            raise self.error(key, f"unknown value {value!r}; known are {', '.join(known)}")
        return known[value]

    def text(self, key: str, default: str | None) -> str:
        value = self._metadata.get(PREFIX + key, default)
        if value is None:
            raise self.error(key, "is missing", "the file has no tokenizer that we can use")
        if not isinstance(value, str):
            raise self.error(key, f"expected a string, got {type(value).__name__}")
        return value

    def flag(self, key: str) -> bool | None:
        value = self._metadata.get(PREFIX + key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, f"expected a boolean, got {type(value).__name__}")
        return value

    def token_id(self, name: str, n_vocab: int) -> int | None:
        key = f"{name}_token_id"
        value = self._metadata.get(PREFIX + key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(key, f"expected an integer, got {type(value).__name__}")
        if not 0 <= value < n_vocab:
            raise self.error(key, f"token {value} does not exist in a vocabulary of {n_vocab}")
        return value

    def _list(self, key: str, element: type) -> list[Any] | None:
        value = self._metadata.get(PREFIX + key)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)):
            raise self.error(key, f"expected a list, got {type(value).__name__}")
        wrong = set(map(type, value)) - {element}
        if wrong:
            names = ", ".join(sorted(kind.__name__ for kind in wrong))
            raise self.error(key, f"expected a list of {element.__name__}, got {names}")
        return list(value)

    def _list_per_token(self, key: str, element: type, n_vocab: int) -> list[Any] | None:
        values = self._list(key, element)
        if values is not None and len(values) != n_vocab:
            raise self.error(key, f"has {len(values)} entries for {n_vocab} tokens")
        return values

    def tokens(self) -> list[str]:
        tokens = self._list("tokens", str)
        if not tokens:
            raise self.error("tokens", "is missing" if tokens is None else "is empty")
        longest = max(map(len, tokens))
        if longest > _MAX_TOKEN_CHARS:
            raise self.error("tokens", f"a token of {longest} characters; at most {_MAX_TOKEN_CHARS} make sense")
        return tokens

    def types(self, tokens: Sequence[str]) -> list[int]:
        types = self._list_per_token("token_type", int, len(tokens))
        if types is None:
            return []
        wrong = set(types) - set(TokenType)
        if wrong:
            raise self.error("token_type", f"unknown type {min(wrong)}")
        for token, kind in enumerate(types):
            if kind == TokenType.BYTE and not _BYTE_TOKEN.fullmatch(tokens[token]):
                raise self.error("tokens", f"token {token} stands for a byte, but its text is {tokens[token][:20]!r}")
        return types

    def scores(self, n_vocab: int, *, required: bool) -> list[float]:
        scores = self._list_per_token("scores", float, n_vocab)
        if scores is None and required:
            raise self.error("scores", "is missing")
        if scores and not all(abs(score) <= _MAX_FLOAT for score in scores):
            raise self.error("scores", "contains a score that is not a finite number of 32 bits")
        return scores or []

    def merges(self) -> list[str]:
        merges = self._list("merges", str)
        if merges is None:
            raise self.error("merges", "is missing")
        return merges
