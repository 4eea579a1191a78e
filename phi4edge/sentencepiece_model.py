"""A sentencepiece model from the lists of a GGUF file, and text to ids with it.

The model file of sentencepiece is a protocol buffer; the few fields needed are written here, which saves a dependency.
"""

from __future__ import annotations

import struct

import sentencepiece

from phi4edge.vocabulary import TokenType, Vocabulary

SPACE = "\u2581"  # how a space is written inside tokens

_BPE = 2  # TrainerSpec.model_type


class SentencePieceModel:
    """Text to ids, without special tokens and without a space put in front."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._unknown_id = vocabulary.unknown_id
        self._n_vocab = len(vocabulary.tokens)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_proto(vocabulary))
        except (RuntimeError, ValueError) as error:
            raise vocabulary.error("tokens", f"sentencepiece refuses the vocabulary: {error}") from error

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text, out_type=int)
        if self._n_vocab in ids:  # the stand-in for an unknown token that the vocabulary does not have
            unknown = [] if self._unknown_id is None else [self._unknown_id]
            return [known for token in ids for known in (unknown if token == self._n_vocab else [token])]
        return ids


def model_proto(vocabulary: Vocabulary) -> bytes:
    """The serialized ModelProto: one piece per token, with the same ids."""
    types = _piece_types(vocabulary)
    byte_fallback = TokenType.BYTE in types
    taken = set(vocabulary.tokens)
    seen: set[str] = set()
    pieces = []
    for token, text in enumerate(vocabulary.tokens):
        kind = types[token]
        # A token that can never match keeps its id. sentencepiece writes a warning about NUL beside byte tokens.
        if not text or text in seen or not _is_unicode(text) or (byte_fallback and text == "\0"):
            text, kind = _unused_name(token, taken), TokenType.CONTROL
        seen.add(text)
        pieces.append(_piece(text, vocabulary.scores[token], kind))
    if TokenType.UNKNOWN not in types:
        pieces.append(_piece(_unused_name(len(pieces), taken), 0.0, TokenType.UNKNOWN))
    trainer = _number(3, _BPE) + _number(35, byte_fallback)
    normalizer = _text(1, "identity") + _number(3, False) + _number(4, False) + _number(5, True)
    return b"".join(_bytes(1, piece) for piece in pieces) + _bytes(2, trainer) + _bytes(3, normalizer)


def _piece_types(vocabulary: Vocabulary) -> list[TokenType]:
    """The types as sentencepiece accepts them: one unknown piece, and all 256 bytes or none."""
    types = [TokenType(kind) for kind in vocabulary.types]
    bytes_present = {vocabulary.byte_of(token) for token, kind in enumerate(types) if kind == TokenType.BYTE}
    n_unknown = 0
    for token, kind in enumerate(types):
        n_unknown += kind == TokenType.UNKNOWN
        if kind == TokenType.UNDEFINED:
            types[token] = TokenType.NORMAL
        # User-defined tokens are found before sentencepiece sees the text.
        elif (
            kind == TokenType.USER_DEFINED
            or (kind == TokenType.BYTE and len(bytes_present) < 256)
            or (kind == TokenType.UNKNOWN and n_unknown > 1)
        ):
            types[token] = TokenType.CONTROL
    return types


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _unused_name(token: int, taken: set[str]) -> str:
    name = f"<unused {token}>"
    while name in taken:
        name = f"<{name}>"
    taken.add(name)
    return name


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())


def _piece(text: str, score: float, kind: TokenType) -> bytes:
    return _text(1, text) + _varint(2 << 3 | 5) + struct.pack("<f", score) + _number(3, kind)
