"""Rows of weights in the formats of GGUF."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from phi4edge import _core
from phi4edge.errors import BundleError

Array = npt.NDArray[np.float32]

VALUES_AT_ONCE = 4 << 20  # that are read, quantized and written together

_NUMPY_TYPES = ("F32", "F16", "BF16")
_WIDE_TYPES = ("F32", "BF16")  # the others hold half-precision numbers
_LARGEST_HALF = 65504.0


def encode(rows: Array, type_name: str, n_threads: int, importance: Array | None = None) -> npt.NDArray[Any]:
    """float32 [n_rows, n_columns] in a format; ``importance`` weighs the columns' errors, float32 [n_columns]."""
    if type_name == "F32":
        return rows
    type_id = GGMLQuantizationType[type_name]
    if type_name in _NUMPY_TYPES:
        return np.asarray(gguf.quants.quantize(rows, type_id))
    return np.asarray(_core.quantize(int(type_id), rows, n_threads, importance=importance))


def encoded_bytes(shape: tuple[int, ...], type_name: str) -> int:
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return math.prod(shape) // block_values * block_bytes


def require_fitting(values: Array, type_name: str, path: Path, tensor: str) -> None:
    """BundleError, with the tensor's name, for values that are not finite or too large for the format."""
    # One pass each, without a temporary: NaN and infinities show in the extremes.
    low, high = float(values.min()), float(values.max())
    field = f"tensor '{tensor[:200]}'"
    if not (math.isfinite(low) and math.isfinite(high)):
        raise BundleError(
            "has a NaN or an infinity", path=str(path), field=field, hint="download it again, or repair the weights"
        )
    if type_name not in _WIDE_TYPES and max(-low, high) > _LARGEST_HALF:
        problem = f"has a value of {max(-low, high):.3g}, too large for {type_name}"
        raise BundleError(problem, path=str(path), field=field, hint="use bf16 or f32")
