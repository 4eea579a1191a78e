"""Guesses at the tokens that come next: what followed when the sequence last said the same (prompt lookup decoding).

A guess costs little, because the decoder reads all weights once however few tokens it computes, and it changes nothing:
the sampler chooses each token as it would without, and what was guessed wrong is thrown away.

>>> drafts = Drafts([7, 8, 9, 4, 5, 6, 1], most=3, ends=frozenset())
>>> drafts.add(7), drafts.add(8)
(None, None)
>>> drafts.propose(100)
[9, 4, 5]
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phi4edge.expanded import Key

_FIRST = 3  # tokens of the first draft: with the token before it, as many as the AVX2 kernel takes at once
_SIZES = (3, 2)  # tokens that must be the same for a place to be found; the first size that is found counts
_NO_TOKEN = -1  # in the place of a row of an image or a sound


class Repeats:
    """A sequence, and where its last tokens came before.  Each token takes the same time, however long it is.

    A place that was found is followed as long as the sequence goes on as it did there: a later place where two or three
    tokens are the same is a worse guess than one where many are.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._n_text = 0  # tokens since the last row of an image or a sound
        self._at: int | None = None  # of the token that comes next, if it goes on as before
        # Tokens -> where the one after them is, when they came last.  The end of the sequence has none after it.
        self._after: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in _SIZES}

    def add(self, key: Key) -> None:
        if not isinstance(key, int):
            self._tokens.append(_NO_TOKEN)
            self._n_text, self._at = 0, None
            return
        for size, after in self._after.items():
            if self._n_text >= size:
                after[tuple(self._tokens[-size:])] = len(self._tokens)
        self._tokens.append(key)
        self._n_text += 1
        if self._at is not None and self._tokens[self._at] == key:
            self._at += 1
        else:
            self._at = next((at for size in _SIZES if (at := self._last(size)) is not None), None)

    def continuation(self, n_most: int) -> list[int]:
        """What came after the last tokens when they came before; it may run on into itself, but not into media."""
        found: list[int] = []
        n_known = len(self._tokens)
        if self._at is None:
            return found
        for i in range(self._at, self._at + n_most):
            token = self._tokens[i] if i < n_known else found[i - n_known]
            if token == _NO_TOKEN:
                break
            found.append(token)
        return found

    def _last(self, size: int) -> int | None:
        return self._after[size].get(tuple(self._tokens[-size:])) if self._n_text >= size else None


class Drafts:
    """Proposes drafts while an answer is written, as long as recent ones were right.

    Lengths are such that a draft and the token before it are 2, 4, 8 ... together: after one that was right to its end
    the next length, after one that was mostly wrong the length before.  When even single tokens were wrong, guesses are
    compared with what comes but not proposed, until one is right; that costs no computing.

    keys: of the prompt.  most: tokens of the longest draft; 0: none ever.  ends: tokens that no sequence goes on after.
    """

    def __init__(self, keys: Sequence[Key], most: int, ends: Collection[int]) -> None:
        self.n_proposed = 0
        self.n_right = 0  # of those that were proposed
        self._most = most
        self._ends = ends
        self._repeats = Repeats()
        self._new: list[Key] = list(keys) if most else []  # not yet in the repeats
        self._length = min(_FIRST, most)
        self._guess: list[int] = []
        self._proposed = False  # whether somebody computes the guess
        self._n_matched = 0  # tokens of the guess that came
        self._foreseen = False  # whether the last token came as proposed

    def add(self, token: int) -> None:
        """Tells the token that was chosen."""
        if not self._most:
            return
        self._new.append(token)
        matches = self._n_matched < len(self._guess) and self._guess[self._n_matched] == token
        self._n_matched += matches
        self._foreseen = matches and self._proposed
        self.n_right += self._foreseen
        if not self._foreseen:
            self._judge()

    def propose(self, room: int) -> list[int]:
        """Tokens that may follow the last one, at most ``room``; none while that one comes from a draft itself."""
        room = min(room, self._most)
        if room <= 0 or self._foreseen:
            return []
        for key in self._new:
            self._repeats.add(key)
        self._new.clear()
        guess = self._repeats.continuation(min(max(self._length, 1), room))
        end = next((i for i, token in enumerate(guess) if token in self._ends), len(guess))
        self._guess, self._n_matched, self._proposed = guess[:end], 0, self._length > 0
        if not self._proposed:
            return []
        self.n_proposed += end
        return self._guess

    def _judge(self) -> None:
        """Chooses the length of the next draft by how this one did."""
        n, n_right = len(self._guess), self._n_matched
        self._guess, self._n_matched = [], 0
        if n == 0:
            return
        if not self._proposed:
            self._length = n_right
        elif n_right == n:
            self._length = min(self._most, max(self._length, 2 * n + 1))
        elif n_right == 0 or n_right < n // 2:
            self._length = n // 2
