"""The other implementations that the tests compare with: asked for by name, and llama.cpp behind a small face."""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pytest

REQUIRED = "PHI4EDGE_REQUIRE_PEERS"


def require(module_name: str) -> ModuleType:
    """The module, or a skipped test when it is not installed; with PHI4EDGE_REQUIRE_PEERS=1 a failed one."""
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        _missing(f"the peer '{module_name}' cannot be imported ({error})", "install it to run this comparison")


def openvino() -> Path:
    """A directory with OpenVINO's onnxruntime, whose module has the name of the usual one; else as :func:`require`."""
    directory = Path(sys.prefix, ".openvino")
    if not (directory / "onnxruntime").is_dir():
        _missing(f"there is no onnxruntime of OpenVINO in {directory}", "'make test PEERS=1' installs it")
    return directory


def with_program(name: str) -> None:
    """Asks for a program; else as :func:`require`."""
    if shutil.which(name) is None:
        _missing(f"there is no {name}", f"Debian's package {name} has it")


def recorded_speech() -> Path:
    """The directory of Debian's package pocketsphinx-testdata; else as :func:`require`."""
    directory = Path("/usr/share/pocketsphinx/test/data")
    if not directory.is_dir():
        _missing("there are no recordings of speech", "install Debian's pocketsphinx-testdata")
    return directory


def missing_encoder(name: str) -> NoReturn:
    """For a build of av that cannot write what a test wants to read."""
    _missing(f"this build of av has no encoder '{name}'", "install the usual one")


def _missing(reason: str, hint: str) -> NoReturn:
    if os.environ.get(REQUIRED, "") not in ("", "0"):
        pytest.fail(f"{reason}, and {REQUIRED} is set", pytrace=False)
    pytest.skip(f"{reason}; {hint}", allow_module_level=True)  # or of all tests of a file


_log_callback: Any = None  # llama.cpp keeps the pointer: it must outlive every call


def llama_cpp() -> ModuleType:
    """llama.cpp's C interface through ctypes, silenced."""
    global _log_callback
    api = require("llama_cpp")
    if _log_callback is None:
        _log_callback = api.llama_log_callback(lambda level, text, user_data: None)
        api.llama_log_set(_log_callback, ctypes.c_void_p(0))
        api.llama_backend_init()
    return api


class LlamaCpp:
    """A model and one sequence in llama.cpp: F16 KV cache, flash attention as it chooses unless there is a kv_type.

    One thread: its threads wait for each other by spinning, which takes minutes when something else runs.

    Example: ``with closing(LlamaCpp(path)) as peer: peer.logits(ids)`` is float32 [n_tokens, vocab].
    """

    def __init__(self, path: Path, n_context: int = 512, n_threads: int = 1, kv_type: str = "") -> None:
        api = self._api = llama_cpp()
        self._model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.n_vocab: int = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        params = api.llama_context_default_params()
        params.n_ctx = n_context
        params.n_batch = params.n_ubatch = n_context
        params.n_threads = params.n_threads_batch = n_threads
        if kv_type:
            params.type_k = params.type_v = getattr(api, f"GGML_TYPE_{kv_type}")
            params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED  # quantized values need it
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context for {path}")
        self._batch = api.llama_batch_init(n_context, 0, 1)
        self._n_tokens = 0

    def close(self) -> None:
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def reset(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._n_tokens = 0

    def extend(self, tokens: Sequence[int], *, all_logits: bool = False) -> npt.NDArray[np.float32]:
        """Appends tokens in one batch; logits of the last one, or of all: float32 [1 or n, vocab]."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for row, token in enumerate(tokens):
            batch.token[row] = token
            batch.pos[row] = self._n_tokens + row
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = 0
            batch.logits[row] = all_logits or row == len(tokens) - 1
        status = self._api.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        self._n_tokens += len(tokens)
        n_rows = len(tokens) if all_logits else 1
        pointer = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(n_rows, self.n_vocab)).astype(np.float32)

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        self.reset()
        return self.extend(tokens, all_logits=True)


def greedy(
    step: Callable[[Sequence[int]], npt.NDArray[np.float32]], prompt: Sequence[int], n_tokens: int, stop: frozenset[int]
) -> tuple[list[int], list[npt.NDArray[np.float32]]]:
    """The likeliest continuation, a stopping token included, and the logits that each of its tokens was taken from."""
    tokens: list[int] = []
    rows: list[npt.NDArray[np.float32]] = []
    new: Sequence[int] = prompt
    while len(tokens) < n_tokens and not (tokens and tokens[-1] in stop):
        rows.append(step(new)[-1])
        tokens.append(int(rows[-1].argmax()))
        new = tokens[-1:]
    return tokens, rows
