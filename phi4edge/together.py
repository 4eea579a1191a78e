"""Several requests answered together: one step of the decoder computes a token of each, and reads the weights once.

>>> together = model.together(["Why is the sky blue?", {"prompt": "Name a fruit.", "seed": 3}])  # doctest: +SKIP
>>> for index, event in together:  # doctest: +SKIP
...     if isinstance(event, phi4edge.Generation):
...         print(index, event.text)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

from phi4edge.answer import Answer
from phi4edge.errors import Cancelled, InputError, OutOfMemoryError, Phi4EdgeError, UsageError
from phi4edge.generation import Generation, Piece
from phi4edge.session import Session, extend_together

Event = Piece | Generation | Phi4EdgeError
MOST_AT_ONCE = 128


@dataclass(frozen=True)
class Work:
    """What a model does for requests."""

    answer: Callable[..., Answer]  # of a prompt and its options; reads its images and sounds
    session: Callable[[], Session]  # a new one
    begin: Callable[[Session, object, Answer], Piece | None]  # computes the prompt, and takes the first token
    load_seconds: float


@dataclass
class _Running:
    index: int
    answer: Answer
    session: Session
    turn: object


class Together:
    """Requests of a model under way; made by ``Model.together``.  Iterating, which can be done once, answers them.

    Gives ``(index of the request, event)``: a Piece of its answer as it comes, and at its end, once for each request,
    the Generation or the error that ``Model.generate`` would have raised.  What happens to one leaves the others alone.
    Where there is no memory for another sequence, requests wait until one ends.
    """

    def __init__(self, requests: Iterable[Any], work: Work, at_once: int, defaults: Mapping[str, Any]) -> None:
        if isinstance(requests, str | bytes | Mapping) or not isinstance(requests, Iterable):
            raise UsageError(f"must be several prompts, got {type(requests).__name__}", field="requests")
        if isinstance(at_once, bool) or not isinstance(at_once, int) or not 1 <= at_once <= MOST_AT_ONCE:
            raise UsageError(f"must be an integer from 1 to {MOST_AT_ONCE}, got {at_once!r:.80}", field="at_once")
        self._requests = enumerate(requests)
        self._work = work
        self._at_once = at_once
        self._defaults = dict(defaults)
        self._running: list[_Running] = []
        self._waiting: tuple[int, Any] | None = None  # a request for which there was no memory
        self._is_full = False  # until a sequence ends
        self._lock = Lock()  # which session belongs to which request
        self._sessions: dict[int, Session] = {}  # of the requests that were begun, for cancel()
        self._idle: list[Session] = []
        self._cancelled: set[int] = set()
        self._all_cancelled = False
        self._events = self._run()

    def __iter__(self) -> Iterator[tuple[int, Event]]:
        return self._events

    def results(self) -> list[Generation | Phi4EdgeError]:
        """The last event of each request, in their order; Cancelled for those that ``cancel()`` kept from beginning."""
        done = {index: event for index, event in self if not isinstance(event, Piece)}
        done |= {index: Cancelled("the answer was stopped") for index, _ in self._requests}
        return [done[index] for index in sorted(done)]

    def cancel(self, index: int | None = None) -> None:
        """Ends one request, or all of them, from any thread: those under way end with the error Cancelled.

        A request that has not begun when all are ended is never read, and nothing is told about it.
        """
        with self._lock:  # or the session may have another request by now
            if index is None:
                self._all_cancelled = True
            else:
                self._cancelled.add(index)
            for begun, session in self._sessions.items():
                if index is None or begun == index:
                    session.cancel()

    def _run(self) -> Generator[tuple[int, Event], None, None]:
        more = True
        while more or self._running:
            while more and len(self._running) < self._at_once and not self._is_full:
                request = self._waiting or (None if self._all_cancelled else next(self._requests, None))
                self._waiting = None
                if request is None:
                    more = False
                else:
                    yield from self._begin(*request)
            yield from self._step()

    def _begin(self, index: int, request: Any) -> Iterator[tuple[int, Event]]:
        """Prompts are computed one by one: each is as much work as many steps."""
        session = None
        n_idle = len(self._idle)
        try:
            answer = self._work.answer(**self._defaults | _options(request))
            session = self._idle.pop() if self._idle else self._work.session()
            with self._lock:
                self._sessions[index] = session
                running = _Running(index, answer, session, session.begin())
            self._require(index)
            piece = self._work.begin(session, running.turn, answer)
        except OutOfMemoryError as error:
            self._forget(index, None)  # an idle session, when it was one, gives up its cache
            if n_idle > 0 or self._running:
                self._waiting = (index, request)
                self._is_full = n_idle == 0  # there is as much as those have that are running
            else:
                yield index, error
            return
        except Phi4EdgeError as error:
            self._forget(index, session)
            yield index, error
            return
        self._running.append(running)
        yield from self._tell(running, piece)

    def _step(self) -> Iterator[tuple[int, Event]]:
        """One more token of each."""
        for each in list(self._running):
            try:
                self._require(each.index)
                each.session.require(each.turn)
                each.session.reserve(len(each.session) + 1)
            except Phi4EdgeError as error:
                yield self._end(each, error)
        running = list(self._running)
        if not running:
            return
        started = time.perf_counter()
        try:
            rows = extend_together([each.session for each in running], [each.answer.tokens[-1:] for each in running])
        except Phi4EdgeError as error:
            if isinstance(error, Cancelled) and any(each.session.cancelled for each in running):
                return  # the others go on in the next step, without those
            for each in running:
                yield self._end(each, error)
            return
        seconds = time.perf_counter() - started
        for each, row in zip(running, rows, strict=True):
            started = time.perf_counter()
            try:
                piece = each.answer.next_piece(row[0])
            except Phi4EdgeError as error:
                yield self._end(each, error)
                continue
            each.answer.n_decoded += 1
            each.answer.decode_seconds += seconds + time.perf_counter() - started
            yield from self._tell(each, piece)

    def _require(self, index: int) -> None:
        if self._all_cancelled or index in self._cancelled:
            raise Cancelled("the answer was stopped")

    def _tell(self, running: _Running, piece: Piece | None) -> Iterator[tuple[int, Event]]:
        if piece is not None:
            yield running.index, piece
        if running.answer.finish_reason is not None:
            yield self._end(running, running.answer.result(self._work.load_seconds))

    def _end(self, running: _Running, event: Generation | Phi4EdgeError) -> tuple[int, Event]:
        self._running.remove(running)
        self._is_full = False
        self._forget(running.index, running.session)
        return running.index, event

    def _forget(self, index: int, session: Session | None) -> None:
        with self._lock:
            self._sessions.pop(index, None)
            self._cancelled.discard(index)
        if session is not None:
            self._idle.append(session)  # the next prompt may begin as this one did


def _options(request: Any) -> dict[str, Any]:
    """The parameters of ``generate`` in a request: a prompt, or an object with one and options."""
    if not isinstance(request, Mapping):
        return {"prompt": request}
    if "prompt" not in request:
        raise InputError("the request has none", field="prompt", hint="write {'prompt': ..., 'max_tokens': 64}")
    for name in request:
        if not isinstance(name, str):
            raise UsageError(f"an option must have a name, got {name!r:.80}")
    return dict(request)
