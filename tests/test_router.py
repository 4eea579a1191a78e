"""The router: which adapter and which projector a request gets, and what a manifest must not say about it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from phi4edge.errors import BundleError, InputError
from phi4edge.router import Route, Router

TABLE: dict[str, Any] = {
    "text": {},
    "image": {"adapter": "vision"},
    "audio": {"adapter": "speech", "audio_branch": "speech"},
    "image+audio": {"adapter": "vision", "audio_branch": "vision"},
}
BOTH = ("vision", "speech")
EXPECTED: list[tuple[set[str], str | None, str | None]] = [  # as the original model does it
    (set(), None, None),
    ({"image"}, "vision", None),
    ({"audio"}, "speech", "speech"),
    ({"audio", "image"}, "vision", "vision"),
]


@pytest.mark.parametrize("kinds, adapter, branch", EXPECTED)
def test_the_media_of_a_request_choose_adapter_and_projector(
    kinds: set[str], adapter: str | None, branch: str | None
) -> None:
    assert Router(TABLE).route(kinds, adapters=BOTH) == Route(adapter, branch)  # type: ignore[arg-type]
    # Another adapter may be asked for; the projector is a matter of the media.
    assert Router(TABLE).route(kinds, adapters=BOTH, override="law") == Route("law", branch)  # type: ignore[arg-type]


@pytest.mark.parametrize("kinds, adapter, branch", EXPECTED)
@pytest.mark.parametrize("merged", ["vision", "speech", "law"])
def test_a_merged_adapter_serves_those_who_need_it_and_text(
    merged: str, kinds: set[str], adapter: str | None, branch: str | None
) -> None:
    router = Router(TABLE, merged=merged)
    if adapter == merged:
        assert router.route(kinds) == Route(None, branch, merged)  # type: ignore[arg-type]
    elif adapter is None:
        route = router.route(kinds)
        assert (route.adapter, route.merged) == (None, merged)
        # The model was not trained to answer text with these two; a user's own adapter was merged for that.
        assert (f"'{merged}' is merged" in route.warning) == (merged != "law")
    else:
        with pytest.raises(InputError, match=f"needs the adapter '{adapter}', and '{merged}' is merged"):
            router.route(kinds, adapters=BOTH)


def test_an_adapter_that_is_needed_and_missing_is_an_error() -> None:
    with pytest.raises(
        InputError, match="an image with a sound needs the adapter 'vision', which this bundle does not"
    ):
        Router(TABLE).route({"image", "audio"}, adapters=["speech"])
    assert Router(TABLE).route(()) == Route(None, None)


def test_media_without_an_entry_are_an_error_and_text_needs_none() -> None:
    router = Router({}, path="b/manifest.json")
    assert router.route(()) == Route(None, None)
    with pytest.raises(BundleError, match=re.escape("b/manifest.json: router.image+audio: does not say")):
        router.route({"image", "audio"})


@pytest.mark.parametrize(
    "table, field",
    [
        ({"video": {}}, "router.video"),
        ({"audio+image": {}}, "router.audio+image"),
        ({"image": "vision"}, "router.image"),
        ({"image": None}, "router.image"),
        ({"image": {"adapter": ["vision"]}}, "router.image.adapter"),
        ({"image": {"adapter": ""}}, "router.image.adapter"),
        ({"image": {"lora": "vision"}}, "router.image"),
        ({"image": {"audio_branch": "vision"}}, "router.image.audio_branch"),
        ({"text": {"audio_branch": "speech"}}, "router.text.audio_branch"),
        ({"audio": {"adapter": "speech"}}, "router.audio.audio_branch"),
        ({"audio": {"audio_branch": 1}}, "router.audio.audio_branch"),
        ({"image+audio": {"audio_branch": "music"}}, "router.image+audio.audio_branch"),
    ],
)
def test_an_entry_that_cannot_be_meant_is_an_error_when_it_is_read(table: dict[str, Any], field: str) -> None:
    with pytest.raises(BundleError, match=re.escape(f"m.json: {field}: ")):
        Router(table, path="m.json")
