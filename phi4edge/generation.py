"""How to generate, and what came out: the options of a request; the pieces, usage and timings that it returns."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from phi4edge.errors import UsageError

FinishReason = Literal["stop", "length", "cancelled"]

_INTEGERS = {  # inclusive
    "max_tokens": (1, 2**31 - 1),
    "top_k": (0, 2**31 - 1),
    "penalty_window": (-1, 2**31 - 1),
    "logprobs": (0, 100),
    "draft_tokens": (0, 64),  # each takes a row of logits
}
_NUMBERS = {  # inclusive
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
}
_SEEDS = (0, 2**64 - 1)
_TOKENS = (0, 2**31 - 1)
_BIASES = (-100.0, 100.0)


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """Options of one generation. A value of a wrong type or out of range is a UsageError that names the field.

    Example: ``GenerationConfig(max_tokens=64, temperature=0.7, top_p=0.9, seed=1)``.

    The sampler applies logit_bias, the penalties, top_k, top_p, min_p and temperature in this order.
    """

    max_tokens: int = 512
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off; 0 leaves the likeliest token
    min_p: float = 0.0  # relative to the likeliest token; 0: off
    repetition_penalty: float = 1.0  # 1: off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 64  # the last tokens that penalties look at, prompt included; 0: none, -1: all
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None  # None: a new one each time
    stop: Sequence[str] = ()  # texts that end the answer; they are not part of it
    stop_tokens: Sequence[int] = ()  # in addition to the tokens with which the model ends an answer
    logprobs: int = 0  # for each token, this many alternatives with their log-probability; 0: no log-probabilities
    draft_tokens: int = 7  # guessed ahead at most, where the text repeats itself; the answer is the same. 0: off

    def __post_init__(self) -> None:
        for name, limits in _INTEGERS.items():
            self._set(name, _integer(name, getattr(self, name), *limits))
        for name, bounds in _NUMBERS.items():
            self._set(name, _number(name, getattr(self, name), *bounds))
        if self.seed is not None:
            self._set("seed", _integer("seed", self.seed, *_SEEDS))
        self._set("logit_bias", _checked_bias(self.logit_bias))
        self._set("stop", _checked_stop(self.stop))
        tokens = _checked_sequence("stop_tokens", self.stop_tokens, "token ids")
        self._set("stop_tokens", tuple(_integer(f"stop_tokens[{i}]", t, *_TOKENS) for i, t in enumerate(tokens)))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the way past `frozen`, here only

    def merged(self, /, **overrides: Any) -> GenerationConfig:
        """This configuration with some fields replaced; an unknown field is a UsageError that lists similar ones."""
        names = [each.name for each in dataclasses.fields(self)]
        for name in overrides:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=3)
                hint = f"did you mean {' or '.join(close)}?" if close else f"the options are {', '.join(names)}"
                raise UsageError("there is no such option of generation", field=name, hint=hint)
        return dataclasses.replace(self, **overrides)


def _integer(name: str, value: object, low: int, high: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]  # also NumPy integers
    except TypeError:
        raise UsageError(
            f"must be an integer from {low} to {high}, got {type(value).__name__} {_shown(value)}", field=name
        ) from None
    if not low <= number <= high:
        raise UsageError(f"must be from {low} to {high}, got {_shown(number)}", field=name)
    return number


def _number(name: str, value: object, low: float, high: float) -> float:
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UsageError(
            f"must be a number from {low:g} to {high:g}, got {type(value).__name__} {_shown(value)}", field=name
        ) from None
    except OverflowError:
        number = math.inf
    if not low <= number <= high:  # also refuses NaN
        raise UsageError(f"must be from {low:g} to {high:g}, got {number:g}", field=name)
    return number


def _checked_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise UsageError(f"must map token ids to numbers, got {type(bias).__name__}", field="logit_bias")
    return {
        _integer("logit_bias", token, *_TOKENS): _number(f"logit_bias[{_shown(token)}]", value, *_BIASES)
        for token, value in bias.items()
    }


def _checked_stop(stop: object) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else _checked_sequence("stop", stop, "texts")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise UsageError(f"must be a text that is not empty, got {_shown(text)}", field=f"stop[{i}]")
    return tuple(texts)


def _checked_sequence(name: str, values: object, what: str) -> tuple[Any, ...]:
    if isinstance(values, str | bytes | Mapping):
        raise UsageError(f"must be a list of {what}, got {type(values).__name__}", field=name)
    try:
        return tuple(values)  # type: ignore[arg-type]
    except TypeError:
        raise UsageError(f"must be a list of {what}, got {type(values).__name__}", field=name) from None


def _shown(value: object) -> str:
    """Short enough for a message, whatever was passed."""
    try:
        text = repr(value)
    except Exception:  # an int of 5,000 digits, or a broken __repr__
        return "(too long to show)"
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithms of probabilities at temperature 1, before penalties and filters."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token, logprob), likeliest first

    def as_json(self) -> dict[str, Any]:
        return {
            "token": self.token,
            "logprob": _json_number(self.logprob),
            "top": [{"token": token, "logprob": _json_number(logprob)} for token, logprob in self.top],
        }


@dataclass(frozen=True, slots=True)
class Piece:
    """What a stream yields: whole characters, and the tokens that completed them."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts."""

    prompt_tokens: int  # images and sounds included
    cached_tokens: int  # of the prompt, found in the KV cache
    completion_tokens: int
    image_tokens: int = 0  # of the prompt
    audio_tokens: int = 0
    drafted_tokens: int = 0  # guessed from what the text repeats, and computed before they were chosen
    accepted_tokens: int = 0  # of those, the ones that were right; they are part of the answer

    def as_json(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "image_tokens": self.image_tokens,
            "audio_tokens": self.audio_tokens,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
        }


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, in seconds. Rates are tokens per second, 0 when nothing was measured.

    ``first_token_seconds`` runs from the call to the first token; ``decode_seconds`` is the time of the
    ``n_decoded`` tokens after the first, which comes out of the prefill.  Images and sounds are read and brought into
    the form that encoders take in ``processor_seconds``, and encoded in ``encoder_seconds``.
    """

    load_seconds: float = 0.0
    prefill_seconds: float = 0.0
    first_token_seconds: float = 0.0
    decode_seconds: float = 0.0
    n_prefilled: int = 0  # prompt tokens that were computed, not found in the cache
    n_decoded: int = 0
    processor_seconds: float = 0.0
    encoder_seconds: float = 0.0

    @property
    def prefill_rate(self) -> float:
        return self.n_prefilled / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def decode_rate(self) -> float:
        return self.n_decoded / self.decode_seconds if self.decode_seconds > 0 else 0.0

    def as_json(self) -> dict[str, float]:
        return {
            "load_seconds": self.load_seconds,
            "processor_seconds": self.processor_seconds,
            "encoder_seconds": self.encoder_seconds,
            "prefill_seconds": self.prefill_seconds,
            "first_token_seconds": self.first_token_seconds,
            "decode_seconds": self.decode_seconds,
            "prefill_tokens_per_second": self.prefill_rate,
            "decode_tokens_per_second": self.decode_rate,
        }


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer. ``finish_reason``: "stop" (the model or a stop text ended it), "length", or "cancelled"."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings = Timings()
    logprobs: tuple[TokenLogprob, ...] = ()
    adapter: str | None = None  # its name; None: the model as it is
    adapter_scale: float = 1.0
    merged_adapter: str | None = None  # the one that the model's weights include
    encoders: Mapping[str, str] = field(default_factory=dict)  # "vision", "audio": what ran them; not from a cache
    warnings: tuple[str, ...] = ()  # about how this request was answered

    def as_json(self) -> dict[str, Any]:
        """Plain types for ``json.dumps(..., allow_nan=False)``; a log-probability of minus infinity becomes null."""
        return {
            "text": self.text,
            "tokens": list(self.tokens),
            "finish_reason": self.finish_reason,
            "usage": self.usage.as_json(),
            "timings": self.timings.as_json(),
            "logprobs": [each.as_json() for each in self.logprobs],
            "adapter": None if self.adapter is None else {"name": self.adapter, "scale": self.adapter_scale},
            "merged_adapter": self.merged_adapter,
            "encoders": dict(self.encoders),
            "warnings": list(self.warnings),
        }


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None
