"""Quantized models stay at least as close to the exact answer as llama.cpp does.

The exact answer is reference.py on the dequantized weights of the same file, so only the arithmetic of a runtime is
judged: activations in 8 bits, the 16-bit KV cache, the order of additions.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import phi4edge
from peers import LlamaCpp
from phi4edge import _core
from reference import Reference, log_probabilities, mean_divergence, same_choices
from tiny_models import PURE_FILE_TYPES, quantized_gguf, tiny_gguf

N_TOKENS = 512
NOISE = 5e-4  # a divergence that nobody can see: below it nothing is compared
FILE_TYPES = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS"]
FILE_TYPES += ["Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K"]

Logits = npt.NDArray[np.float32]  # here: log-probabilities, [N_TOKENS, vocab]


@dataclass(frozen=True)
class Case:
    """A file, a text, and what others make of it."""

    path: Path
    tokens: list[int]
    exact: Logits
    llama_cpp: Logits

    @staticmethod
    def of(path: Path, tokens: list[int]) -> Case:
        with closing(LlamaCpp(path, n_context=N_TOKENS)) as peer:
            theirs = log_probabilities(peer.logits(tokens))
        return Case(path, tokens, log_probabilities(Reference(path).logits(tokens)), theirs)

    def check(self, logits: Logits) -> None:
        ours = log_probabilities(logits)
        our_share, their_share = same_choices(self.exact, ours), same_choices(self.exact, self.llama_cpp)
        our_divergence = mean_divergence(self.exact, ours)
        their_divergence = mean_divergence(self.exact, self.llama_cpp)
        apart = mean_divergence(self.llama_cpp, ours)
        print(
            f"{self.path.stem}: from exact, ours {our_divergence:.2e} (same choice {our_share:.3f}), "
            f"llama.cpp {their_divergence:.2e} ({their_share:.3f}); from each other {apart:.2e}"
        )
        assert our_divergence <= max(their_divergence, NOISE)
        # Independent errors add up, so two good runtimes may be further from each other than from the truth.
        assert apart <= max(5e-3, 1.25 * (our_divergence + their_divergence))
        # Some of the 512 choices are near-ties that any rounding turns; llama.cpp says how many, within 1.5 points.
        assert our_share >= min(0.97, their_share - 0.015)


@cache
def tiny_case(directory: Path, file_type: str) -> Case:
    path = tiny_gguf(directory, file_type, rotary_fraction=0.75, original_context=4096, context=131072)
    return Case.of(path, np.random.default_rng(2).integers(0, 512, N_TOKENS).tolist())


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("file_type", PURE_FILE_TYPES)
def test_a_tiny_model_of_one_type_is_as_good_as_in_llama_cpp(
    file_type: str, isa: str, n_threads: int, models: Path
) -> None:
    case = tiny_case(models, file_type)
    with phi4edge.load(case.path, context=N_TOKENS, threads=n_threads, isa=isa) as model:
        case.check(model.logits(case.tokens))


def test_every_format_we_read_is_among_the_tested() -> None:
    assert {entry.name for entry in _core.formats()} == set(PURE_FILE_TYPES)


@pytest.mark.parametrize("file_type", ["as shipped", *FILE_TYPES])
def test_a_trained_model_is_as_good_as_in_llama_cpp(
    file_type: str, smollm2: Path, english: str, tmp_path: Path
) -> None:
    path = smollm2
    if file_type != "as shipped":
        path = quantized_gguf(smollm2, f"MOSTLY_{file_type}", tmp_path / f"smollm2-{file_type}.gguf")
    with phi4edge.load(path, context=N_TOKENS, threads=2) as model:
        tokens = model.tokenizer.encode(english)[:N_TOKENS]
        assert len(tokens) == N_TOKENS
        ours = model.logits(tokens)
    Case.of(path, tokens).check(ours)
    if path != smollm2:
        path.unlink()
