"""A model in memory: text in, streamed text out.

>>> import phi4edge
>>> model = phi4edge.load("model.gguf", context=4096)  # doctest: +SKIP
>>> for piece in model.stream("Why is the sky blue?", max_tokens=64):  # doctest: +SKIP
...     print(piece.text, end="", flush=True)
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from phi4edge import _core, machine
from phi4edge.adapters import AdapterSet, checked_scale
from phi4edge.bundle import BACKBONE, bundle_at
from phi4edge.errors import InputError, UsageError
from phi4edge.generation import FinishReason, Generation, GenerationConfig, Piece, Timings, TokenLogprob, Usage
from phi4edge.info import check_options, choose_context, context_warnings
from phi4edge.prompt import ChatTemplate
from phi4edge.stops import StopStrings
from phi4edge.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self

Message = Mapping[str, Any]
Prompt = str | Sequence[Message] | Sequence[int]
Progress = Callable[[int, int], bool | None]  # (done, total); False cancels


def load(
    path: str | os.PathLike[str],
    *,
    context: int | None = None,
    threads: int | None = None,
    kv_type: str = "f16",
    isa: str = "",
    check_memory: bool = True,
    progress: Progress | None = None,
) -> Model:
    """Loads a GGUF model, or the one in a bundle directory, whose adapters are there by name and read when first used.

    context: tokens that a conversation may have; None takes what the model was trained on, at most 4096.
    threads: None takes the physical cores that this process may use.
    kv_type: ``"f16"`` or ``"f32"``, the numbers of the KV cache.
    isa: name of an instruction set of ``isas()``; empty takes the environment's ``PHI4EDGE_ISA``, or the best.
    progress: called with (bytes done, bytes in all).

    Raises FileError, BundleError, OutOfMemoryError (before anything large is allocated), UnsupportedError, UsageError,
    and Cancelled when progress returned False.
    """
    started = time.perf_counter()
    check_options(context, kv_type)
    n_threads, thread_warning = machine.clamp_threads(threads)
    bundle = bundle_at(path)
    file = _core.GgufFile(path if bundle is None else bundle.part(BACKBONE))
    config = _core.read_config(file)
    metadata = file.metadata
    tokenizer = Tokenizer.from_metadata(metadata, os.fspath(path))
    template = _template(metadata, tokenizer, os.fspath(path))
    n_context = choose_context(config, context)
    if check_memory:
        _core.require_memory(_core.memory_need(file, n_context, kv_type), _core.available_memory())
    core = _core.Model(file, n_threads, isa, progress)
    load_seconds = time.perf_counter() - started
    warnings = [*file.warnings, *context_warnings(config, n_context)]
    if thread_warning:
        warnings.append(thread_warning)
    return Model(
        os.fspath(path),
        core,
        tokenizer,
        template,
        metadata,
        n_context,
        kv_type,
        load_seconds,
        tuple(warnings),
        adapter_files={} if bundle is None else bundle.adapters(),
        check_memory=check_memory,
    )


def isas() -> list[str]:
    """Instruction sets that this build has and this CPU runs, best first."""
    return _core.isas()


def read_bandwidth(n_threads: int, n_bytes: int, seconds: float) -> float:
    """Bytes per second that ``n_threads`` read from ``n_bytes`` of memory, measured for ``seconds``."""
    return _core.read_bandwidth(n_threads, n_bytes, seconds)


def _template(metadata: Mapping[str, Any], tokenizer: Tokenizer, path: str) -> ChatTemplate:
    source = metadata.get("tokenizer.chat_template")

    def text_of(token: int | None) -> str:
        return "" if token is None else tokenizer.token_text(token)

    return ChatTemplate(
        source if isinstance(source, str) else None,
        special_tokens=tokenizer.special_tokens,
        bos=text_of(tokenizer.bos_id),
        eos=text_of(tokenizer.eos_id),
        path=path,
    )


class Session:
    """One sequence of tokens and its KV cache.  Sessions of a model share its weights."""

    def __init__(self, core: _core.Session) -> None:
        self._core = core
        self._tokens: list[int] = []

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(self._tokens)

    def extend(
        self, tokens: Sequence[int], logits: str = "last", progress: Progress | None = None
    ) -> npt.NDArray[np.float32]:
        """Appends tokens; float32 [0, 1 or n, vocab] for logits ``"none"``, ``"last"`` or ``"all"``.

        Raises InputError when they do not fit or do not exist, Cancelled; then nothing has changed.
        """
        ids = token_ids(tokens)
        self._core.truncate(len(self._tokens))  # an interrupt may have come between the next two lines
        rows = self._core.extend(np.array(ids, dtype=np.int32), logits, progress)
        self._tokens += ids
        return rows

    def reuse(self, tokens: Sequence[int]) -> int:
        """Keeps the longest common prefix with ``tokens`` but leaves one of them to compute.

        Returns how many of the kept ones need no computing when the rest is appended: none when RoPE factors change.
        """
        limit = min(len(self._tokens), len(tokens) - 1)
        n_common = next((i for i in range(limit) if self._tokens[i] != tokens[i]), max(limit, 0))
        self.truncate(n_common)
        return min(n_common, self._core.n_reusable(len(tokens)))

    def truncate(self, n_tokens: int) -> None:
        if not 0 <= n_tokens <= len(self._tokens):
            raise InputError(f"cannot keep {n_tokens} of {len(self._tokens)} tokens")
        del self._tokens[n_tokens:]
        self._core.truncate(n_tokens)

    def computes_all_again(self) -> bool:
        """Whether one more token makes the whole sequence be computed again (see LongRoPE)."""
        return bool(self._tokens) and self._core.n_reusable(len(self._tokens) + 1) == 0

    def clear(self) -> None:
        self.truncate(0)

    def use(self, adapter: _core.Adapter | None, scale: float = 1.0) -> None:
        """The adapter for the whole sequence, from the next ``extend`` on, which computes again what was without it."""
        self._core.set_adapter(adapter, scale)

    def cancel(self) -> None:
        """Ends the ``extend`` that runs in another thread, which raises Cancelled there."""
        self._core.cancel()


class Model:
    """Weights, tokenizer and chat template of one model, with one conversation of its own; made by :func:`load`.

    Not for use from several threads at once; ``session()`` gives each thread a sequence of its own.
    """

    def __init__(
        self,
        path: str,
        core: _core.Model,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        metadata: Mapping[str, Any],
        context: int,
        kv_type: str,
        load_seconds: float,
        warnings: tuple[str, ...] = (),
        *,
        adapter_files: Mapping[str, str | os.PathLike[str]] | None = None,
        check_memory: bool = True,
    ) -> None:
        self.path = path
        self.tokenizer = tokenizer
        self.template = template
        self.metadata = metadata
        self.context = context
        self.kv_type = kv_type
        self.last: Generation | None = None  # of the latest stream() or generate()
        self.config = core.config
        self.threads = core.n_threads
        self.isa = core.isa
        self.weight_bytes = core.weight_bytes
        self.warnings = warnings  # about the file
        self._core: _core.Model | None = core
        self._load_seconds = load_seconds
        self._session: Session | None = None
        self._turn = object()  # the answer that owns the session
        self._check_memory = check_memory
        self._adapters: AdapterSet[_core.Adapter] = AdapterSet(adapter_files or {})

    def __repr__(self) -> str:
        name = self.config.name or self.config.architecture
        return (
            f"<phi4edge.Model {name!r} from {self.path!r}, context {self.context}, {self.threads} threads, {self.isa}>"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the memory back; the model cannot be used after."""
        self._core = None
        self._session = None
        self._adapters = AdapterSet({})

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names for ``adapter=``: those of the bundle, and those that were loaded."""
        return self._adapters.names

    def load_adapter(
        self, name: str, path: str | os.PathLike[str] | None = None, progress: Progress | None = None
    ) -> None:
        """Reads a LoRA adapter from a GGUF file, for any number of requests; the weights of the model stay as they are.

        path: None reads the adapter of that name in the bundle now instead of when it is first used.
        progress: called with (bytes done, bytes in all); False cancels.

        Raises UsageError (the name is taken, or there is none), FileError, BundleError (made for another base, or
        damaged), OutOfMemoryError, Cancelled; then nothing has changed.

        Example: ``model.load_adapter("legal", "legal.lora.gguf"); model.generate("Hi", adapter="legal")``.
        """
        self._require_core()
        if path is None:
            self._adapters.get(name, self._adapter_reader(progress))
        else:
            self._adapters.add(name, path, self._adapter_reader(progress))

    def unload_adapter(self, name: str) -> None:
        """Gives an adapter's memory back, once the answers that use it are done.

        One of the bundle is read again when it is next used.
        """
        self._adapters.remove(name)

    def _adapter_reader(self, progress: Progress | None = None) -> Callable[[str | os.PathLike[str]], _core.Adapter]:
        core = self._require_core()

        def read(path: str | os.PathLike[str]) -> _core.Adapter:
            available = _core.available_memory() if self._check_memory else 2**64 - 1
            return _core.Adapter(core, _core.GgufFile(path), available, progress)

        return read

    @property
    def kv_bytes(self) -> int:
        """Size of the KV cache of one sequence with ``context`` tokens, in bytes."""
        return self._kv_bytes(self.context)

    def decode_bytes(self, n_tokens: int) -> int:
        """Bytes read to write one token after ``n_tokens``: the weights (no separate embedding), and the KV cache."""
        embedding = 0 if self.config.tied_head else self._require_core().embedding_bytes
        return self.weight_bytes - embedding + self._kv_bytes(n_tokens)

    def _kv_bytes(self, n_tokens: int) -> int:
        return _core.kv_bytes_per_token(self.config, self.kv_type) * n_tokens

    def session(self, *, adapter: str | None = None, adapter_scale: float = 1.0) -> Session:
        """A new, empty sequence of up to ``context`` tokens, with an adapter or without."""
        return self._new_session(self.context, self._choose(adapter, adapter_scale))

    def _new_session(self, context: int, choice: _AdapterChoice) -> Session:
        session = Session(_core.Session(self._require_core(), context, self.kv_type))
        session.use(choice.core, choice.scale)
        return session

    def _choose(self, name: str | None, scale: float) -> _AdapterChoice:
        return _AdapterChoice(
            name, checked_scale(scale), None if name is None else self._adapters.get(name, self._adapter_reader())
        )

    def encode(self, prompt: Prompt, *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a prompt: a user's text, messages, or ids as they are."""
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, Mapping):
            raise InputError("one message must be in a list", field="prompt", hint="write [message]")
        if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence | np.ndarray):
            kind = type(prompt).__name__
            raise InputError(f"must be text, a list of messages or a list of token ids, got {kind}", field="prompt")
        if len(prompt) == 0:
            raise InputError("the prompt is empty", hint="give at least one message")
        if _is_chat(prompt):
            messages: Any = prompt
            segments = self.template.segments(messages, add_generation_prompt=add_generation_prompt)
            return self.tokenizer.encode_segments(segments)
        ids: Any = prompt
        return token_ids(ids)

    def logits(
        self, tokens: Sequence[int], *, adapter: str | None = None, adapter_scale: float = 1.0
    ) -> npt.NDArray[np.float32]:
        """Logits after each of the tokens, float32 [n_tokens, vocab].  Leaves the conversation alone."""
        ids = token_ids(tokens)
        n_context = min(self.context, max(1, len(ids)))
        return self._new_session(n_context, self._choose(adapter, adapter_scale)).extend(ids, logits="all")

    def generate(self, prompt: Prompt, config: GenerationConfig | None = None, **overrides: Any) -> Generation:
        """The whole answer; see :meth:`stream`."""
        for _ in self.stream(prompt, config, **overrides):
            pass
        return self._finished()

    def stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        progress: Progress | None = None,
        adapter: str | None = None,
        adapter_scale: float = 1.0,
        **overrides: Any,
    ) -> Generator[Piece, None, None]:
        """Pieces of the answer as they come; ``last`` tells the rest afterwards, also when the loop was left early.

        prompt: one user message, messages for the chat template, or token ids.
        progress: called with (tokens done, tokens to do) while the prompt is computed.
        adapter: one of ``adapters``, for the prompt and the answer; None is the model as it is.
        adapter_scale: multiplies what the adapter adds; any finite number.
        overrides: fields of GenerationConfig.
        What the prompt has in common with the one before is not computed again if the adapter and scale are the same.

        Raises UsageError, InputError (an empty prompt, or one that does not fit the context), Cancelled.
        """
        self.last = None
        self._require_core()
        if config is not None and not isinstance(config, GenerationConfig):
            raise UsageError(f"must be a GenerationConfig, got {type(config).__name__}", field="config")
        config = (config or GenerationConfig()).merged(**overrides)
        tokens = self.encode(prompt)
        if not tokens:
            raise InputError("the prompt has no tokens")
        if len(tokens) >= self.context:
            raise InputError(
                f"the prompt has {len(tokens)} tokens and the context holds {self.context}, the answer included",
                hint="shorten the prompt, or load the model with a larger context",
            )
        choice = self._choose(adapter, adapter_scale)
        answer = _Answer(self, config, len(tokens), choice, continues=not _is_chat(prompt))
        return self._stream(tokens, answer, progress)

    def cancel(self) -> None:
        """Ends the answer that another thread is generating; it raises Cancelled there."""
        if self._session is not None:
            self._session.cancel()

    def _stream(self, prompt: list[int], answer: _Answer, progress: Progress | None) -> Generator[Piece, None, None]:
        if self._session is None:
            self._session = self.session()
        session = self._session
        turn = self._turn = object()
        try:
            started = time.perf_counter()
            session.use(answer.adapter.core, answer.adapter.scale)
            answer.cached_tokens = session.reuse(prompt)
            logits = session.extend(prompt[len(session.tokens) :], progress=progress)
            answer.prefill_seconds = time.perf_counter() - started
            for token in prompt:
                answer.sampler.accept(token)
            piece = answer.next_piece(logits[0])
            answer.first_token_seconds = time.perf_counter() - started
            while True:
                if piece is not None:
                    yield piece
                if answer.finish_reason is not None:
                    return
                if self._turn is not turn:
                    raise UsageError(
                        "another answer of this model was started meanwhile", hint="finish one first, or use session()"
                    )
                # The caller's own time between two pieces is not ours.
                step = time.perf_counter()
                logits = session.extend(answer.tokens[-1:], progress=progress if session.computes_all_again() else None)
                piece = answer.next_piece(logits[0])
                answer.n_decoded += 1
                answer.decode_seconds += time.perf_counter() - step
        finally:
            if self._turn is turn:
                self.last = answer.result(self._load_seconds)

    def _finished(self) -> Generation:
        if self.last is None:
            raise InputError("no answer was generated")
        return self.last

    def _require_core(self) -> _core.Model:
        if self._core is None:
            raise UsageError("the model was closed", hint="load it again")
        return self._core


