"""Which adapter a request needs and which projector its sounds go through: decided by what the request has in it.

>>> Router({"image": {"adapter": "vision"}}).route({"image"}, adapters=["vision"])
Route(adapter='vision', audio_branch=None, merged=None, warning='')

The choice holds for the whole sequence, answer included; in a conversation everything said so far counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from phi4edge.adapters import NO_ADAPTER
from phi4edge.bundle import BACKBONE, MANIFEST, Bundle
from phi4edge.encoders import BRANCHES, Branch
from phi4edge.errors import BundleError, InputError

TEXT, IMAGE, AUDIO = "text", "image", "audio"
_NAMES = {TEXT: "text", IMAGE: "an image", AUDIO: "a sound", f"{IMAGE}+{AUDIO}": "an image with a sound"}
_FIELDS = ("adapter", "audio_branch")


@dataclass(frozen=True, slots=True)
class Route:
    """What one request runs with."""

    adapter: str | None  # to apply to the weights
    audio_branch: Branch | None  # None: the request has no sound
    merged: str | None = None  # the adapter that is in the weights already
    warning: str = ""  # for people


class Router:
    """The ``router`` entry of a manifest; an empty one is that of a model for text alone.

    merged: name of the adapter that the weights of the backbone include.
    path: of the manifest, for messages.  Raises BundleError for an entry that cannot be meant.
    """

    def __init__(self, table: Mapping[str, Any], *, merged: str | None = None, path: str = "") -> None:
        self._path = path
        self.merged = merged
        for key in table:
            if key not in _NAMES:
                self._refuse(f"is not one of {', '.join(_NAMES)}", f"router.{key:.40}")
        self._entries = {key: self._checked(key, entry) for key, entry in table.items()}

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Router:
        """Raises BundleError."""
        path = str(bundle.directory / MANIFEST)
        merged = next(
            (part.details.get("merged_adapter") for part in bundle.manifest.parts if part.role == BACKBONE), None
        )
        if merged is not None and not isinstance(merged, str):
            raise BundleError(f"{merged!r:.80} is not a name", path=path, field="merged_adapter")
        return cls(bundle.manifest.router, merged=merged, path=path)

    def route(self, kinds: Collection[str], *, adapters: Collection[str] = (), override: str | None = None) -> Route:
        """How to run a request.

        kinds: "image" and "audio", as far as the conversation has them.
        adapters: names that could be applied.
        override: an adapter that the user asked for, whatever the request has; "none" for none.

        Raises InputError when the bundle cannot answer such a request, BundleError when it does not say how.
        """
        key = "+".join(kind for kind in (IMAGE, AUDIO) if kind in kinds) or TEXT
        if key != TEXT and key not in self._entries:
            self._refuse(f"does not say which adapter {_NAMES[key]} needs", f"router.{key}")
        needed, branch = self._entries.get(key, (None, None))
        if override is not None:
            return Route(None if override == NO_ADAPTER else override, branch, self.merged)
        if needed is not None and needed == self.merged:
            return Route(None, branch, self.merged)
        if self.merged is not None and needed is not None:
            raise InputError(
                f"{_NAMES[key]} needs the adapter '{needed}', and '{self.merged}' is merged into this model",
                hint="use a bundle with switchable adapters",
            )
        if needed is not None and needed not in adapters:
            raise InputError(
                f"{_NAMES[key]} needs the adapter '{needed}', which this bundle does not have",
                hint="convert the checkpoint again with its adapters, or name another adapter",
            )
        return Route(needed, branch, self.merged, self._warning() if needed is None else "")

    def _warning(self) -> str:
        """For text on weights that were made for pictures or sounds; a user's own merged adapter is meant for text."""
        if self.merged is None or all(adapter != self.merged for adapter, _ in self._entries.values()):
            return ""
        return f"the adapter '{self.merged}' is merged into this model, and text should be answered without it"

    def _checked(self, key: str, entry: object) -> tuple[str | None, Branch | None]:
        field = f"router.{key}"
        if not isinstance(entry, Mapping) or any(name not in _FIELDS for name in entry):
            self._refuse(f"is not an object with {' and '.join(_FIELDS)}", field)
        adapter, branch = (entry.get(name) for name in _FIELDS)
        if adapter is not None and (not isinstance(adapter, str) or not adapter):
            self._refuse(f"{adapter!r:.80} is not a name", f"{field}.adapter")
        if AUDIO in key and branch not in BRANCHES:
            self._refuse(f"{branch!r:.80} is not one of {', '.join(BRANCHES)}", f"{field}.audio_branch")
        if AUDIO not in key and branch is not None:
            self._refuse("is for requests with a sound", f"{field}.audio_branch")
        return adapter, branch

    def _refuse(self, problem: str, field: str) -> NoReturn:
        raise BundleError(problem, path=self._path, field=field, hint="convert the checkpoint again")
