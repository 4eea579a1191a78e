"""Options of a generation: what is out of range is refused with the name of the field."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from phi4edge.errors import UsageError
from phi4edge.generation import Generation, GenerationConfig, Timings, TokenLogprob, Usage

BAD = [
    ("max_tokens", 0),
    ("max_tokens", 1.5),
    ("max_tokens", True),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", "warm"),
    ("top_k", -1),
    ("top_p", 1.1),
    ("min_p", -0.1),
    ("repetition_penalty", 0.0),
    ("presence_penalty", math.inf),
    ("penalty_window", -2),
    ("seed", -1),
    ("seed", 2**64),
    ("stop", [""]),
    ("stop", 5),
    ("stop_tokens", "12"),
    ("logit_bias", [1]),
    ("logit_bias", {-1: 0.0}),
    ("logprobs", -1),
    ("draft_tokens", -1),
    ("draft_tokens", 65),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_value_out_of_range_is_a_usage_error_that_names_the_field(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        GenerationConfig(**{name: value})
    assert caught.value.field.startswith(name)
    assert caught.value.exit_code == 2


def test_an_unknown_option_is_answered_with_similar_ones() -> None:
    with pytest.raises(UsageError, match="temperature"):
        GenerationConfig().merged(temprature=1.0)


def test_merging_replaces_only_what_was_given() -> None:
    config = GenerationConfig(top_k=5, stop="END").merged(temperature=0.5)
    assert (config.top_k, config.stop, config.temperature) == (5, ("END",), 0.5)


def test_an_answer_becomes_json_even_with_impossible_tokens() -> None:
    answer = Generation("hi", (1,), "stop", Usage(3, 1, 1), Timings(), (TokenLogprob(1, -math.inf, ((2, -0.5),)),))
    document = json.loads(json.dumps(answer.as_json(), allow_nan=False))
    counts = {"prompt_tokens": 3, "cached_tokens": 1, "completion_tokens": 1}
    others = ("image_tokens", "audio_tokens", "drafted_tokens", "accepted_tokens")
    assert document["usage"] == counts | dict.fromkeys(others, 0)
    assert document["logprobs"][0]["logprob"] is None
