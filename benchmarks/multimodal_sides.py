"""The sides that benchmarks.multimodal compares, each in a process of its own that waits at a pipe.

A worker reads one JSON request per line on stdin and writes one JSON answer per line to its standard output; what a
library prints goes to standard error.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.against_llama_cpp import ROOT

RATE = 16000  # Hz
N_TEXT = 512  # tokens of a prompt without media
TEXT_IDS = 256  # ids below: single bytes in every vocabulary
QUESTION = "What is it?"
SHOWN_EVERY = 10.0  # seconds


# --- requests


@dataclass(frozen=True)
class Request:
    """A question with a square picture, a sound, or both; without them, N_TEXT random tokens."""

    image: int = 0  # pixels of a side
    seconds: float = 0.0

    @property
    def has_media(self) -> bool:
        return bool(self.image or self.seconds)

    def media(self, seed: int) -> dict[str, Any]:
        """What the parts of a message hold, by their type.  Another seed, other media: nothing comes from a cache."""
        media: dict[str, Any] = {}
        if self.image:
            media["image"] = jpeg(self.image, seed)
        if self.seconds:
            media["audio"] = wav(self.seconds, seed)
        return media


REQUESTS = {
    "text": Request(),
    "image 448": Request(image=448),
    "30 s": Request(seconds=30),
    "image 448, 5 s": Request(image=448, seconds=5),
    "image 1344": Request(image=1344),
}


def jpeg(side: int, seed: int) -> bytes:
    """A file of side x side pixels: coarse random structure, some noise."""
    from PIL import Image

    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (side // 56 + 1, side // 56 + 1, 3), np.uint8)
    picture = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    noise = random.integers(-8, 9, (side, side, 3))
    file = io.BytesIO()
    Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def wav(seconds: float, seed: int) -> bytes:
    """A file of 16-bit samples at 16 kHz: a tone in noise that rises and falls."""
    random = np.random.default_rng(seed)
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, RATE, 0, "NONE", ""))
        for start in range(0, int(seconds * RATE), RATE):
            at = np.arange(start, min(start + RATE, int(seconds * RATE)))
            loudness = 0.1 + 0.1 * np.sin(at / 3000)
            samples = loudness * (random.standard_normal(len(at)) + np.sin(at * 0.08))
            sound.writeframes((samples * 32767).clip(-32768, 32767).astype("<i2").tobytes())
    return file.getvalue()


def token_ids(n_tokens: int, seed: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, TEXT_IDS, n_tokens).tolist()
    return ids


def seconds_of(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


# --- phi4edge


class Phi4Edge:
    """A bundle.  ``load`` is done when it is made.

    adapter_files: adapters under names of our own, beside those of the bundle.
    """

    def __init__(
        self, bundle: str, *, context: int, threads: int, kv_type: str, adapter_files: dict[str, str] | None = None
    ) -> None:
        import phi4edge

        self._model = phi4edge.load(bundle, context=context, threads=threads, kv_type=kv_type)
        self._session = self._model.session()
        for name, path in (adapter_files or {}).items():
            self._model.load_adapter(name, path)
        self._sessions: dict[str | None, Any] = {}
        self.about = {"system": f"phi4edge {phi4edge.__version__}", "isa": self._model.isa}

    def run(self, request: Request, seed: int, n_decode: int, *, show_progress: bool = False) -> dict[str, float]:
        """Seconds of one answer, of whose tokens the first comes out of the prompt, and ``n_decode`` follow."""
        self._session.clear()
        progress = Shown() if show_progress else None
        answer = self._model.generate(
            self._prompt(request, seed), max_tokens=1, session=self._session, progress=progress
        )
        timings = answer.timings
        return {
            "n_prompt": answer.usage.prompt_tokens,
            "processor": timings.processor_seconds,
            "encoder": timings.encoder_seconds,
            "prefill": timings.prefill_seconds,
            "first token": timings.first_token_seconds,
            "decode": self._decode(self._session, n_decode),
        }

    def extend(self, adapter: str | None, n_prompt: int, n_decode: int) -> dict[str, float]:
        """Seconds of a prompt of random tokens with an adapter, and of the single tokens after it."""
        if adapter not in self._sessions:
            self._sessions[adapter] = self._model.session(adapter=adapter)
        session = self._sessions[adapter]
        session.clear()
        return {
            "prefill": seconds_of(lambda: session.extend(token_ids(n_prompt, 0))),
            "decode": self._decode(session, n_decode),
        }

    def save(self, request: Request, seed: int, path: str) -> dict[str, Any]:
        """Writes what an encoder and the decoder get, and the logits that come out, for a side without processors."""
        from phi4edge.audio_processor import AudioNumbers, load_audio, log_mels
        from phi4edge.bundle import Bundle
        from phi4edge.image_processor import ImageNumbers, load_image, process_image

        processors = Bundle.open(self._model.path).manifest.processors
        media = request.media(seed)
        prompt = self._prompt(request, seed)
        arrays: dict[str, npt.NDArray[Any]] = {}
        counts: dict[int, int] = {}
        placeholders = dict(zip(("image", "audio"), self._model.placeholder_ids, strict=False))
        if "image" in media:
            crops = process_image(load_image(media["image"]), ImageNumbers.from_manifest(processors["image"]))
            side = crops.pixel_values.shape[-1]
            arrays |= {"pixels": crops.pixel_values, "mask": crops.patch_mask}
            arrays["size"] = np.array([side * crops.grid[1], side * crops.grid[0]])  # height, width
            counts[placeholders["image"]] = crops.n_tokens
        if "audio" in media:
            arrays["features"] = log_mels(load_audio(media["audio"]), AudioNumbers.from_manifest(processors["audio"]))
            counts[placeholders["audio"]] = -(-len(arrays["features"]) // 8)
        ids = [token for token in self._model.encode(prompt) for _ in range(counts.get(token, 1))]
        self._session.clear()
        logits = self._model.next_logits(prompt, session=self._session)
        np.savez(path, ids=np.array(ids), logits=logits, **arrays)  # type: ignore[arg-type]
        return {}

    def _prompt(self, request: Request, seed: int) -> Any:
        if not request.has_media:
            return token_ids(N_TEXT, seed)
        parts = [{"type": kind, kind: source} for kind, source in request.media(seed).items()]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]

    @staticmethod
    def _decode(session: Any, n_tokens: int) -> float:
        ids = token_ids(n_tokens, 1)
        return seconds_of(lambda: [session.extend([token]) for token in ids])


class Shown:
    """A progress in lines on standard error."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if now - self._last >= SHOWN_EVERY or done == total:
            self._last = now
            print(f"  {now - self._started:6.0f} s: {done} of {total} steps", file=sys.stderr, flush=True)


