"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop string, and holds back what may yet become one.

    >>> stops = StopStrings(["END"])
    >>> stops.push("one E"), stops.push("ND two"), stops.found
    ('one ', '', True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain now; nothing any more once a stop string was found."""
        if self.found:
            return ""
        text = self._held + text
        positions = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if positions:
            self.found = True
            self._held = ""
            return text[: min(positions)]
        n_held = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return "" if self.found else held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of ``text`` that begins ``stop``."""
        return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
