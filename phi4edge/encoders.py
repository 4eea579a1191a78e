"""Images and sounds to embeddings of the decoder, with onnxruntime and the ONNX files of a bundle.

>>> with VisionEncoder("bundle/vision.onnx", 3072, threads=4) as encoder:  # doctest: +SKIP
...     features = encoder.encode(pixel_values, patch_mask)
>>> features.crops.shape  # doctest: +SKIP
(5, 256, 3072)

A file is opened once: it is checked through that descriptor before onnxruntime is even imported.  On Linux onnxruntime
then reads the same file again through the descriptor, so that a file that is renamed over the path in the meantime is
not seen; elsewhere it opens the path.  In both cases a file that is not the same afterwards is refused.

What a provider cannot run, the CPU runs, and the encoder says so: see ``provider`` and ``warnings``.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from phi4edge import machine
from phi4edge.errors import BundleError, Cancelled, InputError, OutOfMemoryError, UnsupportedError, UsageError
from phi4edge.onnx_file import OnnxSummary, TensorInfo, inspect_file, open_onnx
from phi4edge.providers import AUTO, CPU, PROVIDERS, check_name, choose, installed, memory_need

if TYPE_CHECKING:
    from typing_extensions import Self

VERSION = "1"  # of the contract between the converters' graphs and this module
PATCH = 14  # pixels; one token is 2 x 2 patches
N_MELS = 80
FRAMES_PER_TOKEN = 8
WINDOW = 500  # tokens that the audio encoder sees at once: 40 s

_SEVERITY = 2  # from which on onnxruntime writes to stderr by default: warnings
_HINT = "close other programs, or use int8 encoders"  # when memory is short

Branch = Literal["speech", "vision"]
BRANCHES: tuple[Branch, ...] = ("speech", "vision")
Progress = Callable[[int, int], bool | None]  # (crops or tokens done, in all); False cancels
FreeMemory = Callable[[], int]  # bytes
Float32 = npt.NDArray[np.float32]
Shape = tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True)
class VisionFeatures:
    """``crops`` float32 [n, (S/28)^2, hidden], row by row; the separators of rows and views float32 [hidden]."""

    crops: Float32
    row_separator: Float32
    view_separator: Float32


@contextmanager
def _quiet(onnxruntime: Any) -> Iterator[None]:
    """Keeps what a provider writes to stderr while it starts away, where the session's own severity does not help.

    The severity belongs to the whole process, and nobody tells what it was before: afterwards it is onnxruntime's own.
    """
    onnxruntime.set_default_logger_severity(4)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(_SEVERITY)


def encoder_providers() -> list[str]:
    """What the installed onnxruntime can run encoders on, by names of ``PROVIDERS``; UnsupportedError without one."""
    return installed(_onnxruntime().get_available_providers())


def check_provider(name: str) -> None:
    """UsageError or UnsupportedError for a provider that encoders could not be asked to run on.

    Only for one that was named is onnxruntime imported: a text needs none.
    """
    check_name(name)
    if name not in (AUTO, CPU):
        choose(name, _onnxruntime().get_available_providers())


class _Encoder(ABC):
    """A session of onnxruntime for a file that keeps the contract of its kind.

    ``provider`` is the one that runs it: "cpu" when the one that was asked for cannot, None when it was only checked.
    ``warnings`` tell what the CPU runs in its place.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        kind: str,
        hidden_size: int,
        threads: int,
        provider: str | None,
        free_memory: FreeMemory | None,
    ) -> None:
        if threads < 1:
            raise UsageError(f"{threads} threads cannot work", field="threads")
        if provider is not None:
            check_name(provider)
        self.path = os.fspath(path)
        self.hidden_size = hidden_size
        self.provider: str | None = None
        self.warnings: tuple[str, ...] = ()
        self._threads = threads
        self._free_memory = free_memory
        self._session: Any = None
        with open_onnx(path) as file:
            self._opened = _identity(file.fileno())
            self.summary: OnnxSummary = inspect_file(file, self.path)
            self._check_metadata(kind)
            self._check_contract()
            if provider is not None:
                self._open(file, provider)

    @property
    def is_open(self) -> bool:
        return self._session is not None

    def close(self) -> None:
        """Releases the weights.  A closed encoder cannot be used again."""
        self._session = None
        machine.return_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _contract(self) -> tuple[Mapping[str, tuple[str, Shape]], Mapping[str, tuple[str, Shape]]]:
        """Inputs and outputs: name -> element type and shape, in which a string stands for an axis of any length."""

    def _check_metadata(self, kind: str) -> None:
        metadata = self.summary.metadata
        expected = {"kind": kind, "version": VERSION, "hidden": str(self.hidden_size)}
        for key, value in expected.items():
            found = metadata.get(f"phi4edge.{key}")
            if found != value:
                self._refuse(f"is {found!r:.80}, expected '{value}'", f"phi4edge.{key}")

    def _check_contract(self) -> None:
        for what, expected, found in zip(
            ("input", "output"), self._contract(), (self.summary.inputs, self.summary.outputs), strict=True
        ):
            by_name = {tensor.name: tensor for tensor in found}
            if set(by_name) != set(expected):
                self._refuse(f"has the {what}s {sorted(by_name)!r:.300}, expected {sorted(expected)}", what)
            for name, (element, shape) in expected.items():
                if not _fits(by_name[name], element, shape):
                    tensor = by_name[name]
                    self._refuse(f"is {tensor.element} {_text(tensor.shape)}, expected {element} {_text(shape)}", name)

    def _open(self, file: BinaryIO, provider: str) -> None:
        """Makes the session, on the provider as far as it can."""
        onnxruntime = _onnxruntime()
        provider = choose(provider, onnxruntime.get_available_providers())
        size = os.fstat(file.fileno()).st_size
        descriptor = Path(f"/proc/self/fd/{file.fileno()}")
        source = str(descriptor) if descriptor.exists() else self.path
        if provider != CPU:
            try:
                self._require_memory(size, provider)
                with _quiet(onnxruntime):
                    self._session = self._load(onnxruntime, source, provider)
            except (BundleError, OutOfMemoryError) as error:
                self._warn(f"{provider}: {error.problem}, so the CPU runs it")
                provider = CPU
            else:
                provider = self._kept(provider)
        if self._session is None:
            self._require_memory(size, CPU)
            self._session = self._load(onnxruntime, source, CPU)
        machine.return_memory()  # loading takes more than it keeps
        self.provider = provider
        if _identity(source) != self._opened:
            self.close()
            raise BundleError("was changed while it was loaded", path=self.path, hint="try again")

    def _require_memory(self, size: int, provider: str) -> None:
        """OutOfMemoryError for what the system would otherwise kill us for."""
        if self._free_memory is None:
            return
        need = memory_need(provider, size, self.summary.metadata.get("phi4edge.precision", ""))
        free = self._free_memory()
        if need > free:
            raise OutOfMemoryError(
                f"needs about {_size_text(need)}, but {_size_text(free)} are available",
                path=self.path,
                hint=_HINT,
            )

    def _load(self, onnxruntime: Any, source: str, provider: str) -> Any:
        chosen = PROVIDERS[provider]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # a library does not write to stderr; errors come as exceptions
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the decoder has threads too
        # The arena stays on: without it the full-size int8 vision encoder took 2.6 GB at its peak, with it 1.0.
        options.enable_mem_pattern = False  # inputs come in many sizes, and a plan would be kept for each
        if provider != CPU:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            for axis in self._single_axes():  # many providers refuse sizes that are not known
                options.add_free_dimension_override_by_name(axis, 1)
        for key, value in chosen.session.items():
            options.add_session_config_entry(key, value)
        provider_options = {key: value.format(threads=self._threads) for key, value in chosen.options.items()}
        try:
            # Its own fallback to the CPU prints, and tells us nothing.
            return onnxruntime.InferenceSession(
                source, options, providers=[(chosen.name, provider_options)], enable_fallback=False
            )
        except Exception as error:
            self._failed(error, "cannot be loaded by onnxruntime")

    def _single_axes(self) -> set[str]:
        """Names of the axes that always have the length 1: crops, or windows."""
        axes = (tensor.shape[0] for tensor in self.summary.inputs if tensor.shape)
        return {axis for axis in axes if isinstance(axis, str)}

    def _kept(self, provider: str) -> str:
        """The provider, or "cpu" when it runs nothing of the graph; warns about what the CPU runs."""
        name = PROVIDERS[provider].name
        if name not in self._session.get_providers():
            self._warn(f"{provider} does not start on this computer, so the CPU runs it")
            return CPU
        assigned = _assigned_nodes(self._session)
        if assigned is None:
            self._warn(f"{provider} may leave a part of it to the CPU; onnxruntime 1.24 and later tell")
            return provider
        n_taken = assigned.pop(name, Counter()).total()
        left: Counter[str] = sum(assigned.values(), Counter())
        if n_taken == 0:
            self._warn(f"{provider} takes none of its {left.total()} nodes, so the CPU runs it")
            return CPU
        if left:
            n_nodes = n_taken + left.total()
            self._warn(f"{left.total()} of its {n_nodes} nodes run on the CPU, not on {provider}: {_few(sorted(left))}")
        return provider

    def _warn(self, text: str) -> None:
        self.warnings += (f"{self.path}: {text}",)

    def _run(self, inputs: Mapping[str, npt.NDArray[Any]], shapes: Mapping[str, tuple[int, ...]]) -> list[Float32]:
        """The outputs named in ``shapes``, which must have these shapes and be finite.

        A provider that fails now is replaced by the CPU, which also tells whether it was the file's fault.
        """
        if self._session is None:
            raise UsageError("the encoder is closed, or was only checked", path=self.path)
        try:
            return self._outputs(inputs, shapes)
        except (BundleError, OutOfMemoryError) as error:
            if self.provider == CPU:
                raise
            field = f"{error.field} " if error.field else ""
            self._warn(f"{self.provider}: {field}{error.problem}, so the CPU runs it")
        self.close()
        with open_onnx(self.path) as file:
            self._open(file, CPU)
        return self._outputs(inputs, shapes)

    def _outputs(self, inputs: Mapping[str, npt.NDArray[Any]], shapes: Mapping[str, tuple[int, ...]]) -> list[Float32]:
        try:
            outputs: list[Float32] = self._session.run(list(shapes), inputs)
        except Exception as error:
            self._failed(error, "cannot be run by onnxruntime")
        for output, (name, shape) in zip(outputs, shapes.items(), strict=True):
            if output.shape != shape or output.dtype != np.float32:
                self._refuse(f"came as {output.dtype} {list(output.shape)}, expected float32 {list(shape)}", name)
            if not np.isfinite(output).all():
                self._refuse("has a NaN or an infinity", name)
        return outputs

    def _failed(self, error: Exception, problem: str) -> NoReturn:
        text = str(error)
        # onnxruntime has no exception type of its own for this.
        if isinstance(error, MemoryError) or "bad_alloc" in text or "Failed to allocate memory" in text:
            raise OutOfMemoryError(
                "there is not enough memory for this encoder",
                path=self.path,
                hint=_HINT,
            ) from error
        name = type(error).__name__
        raise BundleError(f"{problem} ({name})", path=self.path, hint="convert the checkpoint again") from error

    def _refuse(self, problem: str, field: str) -> NoReturn:
        raise BundleError(problem, path=self.path, field=field, hint="convert the checkpoint again")


