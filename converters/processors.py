"""Numbers of the image and audio processors, from the files that come with a checkpoint to the manifest.

The original processor writes few of them down; the others are constants of its code (and of Phi4MultimodalProcessor in
transformers), which stand here.
"""

from __future__ import annotations

import math
from typing import Any

from phi4edge.converters.checkpoint import Checkpoint
from phi4edge.errors import BundleError

_IMAGE: dict[str, Any] = {
    "crop_size": 448,  # pixels
    "patch_size": 14,
    "max_crops": 36,  # dynamic_hd: the largest grid
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}
_AUDIO: dict[str, Any] = {
    "sampling_rate": 16000,  # Hz
    "feature_size": 80,  # mel bands
    "win_length": 400,  # samples
    "hop_length": 160,
    "n_fft": 512,
    "preemphasis": 0.97,
    "audio_compression_rate": 8,  # frames a token
}
# What only one value of is implemented by the features of this model.
_FIXED = ("audio_downsample_rate", 1), ("audio_feat_stride", 1), ("rescale_factor", 1 / 255)


def read_processors(checkpoint: Checkpoint, crop_size: int | None) -> dict[str, Any]:
    """{"image": {...}, "audio": {...}}; crop_size is what the vision tower takes.  Raises BundleError."""
    both = checkpoint.optional_json("preprocessor_config.json")
    nested = checkpoint.optional_json("processor_config.json")
    image = {**both, **_object(nested, "image_processor")}
    audio = {**both, **_object(nested, "audio_processor")}
    for key, value in _FIXED:
        for found in (image.get(key), audio.get(key)):
            if found is not None and not (isinstance(found, (int, float)) and math.isclose(found, value, rel_tol=1e-6)):
                raise _wrong(key, f"{found!r:.40} is not supported, only {value:g}")
    size = _object(image, "size").get("height", image.get("crop_size", crop_size or _IMAGE["crop_size"]))
    if crop_size is not None and size != crop_size:
        raise _wrong("size", f"{size!r:.40} is not the {crop_size} pixels of the vision tower's crops")
    wanted = {"crop_size": size, "max_crops": image.get("dynamic_hd"), "mean": image.get("image_mean")}
    wanted |= {"std": image.get("image_std"), "patch_size": image.get("patch_size")}
    return {
        "image": {key: _number(key, wanted.get(key), default) for key, default in _IMAGE.items()},
        "audio": {key: _number(key, audio.get(key), default) for key, default in _AUDIO.items()},
    }


def _number(key: str, value: Any, default: Any) -> Any:
    """The value if it is like the default: a positive number, or a list of so many."""
    if value is None:
        return default
    if isinstance(default, list):
        if not isinstance(value, list) or len(value) != len(default):
            raise _wrong(key, f"{value!r:.60} is not a list of {len(default)} numbers")
        return [_number(key, entry, entry_default) for entry, entry_default in zip(value, default, strict=True)]
    kinds = (int, float) if isinstance(default, float) else (int,)
    if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise _wrong(key, f"{value!r:.60} is not a positive {'number' if float in kinds else 'integer'}")
    return value


def _object(table: dict[str, Any], key: str) -> dict[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise _wrong(key, "is not an object")
    return value


def _wrong(field: str, problem: str) -> BundleError:
    return BundleError(problem, path="preprocessor_config.json", field=field)
