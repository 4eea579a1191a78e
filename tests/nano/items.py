"""Files of items from the test split: ``python -m nano.items WORK FOLDER`` writes FOLDER/testset and FOLDER/heldout.

Not selected: what the seed gives.  The test set comes with what the checkpoint makes of it in transformers; the
held-out items are more of the kind, with pictures as JPEG and sounds as Ogg Vorbis, to be small.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
from PIL import Image

from media_oracle import MediaOracle
from nano import joint_stage, pictures, sounds, texts
from nano.evaluate import FAMILIES, new_texts
from nano.texts import Conversation
from nano.tokens import AUDIO, IMAGE, Tokens, prompt_text
from nano.words import COMMANDS, SPOKEN_QUESTIONS, TEST
from peers import require

# Family: items in the test set, and held out.
COUNTS: Final = {"text": (24, 240), "vision": (24, 216), "speech": (24, 216), "vision-speech": (12, 204)}
_LONGEST_ANSWER: Final = 64  # tokens


@dataclass(frozen=True)
class Asked:
    """An item before its files are written."""

    conversation: Conversation
    images: tuple[Image.Image, ...] = ()
    sound: sounds.Samples | None = None
    spoken: str = ""  # what the sound says


def text_items(random: Random, n: int, known: set[str]) -> Iterator[Asked]:
    """Of all tasks alike, as far as there are items that are not known yet; then of those that have more."""
    tasks, left = cycle(texts.TASKS), n
    while left:
        for item in new_texts(random, next(tasks), 1, known):
            left -= 1
            yield Asked(item)


def _sizes(random: Random) -> Iterator[pictures.Size]:
    kinds = pictures.typical_sizes(TEST)
    while True:
        for sizes in kinds.values():
            yield random.choice(sizes)


def picture_items(random: Random, n: int) -> Iterator[Asked]:
    tasks, sizes = list(pictures.TASKS), _sizes(random)
    for i in range(n):
        each = pictures.picture(random, TEST, next(sizes), tasks[i % len(tasks)])
        yield Asked(each.conversation, each.images)


def sound_items(random: Random, n: int, name: str) -> Iterator[Asked]:
    tasks = ("transcribe", "translate", "transcribe", "translate", "turns", "command")
    for i in range(n):
        task = tasks[i % len(tasks)]
        text = random.choice(COMMANDS) if task == "command" else sounds.some_numbers(random, TEST)
        kind, asked = ("command", "transcribe") if task == "command" else ("number", task)
        recording = sounds.record(text, f"{name} speech {i}")
        yield Asked(sounds.conversation(random, kind, text, asked), (), recording, text)


def spoken_items(random: Random, n: int, name: str) -> Iterator[Asked]:
    sizes = _sizes(random)
    for i, task in enumerate(pictures.tasks(random, n, spoken=True)):
        each = pictures.picture(random, TEST, next(sizes), task)
        question = random.choice(SPOKEN_QUESTIONS[task])
        recording = sounds.record(question, f"{name} question {i}")
        yield Asked(joint_stage.spoken(each), each.images, recording, question)


def write(folder: Path, name: str, counts: dict[str, int], known: set[str], compressed: bool) -> list[dict[str, Any]]:
    """The files of items; their entries.  known: the texts of other files, which grows."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    random = Random(name)
    made = {
        "text": text_items(random, counts["text"], known),
        "vision": picture_items(random, counts["vision"]),
        "speech": sound_items(random, counts["speech"], name),
        "vision-speech": spoken_items(random, counts["vision-speech"], name),
    }
    entries = []
    for family, items in made.items():
        for i, item in enumerate(items):
            talk, stem = item.conversation, f"{family}{i:02}" if not compressed else f"{family}{i:03}"
            images = [f"{stem}{'ab'[k] if len(item.images) > 1 else ''}" for k in range(len(item.images))]
            images = [
                _save_image(folder / each, image, compressed) for each, image in zip(images, item.images, strict=True)
            ]
            entries.append(
                {
                    "id": stem,
                    "family": family,
                    "task": talk.task,
                    "adapter": FAMILIES[family],
                    "prompt": prompt_text(talk, len(item.images), int(item.sound is not None)),
                    "images": images,
                    "audio": None if item.sound is None else _save_sound(folder / stem, item.sound, compressed),
                    "spoken": item.spoken,
                    "expected": talk.turns[-1][1],
                }
            )
    return entries


def _save_image(stem: Path, image: Image.Image, compressed: bool) -> str:
    path = stem.with_suffix(".jpg" if compressed else ".png")
    image.save(path, quality=75) if compressed else image.save(path, optimize=True)
    return path.name


def _save_sound(stem: Path, samples: sounds.Samples, compressed: bool) -> str:
    soundfile = require("soundfile")
    path = stem.with_suffix(".ogg" if compressed else ".wav")
    options = {"format": "OGG", "subtype": "VORBIS"} if compressed else {"subtype": "PCM_16"}
    soundfile.write(path, samples, sounds.RATE, **options)
    return path.name


def add_answers(entries: list[dict[str, Any]], folder: Path, checkpoint: Path) -> None:
    """What transformers answers, greedily; the five largest logits of the first token; tokens of the prompt."""
    oracle, tokens = MediaOracle.of_checkpoint(checkpoint), Tokens(checkpoint / "tokenizer.json")
    for entry in entries:
        text = re.sub(r"<\|image_\d+\|>", IMAGE, entry["prompt"]).replace("<|audio_1|>", AUDIO)
        parts = [{"type": "image", "image": folder / name} for name in entry["images"]]
        parts += [{"type": "audio", "audio": folder / entry["audio"]}] if entry["audio"] else []
        asked = tokens.encode(text), [{"role": "user", "content": parts}], entry["adapter"]
        chosen, entry["n_prompt_tokens"] = oracle.answer(*asked, _LONGEST_ANSWER)
        logits = oracle.logits(*asked)
        likeliest = np.argsort(-logits)[:5]
        entry["hf_output_ids"] = chosen
        entry["hf_output"] = tokens.tokenizer.decode(
            [token for token in chosen if token not in (tokens.end, tokens.padding)], skip_special_tokens=False
        )
        entry["hf_first_top5"] = [[int(token), round(float(logits[token]), 4)] for token in likeliest]


def write_video(path: Path, images: list[Path]) -> None:
    """The pictures, a second each."""
    av = require("av")
    with av.open(str(path), "w") as container:
        with Image.open(images[0]) as first:
            width, height = first.size
        stream = container.add_stream("libx264", rate=1, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for image_path in images:
            with Image.open(image_path) as image:
                for packet in stream.encode(av.VideoFrame.from_image(image.convert("RGB"))):
                    container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("work", type=Path, help="directory of nano.train")
    parser.add_argument("folder", type=Path, help="where testset and heldout are replaced")
    options = parser.parse_args()
    known: set[str] = set()
    for place, name, compressed in ((0, "testset", False), (1, "heldout", True)):
        folder = options.folder / name
        entries = write(folder, name, {family: counts[place] for family, counts in COUNTS.items()}, known, compressed)
        if not compressed:
            add_answers(entries, folder, options.work / "checkpoint")
            right = sum(entry["hf_output"] == entry["expected"] for entry in entries)
            print(f"{right} of {len(entries)} of the test set are right")
            pair = next(entry for entry in entries if len(entry["images"]) == 2)
            write_video(folder / "pair.mp4", [folder / image for image in pair["images"]])
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
        (folder / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
