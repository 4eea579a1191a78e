"""Phi-4 models on the edge: a small CPU runtime for GGUF files."""

from __future__ import annotations

__version__ = "0.1.0"
