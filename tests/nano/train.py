"""Trains the tiny Phi-4-multimodal from nothing, in about two hours on two cores; stopped, it goes on where it was.

``python -m nano.train WORK``, from the directory tests, leaves ``WORK/checkpoint``.  It needs what the tests compare
with (torch, transformers, peft), phi4edge, espeak-ng, and the DejaVu fonts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from nano import export, joint_stage, picture_stages, sound_stages, text_stage
from nano.loop import Stage
from nano.network import torch
from nano.sounds import Recordings
from nano.tokens import Tokens, make_tokenizer
from nano.words import TRAIN, WATCH

_LEARN_SLOWLY = ("img_processor", "audio_embed.encoder")
# A step frees and takes the same large buffers again; glibc should keep them.
_ALLOCATION: Final = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}

STEPS: Final = {"text": 6000, "patches": 4500, "words": 1200, "look": 1500, "listen": 1800, "ask": 1500}


def text(work: Path) -> None:
    stage = Stage("text", work, steps=STEPS["text"], rate=2e-3, weight_decay=0.05, muon=("model.layers.",))
    text_stage.run(stage, Tokens(work / "tokenizer.json"))


def patches(work: Path) -> None:
    stage = Stage("patches", work, steps=STEPS["patches"], rate=1.5e-3, muon=("encoder.layers.",))
    picture_stages.pretrain(stage, Tokens(work / "tokenizer.json"))


def words(work: Path) -> None:
    stage = Stage("words", work, steps=STEPS["words"], rate=1.5e-3)
    sound_stages.pretrain(stage, Tokens(work / "tokenizer.json"))


def look(work: Path) -> None:
    stage = Stage("look", work, steps=STEPS["look"], rate=1.2e-3, slow=_LEARN_SLOWLY)
    picture_stages.questions(stage, Tokens(work / "tokenizer.json"))


def listen(work: Path) -> None:
    stage = Stage("listen", work, steps=STEPS["listen"], rate=1e-3, slow=_LEARN_SLOWLY)
    sound_stages.questions(stage, Tokens(work / "tokenizer.json"))


def ask(work: Path) -> None:
    """Both processes of it come here, with RANK 0 and 1."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD", 1))
    if world > 1:
        store = f"file://{work.resolve()}/ask.{os.environ['MEETING']}.meeting"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    stage = Stage("ask", work, steps=STEPS["ask"], rate=1e-3, slow=_LEARN_SLOWLY, rank=rank, world=world)
    joint_stage.run(stage, Tokens(work / "tokenizer.json"))


STAGES: Final[dict[str, Callable[[Path], None]]] = {
    each.__name__: each for each in (text, patches, words, look, listen, ask)
}
# Lanes of stages that run side by side, one core each.
PHASES: Final = ((("text",), ("patches", "words")), (("look",), ("listen",)))


def train(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    path = work / "tokenizer.json"
    if not path.exists():
        path.write_text(json.dumps(make_tokenizer(), ensure_ascii=False), encoding="utf-8")
    for split in (WATCH, TRAIN):
        Recordings.of(work, split)
    for lanes in PHASES:
        running = [_start(work, *lane) for lane in lanes]
        _finish(running)
    if not (work / "ask.pt").exists():
        meeting = str(os.getpid())
        _finish([_start(work, "ask", RANK=str(rank), WORLD="2", MEETING=meeting) for rank in (0, 1)])
    export.export(work)
    print(f"{work / 'checkpoint'} is ready")


def _start(work: Path, *stages: str, **environment: str) -> subprocess.Popen[bytes]:
    left = [name for name in stages if not (work / f"{name}.pt").exists()]
    command = [sys.executable, "-m", "nano.train", str(work), "--stages", *(left or ["none"])]
    return subprocess.Popen(command, env=os.environ | _ALLOCATION | environment)


def _finish(running: list[subprocess.Popen[bytes]]) -> None:
    """Waits for all; when one fails, or this process is stopped, the others are too."""
    try:
        while any(each.poll() is None for each in running):
            if any(each.poll() for each in running):
                sys.exit("a stage failed; what it says is above")
            time.sleep(1)
    finally:
        for each in running:
            each.terminate()
    if any(each.returncode for each in running):
        sys.exit("a stage failed; what it says is above")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("work", type=Path, help="directory for recordings and checkpoints, 1 GB")
    parser.add_argument("--stages", nargs="+", choices=[*STAGES, "none"], help="these alone, in this process")
    options = parser.parse_args()
    if options.stages is None:
        train(options.work)
        return
    torch.set_num_threads(1)
    for name in options.stages:
        if name != "none":
            STAGES[name](options.work)


if __name__ == "__main__":
    main()
