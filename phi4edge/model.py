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
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from phi4edge import _core, machine
from phi4edge.adapters import NO_ADAPTER, AdapterSet, checked_scale
from phi4edge.answer import Answer, Request
from phi4edge.bundle import BACKBONE, bundle_at
from phi4edge.embedded import model_path
from phi4edge.errors import InputError, Phi4EdgeError, UsageError
from phi4edge.expanded import Steps, expand, length
from phi4edge.generation import Generation, GenerationConfig, Piece
from phi4edge.info import check_options, choose_context, context_warnings
from phi4edge.media import Media, MediaInput
from phi4edge.prompt import ChatTemplate, media_parts, template_of, with_frames
from phi4edge.router import IMAGE, TEXT, Router
from phi4edge.session import Growth, Session, token_ids
from phi4edge.together import Together, Work
from phi4edge.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self

Message = Mapping[str, Any]
Prompt = str | Sequence[Message] | Sequence[int]
Progress = Callable[[int, int], bool | None]  # (done, total); False cancels


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    context: int | None = None,
    threads: int | None = None,
    kv_type: str = "i16",
    isa: str = "",
    provider: str = "auto",
    check_memory: bool = True,
    progress: Progress | None = None,
) -> Model:
    """Loads a GGUF model, or the one in a bundle directory, whose adapters are there by name and read when first used.

    path: None loads the small model that is embedded in the package, and so does "nano" where there is no such path.
    context: tokens that a conversation may have, for which there must be memory at once; None: as many as the model was
        trained on, as far as there is memory.
    threads: None takes the physical cores that this process may use.
    kv_type: what the KV cache stores: ``"i16"`` (16 bits a number, and a scale for all of a head), ``"f32"``, or
        ``"q8_0"`` (8 bits a number and a scale for 32 of them).
    isa: name of an instruction set of ``isas()``; empty takes the environment's ``PHI4EDGE_ISA``, or the best.
    provider: what runs the encoders of images and sounds: ``"auto"``, ``"cpu"``, or another of ``encoder_providers()``.
    progress: called with (bytes done, bytes in all).

    Raises FileError, BundleError, OutOfMemoryError (before anything large is allocated), UnsupportedError, UsageError,
    and Cancelled when progress returned False.
    """
    started = time.perf_counter()
    check_options(context, kv_type)
    n_threads, thread_warning = machine.clamp_threads(threads)
    path = model_path(path)
    bundle = bundle_at(path)
    router = Router({}) if bundle is None else Router.of_bundle(bundle)
    file = _core.GgufFile(path if bundle is None else bundle.part(BACKBONE))
    config = _core.read_config(file)
    metadata = file.metadata
    tokenizer = Tokenizer.from_metadata(metadata, path)
    free_memory = _core.available_memory if check_memory else None
    media = Media(
        bundle, config.hidden_size, n_threads, tokenizer.special_tokens, provider=provider, free_memory=free_memory
    )
    template = template_of(metadata, tokenizer, media.placeholders, path)
    n_context = choose_context(config, context)  # to begin with
    if check_memory:
        _core.require_memory(_core.memory_need(file, n_context, kv_type), _core.available_memory())
    core = _core.Model(file, n_threads, isa, progress)
    load_seconds = time.perf_counter() - started
    warnings = [*file.warnings, *context_warnings(config, n_context)]
    if thread_warning:
        warnings.append(thread_warning)
    return Model(
        path,
        core,
        tokenizer,
        template,
        metadata,
        context or config.context_length,
        kv_type,
        load_seconds,
        tuple(warnings),
        router=router,
        media=media,
        adapter_files={} if bundle is None else bundle.adapters(),
        first_context=n_context,
        check_memory=check_memory,
    )


def isas() -> list[str]:
    """Instruction sets that this build has and this CPU runs, best first."""
    return _core.isas()


def read_bandwidth(n_threads: int, n_bytes: int, seconds: float) -> float:
    """Bytes per second that ``n_threads`` read from ``n_bytes`` of memory, measured for ``seconds``."""
    return _core.read_bandwidth(n_threads, n_bytes, seconds)


def int8_peak(isa: str, n_threads: int, seconds: float) -> float:
    """Operations per second, two for multiply and add, of the int8 dot product that the kernels of ``isa`` use."""
    return _core.int8_peak(isa, n_threads, seconds)


