"""Kernels against the definition of each format, in float64: every instruction set, format, odd size and batch."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from phi4edge import _core

FORMATS = {f.name: f for f in _core.formats()}
QUANTIZED = [name for name, f in FORMATS.items() if not f.is_float]


def random_blocks(name: str, n_rows: int, n_columns: int, seed: int = 0) -> np.ndarray:
    """Valid random blocks of a format: random codes, scales of a sensible size."""
    info = FORMATS[name]
    rng = np.random.default_rng(seed)
    n_blocks = n_rows * n_columns // info.block_values
    if name == "F32":
        return rng.standard_normal(n_blocks, dtype=np.float32).view(np.uint8)
    if name == "F16":
        return rng.standard_normal(n_blocks).astype(np.float16).view(np.uint8)
    if name == "BF16":
        return (rng.standard_normal(n_blocks, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    blocks = rng.integers(0, 256, (n_blocks, info.block_bytes), dtype=np.uint8)
    halves = {  # byte offsets of the half-precision scales of a block
        "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108],
        "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
    }[name]  # fmt: skip
    for at in halves:
        blocks[:, at : at + 2] = rng.normal(0, 0.02, n_blocks).astype(np.float16).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(-1)


def exact_weights(name: str, blocks: np.ndarray, n_rows: int, n_columns: int) -> np.ndarray:
    """The weights by the gguf package's own definition."""
    kind = gguf.GGMLQuantizationType[name]
    return gguf.quants.dequantize(blocks.reshape(n_rows, -1), kind).reshape(n_rows, n_columns)


def columns_of(name: str) -> list[int]:
    unit = FORMATS[name].block_values
    return {1: [1, 7, 64, 300], 32: [32, 96, 256, 288, 576], 256: [256, 768]}[unit]


@pytest.mark.parametrize("name", FORMATS)
def test_dequantization_equals_the_gguf_package_block_for_block(name: str) -> None:
    n_columns = 512
    blocks = random_blocks(name, 40, n_columns)
    ours = _core.dequantize(FORMATS[name].type_id, blocks, 40 * n_columns)
    theirs = exact_weights(name, blocks, 40, n_columns).reshape(-1)
    np.testing.assert_allclose(ours, theirs, rtol=2e-7, atol=0)


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("name", FORMATS)
def test_packed_rows_unpack_to_the_same_weights(name: str, isa: str) -> None:
    for n_columns in columns_of(name):
        blocks = random_blocks(name, 21, n_columns, seed=n_columns)
        matrix = _core.PackedMatrix(FORMATS[name].type_id, blocks, 21, n_columns)
        expected = exact_weights(name, blocks, 21, n_columns)
        for row in (0, 9, 15, 16, 20):
            np.testing.assert_allclose(matrix.row(row, isa), expected[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_as_exact_as_eight_bit_activations_allow(name: str, isa: str, n_threads: int) -> None:
    pool = _core.ThreadPool(n_threads)
    for n_columns in columns_of(name):
        for n_rows, n_tokens in ((1, 1), (16, 2), (33, 5), (70, 9), (48, 23)):
            blocks = random_blocks(name, n_rows, n_columns, seed=n_rows)
            matrix = _core.PackedMatrix(FORMATS[name].type_id, blocks, n_rows, n_columns)
            x = np.random.default_rng(7).standard_normal((n_tokens, n_columns)).astype(np.float32)
            weights = exact_weights(name, blocks, n_rows, n_columns).astype(np.float64)
            expected = x.astype(np.float64) @ weights.T
            error = np.abs(matrix.multiply(x, pool, isa) - expected)
            # The scale of a sum of products of these magnitudes, element by element.
            scale = np.sqrt((x.astype(np.float64) ** 2) @ (weights.T**2))
            tolerance = 1e-5 if FORMATS[name].is_float else 0.045
            assert error.max() <= tolerance * scale.max(), (n_rows, n_columns, n_tokens)


@pytest.mark.parametrize("name", QUANTIZED)
def test_all_instruction_sets_compute_the_same_integers(name: str) -> None:
    """The scalar kernels are the reference; others differ from them by float rounding alone."""
    n_rows, n_columns = 40, columns_of(name)[-1]
    blocks = random_blocks(name, n_rows, n_columns)
    matrix = _core.PackedMatrix(FORMATS[name].type_id, blocks, n_rows, n_columns)
    pool = _core.ThreadPool(2)
    for n_tokens in (1, 3, 8, 30):
        x = np.random.default_rng(1).standard_normal((n_tokens, n_columns)).astype(np.float32)
        x[:, 5] *= 100  # an outlier channel: the exponents of the activation blocks differ
        reference = matrix.multiply(x, pool, "scalar")
        for isa in _core.isas():
            np.testing.assert_allclose(
                matrix.multiply(x, pool, isa), reference, rtol=0, atol=2e-5 * np.abs(reference).max()
            )


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("name", FORMATS)
def test_a_token_does_not_depend_on_its_neighbours(name: str, isa: str) -> None:
    n_columns = columns_of(name)[-1]
    matrix = _core.PackedMatrix(FORMATS[name].type_id, random_blocks(name, 50, n_columns), 50, n_columns)
    x = np.random.default_rng(3).standard_normal((40, n_columns)).astype(np.float32)
    together = matrix.multiply(x, _core.ThreadPool(2), isa)
    pool = _core.ThreadPool(1)
    for n in (1, 2, 4, 7, 13):
        pieces = np.concatenate([matrix.multiply(x[i : i + n], pool, isa) for i in range(0, 40, n)])
        np.testing.assert_array_equal(pieces, together)


@pytest.mark.parametrize("isa", _core.isas())
def test_extreme_codes_and_activations_do_not_overflow(isa: str) -> None:
    pool = _core.ThreadPool(1)
    for name in QUANTIZED:
        n_columns = columns_of(name)[-1]
        for fill in (0x00, 0xFF, 0x80, 0x7F):
            blocks = random_blocks(name, 16, n_columns).reshape(-1, FORMATS[name].block_bytes)
            keep = random_blocks(name, 16, n_columns, seed=2).reshape(blocks.shape)
            blocks[:] = fill
            for at in {"Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208]}.get(
                name, [0, 2] if name[-1] == "1" or name in ("Q4_K", "Q5_K") else [0]
            ):
                blocks[:, at : at + 2] = keep[:, at : at + 2]
            matrix = _core.PackedMatrix(FORMATS[name].type_id, blocks.reshape(-1), 16, n_columns)
            for sign in (1.0, -1.0):
                x = np.full((9, n_columns), sign * 3.0, np.float32)
                weights = exact_weights(name, blocks.reshape(-1), 16, n_columns).astype(np.float64)
                expected = x.astype(np.float64) @ weights.T
                np.testing.assert_allclose(
                    matrix.multiply(x, pool, isa), expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max() + 1e-6
                )


def test_an_unknown_instruction_set_is_an_error_that_lists_the_known_ones() -> None:
    from phi4edge.errors import UnsupportedError

    matrix = _core.PackedMatrix(0, np.zeros(64, np.uint8), 1, 16)
    with pytest.raises(UnsupportedError, match="scalar"):
        matrix.multiply(np.zeros((1, 16), np.float32), _core.ThreadPool(1), "mips_msa")
