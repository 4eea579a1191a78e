"""A text decoder and llama.cpp behind one interface, each in a process of its own that waits at a pipe.

So only one works at a time, and peak memory is its own. Loading, tokenizing and sampling are not in the times of a run;
both sides are fed the same ids, and both give the logits of the last token of each call.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from phi4edge import machine

BANDWIDTH_BYTES = 1 << 29  # larger than any last-level cache
LIMIT_SECONDS = 0.2  # to measure each limit of the machine for
ROOT = Path(__file__).resolve().parents[1]
SIDES = ("phi4edge", "llama.cpp")


class Side(Protocol):
    n_vocab: int
    isa: str

    def truncate(self, n_tokens: int) -> None:
        """Keeps the first ``n_tokens`` of what was computed."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Computes the tokens, and the logits of the last."""


class Phi4Edge:
    def __init__(self, path: str, n_context: int, n_threads: int, kv_type: str) -> None:
        from phi4edge import _core

        model = _core.Model(_core.GgufFile(path), n_threads)
        self._session = _core.Session(model, n_context, kv_type=kv_type)
        self.n_vocab = int(model.config.vocab_size)
        self.isa = str(model.isa)

    def truncate(self, n_tokens: int) -> None:
        self._session.truncate(n_tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        self._session.extend(np.asarray(tokens, np.int32), logits="last")


class LlamaCpp:
    """Batches of 512, F16 KV cache, flash attention as it chooses: the defaults of llama-bench.

    A quantized KV cache needs flash attention.
    """

    BATCH = 512

    def __init__(self, path: str, n_context: int, n_threads: int, kv_type: str) -> None:
        import llama_cpp as api

        self._api = api
        self._silence = api.llama_log_callback(lambda level, text, user_data: None)
        api.llama_log_set(self._silence, ctypes.c_void_p(0))
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        params = api.llama_context_default_params()
        params.n_ctx = n_context
        params.n_batch = params.n_ubatch = self.BATCH
        params.n_threads = params.n_threads_batch = n_threads
        if kv_type != "i16":  # its own numbers of 16 bits, halves, are what it takes anyway
            params.type_k = params.type_v = getattr(api, f"GGML_TYPE_{kv_type.upper()}")
            params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {n_context} tokens")
        self._batch = api.llama_batch_init(self.BATCH, 0, 1)
        self._n_tokens = 0
        self.n_vocab = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model)))
        flags = api.llama_print_system_info().decode().split(" | ")
        self.isa = " ".join(flag.split(" = ")[0].split(" : ")[-1] for flag in flags if flag.strip())

    def truncate(self, n_tokens: int) -> None:
        self._api.llama_memory_seq_rm(self._api.llama_get_memory(self._context), 0, n_tokens, -1)
        self._n_tokens = n_tokens

    def extend(self, tokens: Sequence[int]) -> None:
        for start in range(0, len(tokens), self.BATCH):
            piece = tokens[start : start + self.BATCH]
            self._batch.n_tokens = len(piece)
            for row, token in enumerate(piece):
                self._batch.token[row] = token
                self._batch.pos[row] = self._n_tokens + row
                self._batch.n_seq_id[row] = 1
                self._batch.seq_id[row][0] = 0
                self._batch.logits[row] = start + row == len(tokens) - 1
            status = self._api.llama_decode(self._context, self._batch)
            if status != 0:
                raise RuntimeError(f"llama_decode returned {status}")
            self._n_tokens += len(piece)
        self._api.llama_get_logits_ith(self._context, -1)  # waits for the result


def measure(side: Side, n_prompt: int, n_decode: int, after: int = 0) -> dict[str, float]:
    """Seconds of one prompt and of the single tokens after it, when ``after`` tokens are computed already."""
    tokens = np.random.default_rng(after).integers(0, side.n_vocab, n_prompt + n_decode).tolist()
    side.truncate(after)
    started = time.perf_counter()
    if n_prompt:
        side.extend(tokens[:n_prompt])
    prompt_done = time.perf_counter()
    for token in tokens[n_prompt:]:
        side.extend([token])
    return {"prefill_seconds": prompt_done - started, "decode_seconds": time.perf_counter() - prompt_done}


