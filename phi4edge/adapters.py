"""The adapters of a model by name: those of its bundle, read when first asked for, and those that the user adds."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from phi4edge.errors import UsageError

NO_ADAPTER = "none"  # what a user writes for the model as it is; no adapter may be called so

Loaded = TypeVar("Loaded")
StrPath = str | os.PathLike[str]


class AdapterSet(Generic[Loaded]):
    """Names, files, and what was read from them.

    Example: ``AdapterSet({"vision": Path("vision.lora.gguf")}).get("vision", read_file)``.
    """

    def __init__(self, files: Mapping[str, StrPath]) -> None:
        self._files = dict(files)  # those of the bundle
        self._loaded: dict[str, Loaded] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All that can be asked for, those of the bundle first."""
        return tuple({**self._files, **self._loaded})

    def add(self, name: str, path: StrPath, load: Callable[[StrPath], Loaded]) -> None:
        """Raises UsageError for a name that is taken or none, and what ``load`` raises; then nothing has changed."""
        if not isinstance(name, str) or not name.strip():
            raise UsageError(f"must be a text that is not empty, got {name!r:.80}", field="adapter")
        if name in (*self.names, NO_ADAPTER):
            raise UsageError(f"the name {name!r:.80} is taken", field="adapter", hint="choose another one")
        self._loaded[name] = load(path)

    def get(self, name: str, load: Callable[[StrPath], Loaded]) -> Loaded:
        """The adapter, read from the bundle if it was not yet.  UsageError lists the names when there is none."""
        self._require(name)
        if name not in self._loaded:
            self._loaded[name] = load(self._files[name])
        return self._loaded[name]

    def remove(self, name: str) -> None:
        """Forgets the adapter.  One of the bundle keeps its name, and is read again when asked for."""
        self._require(name)
        self._loaded.pop(name, None)

    def _require(self, name: str) -> None:
        if not isinstance(name, str) or name not in self.names:
            known = f"the adapters are {', '.join(self.names)}" if self.names else "the model has none"
            raise UsageError(f"there is no adapter {name!r:.80}", field="adapter", hint=known)


def checked_scale(scale: object) -> float:
    """A finite number; UsageError otherwise."""
    try:
        if isinstance(scale, int | float) and not isinstance(scale, bool) and math.isfinite(scale):
            return float(scale)
    except OverflowError:  # an integer of hundreds of digits
        raise UsageError("must be a finite number, got one too large", field="adapter_scale") from None
    raise UsageError(f"must be a finite number, got {scale!r:.80}", field="adapter_scale")
