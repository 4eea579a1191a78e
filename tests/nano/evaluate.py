"""How many items of the test split a checkpoint answers exactly in transformers, by family, task and adapter.

``python -m nano.evaluate WORK`` reads ``WORK/checkpoint`` and writes ``WORK/accuracy.json``.  In float32, on items that
nothing looked at before; of texts, on those that no training conversation had as one of its turns.  An answer is right
when every token of it is the likeliest one after those before it, its end included, which is when greedy decoding gives
it.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final

from nano import joint_stage, pictures, sound_stages, text_stage, texts, train
from nano.loop import Stage
from nano.network import answer_loss, torch
from nano.picture_stages import batch_of
from nano.sounds import Recordings
from nano.texts import Conversation
from nano.tokens import Tokens
from nano.words import TEST, TRAIN
from peers import require

ADAPTERS: Final = ("vision", "speech")
# Family: the adapter that it needs.
FAMILIES: Final = {"text": None, "vision": "vision", "speech": "speech", "vision-speech": "vision"}
_TALKS, _PICTURES, _SPOKEN = 100, 60, 300  # items of each task, of each task and kind of size, and in all


class Checkpoint:
    """In transformers, with both adapters in PEFT."""

    def __init__(self, path: Path) -> None:
        transformers, peft = require("transformers"), require("peft")
        self.tokens = Tokens(path / "tokenizer.json")
        network = transformers.Phi4MultimodalForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name of the past
            self.adapted = peft.PeftModel.from_pretrained(network, path / "vision-lora", adapter_name="vision").eval()
            self.adapted.load_adapter(path / "speech-lora", adapter_name="speech")
        self.network = self.adapted.get_base_model()

    def using(self, adapter: str | None) -> Any:
        """A context in which one adapter works, or none."""
        if adapter is not None:
            self.adapted.set_adapter(adapter)
        return self.adapted.disable_adapter() if adapter is None else nullcontext()


@cache
def asked_in_training() -> frozenset[str]:
    """Every single turn of the conversations of the first stage, which are made here once more."""
    stage = Stage("text", Path(), train.STEPS["text"], 0.0)
    asked: set[str] = set()
    for group in range(-(-stage.steps // text_stage.BATCHES)):
        random = stage.random(group)
        for _ in range(text_stage.BATCH * text_stage.BATCHES):
            asked.update(question for question, _ in texts.conversation(random, TRAIN).turns)
    return frozenset(asked)


def new_texts(random: Random, task: str, n: int, known: set[str]) -> Iterator[Conversation]:
    """At most n items of a task, each once; some tasks have few.  known: what they ask, which grows."""
    for _ in range(n):
        for _ in range(200):
            item = texts.conversation(random, TEST, task)
            if item.key not in known and item.key not in asked_in_training():
                known.add(item.key)
                yield item
                break


def answers(checkpoint: Checkpoint, family: str, work: Path, share: float = 1.0) -> Iterator[tuple[str, float]]:
    """(task, right) of each item of a family, with whatever adapter is in use."""
    network, tokens = checkpoint.network, checkpoint.tokens
    random = Random(f"test {family}")
    if family == "text":
        for task in texts.TASKS:
            items = new_texts(random, task, max(1, round(_TALKS * share)), set())
            for item in items:
                right = answer_loss(network, tokens, [tokens.example(item, last_only=True)])[1]
                yield task, float(right.item())
    elif family == "vision":
        for kind, sizes in pictures.typical_sizes(TEST).items():
            for task in pictures.TASKS:
                for size in sizes:
                    names = [task] * max(1, round(_PICTURES * share / len(sizes)))
                    examples, media, _ = batch_of(random, tokens, network, TEST, size, names, last_only=True)
                    for right in answer_loss(network, tokens, examples, media)[1].float().tolist():
                        yield f"{task}, {kind}", right
    else:
        recordings = Recordings.of(work, TEST)
        if family == "speech":
            for task in ("transcribe", "translate", "turns"):
                for index in range(0, len(recordings.mels), round(1 / share)):
                    kind = recordings.kinds[index]
                    if task == "transcribe" or kind == "number":
                        yield f"{task} {kind}", sound_stages.right_about(network, tokens, recordings, index, task)
        else:
            asked = joint_stage.questions_of(recordings)
            sizes = [size for kind in pictures.typical_sizes(TEST).values() for size in kind]
            for name in pictures.tasks(random, round(_SPOKEN * share), spoken=True):
                size = pictures.SINGLE if random.random() < 0.5 else random.choice(sizes)
                each = pictures.picture(random, TEST, size, name)
                index = random.choice(asked[name])
                yield name, joint_stage.right_about(network, tokens, each, recordings, index)


def accuracy(checkpoint: Checkpoint, work: Path) -> dict[str, Any]:
    """{family: {"all" and each task: {"right": share, "n": items}, "wrong adapters": {adapter: share}}}."""
    document: dict[str, Any] = {}
    for family, adapter in FAMILIES.items():
        rights: dict[str, list[float]] = defaultdict(list)
        with torch.no_grad(), checkpoint.using(adapter):
            for task, right in answers(checkpoint, family, work):
                rights[task].append(right)
        rights["all"] = [right for each in rights.values() for right in each]
        document[family] = {
            name: {"right": round(sum(each) / len(each), 4), "n": len(each)} for name, each in rights.items()
        }
        others: dict[str, float] = {}
        for other in (None, *ADAPTERS):
            if other != adapter:
                with torch.no_grad(), checkpoint.using(other):
                    some = [right for _, right in answers(checkpoint, family, work, share=0.25)]
                others[other or "none"] = round(sum(some) / len(some), 4)
        document[family]["wrong adapters"] = others
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("work", type=Path, help="directory of nano.train")
    options = parser.parse_args()
    Recordings.of(options.work, TEST)  # in processes, which are begun before torch has threads
    torch.set_num_threads(2)
    document = accuracy(Checkpoint(options.work / "checkpoint"), options.work)
    for family, found in document.items():
        print(family)
        for task, result in found.items():
            if task == "wrong adapters":
                print(f"    {task}: {result}")
            else:
                print(f"    {task:28} {result['right']:.3f}  {result['n']}")
    (options.work / "accuracy.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
