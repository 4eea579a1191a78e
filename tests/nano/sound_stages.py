"""Stages 4 and 5: the audio encoder with the words of each moment, then encoder, projector and LoRA on questions."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

import numpy as np

from nano.loop import Stage, finish, train
from nano.network import (
    AUDIO_PART,
    WIDTH,
    adapter_state,
    add_adapter,
    answer_loss,
    audio_rows,
    base_state,
    evaluating,
    functional,
    load_base,
    new_network,
    round_to_bfloat16,
    torch,
    train_only,
    with_fast_convolutions,
)
from nano.sounds import Recordings, conversation, neighbours
from nano.tokens import Tokens
from nano.words import TRAIN, WATCH

BATCH = 64
_TRAINED = (AUDIO_PART + "encoder", AUDIO_PART + "up_proj_for_speech", AUDIO_PART + "down_proj_for_speech")


def vocabulary(recordings: Recordings) -> dict[str, int]:
    """Words to classes; 0 is for silence."""
    return {
        word: i for i, word in enumerate(["", *sorted({word for text in recordings.texts for word in text.split()})])
    }


def word_heads(n_words: int) -> Any:
    """Thrown away in the end: the words in their order (CTC), and the word of each moment."""

    def head() -> Any:
        return torch.nn.Sequential(torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, n_words))

    with torch.random.fork_rng():
        torch.manual_seed(2)
        return torch.nn.ModuleDict({"order": head(), "moment": head()})


def order_loss(head: Any, rows: Any, recordings: Recordings, indices: list[int], words: Mapping[str, int]) -> Any:
    """CTC (Graves et al., 2006)."""
    spoken = [[words[word] for word in recordings.texts[index].split()] for index in indices]
    likely = head(rows).float().log_softmax(-1).transpose(0, 1)
    lengths = torch.tensor([len(each) for each in spoken])
    flat = torch.tensor([word for each in spoken for word in each])
    return functional.ctc_loss(likely, flat, torch.full((len(indices),), len(likely)), lengths, zero_infinity=True)


def pretrain(stage: Stage, tokens: Tokens) -> None:
    recordings = Recordings.of(stage.folder, TRAIN)
    words = vocabulary(recordings)
    order = sorted(range(len(recordings.mels)), key=lambda index: len(recordings.mels[index]))
    network = with_fast_convolutions(new_network(tokens)).train()
    encoder = network.model.embed_tokens_extend.audio_embed.encoder
    frames = np.concatenate(recordings.mels[::5]).astype(np.float32)
    with torch.no_grad():
        for target, values in (
            (encoder.encoder_embedding.global_mean, frames.mean(0)),
            (encoder.encoder_embedding.global_invstd, 1 / frames.std(0)),
        ):
            target.copy_(torch.from_numpy(values).bfloat16().float())
    heads = word_heads(len(words))
    train_only(network, _TRAINED)
    stage.modules |= {"network": network, "heads": heads}

    def loss_of(step: int) -> tuple[Any, Mapping[str, list[float]]]:
        random = stage.random(step)
        indices = neighbours(order, random, BATCH)
        mels, starts = recordings.disturbed(indices, random)
        rows = audio_rows(network, torch.from_numpy(mels), "speech")
        moments = torch.zeros(len(indices), rows.shape[1], dtype=torch.long)
        for row, (index, start) in enumerate(zip(indices, starts, strict=True)):
            edges = recordings.word_edges(index) + start
            for word, first, last in zip(recordings.texts[index].split(), edges, edges[1:], strict=False):
                moments[row, max(0, round((first - 4) / 8)) : max(0, round((last - 4) / 8))] = words[word]
        guesses = heads["moment"](rows).float().transpose(1, 2)
        right = (guesses.argmax(1) == moments)[moments > 0].float().mean().item()
        by_order = order_loss(heads["order"], rows, recordings, indices, words)
        return by_order + 3 * functional.cross_entropy(guesses, moments), {
            "order": [by_order.item()],
            "moments": [right],
        }

    train(stage, loss_of, dict)
    part = base_state(network, (AUDIO_PART,))
    finish(stage, {"network": part, "heads": heads.state_dict()})


def questions(stage: Stage, tokens: Tokens) -> None:
    recordings, watched = (Recordings.of(stage.folder, split) for split in (TRAIN, WATCH))
    words = vocabulary(recordings)
    order = sorted(range(len(recordings.mels)), key=lambda index: len(recordings.mels[index]))
    network, heads = with_fast_convolutions(new_network(tokens)), word_heads(len(words))
    load_base(network, torch.load(stage.folder / "text.pt", weights_only=True))
    pretrained = torch.load(stage.folder / "words.pt", weights_only=True)
    load_base(network, pretrained["network"])
    heads.load_state_dict(pretrained["heads"])
    add_adapter(network, "speech")
    train_only(network.train(), (*_TRAINED, ".lora_A.speech", ".lora_B.speech"))
    heads["moment"].requires_grad_(False)
    stage.modules |= {"network": network, "heads": heads}

    def loss_of(step: int) -> tuple[Any, Mapping[str, list[float]]]:
        random = stage.random(step)
        indices = neighbours(order, random, BATCH)
        mels, _ = recordings.disturbed(indices, random)
        rows = audio_rows(network, torch.from_numpy(mels), "speech")
        talks = [conversation(random, recordings.kinds[index], recordings.texts[index]) for index in indices]
        examples = [tokens.example(talk, [(tokens.audio, rows.shape[1])]) for talk in talks]
        loss, right = answer_loss(network, tokens, examples, [(tokens.audio, rows)])
        seen: dict[str, list[float]] = {}
        for talk, ok in zip(talks, right.float().tolist(), strict=True):
            seen.setdefault(talk.task, []).append(ok)
        return loss + 0.2 * order_loss(heads["order"], rows, recordings, indices, words), seen

    def watch() -> Mapping[str, float]:
        found: dict[str, list[float]] = {}
        with evaluating(network):
            for task in ("transcribe", "translate", "turns"):
                for index in range(len(watched.mels)):
                    if task == "transcribe" or watched.kinds[index] == "number":
                        found.setdefault(f"{task} {watched.kinds[index]}", []).append(
                            right_about(network, tokens, watched, index, task)
                        )
        return {name: round(sum(rights) / len(rights), 3) for name, rights in found.items()}

    train(stage, loss_of, watch)
    round_to_bfloat16(network)
    part = base_state(network, (AUDIO_PART,))
    finish(stage, {"network": part, "speech": adapter_state(network, "speech")})


def right_about(network: Any, tokens: Tokens, recordings: Recordings, index: int, task: str) -> float:
    """1 when a question about a recording is answered exactly."""
    talk = conversation(Random(index), recordings.kinds[index], recordings.texts[index], task)
    rows = audio_rows(network, torch.from_numpy(recordings.batch([index])), "speech")
    example = tokens.example(talk, [(tokens.audio, rows.shape[1])], last_only=True)
    return float(answer_loss(network, tokens, [example], [(tokens.audio, rows)])[1].item())