# --- transformers


class Transformers:
    """The checkpoint in bfloat16 with its adapters in PEFT; pixels and log-mels are phi4edge's.

    Eager attention: without a masked patch, transformers 5.23 runs its default attention of the vision tower causally.
    """

    def __init__(self, checkpoint: str, *, threads: int) -> None:
        import peft
        import torch
        import transformers

        self._torch = torch
        torch.set_num_threads(threads)
        kind: Any = transformers.Phi4MultimodalForCausalLM
        base = kind.from_pretrained(checkpoint, dtype=torch.bfloat16, attn_implementation="eager")
        vision, speech = (str(Path(checkpoint) / f"{adapter}-lora") for adapter in ("vision", "speech"))
        # PEFT itself, since transformers' own way in asks for a newer one.  By default adapters would become float32; a
        # cast of the whole model afterwards would round the frequencies of RoPE, too.
        model = peft.PeftModel.from_pretrained(base, vision, adapter_name="vision", autocast_adapter_dtype=False)
        model.load_adapter(speech, adapter_name="speech", autocast_adapter_dtype=False)
        self._model: Any = model.eval()
        self._encoder = Stopwatch(base.model.embed_tokens_extend)
        self.about = {
            "system": ", ".join(f"{each.__name__} {each.__version__}" for each in (transformers, torch, peft))
            + ", bfloat16",
            "isa": torch.backends.cpu.get_cpu_capability(),
        }

    def run(self, path: str, n_decode: int) -> dict[str, float]:
        """As :meth:`Phi4Edge.run`, for a file of :meth:`Phi4Edge.save`; processors take no time here."""
        torch = self._torch
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        inputs = self._inputs(arrays)
        self._encoder.seconds = 0.0
        with torch.inference_mode(), self._adapter(arrays):
            started = time.perf_counter()
            out = self._model(use_cache=True, logits_to_keep=1, **inputs)
            first_token = time.perf_counter() - started
            logits = out.logits[0, -1].float().numpy()
            cache = out.past_key_values
            started = time.perf_counter()
            for token in token_ids(n_decode, 1):
                ids = torch.tensor([[token]])
                self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            decode = time.perf_counter() - started
        return {
            "n_prompt": len(arrays["ids"]),
            "encoder": self._encoder.seconds,
            "prefill": first_token - self._encoder.seconds,
            "first token": first_token,
            "decode": decode,
            "likeness": cosine(logits, arrays["logits"]),
        }

    def _inputs(self, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
        torch = self._torch
        inputs: dict[str, Any] = {"input_ids": torch.from_numpy(arrays["ids"])[None]}
        if "pixels" in arrays:
            inputs["image_pixel_values"] = torch.from_numpy(arrays["pixels"])[None].to(torch.bfloat16)
            inputs["image_attention_mask"] = torch.from_numpy(arrays["mask"])[None]
            inputs["image_sizes"] = torch.from_numpy(arrays["size"])[None]
        if "features" in arrays:
            inputs["audio_input_features"] = torch.from_numpy(arrays["features"])[None].to(torch.bfloat16)
            inputs["audio_embed_sizes"] = torch.tensor([-(-len(arrays["features"]) // 8)])
        return inputs

    def _adapter(self, arrays: Collection[str]) -> AbstractContextManager[Any]:
        """Uses the adapter that a request needs."""
        if "pixels" not in arrays and "features" not in arrays:
            off: AbstractContextManager[Any] = self._model.disable_adapter()
            return off
        self._model.set_adapter("vision" if "pixels" in arrays else "speech")
        return nullcontext()


class Stopwatch:
    """The seconds that a module of torch takes, added up."""

    def __init__(self, module: Any) -> None:
        self.seconds = 0.0
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self.seconds -= time.perf_counter()

    def _stop(self, *_: object) -> None:
        self.seconds += time.perf_counter()


def cosine(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


# --- processes

SIDES: dict[str, Callable[..., Any]] = {"phi4edge": Phi4Edge, "transformers": Transformers}


def serve(name: str, options: dict[str, Any]) -> None:
    """Answers requests ``{"do": a method, ...its arguments}``; the first answer tells about the side."""
    from phi4edge.machine import peak_memory

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    started = time.perf_counter()
    side = SIDES[name](**options)
    answer: dict[str, Any] = side.about | {"load": time.perf_counter() - started, "peak": peak_memory()}
    print(json.dumps(answer), file=answers, flush=True)
    for line in sys.stdin:
        arguments = json.loads(line)
        reset_peak_memory()
        if "request" in arguments:
            arguments["request"] = Request(**arguments["request"])
        answer = getattr(side, arguments.pop("do"))(**arguments)
        print(json.dumps(answer | {"peak": peak_memory()}), file=answers, flush=True)


def reset_peak_memory() -> None:
    """Of this process, to what it occupies now; where the system cannot, the peak is the one since its start."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


class Worker:
    """The parent's end of a worker process."""

    def __init__(self, side: str, **options: Any) -> None:
        self._side = side
        command = [sys.executable, "-m", "benchmarks.multimodal_sides", side, json.dumps(options)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
        self.about = self._answer()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.communicate(timeout=60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise RuntimeError(f"the worker of {self._side} ended with status {status}; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
