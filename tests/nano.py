"""The trained tiny checkpoint of the repository, questions for it, and what it answers in transformers.

The benchmark of quality uses this too, so nothing of the other test modules is needed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import phi4edge

NANO = Path(__file__).parent / "data" / "nano"
CHECKPOINT = NANO / "checkpoint"
TEST_SET = NANO / "testset" / "testset.json"  # with the answers of transformers
HELD_OUT = NANO / "heldout" / "heldout.json"  # more of the kind, without
FAMILIES = ("text", "vision", "vision2", "speech", "vision-speech")

_TURN = re.compile(r"<\|(system|user)\|>(.*?)(?:<\|tool\|>(.*?)<\|/tool\|>)?<\|end\|>")
_PLACEHOLDER = re.compile(r"<\|(?:image|audio)_\d+\|>")


@dataclass(frozen=True)
class Item:
    """A question with its right answer, and what the model answers in transformers."""

    name: str
    family: str  # one of FAMILIES
    messages: list[dict[str, Any]]
    adapter: str | None
    expected: str
    their_text: str = ""
    their_tokens: tuple[int, ...] = ()  # <|end|> included
    their_top: tuple[tuple[int, float], ...] = ()  # five (token, logit) for the first of them, likeliest first
    n_prompt_tokens: int = 0  # images and sounds included


@cache
def items(path: Path = TEST_SET) -> tuple[Item, ...]:
    document = json.loads(path.read_text(encoding="utf-8"))
    return tuple(_item(entry, path.parent) for entry in document)


def _item(entry: dict[str, Any], folder: Path) -> Item:
    parts = [{"type": "image", "image": folder / name} for name in entry["images"]]
    if entry["audio"]:
        parts.append({"type": "audio", "audio": folder / entry["audio"]})
    messages: list[dict[str, Any]] = []
    for role, text, tools in _TURN.findall(entry["prompt"]):
        message = {"role": role, "content": [*parts, {"type": "text", "text": _PLACEHOLDER.sub("", text)}]}
        if role == "system":
            message["content"] = text
        messages.append(message | ({"tools": tools} if tools else {}))
    item = Item(entry["id"], entry["family"], messages, entry["adapter"], entry["expected"])
    if "hf_output" not in entry:
        return item
    return replace(
        item,
        their_text=entry["hf_output"],
        their_tokens=tuple(entry["hf_output_ids"]),
        their_top=tuple((token, logit) for token, logit in entry["hf_first_top5"]),
        n_prompt_tokens=entry["n_prompt_tokens"],
    )


def is_right(model: phi4edge.Model, item: Item, **options: Any) -> bool:
    """Whether a model answers an item exactly, and ends there; options are those of ``generate``."""
    answer = model.generate(item.messages, max_tokens=32, **options)
    return answer.finish_reason == "stop" and model.tokenizer.decode(answer.tokens, special=True) == item.expected


def n_right(model: phi4edge.Model, of: Sequence[Item], **options: Any) -> int:
    return sum(is_right(model, item, **options) for item in of)


def answer_logits(
    model: phi4edge.Model, item: Item, session: phi4edge.Session | None = None
) -> npt.NDArray[np.float32]:
    """Float32 [n, vocab]: what a model would say at each token of the right answer, <|end|> included."""
    answer = model.tokenizer.encode(item.expected, special=True)  # where <|end|> comes next
    session = session or model.session()
    first = model.next_logits(item.messages, session=session)
    return np.concatenate([first[np.newaxis], session.extend(answer, logits="all")])
