"""Byte-level byte-pair encoding with the merges of a GGUF file: exact, and at the speed of tiktoken.

GGUF lists merges as pairs of tokens, in the order in which they apply. tiktoken knows no pairs: it joins any two
neighbours whose bytes together are a token, the token of lowest rank first. Both give the same ids if, for every token,
the merges applied to its bytes alone lead to that token, and its rank is the place of the last of those merges.
(Inside a longer text, the bytes between two ends that no merge has crossed go through the same steps as alone; so the
two neighbours are always the listed ones.) ``merge_ranks`` checks that while loading; tokens that merges cannot reach
are kept away from tiktoken, and a vocabulary for which nothing can be proved is encoded by ``_merge``, merge by merge.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import regex  # type: ignore[import-untyped]
import tiktoken

from phi4edge.pretokenizers import Pretokenizer
from phi4edge.vocabulary import TokenType, Vocabulary

Ints = npt.NDArray[np.int64]

_UNREACHABLE = 1 << 60  # more than twice any rank, less than half of what fits
_CACHED_PIECE_BYTES = 64
_CACHED_PIECES = 1 << 16


def _byte_chars() -> list[str]:
    """The printable character that stands for each byte in the vocabulary."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    chars = {byte: chr(byte) for byte in shown}
    for byte in range(256):
        chars.setdefault(byte, chr(256 + byte - len([other for other in shown if other < byte])))
    return [chars[byte] for byte in range(256)]


BYTE_CHARS = _byte_chars()
_NO_BYTE = 256
_BYTE_OF = np.full(1024, _NO_BYTE, np.uint16)  # by code point
_BYTE_OF[[ord(char) for char in BYTE_CHARS]] = range(256)


