"""Which of a command's words is the model, where it may be left out.

A word that can be the name of a model is never taken for a question: whoever mistypes a model gets an error, not an
answer of the embedded one.
"""

from __future__ import annotations

import os
import re
import shlex

from phi4edge.embedded import NAME
from phi4edge.errors import FileError, UsageError

_SEPARATORS = re.escape(os.sep + "/")
_PLACE = re.compile(rf"(~|\.{{0,2}})[{_SEPARATORS}]")  # begins with a directory; spaces may follow
_ONE_WORD = re.compile(rf"[\w.~:{_SEPARATORS}-]*[\w{_SEPARATORS}-]")  # "Summarize." ends as no name does
_SUFFIX = ".gguf"


def model_and_prompt(first: str | None, second: str | None) -> tuple[str | None, str | None]:
    """The words of ``run [MODEL] [PROMPT]``; None is what was left out.

    Raises FileError for a single word that could only be a model, and is not there.
    """
    if first is None or second is not None:
        return first, second
    if os.path.lexists(first) or first == NAME:
        return first, None
    if first == "-" or not _is_name(first):
        return None, first
    raise FileError("cannot open: No such file or directory", path=first, hint=_hint(first))


def model_and_file(first: str | None, second: str | None) -> tuple[str | None, str]:
    """The words of ``transcribe [MODEL] FILE``.  UsageError when the file was left out."""
    model, file = (first, second) if second is not None or first is None or _is_model(first) else (None, first)
    if not file:
        raise UsageError("Missing argument 'FILE'", hint="try 'phi4edge transcribe --help'")
    return model, file


def _is_model(word: str) -> bool:
    """Whether a word is no recording, but a model: a directory, a name of one, or the embedded one's."""
    is_directory = os.path.isdir(word)  # noqa: PTH112 - any text is no error
    return is_directory or word.endswith(_SUFFIX) or (word == NAME and not os.path.lexists(word))


def _is_name(text: str) -> bool:
    return bool(_PLACE.match(text) or _ONE_WORD.fullmatch(text)) or text.endswith(_SUFFIX)


def _hint(word: str) -> str:
    """How to ask the embedded model, unless the word is a path beyond doubt."""
    has_space = " " in word
    if not has_space and (word.endswith(_SUFFIX) or os.sep in word or "/" in word):
        return ""
    question = "a question like this" if has_space else "a question of one word"
    return f"for {question} name the model too: phi4edge run {NAME} {shlex.quote(word)}"
