"""Stop strings in pieces of text, against the same search in the whole text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from phi4edge.stops import StopStrings

LETTERS = st.text("ab", max_size=12)


def cut(text: str, stops: list[str]) -> str:
    """The text before the first stop string to be complete, of those the one that begins first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@settings(derandomize=True, max_examples=500)
@given(st.lists(LETTERS, max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_letter_by_letter_gives_the_text_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    finder = StopStrings(stops)
    given_out = "".join(finder.push(letter) for letter in text) + finder.flush()
    assert given_out == cut(text, stops)
    assert finder.found == any(stop in text for stop in stops)


@settings(derandomize=True, max_examples=500)
@given(st.lists(LETTERS, max_size=8), st.text("ab", min_size=1, max_size=4))
def test_any_pieces_give_the_text_before_the_stop(pieces: list[str], stop: str) -> None:
    finder = StopStrings([stop])
    assert "".join(map(finder.push, pieces)) + finder.flush() == "".join(pieces).split(stop)[0]


def test_text_that_cannot_become_a_stop_is_given_at_once() -> None:
    finder = StopStrings(["\n\n"])
    assert finder.push("one\n") == "one"
    assert finder.push("two") == "\ntwo"
