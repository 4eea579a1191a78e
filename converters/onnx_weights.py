"""Tensors of an encoder, each checked when it is planned and read when it is written."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phi4edge.converters.checkpoint import FLOATS, Checkpoint, SourceTensor
from phi4edge.converters.files import Progress
from phi4edge.errors import BundleError

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Weight:
    """One tensor of the source, or several below each other."""

    owner: Weights
    name: str  # that of transformers, whatever the layout
    sources: tuple[SourceTensor, ...]

    @property
    def source(self) -> SourceTensor:
        return self.sources[0]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.source.shape
        return shape if len(self.sources) == 1 else (sum(source.shape[0] for source in self.sources), *shape[1:])

    def read(self, largest: float = math.inf) -> Array:
        """The values in its shape; BundleError when one is not finite, or its magnitude above ``largest``."""
        values = [self.owner.read(source, largest) for source in self.sources]
        return values[0] if len(values) == 1 else np.concatenate(values)


def stack(name: str, *weights: Weight) -> Weight:
    """Weights of one width below each other as one, such as those of queries, keys and values."""
    return Weight(weights[0].owner, name, tuple(source for weight in weights for source in weight.sources))


class Weights:
    """The tensors of one encoder by the names of transformers, without the encoder's prefix ("image_embed.").

    What was taken but for ``unused_names`` must be all there is; see :meth:`names`.
    """

    def __init__(self, checkpoint: Checkpoint, tensors: Mapping[str, SourceTensor], prefix: str) -> None:
        self._checkpoint = checkpoint
        self._prefix = prefix
        self._tensors = {
            name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
        }
        self._taken: dict[str, SourceTensor] = {}
        self._digest = hashlib.sha256()
        self._done = 0
        self.progress: Progress = lambda name, done, total: None

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; BundleError when there is none."""
        return self._require(name).shape

    def rows(self, name: str) -> int:
        """Entries along the first axis of a tensor; BundleError when there is none."""
        tensor = self._require(name)
        if not math.prod(tensor.shape) or not tensor.shape:
            raise BundleError(
                f"has the shape {list(tensor.shape)}, which is empty",
                path=str(tensor.path),
                field=f"tensor '{tensor.name}'",
            )
        return tensor.shape[0]

    def take(self, name: str, *shape: int) -> Weight:
        """A tensor that will be written; BundleError when it is missing or has another shape or no float type."""
        tensor = self._require(name)
        field = f"tensor '{tensor.name}'"
        if tensor.shape != shape:
            raise BundleError(
                f"has the shape {list(tensor.shape)}, expected {list(shape)}", path=str(tensor.path), field=field
            )
        if tensor.dtype not in FLOATS:
            raise BundleError(
                f"is {tensor.dtype}, expected {', '.join(sorted(FLOATS))}", path=str(tensor.path), field=field
            )
        self._taken[name] = tensor
        return Weight(self, self._prefix + name, (tensor,))

    def not_taken(self) -> set[str]:
        return self.names() - set(self._taken)

    def source_name(self, name: str) -> str:
        """What the checkpoint calls a tensor."""
        return self._tensors[name].name

    @property
    def n_bytes(self) -> int:
        """Of the source, of all tensors that were taken."""
        return sum(tensor.n_bytes for tensor in self._taken.values())

    @property
    def source_sha256(self) -> str:
        """Of the tensors that were read so far."""
        return self._digest.hexdigest()

    def read(self, tensor: SourceTensor, largest: float) -> Array:
        self.progress(tensor.name, self._done, self.n_bytes)
        values = self._checkpoint.array(tensor)
        if not np.isfinite(values).all():
            raise BundleError(
                "has a NaN or an infinity",
                path=str(tensor.path),
                field=f"tensor '{tensor.name}'",
                hint="download it again, or repair the checkpoint",
            )
        if (found := float(max(values.max(initial=0), -values.min(initial=0)))) > largest:
            raise BundleError(
                f"has a weight of {found:.3g}, too large for fp16",
                path=str(tensor.path),
                field=f"tensor '{tensor.name}'",
                hint="use --encoders fp32",
            )
        self._digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}\n".encode())
        self._digest.update(values.data)
        self._done += tensor.n_bytes
        return values

    def _require(self, name: str) -> SourceTensor:
        if name not in self._tensors:
            raise BundleError(
                f"lacks the tensor '{self._prefix}{name}'",
                path=str(self._checkpoint.directory),
                hint="download it again, or use --encoders none",
            )
        return self._tensors[name]
