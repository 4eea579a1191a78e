"""A prompt as the decoder takes it: tokens, and the embeddings of images and sounds between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from phi4edge.errors import InputError
from phi4edge.media import MediaInput

Progress = Callable[[int, int], bool | None]  # (done, total); False cancels
Key = int | tuple[bytes, int]  # a token, or a row of the embeddings with this digest


@dataclass(frozen=True, slots=True)
class Expanded:
    """A prompt as the decoder takes it: tokens and media in order."""

    pieces: tuple[list[int] | MediaInput, ...]
    keys: list[Key]  # of all positions: equal keys are equal inputs

    @property
    def media(self) -> list[MediaInput]:
        return [piece for piece in self.pieces if isinstance(piece, MediaInput)]

    def without_data(self) -> Expanded:
        """The same without what encoders take, which may be hundreds of megabytes."""
        pieces = (piece.without_data() if isinstance(piece, MediaInput) else piece for piece in self.pieces)
        return Expanded(tuple(pieces), self.keys)

    def n_tokens(self, kind: str) -> int:
        """Positions that images, or sounds, take."""
        return sum(item.n_tokens for item in self.media if item.kind == kind)


def expand(tokens: Sequence[int], placeholders: Mapping[int, str], items: Sequence[MediaInput]) -> Expanded:
    """Puts each item in the place of a token that stands for its kind.

    placeholders: token -> kind.  Raises InputError unless there are as many of the tokens as items, in the same order.
    """
    kinds = [placeholders[token] for token in tokens if token in placeholders]
    if kinds != [item.kind for item in items]:
        raise InputError(
            f"the prompt has {len(kinds)} tokens that stand for images and sounds, and there are {len(items)} of them",
            hint="give each image or sound as a part of a message",
        )
    pieces: list[list[int] | MediaInput] = []
    keys: list[Key] = []
    text: list[int] = []
    rest = iter(items)
    for token in tokens:
        if token not in placeholders:
            text.append(token)
            keys.append(token)
            continue
        if text:
            pieces.append(text)
            text = []
        item = next(rest)
        pieces.append(item)
        keys += [(item.digest, row) for row in range(item.n_tokens)]
    if text:
        pieces.append(text)
    return Expanded(tuple(pieces), keys)


def length(piece: list[int] | MediaInput) -> int:
    return piece.n_tokens if isinstance(piece, MediaInput) else len(piece)


class Steps:
    """One progress over the encoders of a prompt, and the decoder after them.

    n_kept: positions that the sequence has already; n_cached: those of them that are computed.
    """

    def __init__(self, progress: Progress | None, prompt: Expanded, n_kept: int, n_cached: int) -> None:
        self._progress = progress
        self._done = 0
        ends = itertools.accumulate(map(length, prompt.pieces))
        new = [piece for piece, end in zip(prompt.pieces, ends, strict=True) if end > n_kept]
        self._n_decoder = len(prompt.keys) - n_cached
        self._total = self._n_decoder + sum(piece.n_tokens for piece in new if isinstance(piece, MediaInput))

    def encoder(self, item: MediaInput) -> Progress | None:
        return self._next(item.n_tokens)

    def decoder(self) -> Progress | None:
        return self._next(self._n_decoder)

    def _next(self, n_steps: int) -> Progress | None:
        """For the next work, of so many steps, whatever it counts itself."""
        if self._progress is None:
            return None
        progress, begin = self._progress, self._done
        self._done += n_steps

        def tell(done: int, total: int) -> bool | None:
            return progress(begin + n_steps * done // max(total, 1), self._total)

        return tell
