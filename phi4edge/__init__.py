"""phi4edge: Phi-4-mini and its relatives on the CPU, quantized.

>>> import phi4edge
>>> model = phi4edge.load("model.gguf")  # doctest: +SKIP
>>> print(model.generate("Why is the sky blue?", max_tokens=64).text)  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "BundleError",
    "Cancelled",
    "FileError",
    "Generation",
    "GenerationConfig",
    "InputError",
    "Model",
    "OutOfMemoryError",
    "Phi4EdgeError",
    "Piece",
    "Recording",
    "Segment",
    "Session",
    "UnsupportedError",
    "UsageError",
    "encoder_providers",
    "inspect",
    "isas",
    "load",
    "transcribe",
]

_HOMES = {
    "Generation": "generation",
    "GenerationConfig": "generation",
    "Piece": "generation",
    "Model": "model",
    "Session": "session",
    "encoder_providers": "encoders",
    "isas": "model",
    "load": "model",
    "inspect": "info",
    "Recording": "transcription",
    "Segment": "transcription",
    "transcribe": "transcription",
    "Phi4EdgeError": "errors",
    "BundleError": "errors",
    "Cancelled": "errors",
    "FileError": "errors",
    "InputError": "errors",
    "OutOfMemoryError": "errors",
    "UnsupportedError": "errors",
    "UsageError": "errors",
}

if TYPE_CHECKING:
    from phi4edge.encoders import encoder_providers
    from phi4edge.errors import (
        BundleError,
        Cancelled,
        FileError,
        InputError,
        OutOfMemoryError,
        Phi4EdgeError,
        UnsupportedError,
        UsageError,
    )
    from phi4edge.generation import Generation, GenerationConfig, Piece
    from phi4edge.info import inspect
    from phi4edge.model import Model, isas, load
    from phi4edge.session import Session
    from phi4edge.transcription import Recording, Segment, transcribe


def __getattr__(name: str) -> Any:
    """Public names on first use, so that the command line starts without loading the decoder."""
    if name not in _HOMES:
        raise AttributeError(f"module 'phi4edge' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"phi4edge.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
