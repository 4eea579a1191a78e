"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_models import smollm2_path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which tiny models are made once per test run."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, a small model that was really trained."""
    return smollm2_path()


@pytest.fixture(scope="session")
def english() -> str:
    """About 540 tokens of plain English with a little code."""
    return (Path(__file__).parent / "data" / "text.txt").read_text(encoding="utf-8")
