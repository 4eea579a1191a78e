"""What benchmarks of the kernels measure with: are figures of the right kind, and bad arguments told."""

from __future__ import annotations

import math

import numpy as np
import pytest

from phi4edge import _core
from phi4edge.errors import InputError, UnsupportedError

Q8_0 = next(each for each in _core.formats() if each.name == "Q8_0")
N_ROWS, N_COLUMNS = 48, 256


def matrix() -> _core.PackedMatrix:
    rows = np.random.default_rng(0).standard_normal((N_ROWS, N_COLUMNS), np.float32)
    return _core.PackedMatrix(Q8_0.type_id, _core.quantize(Q8_0.type_id, rows).reshape(-1), N_ROWS, N_COLUMNS)


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("n_threads", [1, 2])
def test_the_int8_limit_is_a_rate_that_a_cpu_may_have(isa: str, n_threads: int) -> None:
    rate = _core.int8_peak(isa, n_threads, 0.02)
    assert math.isfinite(rate)
    # From a small core that takes ten cycles an operation, to four units of 128 operations a cycle at 6 GHz.
    assert 1e7 < rate / n_threads < 4 * 128 * 6e9


def test_the_int8_limit_without_a_name_is_that_of_the_kernels_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI4EDGE_ISA", "no_such_isa")
    with pytest.raises(UnsupportedError, match="no_such_isa"):
        _core.int8_peak("", 1, 0.01)


@pytest.mark.parametrize(
    ("n_threads", "seconds"), [(0, 1.0), (-1, 1.0), (1, 0.0), (1, -1.0), (1, math.nan), (1, 61.0), (100_000, 0.01)]
)
def test_a_limit_of_no_threads_or_of_no_time_is_an_error(n_threads: int, seconds: float) -> None:
    with pytest.raises(InputError):
        _core.int8_peak("scalar", n_threads, seconds)


def test_the_limit_of_an_unknown_instruction_set_is_an_error_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match="scalar"):
        _core.int8_peak("x86_mmx", 1, 0.01)


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("n_copies", [1, 3])
def test_each_repeated_product_has_its_seconds(n_threads: int, n_copies: int) -> None:
    x = np.ones((5, N_COLUMNS), np.float32)
    for isa in _core.isas():
        seconds = matrix().time_multiply(x, _core.ThreadPool(n_threads), 7, n_copies, isa)
        assert len(seconds) == 7
        assert all(0 < each < 10 for each in seconds)


@pytest.mark.parametrize(
    ("n_tokens", "n_repeats", "n_copies"), [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 10**9, 1), (1, 1, 10**9)]
)
def test_products_that_cannot_be_timed_are_an_error(n_tokens: int, n_repeats: int, n_copies: int) -> None:
    with pytest.raises(InputError, match="time_multiply"):
        matrix().time_multiply(np.ones((n_tokens, N_COLUMNS), np.float32), _core.ThreadPool(1), n_repeats, n_copies)


def test_timing_inputs_of_another_size_is_an_error() -> None:
    with pytest.raises(InputError, match=r"\[n, 256\]"):
        matrix().time_multiply(np.ones((1, 255), np.float32), _core.ThreadPool(1), 1)
