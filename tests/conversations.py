"""Conversations with made-up images and sounds, in every mode that a multimodal model has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RATE = 16000
Message = dict[str, Any]


def picture(width: int, height: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def sound(seconds: float, seed: int = 0) -> tuple[Any, int]:
    n_samples = int(seconds * RATE)
    noise = np.random.default_rng(seed).standard_normal(n_samples)
    return (0.2 * np.sin(0.1 * np.arange(n_samples)) + 0.05 * noise).astype(np.float32), RATE


def ask(text: str, images: Sequence[Any] = (), sounds: Sequence[Any] = ()) -> Message:
    parts = [{"type": "text", "text": text}] if text else []
    parts += [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, *({"type": "audio", "audio": each} for each in sounds)]}


ANSWER: Message = {"role": "assistant", "content": "the hat"}
# Name -> messages, and the adapter that the original model uses.  45 seconds cross the 512 tokens of the original
# context of MediaShape.
MODES: dict[str, tuple[list[Message], str | None]] = {
    "text": ([ask("the cat sat on the mat")], None),
    "an image": ([ask("the cat", [picture(150, 90)])], "vision"),
    "three images of odd sizes": (
        [ask("the cat", [picture(113, 112, 1), picture(60, 200, 2), picture(300, 120, 3)])],
        "vision",
    ),
    "half a second": ([ask("the cat", sounds=[sound(0.5)])], "speech"),
    "seven seconds, no text": ([ask("", sounds=[sound(7)])], "speech"),
    "45 seconds": ([ask("the cat", sounds=[sound(45)])], "speech"),
    "an image and a sound": ([ask("", [picture(150, 90)], [sound(2)])], "vision"),
    "text after an image": ([ask("the cat", [picture(90, 150)]), ANSWER, ask("on the mat")], "vision"),
    "a sound, then an image": ([ask("", sounds=[sound(1)]), ANSWER, ask("the mat", [picture(50, 50)])], "vision"),
}
