"""Stage 1: embeddings and decoder on text.  Then they are rounded to bfloat16, and frozen for good."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from nano.loop import Stage, finish, train
from nano.network import (
    DECODER_PARTS,
    answer_loss,
    base_state,
    evaluating,
    new_network,
    round_to_bfloat16,
    train_only,
)
from nano.texts import TASKS, conversation
from nano.tokens import Tokens
from nano.words import TRAIN, WATCH

BATCH, BATCHES = 64, 16  # this many batches are made at a time, each of items of about one length
WATCHED = 60  # items of each task


def run(stage: Stage, tokens: Tokens) -> None:
    network = new_network(tokens).train()
    train_only(network, DECODER_PARTS)
    stage.modules["network"] = network
    random = Random(77)
    watched = {
        task: [tokens.example(conversation(random, WATCH, task), last_only=True) for _ in range(WATCHED)]
        for task in TASKS
    }

    def watch() -> Mapping[str, float]:
        with evaluating(network):
            return {
                task: round(answer_loss(network, tokens, examples)[1].float().mean().item(), 3)
                for task, examples in watched.items()
            }

    made: dict[int, list[Any]] = {}

    def loss_of(step: int) -> tuple[Any, Mapping[str, list[float]]]:
        group = step // BATCHES
        if group not in made:
            made.clear()
            made[group] = _batches(stage.random(group), tokens)
        loss, right = answer_loss(network, tokens, made[group][step % BATCHES])
        return loss, {"right": right.float().tolist()}

    train(stage, loss_of, watch)
    round_to_bfloat16(network)
    stage.log("watched, in bfloat16:", watch())
    finish(stage, base_state(network, DECODER_PARTS))


def _batches(random: Random, tokens: Tokens) -> list[Any]:
    examples = [tokens.example(conversation(random, TRAIN)) for _ in range(BATCH * BATCHES)]
    examples.sort(key=lambda example: len(example[0]))
    order = list(range(BATCHES))
    random.shuffle(order)
    return [examples[i * BATCH : (i + 1) * BATCH] for i in order]
