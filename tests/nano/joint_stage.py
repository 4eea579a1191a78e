"""Stage 6: spoken questions about pictures, beside typed ones.

The vision LoRA answers both.  Of the sound's side only the projector's vision branch learns, from where the speech
branch ended; the audio encoder stays as the speech adapter knows it.  Two processes share the gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from nano.loop import Stage, finish, train
from nano.network import (
    AUDIO_PART,
    IMAGE_PART,
    adapter_state,
    add_adapter,
    answer_loss,
    audio_rows,
    base_state,
    evaluating,
    image_rows,
    load_base,
    new_network,
    project_audio,
    round_to_bfloat16,
    torch,
    train_only,
    with_fast_convolutions,
)
from nano.picture_stages import patch_heads, question_loss, watcher
from nano.pictures import GRIDS, SINGLE, Picture, odd_size, picture, tasks
from nano.sounds import Recordings, kind_of_question
from nano.texts import Conversation
from nano.tokens import Tokens
from nano.words import TRAIN, WATCH

BATCH = 48
WATCHED = 150  # spoken questions
_BRANCH = (AUDIO_PART + "up_proj_for_vision_speech", AUDIO_PART + "down_proj_for_vision_speech")


def questions_of(recordings: Recordings) -> dict[str, list[int]]:
    """The recordings of each kind of question."""
    found: dict[str, list[int]] = {}
    for index, kind in enumerate(recordings.kinds):
        if kind == "question":
            found.setdefault(kind_of_question(recordings.texts[index]), []).append(index)
    return found


def spoken(each: Picture) -> Conversation:
    """The same without the typed question."""
    return Conversation(each.conversation.task, (("", each.conversation.turns[0][1]),))


def run(stage: Stage, tokens: Tokens) -> None:
    recordings, watched = (Recordings.of(stage.folder, split) for split in (TRAIN, WATCH))
    asked, asked_watched = questions_of(recordings), questions_of(watched)
    network, heads = with_fast_convolutions(new_network(tokens)), patch_heads()
    looked, listened = (torch.load(stage.folder / f"{name}.pt", weights_only=True) for name in ("look", "listen"))
    for state in (torch.load(stage.folder / "text.pt", weights_only=True), looked["network"], listened["network"]):
        load_base(network, state)
    embed = network.model.embed_tokens_extend.audio_embed
    embed.up_proj_for_vision_speech.load_state_dict(embed.up_proj_for_speech.state_dict())
    embed.down_proj_for_vision_speech.load_state_dict(embed.down_proj_for_speech.state_dict())
    heads.load_state_dict(looked["heads"])
    add_adapter(network, "vision", looked["vision"])
    train_only(network.train(), (IMAGE_PART, *_BRANCH, ".lora_A.vision", ".lora_B.vision"))
    stage.modules |= {"network": network, "heads": heads}

    def spoken_loss(step: int) -> tuple[Any, Mapping[str, list[float]]]:
        random, common = stage.random(step), Random(f"{stage.name} size {step}")
        size = common.choices([SINGLE, common.choice(GRIDS[:3]), odd_size(common)], [5, 2, 2])[0]
        n = BATCH if size == SINGLE else BATCH // 2
        pictures = [picture(random, TRAIN, size, name) for name in tasks(random, n, spoken=True)]
        indices = _of_one_length(random, recordings, [asked[each.conversation.task] for each in pictures])
        images = image_rows(network, [each.images[0] for each in pictures])
        mels, _ = recordings.disturbed(indices, random)
        with torch.no_grad():
            features = embed.encoder(torch.from_numpy(mels), None)
        sounds = project_audio(embed, features, "vision")
        rows = [(tokens.image, images.shape[1]), (tokens.audio, sounds.shape[1])]
        examples = [tokens.example(spoken(each), rows) for each in pictures]
        loss, right = answer_loss(network, tokens, examples, [(tokens.image, images), (tokens.audio, sounds)])
        return loss, {"spoken": right.float().tolist()}

    def loss_of(step: int) -> tuple[Any, Mapping[str, list[float]]]:
        return spoken_loss(step) if step % 2 else question_loss(stage, network, tokens, heads, step)

    watch_pictures = watcher(network, tokens)

    def watch() -> Mapping[str, float]:
        random, rights = Random(4243), []
        with evaluating(network):
            for name in tasks(random, WATCHED, spoken=True):
                each = picture(random, WATCH, SINGLE, name)
                rights.append(right_about(network, tokens, each, watched, random.choice(asked_watched[name])))
        return {**watch_pictures(), "spoken": round(sum(rights) / len(rights), 3)}

    train(stage, loss_of, watch)
    if stage.rank == 0:
        round_to_bfloat16(network)
        stage.log("watched, in bfloat16:", watch())
        part = base_state(network, (IMAGE_PART, *_BRANCH))
        finish(stage, {"network": part, "vision": adapter_state(network, "vision")})


def _of_one_length(random: Random, recordings: Recordings, of_kinds: list[list[int]]) -> list[int]:
    """One of each kind of question, all about as long as some first one."""
    wanted = len(recordings.mels[random.choice(random.choice(of_kinds))])
    return [
        min(random.sample(of_kind, 16), key=lambda index: abs(len(recordings.mels[index]) - wanted))
        for of_kind in of_kinds
    ]


def right_about(network: Any, tokens: Tokens, each: Picture, recordings: Recordings, index: int) -> float:
    """1 when a spoken question about a picture is answered exactly."""
    images = image_rows(network, each.images)
    sounds = audio_rows(network, torch.from_numpy(recordings.batch([index])), "vision")
    rows = [(tokens.image, images.shape[1]), (tokens.audio, sounds.shape[1])]
    example = tokens.example(spoken(each), rows)
    media = [(tokens.image, images), (tokens.audio, sounds)]
    return float(answer_loss(network, tokens, [example], media)[1].item())


def joined(network: Any, folder: Path) -> dict[str, Any]:
    """Loads the results of all stages into a new network; returns the adapters' weights."""
    states = {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("text", "listen", "ask")}
    load_base(network, states["text"])
    load_base(network, states["listen"]["network"])
    load_base(network, states["ask"]["network"])
    return {"vision": states["ask"]["vision"], "speech": states["listen"]["speech"]}
