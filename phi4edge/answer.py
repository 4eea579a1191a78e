"""An answer as it is written, token by token, and what there is to tell about it afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from phi4edge.drafts import Drafts
from phi4edge.expanded import Expanded
from phi4edge.generation import FinishReason, Generation, GenerationConfig, Piece, Timings, TokenLogprob, Usage
from phi4edge.media import EncoderRun
from phi4edge.router import AUDIO, IMAGE, Route
from phi4edge.stops import StopStrings
from phi4edge.tokenizer import Tokenizer

_EXPECTED = GenerationConfig().max_tokens


class Sample(Protocol):
    """A token that was chosen, its log-probability, and the likeliest tokens with theirs."""

    @property
    def token(self) -> int: ...
    @property
    def logprob(self) -> float: ...
    @property
    def top(self) -> Sequence[tuple[int, float]]: ...


class Sampler(Protocol):
    """Chooses tokens; ``accept`` tells it those that the sequence has."""

    def sample(self, logits: npt.NDArray[np.float32], /) -> Sample: ...
    def accept(self, token: int, /) -> None: ...


@dataclass(frozen=True)
class Request:
    """A prompt that was found to be good, and how to run it."""

    prompt: Expanded
    route: Route
    scale: float  # of the adapter
    loaded: Any  # the adapter of the route, in memory as long as this request is; None for none
    seconds: float  # that it took to get here: reading files, and bringing them into the form that encoders take
    warnings: tuple[str, ...] = ()  # about the prompt, for people


class Answer:
    """An answer in the making: picks tokens, turns them into text, and knows when to stop.

    context: tokens that the prompt and the answer may have together.  continues: the answer goes on from a text.
    """

    def __init__(
        self,
        request: Request,
        config: GenerationConfig,
        tokenizer: Tokenizer,
        sampler: Sampler,
        *,
        context: int,
        continues: bool,
    ) -> None:
        self.request = request
        self.sampler = sampler
        self._config = config
        n_prompt = len(request.prompt.keys)
        self._n_most = min(config.max_tokens, context - n_prompt)
        self._stop_tokens = tokenizer.stop_ids | frozenset(config.stop_tokens)
        self._decoder = tokenizer.stream_decoder(continues=continues)
        self._stops = StopStrings(config.stop)
        self._drafts = Drafts(request.prompt.keys, config.draft_tokens, self._stop_tokens)
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.cached_tokens = 0
        self.encoder_runs: dict[str, EncoderRun] = {}
        self.encoder_seconds = 0.0
        self.prefill_seconds = 0.0
        self.first_token_seconds = 0.0
        self.decode_seconds = 0.0
        self.n_decoded = 0
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._n_given = 0  # tokens that were part of a piece

    @property
    def n_expected(self) -> int:
        """Tokens for which to make room at once: a longer answer gets more as it comes."""
        return min(self._n_most, _EXPECTED)

    def forget_media(self) -> None:
        """Once the prompt is computed."""
        self.request = replace(self.request, prompt=self.request.prompt.without_data())

    def draft(self, room: int) -> list[int]:
        """Tokens that may come after the last one, at most ``room`` and not more than the answer may still have."""
        return self._drafts.propose(min(room, self._n_most - len(self.tokens) - 1))

    def next_piece(self, logits: npt.NDArray[np.float32]) -> Piece | None:
        """Takes one more token; the text that became certain by it, or None."""
        sample = self.sampler.sample(logits)
        if sample.token in self._stop_tokens:
            self.finish_reason = "stop"
            return self._piece(self._stops.push(self._decoder.flush()) + self._stops.flush())
        self.sampler.accept(sample.token)
        self.tokens.append(sample.token)
        self._drafts.add(sample.token)
        if self._config.logprobs:
            self._logprobs.append(TokenLogprob(sample.token, sample.logprob, tuple(sample.top)))
        text = self._stops.push(self._decoder.push(sample.token))
        if self._stops.found:
            self.finish_reason = "stop"
        elif self._n_most <= len(self.tokens):
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
        prompt, route = self.request.prompt, self.request.route
        n_prompt = len(prompt.keys)
        return Generation(
            text="".join(self._text),
            tokens=tuple(self.tokens),
            finish_reason=self.finish_reason or "cancelled",
            usage=Usage(
                n_prompt,
                self.cached_tokens,
                len(self.tokens),
                prompt.n_tokens(IMAGE),
                prompt.n_tokens(AUDIO),
                self._drafts.n_proposed,
                self._drafts.n_right,
            ),
            timings=Timings(
                load_seconds=load_seconds,
                prefill_seconds=self.prefill_seconds,
                first_token_seconds=self.first_token_seconds,
                decode_seconds=self.decode_seconds,
                n_prefilled=n_prompt - self.cached_tokens,
                n_decoded=self.n_decoded,
                processor_seconds=self.request.seconds if prompt.media else 0.0,
                encoder_seconds=self.encoder_seconds,
            ),
            logprobs=tuple(self._logprobs),
            adapter=route.adapter,
            adapter_scale=self.request.scale,
            merged_adapter=route.merged,
            encoders={role: run.provider for role, run in self.encoder_runs.items()},
            warnings=(
                *([route.warning] if route.warning else []),
                *self.request.warnings,
                *(warning for run in self.encoder_runs.values() for warning in run.warnings),
            ),
        )