class VisionEncoder(_Encoder):
    """Crops of S x S pixels to (S/28)^2 embeddings each.

    hidden_size: width of the decoder.  threads: how many compute.  provider: "auto" or a name in ``PROVIDERS``; None
    only checks the file, and leaves onnxruntime alone.  free_memory: tells how much there is; None is enough.

    Raises FileError, BundleError when the file is damaged, of another kind or for another decoder, OutOfMemoryError,
    UnsupportedError (also for a provider that this onnxruntime does not have), UsageError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        hidden_size: int,
        *,
        threads: int = 1,
        provider: str | None = AUTO,
        free_memory: FreeMemory | None = None,
    ) -> None:
        super().__init__(path, "vision", hidden_size, threads, provider, free_memory)

    @property
    def crop_size(self) -> int:
        """S: pixels of a side of a crop."""
        text = self.summary.metadata.get("phi4edge.crop_size", "")
        size = int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0
        if size == 0 or size % (2 * PATCH):
            self._refuse(f"is {text!r:.80}, not a multiple of {2 * PATCH}", "phi4edge.crop_size")
        return size

    def encode(
        self, pixel_values: Float32, patch_mask: npt.NDArray[np.bool_], progress: Progress | None = None
    ) -> VisionFeatures:
        """Encodes one crop after the other: each fills the processor, and memory does not grow with their number.

        pixel_values: float32 [n, 3, S, S], normalised to -1..1.  patch_mask: bool [n, S/14, S/14], True for the patches
        that hold picture; they are the first of the rows and columns.

        Raises InputError for inputs of another kind, OutOfMemoryError, Cancelled.
        """
        size = self.crop_size
        n_crops = len(pixel_values) if pixel_values.ndim else 0
        n_patches = size // PATCH
        _require(pixel_values, "pixel_values", "float32", (n_crops, 3, size, size))
        _require(patch_mask, "patch_mask", "bool", (n_crops, n_patches, n_patches))
        rows, columns = patch_mask[:, :, :1], patch_mask[:, :1, :]
        n_valid = rows.sum(axis=1, keepdims=True), columns.sum(axis=2, keepdims=True)
        ranks = np.arange(n_patches)
        if n_crops == 0 or not all(n.all() for n in n_valid):
            raise InputError("there is a crop without any patch, or no crop", field="patch_mask")
        if (patch_mask != ((ranks[:, None] < n_valid[0]) & (ranks < n_valid[1]))).any():
            raise InputError("the valid patches are not the first rows and columns", field="patch_mask")
        n_tokens = (size // (2 * PATCH)) ** 2
        shapes = {
            "crop_embeddings": (1, n_tokens, self.hidden_size),
            "row_separator": (1, self.hidden_size),
            "view_separator": (1, self.hidden_size),
        }
        crops = np.empty((n_crops, n_tokens, self.hidden_size), np.float32)
        for index in range(n_crops):
            _tell(progress, index, n_crops)
            one = slice(index, index + 1)
            inputs = {"pixel_values": pixel_values[one], "patch_mask": patch_mask[one]}
            crops[one], row_separator, view_separator = self._run(inputs, shapes)
        _tell(progress, n_crops, n_crops)
        return VisionFeatures(crops, row_separator[0], view_separator[0])

    def _contract(self) -> tuple[Mapping[str, tuple[str, Shape]], Mapping[str, tuple[str, Shape]]]:
        size, hidden = self.crop_size, self.hidden_size
        n_patches = size // PATCH
        inputs: dict[str, tuple[str, Shape]] = {
            "pixel_values": ("float32", ("crops", 3, size, size)),
            "patch_mask": ("bool", ("crops", n_patches, n_patches)),
        }
        outputs: dict[str, tuple[str, Shape]] = {
            "crop_embeddings": ("float32", ("crops", n_patches * n_patches // 4, hidden)),
            "row_separator": ("float32", (1, hidden)),
            "view_separator": ("float32", (1, hidden)),
        }
        return inputs, outputs


class AudioEncoder(_Encoder):
    """Log-mel frames of 10 ms to embeddings of 80 ms.  Parameters and errors are those of :class:`VisionEncoder`."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        hidden_size: int,
        *,
        threads: int = 1,
        provider: str | None = AUTO,
        free_memory: FreeMemory | None = None,
    ) -> None:
        super().__init__(path, "audio", hidden_size, threads, provider, free_memory)

    def encode(self, features: Float32, branch: Branch, progress: Progress | None = None) -> Float32:
        """Float32 [ceil(n_frames / 8), hidden] for log-mels float32 [n_frames, 80] of one recording.

        branch: the projector, "speech", or "vision" when the same request has images.

        Up to 500 tokens are one window.  Of longer recordings the windows of 500 tokens do not see each other, and the
        last one sees zeros behind its end, as the reference has it.  They are run one by one, which bounds the memory.

        Raises InputError, OutOfMemoryError, Cancelled.
        """
        if branch not in BRANCHES:
            raise InputError(f"{branch!r:.80} is not one of {', '.join(BRANCHES)}", field="branch")
        n_frames = len(features) if features.ndim else 0
        _require(features, "features", "float32", (n_frames, N_MELS))
        if n_frames == 0:
            raise InputError("there is no frame", field="features")
        n_tokens = -(-n_frames // FRAMES_PER_TOKEN)
        is_long = n_tokens > WINDOW
        embeddings = np.empty((n_tokens, self.hidden_size), np.float32)
        for start in range(0, n_tokens, WINDOW):
            _tell(progress, start, n_tokens)
            end = min(start + WINDOW, n_tokens)
            n_context = 1 if start else 0  # the convolutions look 7 frames back; a token of its own is cut off again
            frames = features[FRAMES_PER_TOKEN * (start - n_context) : FRAMES_PER_TOKEN * end]
            inputs: dict[str, npt.NDArray[Any]] = {
                "features": frames[np.newaxis],
                "skip": np.array(n_context, np.int64),
                "window": np.array(WINDOW if is_long else 0, np.int64),
                "branch": np.array(BRANCHES.index(branch), np.int64),
            }
            (embeddings[start:end],) = self._run(inputs, {"embeddings": (1, end - start, self.hidden_size)})
        _tell(progress, n_tokens, n_tokens)
        return embeddings

    def _contract(self) -> tuple[Mapping[str, tuple[str, Shape]], Mapping[str, tuple[str, Shape]]]:
        inputs: dict[str, tuple[str, Shape]] = {
            "features": ("float32", ("windows", "frames", N_MELS)),
            "skip": ("int64", ()),
            "window": ("int64", ()),
            "branch": ("int64", ()),
        }
        return inputs, {"embeddings": ("float32", ("windows", "tokens", self.hidden_size))}


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UnsupportedError(
            "onnxruntime is not installed, which images and sounds need", hint="pip install onnxruntime"
        ) from error
    return onnxruntime


def _assigned_nodes(session: Any) -> dict[str, Counter[str]] | None:
    """onnxruntime's name of a provider -> kinds of the nodes that it runs; None when onnxruntime does not tell."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return None
    assigned: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        assigned.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    return assigned


def _fits(tensor: TensorInfo, element: str, shape: Shape) -> bool:
    if tensor.element != element or tensor.shape is None or len(tensor.shape) != len(shape):
        return False
    return all(
        not isinstance(found, int) if isinstance(expected, str) else found == expected
        for found, expected in zip(tensor.shape, shape, strict=True)
    )


def _require(array: npt.NDArray[Any], name: str, element: str, shape: tuple[int, ...]) -> None:
    if array.dtype != np.dtype(element) or array.shape != shape:
        raise InputError(
            f"is {array.dtype} {list(array.shape)}, expected {element} [n{''.join(f', {n}' for n in shape[1:])}]",
            field=name,
        )
    if not np.isfinite(array).all():
        raise InputError("has a NaN or an infinity", field=name)


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None and progress(done, total) is False:
        raise Cancelled("the encoder was stopped")


def _identity(place: str | int) -> tuple[int, int, int, int] | None:
    """Which file a path or descriptor leads to, and whether it was written since."""
    try:
        status = os.stat(place)  # noqa: PTH116 - a Path cannot be a descriptor
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _text(shape: Shape | None) -> str:
    return "of any shape" if shape is None else f"{list(shape)!r:.200}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(name[:40] for name in names[:4]) + (" and others" if len(names) > 4 else "")


def _size_text(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"
