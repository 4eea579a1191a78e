"""Text to token ids and back, from the metadata of a GGUF file.

Text is replaced, never refused: a lone surrogate, which is no character, becomes U+FFFD before encoding, and bytes that
are not UTF-8 become U+FFFD in decoding.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from phi4edge.byte_bpe import ByteBpe, bytes_of
from phi4edge.errors import InputError
from phi4edge.pretokenizers import PRETOKENIZERS, SPACES, Pretokenizer
from phi4edge.sentencepiece_model import SPACE, SentencePieceModel
from phi4edge.vocabulary import TokenType, Vocabulary

_LEADING_SPACES = re.compile(rf"[{SPACES}]*")


class TextSegment(Protocol):
    """Text and whether special tokens in it count; ``prompt.Segment`` is one."""

    @property
    def text(self) -> str: ...
    @property
    def special(self) -> bool: ...


class Tokenizer:
    """A tokenizer: byte-level BPE through tiktoken, or sentencepiece.

    ::

        tokenizer = Tokenizer.from_metadata(metadata)
        tokenizer.decode(tokenizer.encode("hello world"))
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.kind = vocabulary.kind
        self.pre = vocabulary.pre
        self.n_vocab = len(vocabulary.tokens)
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.stop_ids = vocabulary.stop_ids
        self._tokens = vocabulary.tokens
        self._types = vocabulary.types
        self._strip_id: frozenset[int] = frozenset()
        self._space_prefix = vocabulary.add_space_prefix
        self._backend: ByteBpe | SentencePieceModel
        if self.kind == "bpe":
            pretokenizer = PRETOKENIZERS.get(self.pre)
            if pretokenizer is None:
                known = ", ".join(PRETOKENIZERS)
                raise vocabulary.error("pre", f"unknown pre-tokenizer {self.pre[:40]!r}; known are {known}")
            contents = bytes_of(vocabulary.tokens)
            self._backend = ByteBpe(vocabulary, pretokenizer, contents)
            self._strip_id = _rstrip_ids(vocabulary, pretokenizer)
            add_bos = pretokenizer.add_bos
        else:
            contents = [text.replace(SPACE, " ").encode("utf-8", "surrogateescape") for text in vocabulary.tokens]
            self._backend = SentencePieceModel(vocabulary)
            add_bos = True
        if vocabulary.add_bos is not None:
            add_bos = vocabulary.add_bos
        self.add_bos = add_bos and self.bos_id is not None
        self._bytes = _shown(vocabulary, contents)
        control = _of_type(vocabulary, TokenType.CONTROL)
        defined = _of_type(vocabulary, TokenType.USER_DEFINED)
        self.special_tokens: Mapping[str, int] = MappingProxyType(control)
        self.unused_ids = [token for token, kind in enumerate(self._types) if kind == TokenType.UNUSED]  # without text
        self._found_always = defined
        self._found = defined | control
        self._find_always = _finder(self._found_always)
        self._find = _finder(self._found)

    @property
    def is_fast(self) -> bool:
        """False for the rare vocabulary whose merges tiktoken cannot follow; it is exact, but slower to encode."""
        return not isinstance(self._backend, ByteBpe) or self._backend.is_merged_by_tiktoken

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], path: str = "") -> Tokenizer:
        """The tokenizer that the ``tokenizer.ggml.*`` keys describe; ``BundleError`` names the key that is wrong."""
        return cls(Vocabulary.from_metadata(metadata, path))

    def encode(self, text: str, *, special: bool = False, add_bos: bool | None = None) -> list[int]:
        """The ids of one text.

        special: control tokens written in the text become their ids; otherwise they are text like any other.
        add_bos: None means as the model wants it. A text that begins with that token does not get a second one.
        """
        return self._encode([(text, special)], add_bos)

    def encode_segments(self, segments: Iterable[TextSegment], *, add_bos: bool | None = None) -> list[int]:
        """The ids of a prompt in parts, as if it were one text: only parts marked special have special tokens."""
        return self._encode([(segment.text, segment.special) for segment in segments], add_bos)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of the ids, without control tokens unless special; what is not UTF-8 becomes U+FFFD."""
        data = b"".join(self.token_bytes(token, special=special) for token in ids)
        if self._space_prefix:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """What a token adds to the text: bytes that need not be whole characters, nothing for a control token."""
        self._check(token)
        if special and self._types[token] in (TokenType.CONTROL, TokenType.UNKNOWN):
            return self._tokens[token].encode("utf-8", "surrogateescape")
        return self._bytes[token]

    def token_text(self, token: int) -> str:
        """A token as the vocabulary writes it, for display."""
        self._check(token)
        return self._tokens[token].encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    def stream_decoder(self, *, continues: bool = False) -> StreamDecoder:
        """A decoder for tokens as they come; in total it gives the same text as ``decode``.

        continues: the tokens go on from a text, so that a space in front of the first one is kept.
        """
        return StreamDecoder(self, strip_space=self._space_prefix and not continues)

    def _check(self, token: int) -> None:
        if not 0 <= token < self.n_vocab:
            raise InputError(f"token {token} does not exist in a vocabulary of {self.n_vocab}")

    def _encode(self, parts: Iterable[tuple[str, bool]], add_bos: bool | None) -> list[int]:
        ids: list[int] = []
        for item in self._split(parts):
            if isinstance(item, int):
                ids.append(item)
                continue
            after_token = not ids or self._types[ids[-1]] in (TokenType.CONTROL, TokenType.USER_DEFINED)
            ids += self._backend.encode(" " + item if self._space_prefix and after_token else item)
        if self.bos_id is not None and (self.add_bos if add_bos is None else add_bos) and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def _split(self, parts: Iterable[tuple[str, bool]]) -> Iterable[str | int]:
        """Special tokens, and the text between them in as long pieces as possible."""
        plain: list[str] = []
        strip = False  # whitespace goes, up to the next text or token, even if that is in the next part
        for text, special in parts:
            text = _valid(text)
            find, tokens = (self._find, self._found) if special else (self._find_always, self._found_always)
            start = 0
            while start < len(text):
                if strip:
                    start = _LEADING_SPACES.match(text, start).end()  # type: ignore[union-attr]
                    strip = start == len(text)
                match = find.search(text, start) if find else None
                end = match.start() if match else len(text)
                if end > start:
                    plain.append(text[start:end])
                if match is None:
                    break
                if plain:
                    yield "".join(plain)
                    plain.clear()
                token = tokens[match.group()]
                yield token
                strip = special and token in self._strip_id
                start = match.end()
        if plain:
            yield "".join(plain)


class StreamDecoder:
    """Tokens to text, one at a time, holding back bytes until they are whole characters."""

    def __init__(self, tokenizer: Tokenizer, *, strip_space: bool) -> None:
        self._tokenizer = tokenizer
        self._strip_space = strip_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes, often none."""
        data = self._tokenizer.token_bytes(token)
        if data and self._strip_space:
            data = data.removeprefix(b" ")
            self._strip_space = False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """U+FFFD for a character that was begun and not finished; then the decoder can be used anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _valid(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _of_type(vocabulary: Vocabulary, kind: TokenType) -> dict[str, int]:
    wanted = int(kind)
    return {vocabulary.tokens[token]: token for token, found in enumerate(vocabulary.types) if found == wanted}


def _finder(tokens: Mapping[str, int]) -> re.Pattern[str] | None:
    """Finds the leftmost of the tokens, and of those the longest."""
    texts = sorted((text for text in tokens if text), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def _rstrip_ids(vocabulary: Vocabulary, pretokenizer: Pretokenizer) -> frozenset[int]:
    kinds = (TokenType.CONTROL, TokenType.USER_DEFINED)
    found = {
        text: vocabulary.ids[text]
        for text in pretokenizer.rstrip_after
        if text in vocabulary.ids and vocabulary.types[vocabulary.ids[text]] in kinds
    }
    return frozenset(found.values()) if pretokenizer.rstrip_if <= set(found) else frozenset()


def _shown(vocabulary: Vocabulary, contents: Sequence[bytes | None]) -> list[bytes]:
    """Per token what it shows in decoded text; ``contents``: its bytes, None if it is not written byte by byte."""
    shown = list(contents)
    for token, kind in enumerate(vocabulary.types):
        if kind == TokenType.NORMAL and contents[token] is not None:
            continue
        if kind in (TokenType.CONTROL, TokenType.UNUSED):
            shown[token] = b""
        elif kind == TokenType.BYTE:
            shown[token] = vocabulary.byte_of(token)
        elif kind == TokenType.UNKNOWN:
            shown[token] = "\ufffd".encode() if vocabulary.kind == "spm" else b""
        elif contents[token] is None or kind == TokenType.USER_DEFINED:
            shown[token] = vocabulary.tokens[token].encode("utf-8", "surrogateescape")
    return [content or b"" for content in shown]
