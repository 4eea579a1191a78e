"""Stages 2 and 3: the vision encoder with labels for each patch, then encoder, projector and LoRA on questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import numpy as np

from nano.loop import Stage, finish, train
from nano.network import (
    IMAGE_PART,
    WIDTH,
    adapter_state,
    add_adapter,
    answer_loss,
    base_state,
    evaluating,
    functional,
    image_rows,
    load_base,
    new_network,
    patch_features,
    pooled,
    project_image,
    round_to_bfloat16,
    torch,
    train_only,
)
from nano.pictures import (
    BACKGROUND,
    GRIDS,
    IGNORED,
    N_CLASSES,
    SINGLE,
    Picture,
    Size,
    glyph_page,
    odd_size,
    picture,
    shape_page,
    tasks,
    typical_sizes,
)
from nano.tokens import Tokens
from nano.words import TRAIN, WATCH

WATCHED = 32  # questions of each kind


def patch_heads() -> Any:
    """Thrown away in the end: the class of a patch, and the classes of the four of a token."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return torch.nn.ModuleDict(
            {"patch": torch.nn.Linear(128, N_CLASSES), "token": torch.nn.Linear(WIDTH, 4 * N_CLASSES)}
        )


def patch_loss(network: Any, heads: Any, random: Random, n: int) -> tuple[Any, Mapping[str, list[float]]]:
    """On pages that are made now."""
    embed = network.model.embed_tokens_extend.image_embed
    pages = [(glyph_page if random.random() < 0.8 else shape_page)(random) for _ in range(n)]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image, _ in pages])).permute(0, 3, 1, 2) / 127.5 - 1
    labels = torch.from_numpy(np.stack([labels for _, labels in pages]))
    features = patch_features(embed, pixels)
    rows = project_image(embed, pooled(features).flatten(1, 2))
    of_patches, of_tokens = heads["patch"](features).float(), heads["token"](rows).float()
    importance = torch.ones(N_CLASSES)
    importance[BACKGROUND] = 0.2
    by_token = labels.view(n, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1)
    flat = labels.reshape(-1)
    loss = functional.cross_entropy(of_patches.view(-1, N_CLASSES), flat, importance)
    loss = loss + functional.cross_entropy(of_tokens.reshape(-1, N_CLASSES), by_token, importance)
    shown = (flat != IGNORED) & (flat != BACKGROUND)
    right = (of_patches.view(-1, N_CLASSES).argmax(-1) == flat)[shown]
    seen = (by_token != IGNORED) & (by_token != BACKGROUND)
    token_right = (of_tokens.reshape(-1, N_CLASSES).argmax(-1) == by_token)[seen]
    return loss, {"patches": [right.float().mean().item()], "tokens": [token_right.float().mean().item()]}


def pretrain(stage: Stage, tokens: Tokens) -> None:
    network, heads = new_network(tokens).train(), patch_heads()
    train_only(network, [IMAGE_PART])
    stage.modules |= {"network": network, "heads": heads}
    train(stage, lambda step: patch_loss(network, heads, stage.random(step), 64), dict)
    part = base_state(network, (IMAGE_PART,))
    finish(stage, {"network": part, "heads": heads.state_dict()})


def batch_of(
    random: Random, tokens: Tokens, network: Any, split: str, size: Size, names: list[str], last_only: bool = False
) -> tuple[list[Any], list[tuple[int, Any]], list[Picture]]:
    """Examples, their media, and the pictures, which have one size and come one or two to a question."""
    pictures = [picture(random, split, size, name) for name in names]
    rows = image_rows(network, [image for each in pictures for image in each.images])
    examples = [
        tokens.example(each.conversation, [(tokens.image, rows.shape[1])] * len(each.images), last_only)
        for each in pictures
    ]
    return examples, [(tokens.image, rows)], pictures


def random_size(random: Random) -> Size:
    kind = random.random()
    return SINGLE if kind < 0.45 else random.choice(GRIDS) if kind < 0.7 else odd_size(random)


def images_in_batch(size: Size) -> int:
    """Batches of large pictures are smaller, but not in proportion: their prompts are a part of the work only."""
    crops = -(-size[0] // 112) * -(-size[1] // 112)
    return {1: 64, 2: 40, 3: 32, 4: 26, 6: 20}[crops]


def question_loss(
    stage: Stage, network: Any, tokens: Tokens, heads: Any, step: int
) -> tuple[Any, Mapping[str, list[float]]]:
    """Questions about pictures of one size, and beside them the patches of pages, which keep the glyphs apart."""
    random, common = stage.random(step), Random(f"{stage.name} size {step}")  # the same size for both processes
    size = random_size(common)
    n = images_in_batch(size)
    names = (
        ["larger"] * (n // 2) if common.random() < 0.12 and size[0] * size[1] < 200 * 130 else list(tasks(random, n))
    )
    examples, media, pictures = batch_of(random, tokens, network, TRAIN, size, names)
    loss, right = answer_loss(network, tokens, examples, media)
    page_loss, metrics = patch_loss(network, heads, random, 32)
    kind = "one crop " if size == SINGLE else "grid " if size in GRIDS else "odd "
    seen: dict[str, list[float]] = dict(metrics)
    for each, ok in zip(pictures, right.float().tolist(), strict=True):
        seen.setdefault(kind + each.conversation.task, []).append(ok)
    return loss + 0.3 * page_loss, seen


def watcher(network: Any, tokens: Tokens) -> Callable[[], Mapping[str, float]]:
    n = WATCHED

    def watch() -> Mapping[str, float]:
        random, found = Random(4242), {}
        with evaluating(network):
            for kind, sizes in typical_sizes(WATCH).items():
                for name in ("number", "word", "describe", "turns"):
                    rights = []
                    for size in sizes[:4]:
                        count = n * 2 if len(sizes) == 1 else max(1, n // 2)
                        batch = batch_of(random, tokens, network, WATCH, size, [name] * count, last_only=True)
                        rights += answer_loss(network, tokens, *batch[:2])[1].float().tolist()
                    found[f"{kind} {name}"] = round(sum(rights) / len(rights), 3)
            batch = batch_of(random, tokens, network, WATCH, SINGLE, ["larger"] * n)
            found["larger"] = round(answer_loss(network, tokens, *batch[:2])[1].float().mean().item(), 3)
        return found

    return watch


def questions(stage: Stage, tokens: Tokens) -> None:
    network, heads = new_network(tokens), patch_heads()
    load_base(network, torch.load(stage.folder / "text.pt", weights_only=True))
    pretrained = torch.load(stage.folder / "patches.pt", weights_only=True)
    load_base(network, pretrained["network"])
    heads.load_state_dict(pretrained["heads"])
    add_adapter(network, "vision")
    train_only(network.train(), [IMAGE_PART, ".lora_A.vision", ".lora_B.vision"])
    stage.modules |= {"network": network, "heads": heads}
    train(stage, lambda step: question_loss(stage, network, tokens, heads, step), watcher(network, tokens))
    round_to_bfloat16(network)
    part = base_state(network, (IMAGE_PART,))
    finish(stage, {"network": part, "heads": heads.state_dict(), "vision": adapter_state(network, "vision")})
