"""LoRA adapters, those of Phi-4-multimodal and a user's own from PEFT: to GGUF, or added to the weights.

The GGUF file is llama.cpp's: a pair ``blk.N.attn_qkv.weight.lora_a`` [rank, in] and ``.lora_b`` [out, rank] for each
linear, and one alpha for all.  A linear with the weights W becomes W + alpha / rank * B @ A, where the rank is A's.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from phi4edge.converters.checkpoint import Checkpoint, SafetensorsFile, SourceTensor, row_pieces, to_float32
from phi4edge.converters.encode import VALUES_AT_ONCE, Array, encode, encoded_bytes, require_fitting
from phi4edge.converters.files import Progress, Written, hashed_file, one_ahead
from phi4edge.converters.lora import LoraPair, decoder_linears, pair_tensors
from phi4edge.converters.mixes import ADAPTER_TYPES, fitting_type
from phi4edge.converters.peft import LoraConfig, alpha_of, rank_of, read_peft_config
from phi4edge.converters.variants import BackboneConfig, Variant
from phi4edge.errors import BundleError, FileError, UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

BUILT_IN = ("vision", "speech")
FORMAT_KEY = "phi4edge.adapter.format"

_LLAMA_CPP_TYPES = ("F32", "F16", "Q8_0")  # of the others the file says that they are ours
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"


class Adapter:
    """One LoRA; all of it but the values was checked.  A context manager that keeps its files open.

    name: what it is chosen by.
    modules: stem of the linear's name in GGUF ("blk.3.attn_qkv") -> its pair, in the order of the layers.
    alpha: the one of most modules; B of the others is multiplied by their own alpha / this one in the file.
    """

    def __init__(
        self,
        name: str,
        modules: Mapping[str, LoraPair],
        read: Callable[[SourceTensor, int, int], bytes],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.modules = modules
        self.alpha = Counter(pair.alpha for pair in modules.values()).most_common(1)[0][0]
        self._read = read
        self._close = close
        self._cached: tuple[str, Array] | None = None  # the A of one module

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._cached = None
        self._close()

    @property
    def rank(self) -> int:
        """The largest of the modules."""
        return max(pair.rank for pair in self.modules.values())

    @property
    def source_bytes(self) -> int:
        return sum(pair.a.n_bytes + pair.b.n_bytes for pair in self.modules.values())

    def delta(self, stem: str, first_row: int, n_rows: int) -> Array | None:
        """What to add to some rows of a linear's weights, float32 [n_rows, in]; None for one without a pair.

        Raises BundleError for values that are not finite.
        """
        pair = self.modules.get(stem)
        if pair is None:
            return None
        if self._cached is None or self._cached[0] != stem:
            self._cached = None  # before the next one is read, so that there is only one
            self._cached = stem, self._rows(pair.a, 0, pair.rank)
        b = self._rows(pair.b, first_row, n_rows)
        with np.errstate(over="ignore", invalid="ignore"):
            delta: Array = (b * np.float32(pair.scale)) @ self._cached[1]
        require_fitting(delta, "F32", pair.b.path, pair.b.name)
        return delta

    def raw(self, tensor: SourceTensor, first_row: int, n_rows: int) -> bytes:
        """The bytes of some rows of an A or a B."""
        return self._read(tensor, first_row, n_rows)

    def _rows(self, tensor: SourceTensor, first_row: int, n_rows: int) -> Array:
        rows = to_float32(self.raw(tensor, first_row, n_rows), tensor.dtype).reshape(n_rows, tensor.shape[1])
        require_fitting(rows, "F32", tensor.path, tensor.name)
        return rows


def built_in_adapters(checkpoint: Checkpoint, variant: Variant, config: BackboneConfig) -> dict[str, Adapter]:
    """The vision and the speech LoRA of a multimodal checkpoint, each whole; nothing for one of text alone.

    The original layout has them between the other weights, that of transformers in folders beside them.
    Raises BundleError, FileError.
    """
    if not variant.is_multimodal:
        return {}
    with ExitStack() as opened:  # closes the first when the second is wrong
        adapters = {}
        for name in BUILT_IN:
            if variant.linear_suffix == ".weight":
                adapter = _from_folder(name, checkpoint, config)
            else:
                adapter = _between_weights(name, checkpoint, config)
            adapters[name] = opened.enter_context(adapter)
            n_expected = config.layers * len(decoder_linears(config))
            if len(adapter.modules) != n_expected:
                problem = f"has only {len(adapter.modules)} of the {n_expected} pairs of the adapter '{name}'"
                raise _incomplete(checkpoint, problem)
        opened.pop_all()
    return adapters


def read_peft_adapter(name: str, directory: Path, config: BackboneConfig) -> Adapter:
    """A LoRA as PEFT saves it: adapter_config.json and adapter_model.safetensors.

    Raises UsageError for the name, FileError, BundleError.
    """
    if not _NAME.fullmatch(name) or name == "none":  # which stands for no adapter
        raise UsageError(
            f"'{name[:80]}' is no name for an adapter",
            field="adapter",
            hint="take 1 to 40 of a-z, 0-9, _ and -, beginning with a letter or a digit",
        )
    directory = Path(directory)
    if not directory.is_dir():
        problem = "is not a directory" if directory.exists() else "does not exist"
        raise FileError(problem, path=str(directory), hint="give a folder that PEFT saved")
    lora = read_peft_config(directory)
    if not (directory / _WEIGHTS).exists():
        if (directory / _PICKLE).exists():
            problem, hint = f"pickle refused: {_PICKLE} may run any code when it is read", "save it as safetensors"
        else:
            problem, hint = f"has no {_WEIGHTS}", "give a folder that PEFT saved"
        raise BundleError(problem, path=str(directory), hint=hint)
    strays = sorted(path.name for path in directory.glob("*.safetensors") if path.name != _WEIGHTS)
    if strays:
        raise BundleError(
            f"has {strays[0]} too, of which an adapter knows nothing", path=str(directory), hint="move it elsewhere"
        )
    file = SafetensorsFile(directory / _WEIGHTS)
    with ExitStack() as opened:
        opened.callback(file.close)
        modules = pair_tensors(file.tensors.values(), str(file.path), lora, config)
        opened.pop_all()

    def read(tensor: SourceTensor, first_row: int, n_rows: int) -> bytes:
        row_bytes = tensor.n_bytes // tensor.shape[0]
        return file.read(tensor.offset + first_row * row_bytes, n_rows * row_bytes)

    return Adapter(name, modules, read, file.close)


def adapter_bytes(adapter: Adapter, type_name: str) -> int:
    """Of the weights in the file that ``write_adapter`` makes."""
    return sum(_encoded_bytes(source, type_name) for _, source, _ in _file_tensors(adapter))


def write_adapter(path: Path, adapter: Adapter, type_name: str, *, n_threads: int, progress: Progress) -> Written:
    """Writes an adapter as GGUF with one of ADAPTER_TYPES, and syncs it.

    Rows that are no multiple of the type's block become F16.  BundleError names a tensor with a value that is not
    finite or does not fit.  source_sha256 covers the strength of each module too.
    """
    if type_name not in ADAPTER_TYPES:
        raise UsageError(f"'{type_name:.40}' is no type of adapters", hint=f"choose one of {', '.join(ADAPTER_TYPES)}")
    alignment = _write_header(path, adapter, type_name)
    header = path.read_bytes()
    source_hash = hashlib.sha256(f"alpha {adapter.alpha!r}\n".encode())
    done, total = 0, adapter.source_bytes
    with hashed_file(path) as output:
        output.write(header)
        for source, first, rows, n_bytes in one_ahead(_pieces(adapter, type_name, source_hash)):
            progress(source.name, done, total)
            if first == 0:
                output.pad(alignment)
            output.write(encode(rows, fitting_type(type_name, rows.shape[1]), n_threads))
            done += n_bytes
        output.pad(alignment)
        progress("", done, total)
    return Written(output.n_bytes, output.sha256, source_hash.hexdigest())


def _pieces(
    adapter: Adapter, type_name: str, source_hash: hashlib._Hash
) -> Iterator[tuple[SourceTensor, int, Array, int]]:
    """Source, first row, rows in float32, and the bytes that were read for them, which source_hash gets."""
    for _, source, factor in _file_tensors(adapter):
        source_hash.update(f"{source.name} {source.dtype} {source.shape} {factor!r}\n".encode())
        n_rows, n_columns = source.shape
        for first, n_piece in row_pieces(n_rows, n_columns, VALUES_AT_ONCE):
            raw = adapter.raw(source, first, n_piece)
            source_hash.update(raw)
            rows = to_float32(raw, source.dtype).reshape(n_piece, n_columns)
            if factor != 1.0:
                with np.errstate(over="ignore", invalid="ignore"):
                    rows *= np.float32(factor)
            require_fitting(rows, fitting_type(type_name, n_columns), source.path, source.name)
            yield source, first, rows, len(raw)


def _file_tensors(adapter: Adapter) -> Iterator[tuple[str, SourceTensor, float]]:
    """The tensors of the file: name, source, and what its values are multiplied by, for llama.cpp has but one alpha."""
    for stem, pair in adapter.modules.items():
        yield f"{stem}.weight.lora_a", pair.a, 1.0
        yield f"{stem}.weight.lora_b", pair.b, pair.alpha / adapter.alpha


def _write_header(path: Path, adapter: Adapter, type_name: str) -> int:
    """Metadata and the tensor directory; returns the alignment of the data that follow."""
    writer = gguf.GGUFWriter(str(path), "phi3")
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.alpha)
        writer.add_name(adapter.name)
        if type_name not in _LLAMA_CPP_TYPES:
            writer.add_string(FORMAT_KEY, type_name)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if type_name == "F32" else f"MOSTLY_{type_name}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, source, _ in _file_tensors(adapter):
            type_id = GGMLQuantizationType[fitting_type(type_name, source.shape[1])]
            writer.add_tensor_info(name, source.shape, np.dtype(np.float32), _encoded_bytes(source, type_name), type_id)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    return int(writer.data_alignment)


def _encoded_bytes(source: SourceTensor, type_name: str) -> int:
    return encoded_bytes(source.shape, fitting_type(type_name, source.shape[1]))


# --- which tensors


def _from_folder(name: str, checkpoint: Checkpoint, config: BackboneConfig) -> Adapter:
    directory = checkpoint.directory / f"{name}-lora"
    if not directory.is_dir():
        raise _incomplete(checkpoint, f"has no folder {directory.name}")
    return read_peft_adapter(name, directory, config)


def _between_weights(name: str, checkpoint: Checkpoint, config: BackboneConfig) -> Adapter:
    path, key = str(checkpoint.directory / "config.json"), f"{name}_lora"
    table = checkpoint.config.get(key)
    if not isinstance(table, dict):
        raise _incomplete(checkpoint, f"has no {key} with r and lora_alpha in its config.json")
    rank = rank_of(table.get("r"), path, f"{key}.r")
    alpha = alpha_of(table.get("lora_alpha"), path, f"{key}.lora_alpha")
    tensors = [tensor for at, tensor in checkpoint.tensors.items() if re.search(rf"\.lora_[AB]\.{name}\.", at)]
    if not tensors:
        raise _incomplete(checkpoint, f"has no tensors of the adapter '{name}'")
    lora = LoraConfig(path, rank, alpha, rank_field=f"{key}.r")
    return Adapter(name, pair_tensors(tensors, str(checkpoint.directory), lora, config), checkpoint.raw)


def _incomplete(checkpoint: Checkpoint, problem: str) -> BundleError:
    hint = "download it again, or leave the adapters out: --adapters none"
    return BundleError(problem, path=str(checkpoint.directory), hint=hint)
