"""One sequence of a model: what it has, what of that is computed already, and room for more.

>>> session = model.session()  # doctest: +SKIP
>>> session.extend(model.tokenizer.encode("The sky is")).shape  # doctest: +SKIP
(1, 200064)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from phi4edge.errors import Cancelled, InputError, OutOfMemoryError, UsageError
from phi4edge.expanded import Key

if TYPE_CHECKING:
    from phi4edge import _core

Progress = Callable[[int, int], bool | None]  # (tokens done, in all); False cancels


@dataclass(frozen=True)
class Growth:
    """How far the KV cache of a sequence may grow."""

    n_most: int  # tokens
    bytes_per_token: int
    available: Callable[[], int]  # bytes of memory that can still be taken

    def require_memory(self, n_tokens: int) -> None:
        """OutOfMemoryError when a KV cache of so many tokens does not fit."""
        needed, available = n_tokens * self.bytes_per_token, self.available()
        if needed > available:
            raise OutOfMemoryError(
                f"the KV cache of {n_tokens} tokens needs {needed >> 20} MiB of memory, but {available >> 20} MiB are "
                "available",
                hint="shorten the conversation, or store keys and values in fewer bits (kv_type)",
            )


class StepTotal(NamedTuple):
    """What one step of all forward passes took, and had to do."""

    seconds: float  # mean of the threads
    n_bytes: int  # read of weights, or of keys and values
    operations: int  # of matrix products; multiplying and adding are two


class Session:
    """One sequence of tokens and embeddings, and its KV cache.  Sessions of a model share its weights."""

    def __init__(self, core: _core.Session, model: _core.Model, growth: Growth) -> None:
        self._core = core
        self._keys: list[Key] = []
        self._ahead: deque[tuple[int, npt.NDArray[np.float32]]] = deque()  # a draft: tokens, and the logits after each
        self._growth = growth
        self.model = model
        self._original_context: int = model.config.rope.original_context  # 0: no LongRoPE
        self.turn = object()  # the answer that owns the sequence
        self.cancelled = False  # of the answer that owns it

    @property
    def tokens(self) -> tuple[int, ...]:
        """What the sequence has; -1 for each embedding of an image or a sound."""
        return tuple(key if isinstance(key, int) else -1 for key in self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def extend(
        self, tokens: Sequence[int], logits: str = "last", progress: Progress | None = None
    ) -> npt.NDArray[np.float32]:
        """Appends tokens; float32 [0, 1 or n, vocab] for logits ``"none"``, ``"last"`` or ``"all"``.

        Raises InputError when they do not fit or do not exist, Cancelled; then nothing has changed.
        """
        ids = self._prepared(token_ids(tokens))
        rows = self._core.extend(np.array(ids, dtype=np.int32), logits, progress)
        self._keys += ids
        return rows

    def extend_embeddings(
        self,
        embeddings: npt.NDArray[np.float32],
        keys: Sequence[Key],
        logits: str = "last",
        progress: Progress | None = None,
    ) -> npt.NDArray[np.float32]:
        """Appends rows, float32 [n, hidden], in place of tokens; ``keys`` say what each row is.  As :meth:`extend`."""
        self._prepared(keys, n_rows=len(embeddings))
        rows = self._core.extend_embeddings(embeddings, logits, progress)
        self._keys += keys
        return rows

    def step(self, token: int, draft: Sequence[int] = (), progress: Progress | None = None) -> npt.NDArray[np.float32]:
        """Appends one token; the logits after it, float32 [vocab].  Raises what :meth:`extend` raises.

        draft: tokens that may come after it, computed along with it.  They are no part of the sequence, but the next
        steps take what was computed as long as they have the same tokens.
        """
        if self._ahead and self._ahead[0][0] == token:
            known, row = self._ahead[0]
            self._keys.append(known)
            self._ahead.popleft()
            return row
        ids = self._prepared(token_ids([token, *draft]))
        rows = self._core.extend(np.array(ids, dtype=np.int32), "all" if draft else "last", progress)
        self._keys.append(ids[0])
        self._ahead.extend(zip(ids[1:], rows[1:], strict=True))
        first: npt.NDArray[np.float32] = rows[0]
        return first

    def draft_room(self) -> int:
        """Tokens that a draft of the next :meth:`step` may have without more cost than its own.

        It must not make the cache grow, nor the whole sequence be computed again (see LongRoPE).
        """
        n_next = len(self._keys) + 1
        n_most = self._core.n_context
        if self.computes_all_again():
            return 0
        if n_next <= self._original_context:
            n_most = min(n_most, self._original_context)
        return max(0, n_most - n_next)

    def forget_draft(self) -> None:
        """Gives the memory of a draft back."""
        self._ahead.clear()

    def append(self, tokens: Sequence[int]) -> None:
        """Appends tokens which the next extension computes together with its own.  Raises InputError."""
        ids = self._prepared(token_ids(tokens))
        self._core.append(np.array(ids, dtype=np.int32))
        self._keys += ids

    def append_embeddings(self, embeddings: npt.NDArray[np.float32], keys: Sequence[Key]) -> None:
        """The same with rows, float32 [n, hidden]; ``keys`` say what each row is."""
        self._prepared(keys, n_rows=len(embeddings))
        self._core.append_embeddings(embeddings)
        self._keys += keys

    def _prepared(self, keys: Sequence[Any], n_rows: int | None = None) -> Sequence[Any]:
        """Makes the sequence ready for these."""
        if n_rows is not None and n_rows != len(keys):
            raise InputError(f"{n_rows} rows have {len(keys)} keys", field="keys")
        self.forget_draft()
        self._core.truncate(len(self._keys))  # a draft, or an interrupt that came between a call and its keys
        self.reserve(len(self._keys) + len(keys))
        return keys

    def reserve(self, n_tokens: int) -> None:
        """Room for so many tokens in all, or for as many as the context may have.

        Raises OutOfMemoryError before anything is allocated, and leaves the sequence as it is.
        """
        n_context, n_most = self._core.n_context, self._growth.n_most
        n_tokens = min(n_tokens, n_most)
        if n_tokens <= n_context:
            return
        self._growth.require_memory(n_tokens)
        try:
            # A larger step than was asked for saves copies later.  What is not used of it takes no memory.
            self._core.grow(min(n_most, max(n_tokens, 2 * n_context)))
        except OutOfMemoryError:  # where memory that is not used counts too
            self._core.grow(n_tokens)

    def reuse(self, keys: Sequence[Key]) -> int:
        """Keeps the longest common prefix with ``keys`` but leaves one of them to compute.

        Returns how many of the kept ones need no computing: not those that were only appended, and none when RoPE
        factors change on the way.
        """
        limit = min(len(self._keys), len(keys) - 1)
        n_common = next((i for i in range(limit) if self._keys[i] != keys[i]), max(limit, 0))
        self.truncate(n_common)
        return self._core.n_reusable(len(keys))

    def truncate(self, n_tokens: int) -> None:
        if not 0 <= n_tokens <= len(self._keys):
            raise InputError(f"cannot keep {n_tokens} of {len(self._keys)} tokens")
        self.forget_draft()
        del self._keys[n_tokens:]
        self._core.truncate(n_tokens)

    def computes_all_again(self) -> bool:
        """Whether one more token makes the whole sequence be computed again (see LongRoPE)."""
        return bool(self._keys) and self._core.n_reusable(len(self._keys) + 1) == 0

    def clear(self) -> None:
        self.truncate(0)

    def collect_profile(self, enabled: bool) -> None:
        """Starts to measure where the time of ``extend`` goes, from zero; or stops, and forgets what was measured."""
        self._core.collect_profile(enabled)

    def profile(self) -> dict[str, StepTotal]:
        """Steps by name, in the order of a forward pass; empty while none are collected."""
        return {name: StepTotal(*total) for name, total in self._core.profile().items()}

    def use(self, adapter: _core.Adapter | None, scale: float = 1.0) -> None:
        """The adapter for the whole sequence, from the next ``extend`` on, which computes again what was without it."""
        self.forget_draft()
        self._core.set_adapter(adapter, scale)

    def cancel(self) -> None:
        """Ends the ``extend`` that runs in another thread, or the answer that is written there: it raises Cancelled."""
        self.cancelled = True
        self._core.cancel()

    def begin(self) -> object:
        """Makes a new answer the owner of the sequence, and returns what :meth:`require` asks for."""
        self.cancelled = False
        self.turn = object()
        return self.turn

    def require(self, turn: object) -> None:
        """UsageError when the sequence belongs to another answer by now, Cancelled after :meth:`cancel`."""
        if self.turn is not turn:
            raise UsageError(
                "another answer of this model was started meanwhile", hint="finish one first, or use session()"
            )
        if self.cancelled:
            raise Cancelled("the answer was stopped")


def extend_together(
    sessions: Sequence[Session],
    tokens: Sequence[Sequence[int]],
    logits: str = "last",
    progress: Progress | None = None,
) -> list[npt.NDArray[np.float32]]:
    """As :meth:`Session.extend` of each, with the same logits, in the time of reading the weights once.

    For sessions of one model, with any adapters.  Raises what ``extend`` raises, and Cancelled when any of them was
    cancelled; then none of them has changed.
    """
    from phi4edge import _core

    if len(sessions) != len(tokens):
        raise InputError(f"{len(sessions)} sessions have tokens for {len(tokens)}", field="tokens")
    ids = [session._prepared(token_ids(each)) for session, each in zip(sessions, tokens, strict=True)]
    cores = [session._core for session in sessions]
    rows = _core.extend_together(cores, [np.array(each, dtype=np.int32) for each in ids], logits, progress)
    for session, each in zip(sessions, ids, strict=True):
        session._keys += each
    return rows


def token_ids(tokens: Sequence[int]) -> list[int]:
    """Token ids as plain integers; InputError names the one that is none, or that no vocabulary can have."""
    ids = []
    for i, token in enumerate(tokens):
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise InputError(f"must be a token id, got {type(token).__name__}", field=f"prompt[{i}]")
        if not -(2**31) <= token < 2**31:
            raise InputError(f"{token} is no token id", field=f"prompt[{i}]")
        ids.append(int(token))
    return ids
