"""Makes what the package embeds of the trained tiny checkpoint: its bundle in 4 bits, samples for ``phi4edge demo``.

``make nano`` runs this, after the checkpoint or its test set changed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from nano_items import CHECKPOINT, items
from phi4edge.converters.convert import convert
from phi4edge.quality_items import Item

PACKAGE = Path(__file__).parent.parent / "phi4edge"


@dataclass(frozen=True)
class Sample:
    """An item of the test set, and the names that its files have in the package."""

    item: str
    name: str  # for people
    command: str  # "run", or "transcribe", which has words of its own for the model
    files: dict[str, str] = field(default_factory=dict)  # "image", "audio" -> name
    spoken: str = ""  # what the recording asks


# Items that nano answers rightly in 4 bits: the demo fails otherwise.
SAMPLES = (
    Sample("text20", "A question", "run"),
    Sample("vision18", "An image", "run", {"image": "word.png"}),
    Sample("speech06", "A recording", "transcribe", {"audio": "numbers.wav"}),
    Sample(
        "vision-speech05",
        "A spoken question about an image",
        "run",
        {"image": "shape.png", "audio": "ask.wav"},
        spoken="describe the image",
    ),
)


def embed(package: Path) -> None:
    """Replaces ``nano`` and ``samples`` in the directory of a package."""
    bundle, folder = package / "nano", package / "samples"
    for old in (bundle, folder):  # replacing a bundle would give its files their second names
        shutil.rmtree(old, ignore_errors=True)
    convert(CHECKPOINT, bundle)
    folder.mkdir()
    by_name = {item.name: item for item in items()}
    document = {"samples": [_embed(sample, by_name[sample.item], folder) for sample in SAMPLES]}
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    (folder / "samples.json").write_text(text, encoding="utf-8")


def _embed(sample: Sample, item: Item, folder: Path) -> dict[str, str]:
    """Copies the files of an item; what ``samples.json`` says about it."""
    described = {"name": sample.name, "command": sample.command}
    if sample.spoken:
        described["spoken"] = sample.spoken
    (message,) = item.messages  # one question, which a command can ask
    content = message["content"]
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = part["type"]
        if kind in sample.files:
            described[kind] = sample.files[kind]
            shutil.copyfile(part[kind], folder / described[kind])
        elif part["text"] and sample.command == "run":
            described["prompt"] = part["text"]
    return described | {"expected": item.expected}


if __name__ == "__main__":
    embed(PACKAGE)