def limits(n_threads: int, fields: Sequence[str] = ()) -> dict[str, float]:
    """What the machine can do right now, with as many threads, and the instruction set that our kernels take.

    ``fields``: which limits; none: all.
    """
    from phi4edge import _core

    known = {
        "bytes_per_second": lambda: _core.read_bandwidth(n_threads, BANDWIDTH_BYTES, LIMIT_SECONDS),
        "int8_operations_per_second": lambda: _core.int8_peak("", n_threads, LIMIT_SECONDS),
    }
    return {name: known[name]() for name in fields or known}


def first_token(path: str, n_threads: int, kv_type: str) -> dict[str, Any]:
    """Seconds from a path to the first logits of a one-token prompt, and the memory that it took."""
    import phi4edge

    started = time.perf_counter()
    model = phi4edge.load(path, threads=n_threads, kv_type=kv_type)
    loaded = time.perf_counter()
    session = model.session()
    session.extend([0])
    done = time.perf_counter()
    return {
        "load_seconds": loaded - started,
        "first_token_seconds": done - started,
        "weight_bytes": model.weight_bytes,
    }


def context_memory(path: str, n_threads: int, kv_type: str, n_tokens: int) -> dict[str, Any]:
    """Memory of a model and a sequence of ``n_tokens``."""
    from phi4edge import _core

    file = _core.GgufFile(path)
    model = _core.Model(file, n_threads)
    session = _core.Session(model, n_tokens, kv_type=kv_type)
    session.extend(np.zeros(n_tokens, np.int32), logits="last")
    return {"weight_bytes": model.weight_bytes, "kv_bytes": session.kv_bytes}


def serve(name: str, path: str, n_context: int, n_threads: int, kv_type: str) -> None:
    """A worker: one JSON request per line on stdin, one JSON answer per line on stdout."""
    side: Side | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        if request["do"] == "limits":
            answer = dict(limits(n_threads, request.get("fields", ())))
        elif request["do"] == "load":
            started = time.perf_counter()
            kind = Phi4Edge if name == SIDES[0] else LlamaCpp
            side = kind(path, n_context, n_threads, kv_type)
            answer = {"load_seconds": time.perf_counter() - started, "isa": side.isa}
        elif request["do"] == "first token":
            answer = first_token(path, n_threads, kv_type)
        elif request["do"] == "memory":
            answer = context_memory(path, n_threads, kv_type, request["n_tokens"])
        else:
            assert side is not None
            answer = dict(measure(side, request["n_prompt"], request["n_decode"], request.get("after", 0)))
        answer["peak_bytes"] = machine.peak_memory()
        print(json.dumps(answer), flush=True)


class Worker:
    """The parent's end of a worker process.

    ``python``: the interpreter that runs it; ``environment`` is added to ours.
    """

    def __init__(
        self,
        name: str,
        model: Path,
        *,
        n_context: int,
        n_threads: int,
        kv_type: str = "i16",
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._name = name
        command = [python, "-m", "benchmarks.decoder_sides", name, str(model.resolve())]
        command += ["--threads", str(n_threads), "--context", str(n_context), "--kv-type", kv_type]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env={**os.environ, **(environment or {})}
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"the worker of {self._name} ended with status {self._process.wait()}; its error is above"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.communicate(timeout=60)


def context_for(n_tokens: int) -> int:
    """Tokens of room, in the steps that llama.cpp takes."""
    return -(-n_tokens // 256) * 256


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--kv-type", required=True)
    options = parser.parse_args()
    serve(options.side, options.model, options.context, options.threads, options.kv_type)


if __name__ == "__main__":
    main()
