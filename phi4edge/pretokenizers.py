"""How text is cut into pieces before byte-pair merging: one entry per value of ``tokenizer.ggml.pre``.

Merges never cross a piece. The patterns are written for two regex engines at once, the one inside tiktoken and the
``regex`` module, and describe in one pass what some vocabularies define as several splits, one after the other.
Runs of any one character are cheap in all of them, with one exception: ``\\s+(?!\\S)`` keeps one stack entry per space
inside tiktoken and fails near a million, so ``safe_cuts`` finds places where the text may be cut before it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

# White_Space of Unicode. Python's own \s also has U+001C-U+001F, which are not.
SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_SPACES_IN_LINE = SPACES.replace("\t-\r", "\t\x0b\x0c")

_LONG_RUN = 8192  # spaces; far below where tiktoken fails, far above what people write


@dataclass(frozen=True, slots=True)
class Pretokenizer:
    """The pieces of one family of vocabularies."""

    name: str
    pattern: str
    ignore_merges: bool = False  # a piece that is a token is taken whole, even if merges do not lead there
    add_bos: bool = False  # unless the file says so itself
    newlines_end_pieces: bool = False  # the pattern has \s*[\r\n]+, so that only the spaces behind matter
    # The last space of a run joins what follows, unless what follows is split off first.
    splits_off: Callable[[str], bool] = lambda char: False
    # Whitespace behind these tokens is deleted in text from a template, if the vocabulary has all of `rstrip_if`.
    rstrip_after: frozenset[str] = frozenset()
    rstrip_if: frozenset[str] = frozenset()

    def safe_cuts(self, text: str) -> list[int]:
        """Positions in front of which a piece always ends, one near the end of every long run of spaces."""
        step = _LONG_RUN // 2
        # A long run covers at least one whole aligned block; most texts stop here, after a look at one or two letters.
        if not any(text[start : start + step].isspace() for start in range(0, len(text) - step + 1, step)):
            return []
        cuts = []
        for run in (_LONG_RUN_IN_LINE if self.newlines_end_pieces else _LONG_RUN_ANY).finditer(text):
            end = run.end()
            if end < len(text):
                cuts.append(end if self.splits_off(text[end]) else end - 1)
        return cuts


_LONG_RUN_ANY = re.compile(rf"(?<![{SPACES}])[{SPACES}]{{{_LONG_RUN},}}")
_LONG_RUN_IN_LINE = re.compile(rf"(?<![{_SPACES_IN_LINE}])[{_SPACES_IN_LINE}]{{{_LONG_RUN},}}(?![{SPACES}])")


def _is_number(char: str) -> bool:
    return unicodedata.category(char).startswith("N")


def _is_mark_of_default(char: str) -> bool:
    return char in "$+<=>^~|" or unicodedata.category(char).startswith("P")


def _any(*alternatives: str) -> str:
    return "|".join(alternatives)


# `\s+$` says nothing that `\s+(?!\S)` does not, but needs no stack: it serves texts that end in a long run.
_SPACES_THEN_TEXT = (r"\s+$", r"\s+(?!\S)", r"\s+")
_CONTRACTIONS = r"'(?:[stmd]|re|ve|ll)"
_ANY_CASE_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_DEFAULT_MARKS = r"\p{P}$+<=>^~|"
_OTHER_DIGIT = r"[^\P{N}0-9]"

_GPT_4O = Pretokenizer(
    name="gpt-4o",
    pattern=_any(
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ANY_CASE_CONTRACTIONS}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ANY_CASE_CONTRACTIONS}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        *_SPACES_THEN_TEXT,
    ),
    newlines_end_pieces=True,
    rstrip_after=frozenset(
        f"<|{name}|>"
        for name in (
            *("assistant", "end", "user", "system", "tag"),
            *("tool", "/tool", "tool_call", "/tool_call", "tool_response"),
        )
    ),
    rstrip_if=frozenset({"<|assistant|>", "<|end|>", "<|user|>", "<|system|>"}),
)

_LLAMA_BPE = Pretokenizer(
    name="llama-bpe",
    pattern=_any(
        _ANY_CASE_CONTRACTIONS,
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        *_SPACES_THEN_TEXT,
    ),
    ignore_merges=True,
    add_bos=True,
    newlines_end_pieces=True,
)

_GPT_2 = Pretokenizer(
    name="gpt-2",
    pattern=_any(_CONTRACTIONS, r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+", *_SPACES_THEN_TEXT),
)

# Every digit is split off first, then the rest is cut as for gpt-2: spaces end where a digit begins.
_SMOLLM = Pretokenizer(
    name="smollm",
    pattern=_any(_CONTRACTIONS, r" ?\p{L}+", r"\p{N}", r" ?[^\s\p{L}\p{N}]+", r"\s+$", r"\s+(?![^\s\p{N}])", r"\s+"),
    splits_off=_is_number,
)

# Runs of marks first, then as for gpt-2, then numbers without the space before them, and in those ASCII digits by
# three from the left: so a piece of a number ends where three ASCII digits begin.
_DEFAULT = Pretokenizer(
    name="default",
    pattern=_any(
        rf"[{_DEFAULT_MARKS}]+",
        r" ?\p{L}+",
        r"[0-9]{3}",
        rf"(?>(?:[0-9]{{0,2}}{_OTHER_DIGIT}+)+)(?:[0-9]{{1,2}}(?![0-9]))?",
        r"[0-9]{1,2}",
        rf" ?[^\s\p{{L}}\p{{N}}{_DEFAULT_MARKS}]+",
        r"\s+$",
        rf"\s+(?![^\s{_DEFAULT_MARKS}])",
        r"\s+",
    ),
    splits_off=_is_mark_of_default,
)

PRETOKENIZERS = {entry.name: entry for entry in (_GPT_4O, _LLAMA_BPE, _GPT_2, _SMOLLM, _DEFAULT)}