@dataclass(frozen=True)
class _AdapterChoice:
    """What a request asked for; keeps the adapter in memory as long as the request lasts."""

    name: str | None
    scale: float
    core: _core.Adapter | None


class _Answer:
    """An answer in the making: picks tokens, turns them into text, and knows when to stop."""

    def __init__(
        self, model: Model, config: GenerationConfig, n_prompt: int, adapter: _AdapterChoice, *, continues: bool
    ) -> None:
        self.adapter = adapter
        self._model = model
        self._config = config
        self._n_prompt = n_prompt
        tokenizer = model.tokenizer
        self._stop_tokens = tokenizer.stop_ids | frozenset(config.stop_tokens)
        self._decoder = tokenizer.stream_decoder(continues=continues)
        self._stops = StopStrings(config.stop)
        seed = secrets.randbits(64) if config.seed is None else config.seed
        self.sampler = _core.Sampler(
            _core.SamplerOptions(
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                min_p=config.min_p,
                repetition_penalty=config.repetition_penalty,
                presence_penalty=config.presence_penalty,
                frequency_penalty=config.frequency_penalty,
                penalty_window=config.penalty_window,
                logit_bias=list(config.logit_bias.items()),
                seed=seed,
                n_top=config.logprobs,
                forbidden=tokenizer.unused_ids,
            ),
            model.config.vocab_size,
        )
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.cached_tokens = 0
        self.prefill_seconds = 0.0
        self.first_token_seconds = 0.0
        self.decode_seconds = 0.0
        self.n_decoded = 0
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._n_given = 0  # tokens that were part of a piece

    def next_piece(self, logits: npt.NDArray[np.float32]) -> Piece | None:
        """Takes one more token; the text that became certain by it, or None."""
        sample = self.sampler.sample(logits)
        if sample.token in self._stop_tokens:
            self.finish_reason = "stop"
            return self._piece(self._stops.push(self._decoder.flush()) + self._stops.flush())
        self.sampler.accept(sample.token)
        self.tokens.append(sample.token)
        if self._config.logprobs:
            self._logprobs.append(TokenLogprob(sample.token, sample.logprob, tuple(sample.top)))
        text = self._stops.push(self._decoder.push(sample.token))
        if self._stops.found:
            self.finish_reason = "stop"
        elif min(self._config.max_tokens, self._model.context - self._n_prompt) <= len(self.tokens):
            self.finish_reason = "length"
            text += self._stops.push(self._decoder.flush()) + self._stops.flush()
        return self._piece(text)

    def _piece(self, text: str) -> Piece | None:
        if not text and (self.finish_reason is None or self._n_given == len(self.tokens)):
            return None
        tokens = tuple(self.tokens[self._n_given :])
        logprobs = tuple(self._logprobs[self._n_given :])
        self._n_given = len(self.tokens)
        self._text.append(text)
        return Piece(text, tokens, logprobs)

    def result(self, load_seconds: float) -> Generation:
        return Generation(
            text="".join(self._text),
            tokens=tuple(self.tokens),
            finish_reason=self.finish_reason or "cancelled",
            usage=Usage(self._n_prompt, self.cached_tokens, len(self.tokens)),
            timings=Timings(
                load_seconds=load_seconds,
                prefill_seconds=self.prefill_seconds,
                first_token_seconds=self.first_token_seconds,
                decode_seconds=self.decode_seconds,
                n_prefilled=self._n_prompt - self.cached_tokens,
                n_decoded=self.n_decoded,
            ),
            logprobs=tuple(self._logprobs),
            adapter=self.adapter.name,
            adapter_scale=self.adapter.scale,
        )


def _is_chat(prompt: Any) -> bool:
    """Whether a prompt goes through the chat template: a text or messages, not token ids."""
    return isinstance(prompt, str) or isinstance(prompt[0], Mapping)


def token_ids(tokens: Sequence[int]) -> list[int]:
    """Token ids as plain integers; InputError names the one that is none, or that no vocabulary can have."""
    ids = []
    for i, token in enumerate(tokens):
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise InputError(f"must be a token id, got {type(token).__name__}", field=f"prompt[{i}]")
        if not -(2**31) <= token < 2**31:
            raise InputError(f"{token} is no token id", field=f"prompt[{i}]")
        ids.append(int(token))
    return ids
