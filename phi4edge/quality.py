"""How much of what a model knows is left: questions answered exactly, and how far its choices moved.

>>> exact = {}  # filled by the first model, and compared with by the others
>>> total(measure(model, read_items("heldout.json"), exact)).n_right  # doctest: +SKIP
503

The right answer is given to the model, which tells at each of its tokens what it would have said there.  Where the
likeliest token is the right one every time, and one that ends the answer comes last, greedy decoding would have written
exactly this; where it is another one, something else.  So one pass gives both whether an answer is right, and the
divergence.  Only where that other token may begin the same text, cut in another way, is an answer really generated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from phi4edge.adapters import NO_ADAPTER
from phi4edge.errors import FileError, InputError, UnsupportedError
from phi4edge.quality_items import Item, families, require_adapters

if TYPE_CHECKING:
    from phi4edge.model import Model
    from phi4edge.session import Session

Float32 = npt.NDArray[np.float32]
Exact = MutableMapping[Item, Float32]  # logits [n_positions, vocab] of what others are compared with
Progress = Callable[[], None]  # one more item is done


@dataclass(frozen=True, slots=True)
class Measured:
    """What a model made of one item."""

    item: Item
    is_right: bool
    n_positions: int  # tokens of the answer, and the one that ends it
    divergence: float  # sum over them of KL(exact || this model), in nats


@dataclass(frozen=True, slots=True)
class Score:
    """The same of several items."""

    n: int
    n_right: int
    n_positions: int
    divergence: float  # mean over all positions, in nats


def measure(
    model: Model, items: Sequence[Item], exact: Exact, *, adapter: str | None = None, progress: Progress = lambda: None
) -> list[Measured]:
    """What the model makes of each item, in the order of their families.

    exact: gets what this model says for items that are not in it; others are compared with what is there.
    adapter: for all items, a name or "none"; None is for each its own one.

    Raises InputError, FileError and UnsupportedError, which name the item; those of a model that cannot be used.
    """
    if model.adapters:  # else one may be merged
        require_adapters(items, model.adapters)
    measured = []
    for family in families(items):
        session = model.session()  # its questions begin alike, which is computed once
        for item in items:
            if item.family == family:
                measured.append(_measured(model, item, exact, adapter, session))
                progress()
    return measured


def _measured(model: Model, item: Item, exact: Exact, adapter: str | None, session: Session) -> Measured:
    if adapter is None and model.adapters:
        adapter = (
            item.adapter or NO_ADAPTER
        )  # in a bundle that has none to choose from, its router knows what is merged
    with _errors_of(item):
        logits = answer_logits(model, item, adapter=adapter, session=session)
        right = _is_right(model, item, logits, adapter=adapter, session=session)
    reference = exact.setdefault(item, logits)
    return Measured(item, right, len(logits), float(divergences(reference, logits).sum()))


def answer_logits(model: Model, item: Item, *, adapter: str | None, session: Session) -> Float32:
    """Logits of each token of the right answer, and of the one that ends it: float32 [n_positions, vocab]."""
    first = model.next_logits(item.messages, adapter=adapter, session=session)
    return np.concatenate([first[np.newaxis], session.extend(_answer(model, item), logits="all")])


def _is_right(model: Model, item: Item, logits: Float32, **options: Any) -> bool:
    """Whether greedy decoding writes exactly the right answer and ends there.

    logits: of :func:`answer_logits`.  options: the same as there.
    """
    allowed = logits.copy()
    allowed[:, [*model.tokenizer.unused_ids, *model.placeholder_ids]] = -np.inf  # as in an answer
    answer, choices = _answer(model, item), allowed.argmax(-1).tolist()
    n_same = next((i for i, token in enumerate(answer) if choices[i] != token), len(answer))
    if n_same == len(answer):
        return choices[-1] in model.tokenizer.stop_ids
    written = _text(model, choices[: n_same + 1]).rstrip("\ufffd")  # a character may have come in part
    if not item.expected.startswith(written):
        return False
    n_most = len(item.expected.encode()) + 1
    other = model.generate(item.messages, max_tokens=n_most, **options)
    return other.finish_reason == "stop" and _text(model, other.tokens) == item.expected


def _text(model: Model, tokens: Sequence[int]) -> str:
    return model.tokenizer.decode(tokens, special=True)


def n_positions(model: Model, items: Sequence[Item]) -> int:
    """Rows of logits of all answers."""
    return sum(len(_answer(model, item)) + 1 for item in items)


def total(measured: Sequence[Measured]) -> Score:
    n_positions = sum(each.n_positions for each in measured)
    divergence = sum(each.divergence for each in measured) / max(1, n_positions)
    return Score(len(measured), sum(each.is_right for each in measured), n_positions, divergence)


def divergences(exact: Float32, logits: Float32) -> npt.NDArray[np.float64]:
    """KL(exact || other) of each row of logits, float32 [n, vocab], in nats: float64 [n]."""
    theirs, ours = _log_probabilities(exact), _log_probabilities(logits)
    found: npt.NDArray[np.float64] = (np.exp(theirs) * (theirs - ours)).sum(-1)
    return found


def _log_probabilities(logits: Float32) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    rows: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return rows


def _answer(model: Model, item: Item) -> list[int]:
    return model.tokenizer.encode(item.expected, special=True)


@contextmanager
def _errors_of(item: Item) -> Iterator[None]:
    """An error of a prompt, or of a picture or a sound in it, says which item it is."""
    try:
        yield
    except (InputError, FileError, UnsupportedError) as error:
        raise type(error)(str(error), path=item.path, field=item.field) from error
