"""tokenizer.json to the vocabulary of a GGUF file, as llama.cpp's converter writes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from phi4edge.converters.checkpoint import Checkpoint
from phi4edge.errors import BundleError
from phi4edge.strict_json import read_bytes

# The split of the tokenizer: its regular expression -> tokenizer.ggml.pre.
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_WORD, _ENDING = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"{_WORD}[{_UPPER}]*[{_LOWER}]+{_ENDING}|{_WORD}[{_UPPER}]+[{_LOWER}]*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_OF_SPLIT = {O200K: "gpt-4o"}
_ROLES = ("bos", "eos", "unk", "pad")
_LARGEST_TEMPLATE = 1 << 20


@dataclass(frozen=True, slots=True)
class Vocabulary:
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    special_ids: dict[str, int]  # "bos" -> id
    add_bos: bool | None  # None: the checkpoint does not say
    template: str | None

    def write_to(self, writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for role, token in self.special_ids.items():
            getattr(writer, f"add_{role}_token_id")(token)
        if self.add_bos is not None:
            writer.add_add_bos_token(self.add_bos)
        if self.template is not None:
            writer.add_chat_template(self.template)


def read_vocabulary(checkpoint: Checkpoint, n_vocab: int) -> Vocabulary:
    """The byte-level BPE vocabulary of exactly n_vocab entries; ids without a token become [PAD<id>], type UNUSED."""
    reader = _Reader(checkpoint)
    tokens = [f"[PAD{token}]" for token in range(n_vocab)]
    types = [TokenType.UNUSED] * n_vocab
    for text, token in reader.ranks():
        if token >= n_vocab or types[token] != TokenType.UNUSED:
            raise reader.wrong("model.vocab", f"the id {token} of {text!r:.40} is taken, or not below {n_vocab}")
        tokens[token], types[token] = text, TokenType.NORMAL
    for text, token, is_special in reader.added():
        if token >= n_vocab or (types[token] != TokenType.UNUSED and tokens[token] != text):
            raise reader.wrong("added_tokens", f"the id {token} of {text!r:.40} is taken, or not below {n_vocab}")
        looks_special = text.startswith("<|") and text.endswith("|>")
        tokens[token] = text
        types[token] = TokenType.CONTROL if is_special or looks_special else TokenType.USER_DEFINED
    ids = {text: token for token, text in enumerate(tokens)}
    if len(ids) != n_vocab:
        raise reader.wrong("model.vocab", "a text stands for two ids")
    return Vocabulary(
        pre=reader.pre(),
        tokens=tokens,
        types=types,
        merges=reader.merges(ids),
        special_ids=reader.special_ids(ids),
        add_bos=reader.add_bos(),
        template=reader.template(),
    )


class _Reader:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self._path = str(checkpoint.directory / "tokenizer.json")
        self._checkpoint = checkpoint
        self._tokenizer = checkpoint.read_json("tokenizer.json")
        self._options = checkpoint.optional_json("tokenizer_config.json")
        model = self._tokenizer.get("model")
        if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback"):
            raise self.wrong("model", "is not byte-level BPE, which is all we can convert")
        self._model: dict[str, Any] = model

    def wrong(self, field: str, problem: str) -> BundleError:
        return BundleError(problem, path=self._path, field=field)

    def ranks(self) -> list[tuple[str, int]]:
        vocab = self._model.get("vocab")
        if not isinstance(vocab, dict) or not all(_is_id(token) for token in vocab.values()):
            raise self.wrong("model.vocab", "is not an object of token ids")
        return list(vocab.items())

    def added(self) -> list[tuple[str, int, bool]]:
        entries = self._tokenizer.get("added_tokens") or []
        if not isinstance(entries, list):
            raise self.wrong("added_tokens", "is not a list")
        found = []
        for entry in entries:
            text: Any = entry.get("content") if isinstance(entry, dict) else None
            token: Any = entry.get("id") if isinstance(entry, dict) else None
            if not isinstance(text, str) or not text or not _is_id(token):
                raise self.wrong("added_tokens", f"{entry!r:.80} has no text or no id")
            found.append((text, token, bool(entry.get("special"))))
        return found

    def pre(self) -> str:
        pretokenizer = self._tokenizer.get("pre_tokenizer") or {}
        steps = pretokenizer.get("pretokenizers", [pretokenizer]) if isinstance(pretokenizer, dict) else []
        splits = [step for step in steps if isinstance(step, dict) and step.get("type") == "Split"]
        pattern = splits[0].get("pattern") if len(splits) == 1 else None
        pre = _PRE_OF_SPLIT.get(str(pattern.get("Regex"))) if isinstance(pattern, dict) else None
        if pre is None or self._tokenizer.get("normalizer") is not None:
            raise self.wrong("pre_tokenizer", "does not split text as a tokenizer that we know")
        return pre

    def merges(self, ids: dict[str, int]) -> list[str]:
        entries = self._model.get("merges")
        if not isinstance(entries, list):
            raise self.wrong("model.merges", "is not a list")
        merges = []
        for entry in entries:
            pair = entry.split(" ") if isinstance(entry, str) else entry
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
                raise self.wrong("model.merges", f"{entry!r:.80} is not a pair")
            if any(text not in ids for text in (*pair, "".join(pair))):
                raise self.wrong("model.merges", f"{entry!r:.80} has a part or a result that is no token")
            merges.append(" ".join(pair))
        return merges

    def special_ids(self, ids: dict[str, int]) -> dict[str, int]:
        """By the texts of tokenizer_config.json, else by the ids of config.json, of which the first counts."""
        found = {}
        for role in _ROLES:
            text = self._options.get(f"{role}_token")
            text = text.get("content") if isinstance(text, dict) else text
            token = ids.get(text) if isinstance(text, str) else None
            if token is None:
                token = self._checkpoint.config.get(f"{role}_token_id")
                token = token[0] if isinstance(token, list) and token else token
            if token is None:
                continue
            if not _is_id(token) or token >= len(ids):
                raise self.wrong(f"{role}_token", f"{token!r:.40} is no id of the vocabulary")
            found[role] = token
        return found

    def add_bos(self) -> bool | None:
        value = self._options.get("add_bos_token")
        return value if isinstance(value, bool) else None

    def template(self) -> str | None:
        path: Path = self._checkpoint.directory / "chat_template.jinja"
        if path.exists():
            try:
                return read_bytes(path, at_most=_LARGEST_TEMPLATE).decode()
            except UnicodeDecodeError as error:
                raise BundleError(f"is not UTF-8 at byte {error.start}", path=str(path)) from error
        source = self._options.get("chat_template")
        if isinstance(source, list):  # several by name
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        return source if isinstance(source, str) else None


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
