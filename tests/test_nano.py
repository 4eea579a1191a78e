"""The trained tiny checkpoint answers as it does in transformers, in every mode; quantized ones nearly so."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phi4edge
from conversations import MODES
from media_oracle import MediaOracle, our_embeddings
from nano_items import CHECKPOINT, HELD_OUT, N_LEAST, TEST_SET, items, n_right, theirs
from phi4edge.adapters import NO_ADAPTER
from phi4edge.converters.convert import convert
from phi4edge.quality import measure, total
from phi4edge.quality_items import Item, adapters, families
from reference import Reference, relative_difference
from tiny_models import Array

ITEMS = items()
FAMILIES = families(ITEMS)


def of_family(family: str) -> list[Item]:
    return [item for item in ITEMS if item.family == family]


@pytest.fixture(scope="module")
def model(nano_bundle: Path) -> Iterator[phi4edge.Model]:
    with phi4edge.load(nano_bundle, context=1024, kv_type="f32", threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def oracle() -> MediaOracle:
    return MediaOracle.of_checkpoint(CHECKPOINT)


def test_the_questions_are_of_all_families() -> None:
    for path, n_least in N_LEAST.items():
        assert families(items(path)) == FAMILIES
        assert min(sum(item.family == family for item in items(path)) for family in FAMILIES) >= n_least
    both = [*items(TEST_SET), *items(HELD_OUT)]
    assert len({item.name for item in both}) == len({str(item.messages) for item in both}) == len(both)


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.name)
def test_answers_are_those_of_transformers(model: phi4edge.Model, item: Item) -> None:
    """Stored ones: generate() with the processor of transformers and the adapters in PEFT, greedily."""
    expected = theirs()[item.name]
    answer = model.generate(item.messages, max_tokens=64)
    assert (*answer.tokens, *model.tokenizer.encode("<|end|>", special=True)) == expected.tokens
    assert model.tokenizer.decode(answer.tokens, special=True) == expected.text
    assert (answer.finish_reason, answer.adapter) == ("stop", item.adapter)
    assert answer.usage.prompt_tokens == expected.n_prompt_tokens
    logits = model.next_logits(item.messages)
    likeliest = np.argsort(-logits)[: len(expected.top)]
    assert likeliest.tolist() == [token for token, _ in expected.top]
    np.testing.assert_allclose(
        logits[likeliest], [logit for _, logit in expected.top], rtol=0, atol=1e-3 * float(np.ptp(logits))
    )


@pytest.mark.parametrize("mode", MODES)
def test_logits_and_embeddings_are_those_of_transformers(
    nano_bundle: Path, model: phi4edge.Model, oracle: MediaOracle, mode: str
) -> None:
    messages, adapter = MODES[mode]
    tokens = model.encode(messages)
    assert relative_difference(model.next_logits(messages), oracle.logits(tokens, messages, adapter)) <= 1e-3
    theirs = oracle.embeddings(tokens, messages)
    ours = our_embeddings(nano_bundle, model, messages, Reference(nano_bundle / "backbone.gguf").embedding, adapter)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_wrong_adapter_is_seen_in_the_answers(model: phi4edge.Model, family: str) -> None:
    """Every wrong one loses some of them, and one at least half."""
    shares = []
    for adapter in (NO_ADAPTER, *adapters(ITEMS)):
        asked = [item for item in of_family(family) if (item.adapter or NO_ADAPTER) != adapter]
        if asked:
            shares.append(n_right(model, asked, adapter=adapter) / len(asked))
    assert max(shares) < 1
    assert min(shares) <= 0.5


def test_interleaved_conversations_with_different_adapters_do_not_change_each_other(model: phi4edge.Model) -> None:
    asked = [of_family(family)[-1] for family in FAMILIES]
    sessions = [model.session() for _ in asked]
    options: dict[str, Any] = {"max_tokens": 32}
    streams = [
        model.stream(item.messages, session=session, **options) for item, session in zip(asked, sessions, strict=True)
    ]
    together: list[list[int]] = [[] for _ in asked]
    for pieces in zip_longest(*streams):
        for tokens, piece in zip(together, pieces, strict=True):
            tokens += piece.tokens if piece is not None else ()
    for item, tokens, session in zip(asked, together, sessions, strict=True):
        assert tuple(tokens) == theirs()[item.name].tokens[:-1]
        alone = model.next_logits(item.messages)
        np.testing.assert_allclose(model.next_logits(item.messages, session=session), alone, rtol=0, atol=1e-4)


# Type of the backbone -> the least share of right answers, and the largest mean divergence from float32 in nats; about
# three times what was measured.  Adapters in Q8_0 and encoders in int8, as `convert` makes them.
QUALITY = {"q8_0": (0.97, 7e-5), "q4_k_m": (0.96, 3e-3), "q3_k_m": (0.96, 3e-3), "q2_k": (0.92, 5e-3)}


@pytest.fixture(scope="module")
def exact(model: phi4edge.Model) -> dict[Item, Array]:
    found: dict[Item, Array] = {}
    measure(model, ITEMS, found)
    return found


@pytest.mark.parametrize("quant", QUALITY)
def test_quantized_bundles_answer_nearly_as_well(exact: dict[Item, Array], tmp_path: Path, quant: str) -> None:
    convert(CHECKPOINT, tmp_path / "bundle", quant)
    least_right, most_divergent = QUALITY[quant]
    with phi4edge.load(tmp_path / "bundle", context=1024, threads=1) as loaded:
        score = total(measure(loaded, ITEMS, exact))
    print(f"{quant}: {score.n_right} of {score.n} right, mean divergence {score.divergence:.2e}")
    assert score.n_right >= least_right * score.n
    assert score.divergence <= most_divergent
