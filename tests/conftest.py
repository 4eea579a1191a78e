"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from tiny_models import smollm2_path

NANO = Path(__file__).parent / "data" / "nano"


def _offer_benchmarks() -> None:
    """Makes the package of the checkout importable, but not phi4edge beside it: that is the installed one."""
    path = Path(__file__).parent.parent / "benchmarks" / "__init__.py"
    spec = importlib.util.spec_from_file_location("benchmarks", path)
    if spec is None:
        raise ImportError(str(path))
    sys.modules.setdefault("benchmarks", importlib.util.module_from_spec(spec))


_offer_benchmarks()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which tiny models are made once per test run."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, a small model that was really trained."""
    return smollm2_path()


@pytest.fixture(scope="session")
def nano_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained tiny Phi-4-multimodal, everything in float32."""
    from phi4edge.converters.convert import convert

    path = tmp_path_factory.mktemp("nano") / "bundle"
    convert(NANO / "checkpoint", path, "F32", encoders="fp32", adapter_quant="F32")
    return path


@pytest.fixture(scope="session")
def english() -> str:
    """About 540 tokens of plain English with a little code."""
    return (Path(__file__).parent / "data" / "text.txt").read_text(encoding="utf-8")
