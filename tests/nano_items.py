"""The trained tiny checkpoint of the repository, the questions for it, and what it answers to them in transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import phi4edge
from phi4edge.quality_items import Item, read_items

NANO = Path(__file__).parent / "data" / "nano"
CHECKPOINT = NANO / "checkpoint"
TEST_SET = NANO / "testset" / "testset.json"  # with the answers of transformers
HELD_OUT = NANO / "heldout" / "heldout.json"  # more of the kind, without
N_LEAST = {TEST_SET: 12, HELD_OUT: 200}  # items of each family


@dataclass(frozen=True)
class Theirs:
    """What the model answers to an item in transformers."""

    text: str
    tokens: tuple[int, ...]  # <|end|> included
    top: tuple[tuple[int, float], ...]  # five (token, logit) for the first of them, likeliest first
    n_prompt_tokens: int  # images and sounds included


@cache
def items(path: Path = TEST_SET) -> tuple[Item, ...]:
    return tuple(read_items(path))


@cache
def theirs() -> dict[str, Theirs]:
    """Of the items of the test set, by their names."""
    return {
        entry["id"]: Theirs(
            entry["hf_output"],
            tuple(entry["hf_output_ids"]),
            tuple((token, logit) for token, logit in entry["hf_first_top5"]),
            entry["n_prompt_tokens"],
        )
        for entry in json.loads(TEST_SET.read_text(encoding="utf-8"))
    }


def answers_exactly(model: phi4edge.Model, item: Item, **options: Any) -> bool:
    """Whether a model writes the right answer and ends there, token by token; options are those of ``generate``."""
    answer = model.generate(item.messages, max_tokens=len(item.expected.encode()) + 1, **options)
    return answer.finish_reason == "stop" and model.tokenizer.decode(answer.tokens, special=True) == item.expected


def n_right(model: phi4edge.Model, of: Sequence[Item], **options: Any) -> int:
    return sum(answers_exactly(model, item, **options) for item in of)