class Model:
    """Weights, tokenizer and chat template of one model, with one conversation of its own; made by :func:`load`.

    Not for use from several threads at once, but for ``cancel()``; sessions of ``session()`` may each be extended in a
    thread of its own.
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
        router: Router,
        media: Media,
        adapter_files: Mapping[str, str | os.PathLike[str]] | None = None,
        first_context: int,
        check_memory: bool = True,
    ) -> None:
        self.path = path
        self.tokenizer = tokenizer
        self.template = template
        self.metadata = metadata
        self.context = context  # tokens that a sequence may have
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
        self._together: Together | None = None  # of the generate_together() that runs
        self._router = router
        self._media = media
        # Token -> "image" or "audio": tokens that stand for media in a prompt, and are never part of an answer.
        self._placeholders = {tokenizer.special_tokens[text]: kind for kind, text in media.placeholders.items()}
        self._first_context = first_context  # of a sequence that is new
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
        self.release_encoders()
        self._adapters = AdapterSet({})

    @property
    def modalities(self) -> frozenset[str]:
        """What prompts may have: "text", and "image" and "audio" when the bundle has encoders for them."""
        return self._media.kinds | {TEXT}

    def release_encoders(self) -> None:
        """Gives the memory of the image and audio encoders back; the next image or sound opens them again."""
        self._media.release()

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Tokens that stand for images and sounds in a prompt; an answer never has them."""
        return tuple(self._placeholders)

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
            return _core.Adapter(core, _core.GgufFile(path), self._available_memory(), progress)

        return read

    def _available_memory(self) -> int:
        return _core.available_memory() if self._check_memory else 2**64 - 1

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
        """A new, empty sequence of up to ``context`` tokens, with an adapter or without.

        The adapter is for ``Session.extend``; :meth:`stream` sets the one that it was asked for.
        """
        return self._new_session(self._first_context, self._adapter(adapter), checked_scale(adapter_scale))

    def _new_session(self, context: int, adapter: _core.Adapter | None, scale: float) -> Session:
        core = self._require_core()
        growth = Growth(self.context, self._kv_bytes(1), self._available_memory)
        growth.require_memory(context)
        session = Session(_core.Session(core, context, self.kv_type), core, growth)
        session.use(adapter, scale)
        return session

    def _adapter(self, name: str | None) -> _core.Adapter | None:
        return None if name in (None, NO_ADAPTER) else self._adapters.get(name, self._adapter_reader())

    def encode(self, prompt: Prompt, *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a prompt: a user's text, messages, or ids as they are.

        An image or a sound is one id here, a video one for each frame that is asked for; none of them is read.
        """
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
        session = self._new_session(n_context, self._adapter(adapter), checked_scale(adapter_scale))
        return session.extend(ids, logits="all")

    def next_logits(
        self,
        prompt: Prompt,
        *,
        adapter: str | None = None,
        adapter_scale: float = 1.0,
        max_crops: int | None = None,
        session: Session | None = None,
    ) -> npt.NDArray[np.float32]:
        """Logits of the token after a prompt, float32 [vocab]; the parameters are those of :meth:`stream`.

        session: None leaves the conversation alone.
        """
        request = self._request(prompt, adapter, adapter_scale, max_crops)
        if session is None:
            session = self._new_session(len(request.prompt.keys), request.loaded, request.scale)
        return self._prefill(self._owned(session), session.begin(), request, None, 0)

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
        max_crops: int | None = None,
        session: Session | None = None,
        **overrides: Any,
    ) -> Generator[Piece, None, None]:
        """Pieces of the answer as they come; ``last`` tells the rest afterwards, also when the loop was left early.

        prompt: one user message, messages for the chat template, or token ids.  Where ``modalities`` allows it, the
            content of a message may be a list of ``{"type": "text", "text": ...}``, ``{"type": "image", "image": ...}``
            (a path, the bytes of a file, an image of Pillow, or uint8 [height, width, 3]), ``{"type": "audio",
            "audio": ...}`` (a path, the bytes of a file, or samples with their rate in Hz) and ``{"type": "video",
            "video": ..., "frames": 8}`` (a path, the bytes of a file, or uint8 [n, height, width, 3]), of which so many
            frames are taken as images, evenly over its duration; its sound is not heard.  A data URL stands for the
            bytes of a file; no other URL is taken.
        progress: called with (tokens done, tokens to do) while the prompt is computed; those of an image or a sound
            that is encoded count twice.
        adapter: one of ``adapters``, for the prompt and the answer, or "none"; None is the one that the bundle has for
            what the prompt holds: none for text.
        adapter_scale: multiplies what the adapter adds; any finite number.
        max_crops: of each image, and of all frames of a video together (but one for each frame at least), at most what
            the model was made for; fewer take less time, and show less.
        session: of this model; None is its own one.
        overrides: fields of GenerationConfig.
        What the prompt has in common with the one before is not computed again if the adapter and scale are the same.

        Raises UsageError, FileError, BundleError, InputError (an empty prompt, one that does not fit the context, or an
        image or a sound that cannot be used), Cancelled.
        """
        self.last = None
        answer = self._answer(prompt, config, adapter, adapter_scale, max_crops, **overrides)
        if session is None:
            if self._session is None:
                self._session = self.session()
            session = self._session
        return self._stream(self._owned(session), answer, progress)

    def together(
        self,
        requests: Iterable[Prompt | Mapping[str, Any]],
        config: GenerationConfig | None = None,
        *,
        at_once: int = 4,
        **options: Any,
    ) -> Together:
        """Answers several requests at the same time; see :class:`Together`.

        requests: of each the prompt, or ``{"prompt": ..., "adapter": ..., "max_tokens": ...}`` with any parameters of
            :meth:`generate` but ``config``, ``progress`` and ``session``.  They are read one by one as others end.
        config, options: for requests that do not say it themselves.
        at_once: how many answers, each with a KV cache of its own, are written at the same time; as far as there is
            memory.

        Answers are those of :meth:`generate`.  The conversation of the model, and ``last``, stay as they are.
        Raises UsageError; what is wrong with one request is told in its place.
        """
        self._require_core()
        work = Work(self._answer, self.session, self._begin, self._load_seconds)
        return Together(requests, work, at_once, {"config": config, **options})

    def generate_together(
        self, requests: Iterable[Prompt | Mapping[str, Any]], config: GenerationConfig | None = None, **options: Any
    ) -> list[Generation | Phi4EdgeError]:
        """The whole answer to each request in their order, or the error that :meth:`generate` would have raised for it.

        The parameters are those of :meth:`together`.  After ``cancel()`` those that were not done are Cancelled.
        """
        self._together = self.together(requests, config, **options)
        try:
            return self._together.results()
        finally:
            self._together = None

    def _answer(
        self,
        /,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        adapter: str | None = None,
        adapter_scale: float = 1.0,
        max_crops: int | None = None,
        **overrides: Any,
    ) -> Answer:
        """An answer that is to be written; the parameters are those of :meth:`stream`."""
        self._require_core()
        if config is not None and not isinstance(config, GenerationConfig):
            raise UsageError(f"must be a GenerationConfig, got {type(config).__name__}", field="config")
        config = (config or GenerationConfig()).merged(**overrides)
        request = self._request(prompt, adapter, adapter_scale, max_crops)
        continues = not _is_chat(prompt)
        return Answer(request, config, self.tokenizer, self._sampler(config), context=self.context, continues=continues)

    def _request(self, prompt: Prompt, adapter: str | None, scale: float, max_crops: int | None) -> Request:
        """Everything that can be wrong with a prompt is found here, before an encoder or the decoder works."""
        started = time.perf_counter()
        tokens = self.encode(prompt)
        if not tokens:
            raise InputError("the prompt has no tokens")
        messages: Any = prompt
        parts = [] if isinstance(prompt, str) or not _is_chat(prompt) else media_parts(messages)
        self._media.require(parts)
        route = self._router.route({part.placeholder for part in parts}, adapters=self.adapters, override=adapter)
        room = self.context - len(tokens) + sum(part.n_items for part in parts)
        read = self._media.read_all(parts, route.audio_branch, max_crops, room)
        if read.n_frames:
            tokens = self.encode(with_frames(messages, read.n_frames))
        expanded = expand(tokens, self._placeholders, read.items)
        if len(expanded.keys) >= self.context:
            fewer = " or its images, allow fewer crops" if any(item.kind == IMAGE for item in read.items) else ""
            raise InputError(
                f"the prompt has {len(expanded.keys)} tokens and the context holds {self.context}, the answer included"
                + read.sizes,
                hint=f"shorten the prompt{fewer}, or load the model with a larger context",
            )
        loaded = self._adapter(route.adapter)
        return Request(expanded, route, checked_scale(scale), loaded, time.perf_counter() - started, read.warnings)

    def _sampler(self, config: GenerationConfig) -> _core.Sampler:
        options = _core.SamplerOptions(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            presence_penalty=config.presence_penalty,
            frequency_penalty=config.frequency_penalty,
            penalty_window=config.penalty_window,
            logit_bias=list(config.logit_bias.items()),
            seed=secrets.randbits(64) if config.seed is None else config.seed,
            n_top=config.logprobs,
            forbidden=[*self.tokenizer.unused_ids, *self.placeholder_ids],
        )
        return _core.Sampler(options, self.config.vocab_size)

    def cancel(self) -> None:
        """Ends the answer that another thread is generating, which raises Cancelled there, or generate_together()."""
        if self._session is not None:
            self._session.cancel()
        together = self._together  # another thread may finish it meanwhile
        if together is not None:
            together.cancel()

    def _owned(self, session: Session) -> Session:
        if session.model is not self._core:
            raise UsageError("belongs to another model", field="session", hint="use one that session() made")
        return session

    def _prefill(
        self,
        session: Session,
        turn: object,
        request: Request,
        progress: Progress | None,
        n_answer: int,
        answer: Answer | None = None,
    ) -> npt.NDArray[np.float32]:
        """Brings the session to the end of the prompt, with room for an answer, and returns the logits there, [vocab].

        Everything is appended first and computed at once: each call of the decoder reads all weights.
        """
        prompt = request.prompt
        progress = _stoppable(session, progress)
        session.use(request.loaded, request.scale)
        n_cached = session.reuse(prompt.keys)
        session.reserve(len(prompt.keys) + n_answer)
        steps = Steps(progress, prompt, len(session), n_cached)
        runs = None if answer is None else answer.encoder_runs
        encoder_seconds = 0.0
        begin = 0
        for piece in prompt.pieces:
            end = begin + length(piece)
            n_kept = max(0, len(session) - begin)
            is_last = end == len(prompt.keys)
            if isinstance(piece, MediaInput) and len(session) < end:
                started = time.perf_counter()
                rows = self._media.encode(piece, steps.encoder(piece), runs)[n_kept:]
                encoder_seconds += time.perf_counter() - started
                session.require(turn)  # nobody locks the sequence while an encoder works
                keys = prompt.keys[begin + n_kept : end]
                if is_last:
                    logits = session.extend_embeddings(rows, keys, progress=steps.decoder())
                else:
                    session.append_embeddings(rows, keys)
                del rows  # the session has a copy
            elif not isinstance(piece, MediaInput) and is_last:
                logits = session.extend(piece[n_kept:], progress=steps.decoder())
            elif not isinstance(piece, MediaInput):
                session.append(piece[n_kept:])
            begin = end
        if answer is not None:
            answer.cached_tokens, answer.encoder_seconds = n_cached, encoder_seconds
        row: npt.NDArray[np.float32] = logits[0]
        return row

    def _stream(self, session: Session, answer: Answer, progress: Progress | None) -> Generator[Piece, None, None]:
        turn = session.begin()
        try:
            piece = self._begin(session, turn, answer, progress)
            while True:
                if piece is not None:
                    yield piece
                if answer.finish_reason is not None:
                    return
                session.require(turn)
                # The caller's own time between two pieces is not ours.
                step = time.perf_counter()
                shown = progress if session.computes_all_again() else None
                logits = session.step(answer.tokens[-1], answer.draft(session.draft_room()), shown)
                piece = answer.next_piece(logits)
                answer.n_decoded += 1
                answer.decode_seconds += time.perf_counter() - step
        finally:
            if session.turn is turn:
                session.forget_draft()
                self.last = answer.result(self._load_seconds)

    def _begin(self, session: Session, turn: object, answer: Answer, progress: Progress | None = None) -> Piece | None:
        """Computes the prompt and takes the first token of the answer."""
        started = time.perf_counter()
        logits = self._prefill(session, turn, answer.request, progress, answer.n_expected, answer)
        answer.forget_media()
        answer.prefill_seconds = time.perf_counter() - started - answer.encoder_seconds
        for key in answer.request.prompt.keys:
            if isinstance(key, int):
                answer.sampler.accept(key)
        piece = answer.next_piece(logits)
        answer.first_token_seconds = answer.request.seconds + time.perf_counter() - started
        return piece

    def _finished(self) -> Generation:
        if self.last is None:
            raise InputError("no answer was generated")
        return self.last

    def _require_core(self) -> _core.Model:
        if self._core is None:
            raise UsageError("the model was closed", hint="load it again")
        return self._core


def _stoppable(session: Session, progress: Progress | None) -> Progress:
    """A progress that also looks whether the answer was cancelled, from where the decoder cannot see it."""

    def tell(done: int, total: int) -> bool | None:
        going_on = None if progress is None else progress(done, total)
        return False if session.cancelled else going_on

    return tell


def _is_chat(prompt: Any) -> bool:
    """Whether a prompt goes through the chat template: a text or messages, not token ids."""
    return isinstance(prompt, str) or isinstance(prompt[0], Mapping)