def bytes_of(tokens: Sequence[str]) -> list[bytes | None]:
    """The bytes that tokens of a byte-level vocabulary stand for; None for one that is not written in that way."""
    codes = np.frombuffer("".join(tokens).encode("utf-32-le", "surrogatepass"), np.uint32)
    values = _BYTE_OF[np.minimum(codes, len(_BYTE_OF) - 1)]
    data = values.astype(np.uint8).tobytes()
    ends = np.cumsum(np.fromiter(map(len, tokens), np.int64, len(tokens)))
    stops = ends.tolist()
    contents: list[bytes | None] = [data[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]
    for token in np.searchsorted(ends, np.flatnonzero(values == _NO_BYTE), side="right").tolist():
        contents[token] = None
    return contents


class ByteBpe:
    """Text to ids, without special tokens."""

    def __init__(self, vocabulary: Vocabulary, pretokenizer: Pretokenizer, contents: Sequence[bytes | None]) -> None:
        """``contents``: per token its bytes, None for tokens that are not made of bytes."""
        self._pretokenizer = pretokenizer
        self._byte_ids = [vocabulary.ids.get(char, -1) for char in BYTE_CHARS]
        self._missing = bytes(byte for byte, token in enumerate(self._byte_ids) if token < 0)
        self._merges = _read_merges(vocabulary)
        self._whole: dict[bytes, int] = {}
        if pretokenizer.ignore_merges:
            is_piece = [kind in (TokenType.NORMAL, TokenType.UNDEFINED) for kind in vocabulary.types]
            self._whole = {piece: token for token, piece in enumerate(contents) if piece and is_piece[token]}
        self._cache: dict[bytes, list[int]] = {}
        self._encoding: tiktoken.Encoding | None = None
        self._ids: list[int] = []  # of the ranks that tiktoken uses

        lengths = np.fromiter(map(len, vocabulary.tokens), np.int64, len(vocabulary.tokens))
        ranks = merge_ranks(lengths, [token for token in self._byte_ids if token >= 0], self._merges)
        extra = None if ranks is None else self._only_whole(ranks)
        if ranks is not None and extra is not None:
            reachable = np.flatnonzero(ranks < _UNREACHABLE)
            self._ids = reachable[np.argsort(ranks[reachable], kind="stable")].tolist() + extra
        if self._ids:
            self._encoding = tiktoken.Encoding(
                pretokenizer.name,
                pat_str=pretokenizer.pattern,
                mergeable_ranks={contents[token] or b"": rank for rank, token in enumerate(self._ids)},
                special_tokens={},
            )

    @property
    def is_merged_by_tiktoken(self) -> bool:
        """False for the rare vocabulary whose merges tiktoken cannot follow; encoding it is exact, but slower."""
        return self._encoding is not None

    def encode(self, text: str) -> list[int]:
        """The ids of valid Unicode text; bytes that the vocabulary does not have are left out."""
        if self._encoding is None or self._lacks_bytes_of(text):
            return self._encode_by_pieces(text)
        ranks: list[int] = []
        start = 0
        for end in [*self._pretokenizer.safe_cuts(text), len(text)]:
            ranks += self._encoding.encode_ordinary(text[start:end] if start or end < len(text) else text)
            start = end
        ids = self._ids
        return [ids[rank] for rank in ranks]

    def _lacks_bytes_of(self, text: str) -> bool:
        if not self._missing:
            return False
        data = text.encode()
        return len(data.translate(None, self._missing)) < len(data)

    def _only_whole(self, ranks: Ints) -> list[int] | None:
        """Tokens that text becomes only as a whole piece, or None if tiktoken would find them inside pieces too."""
        unreachable = set(np.flatnonzero(ranks == _UNREACHABLE).tolist())
        pieces = {piece: token for piece, token in self._whole.items() if token in unreachable}
        if any(len(self._merge(piece)) <= 2 for piece in pieces):  # tiktoken would join these two, though no merge does
            return None
        return list(pieces.values())

    def _encode_by_pieces(self, text: str) -> list[int]:
        ids: list[int] = []
        for match in regex.finditer(self._pretokenizer.pattern, text):
            piece = match.group().encode()
            known = self._cache.get(piece)
            if known is None:
                whole = self._whole.get(piece)
                known = self._merge(piece) if whole is None else [whole]
                if len(piece) <= _CACHED_PIECE_BYTES and len(self._cache) < _CACHED_PIECES:
                    self._cache[piece] = known
            ids += known
        return ids

    @cached_property
    def _merge_table(self) -> dict[tuple[int, int], tuple[int, int]]:
        """(left, right) -> (rank, joined)"""
        left, right, joined = self._merges.T.tolist()
        table: dict[tuple[int, int], tuple[int, int]] = {}
        for rank, pair in enumerate(zip(left, right, strict=True)):
            table.setdefault(pair, (rank, joined[rank]))
        return table

    def _merge(self, piece: bytes) -> list[int]:
        """The listed merges, lowest rank first and from the left, in n log n."""
        symbols = [token for token in (self._byte_ids[byte] for byte in piece) if token >= 0]
        table = self._merge_table
        following = [*range(1, len(symbols)), -1] if symbols else []
        previous = [*range(-1, len(symbols) - 1)]
        queue: list[tuple[int, int, int, int, int]] = []  # rank, position, left, right, joined

        def consider(at: int) -> None:
            if at >= 0 and (after := following[at]) >= 0:
                found = table.get((symbols[at], symbols[after]))
                if found is not None:
                    heapq.heappush(queue, (found[0], at, symbols[at], symbols[after], found[1]))

        for at in range(len(symbols)):
            consider(at)
        while queue:
            _, at, left, right, joined = heapq.heappop(queue)
            after = following[at]
            if symbols[at] != left or after < 0 or symbols[after] != right:
                continue  # one of the two has been merged since
            symbols[at], symbols[after] = joined, -1
            following[at] = following[after]
            if following[at] >= 0:
                previous[following[at]] = at
            consider(previous[at])
            consider(at)
        return [token for token in symbols if token >= 0]


def _read_merges(vocabulary: Vocabulary) -> Ints:
    """[n_merges, 3]: the ids of left, right and joined token."""
    ids = vocabulary.ids
    malformed = [merge for merge in vocabulary.merges if merge.count(" ") != 1]
    if malformed:
        raise vocabulary.error("merges", f"{malformed[0][:40]!r} is not two tokens with a space between them")
    if not vocabulary.merges:
        return np.zeros((0, 3), np.int64)
    parts = " ".join(vocabulary.merges).split(" ")
    left, right = parts[::2], parts[1::2]
    found = [[ids.get(text, -1) for text in texts] for texts in (left, right, map(operator.add, left, right))]
    merges: Ints = np.array(found, np.int64).T
    unknown = np.flatnonzero((merges < 0).any(axis=1))
    if len(unknown):
        first = int(unknown[0])
        raise vocabulary.error("merges", f"merge {first}, {vocabulary.merges[first][:40]!r}, names an unknown token")
    return merges


def merge_ranks(lengths: Ints, byte_ids: Sequence[int], merges: Ints) -> Ints | None:
    """Per token the place of the merge that forms it from its bytes alone, -1 for bytes.

    ``lengths``: bytes per token. Tokens that merges do not reach get a rank above ``2**59``. None if the merges are not
    in an order in which a token comes before the merges that use it, so that the reasoning of this file does not hold.
    """
    tree = _Tree(len(lengths), byte_ids, merges)
    joined_lengths = lengths[merges[:, 2]]
    by_length = np.argsort(joined_lengths, kind="stable")
    for rows in np.split(by_length, np.flatnonzero(np.diff(joined_lengths[by_length])) + 1):
        left, right, _ = merges[rows].T
        rows = rows[np.maximum(tree.ranks[left], tree.ranks[right]) < _UNREACHABLE]
        rows = rows[tree.stay_apart(rows)]
        left, right, joined = merges[rows].T
        in_order = np.maximum(tree.ranks[left], tree.ranks[right]) < rows
        tree.ranks[joined], tree.left[joined], tree.right[joined] = rows, left, right
        if not in_order.all() or (tree.ranks[joined] != rows).any():  # or two ways to one token
            return None
    return tree.ranks


class _Tree:
    """How each token is merged from two others, as far as known."""

    def __init__(self, n_tokens: int, byte_ids: Sequence[int], merges: Ints) -> None:
        self.ranks = np.full(n_tokens, _UNREACHABLE, np.int64)
        self.ranks[np.array(byte_ids, np.int64)] = -1
        self.left = np.arange(n_tokens)
        self.right = np.arange(n_tokens)
        self._n_tokens = n_tokens
        self._merges = merges
        self._pairs, self._pair_ranks = np.unique(merges[:, 0] * n_tokens + merges[:, 1], return_index=True)

    def _rank_of_pair(self, left: Ints, right: Ints) -> Ints:
        wanted = left * self._n_tokens + right
        at = np.minimum(np.searchsorted(self._pairs, wanted), len(self._pairs) - 1)
        found: Ints = np.where(self._pairs[at] == wanted, self._pair_ranks[at], _UNREACHABLE)
        return found

    def stay_apart(self, rows: Ints) -> npt.NDArray[np.bool_]:
        """Per merge: do its two tokens form before any other merge crosses the border between them?

        Walks back in time: of the two tokens at the border, the younger one is taken apart again, until both are
        bytes. A merge of the two that ranks before the one that ended their time side by side would have crossed.
        """
        result = np.ones(len(rows), np.bool_)
        at = np.arange(len(rows))
        left, right = self._merges[rows, 0], self._merges[rows, 1]
        until = 2 * rows  # ranks are doubled, for ties between the same merge on both sides
        while len(at):
            crossed = 2 * self._rank_of_pair(left, right) < until
            result[at[crossed]] = False
            age_left, age_right = self.ranks[left], self.ranks[right]
            going = ~crossed & (np.maximum(age_left, age_right) >= 0)
            at, left, right = at[going], left[going], right[going]
            age_left, age_right = age_left[going], age_right[going]
            # Of equal merges the left one is done first: so the right one is undone first, and ends before a tie.
            undo_left = age_left > age_right
            until = np.where(undo_left, 2 * age_left, 2 * age_right + 1)
            left, right = np.where(undo_left, self.right[left], left), np.where(undo_left, right, self.left[right])
        return result
