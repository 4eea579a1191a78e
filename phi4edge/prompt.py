"""Messages to segments: the chat template of a model, with what a user typed kept plain.

What a user typed must never become control tokens, although the template puts it in the same text as its own. So the
special tokens that occur in messages are broken with a mark, a private-use character that occurs nowhere else; the
template is rendered; and where marks come out, the text is plain. Template logic that searches a *message* for the text
of a special token does not find it.

An image or a sound in a message becomes the special token that stands for its kind, once, without marks; a video one
for each of its frames, which are images.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi4edge.errors import BundleError, InputError
from phi4edge.template_sandbox import RaisedByTemplateError, SandboxedTemplate, TemplateError, TemplateLimits

if TYPE_CHECKING:
    from phi4edge.tokenizer import Tokenizer

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}, and "tools" on a system message
# Kinds of placeholders, in the order in which a message shows them.
MEDIA = ("image", "audio")
# Types of parts and what stands for them; each part has its source under the name of its type.
PART_TYPES = {"image": "image", "audio": "audio", "video": "image"}
DEFAULT_FRAMES = 8  # of a video
MAX_FRAMES = 64  # of all videos in a conversation

# The format of Phi-4-mini and Phi-4-multimodal, for files that bring no template.
_PHI4_SOURCE = """
{%- for message in messages -%}
    {{- '<|' ~ message.role ~ '|>' ~ message.content -}}
    {%- if message.role == 'system' and message.tools is defined and message.tools is not none -%}
        {{- '<|tool|>' ~ message.tools ~ '<|/tool|>' -}}
    {%- endif -%}
    {{- '<|end|>' -}}
{%- endfor -%}
{{- '<|assistant|>' if add_generation_prompt else (eos_token or '<|endoftext|>') -}}
"""
_PHI4_TOKENS = (
    *("<|endoftext|>", "<|endoftext10|>", "<|endoftext11|>", "<|endofprompt|>", "<|assistant|>", "<|end|>", "<|user|>"),
    *("<|system|>", "<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>", "<|tag|>"),
)

_FIELD = "tokenizer.chat_template"
_MAX_NESTING = 64  # of lists in a message
_ROLE = re.compile(r"[\w.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a prompt. ``special``: texts of special tokens in it are those tokens; else all of it is plain text."""

    text: str
    special: bool


@dataclass(frozen=True, slots=True)
class MediaPart:
    """An image, a sound or a video in a message."""

    kind: str  # of PART_TYPES
    source: Any
    label: str  # "image 1" is the first of the conversation
    field: str = ""  # where it stands, for messages
    frames: int | None = None  # of a video, as far as somebody said how many

    @property
    def placeholder(self) -> str:
        """The kind of its tokens."""
        return PART_TYPES[self.kind]

    @property
    def n_items(self) -> int:
        """How many tokens stand for it."""
        return (self.frames or DEFAULT_FRAMES) if self.kind == "video" else 1


def media_parts(messages: Sequence[Message]) -> list[MediaPart]:
    """The images, sounds and videos of messages that a template took, in the order of their tokens in the prompt."""
    numbers = dict.fromkeys(PART_TYPES, 0)
    found: list[MediaPart] = []
    for i, message in enumerate(messages):
        parts = _parts_of(message)
        for placeholder in MEDIA:
            for j, part in enumerate(parts):
                kind = part["type"]
                if PART_TYPES.get(kind) == placeholder:
                    numbers[kind] += 1
                    label, field = f"{kind} {numbers[kind]}", f"messages[{i}].content[{j}].{kind}"
                    frames = part.get("frames") if kind == "video" else None
                    found.append(MediaPart(kind, part[kind], label, field, frames))
    return found


def with_frames(messages: Sequence[Message], n_frames: Mapping[str, int]) -> list[Message]:
    """Messages that a template took, with other numbers of frames; a video is named by the field of its MediaPart."""
    changed: list[Message] = []
    for i, message in enumerate(messages):
        parts: list[Mapping[str, Any]] = []
        for j, part in enumerate(_parts_of(message)):
            frames = n_frames.get(f"messages[{i}].content[{j}].video")
            parts.append(part if frames is None else {**part, "frames": frames})
        changed.append({**message, "content": parts} if parts else message)
    return changed


class ChatTemplate:
    """The chat template of a model.

    Example::

        template = ChatTemplate(source, special_tokens=tokenizer.special_tokens, path="model.gguf")
        ids = tokenizer.encode_segments(template.segments([{"role": "user", "content": "Hi"}]))

    ``source`` is Jinja as in ``tokenizer.chat_template`` of a GGUF file; None is the format of Phi-4.
    ``special_tokens`` are the texts that the tokenizer turns into control tokens. ``placeholders`` are those that stand
    for media, by their kind; without them a prompt has only text. ``path`` is for error messages. A source that does
    not compile, or is too large or too deep, is a BundleError. Safe to share between threads.
    """

    def __init__(
        self,
        source: str | None,
        *,
        special_tokens: Iterable[str] = (),
        bos: str = "",
        eos: str = "",
        placeholders: Mapping[str, str] | None = None,
        path: str = "",
        limits: TemplateLimits = TemplateLimits(),
    ) -> None:
        self.source = source
        self.path = path
        self.limits = limits
        self._bos, self._eos = bos, eos
        self._placeholders = dict(placeholders or {})
        tokens = {token for token in (*special_tokens, *self._placeholders.values()) if token.strip()}
        if source is None:
            tokens.update(_PHI4_TOKENS)
        self._marks = _Marks(tokens)
        try:
            self._template = SandboxedTemplate(_PHI4_SOURCE if source is None else source, limits)
        except TemplateError as error:
            raise self._error(error) from None

    def segments(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[Segment]:
        """The prompt of a conversation, split so that special tokens typed in a message stay text.

        ``content`` is a text or a list of ``{"type": "text", "text": ...}``, ``{"type": "image", "image": ...}``,
        ``{"type": "audio", "audio": ...}`` or ``{"type": "video", "video": ..., "frames": 8}`` where there are
        placeholders. Those stand before the text of their message, images and frames first, as the models were trained;
        what they hold is not looked at here. A message that cannot be used, an empty prompt, or one that the template
        refuses is an InputError; a template that fails or exceeds its limits a BundleError.
        """
        text, mark = self._render(messages, add_generation_prompt)
        return self._marks.split(text, mark)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of :meth:`segments`."""
        return "".join(segment.text for segment in self.segments(messages, add_generation_prompt=add_generation_prompt))

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> tuple[str, str]:
        checked = _checked_messages(messages, self.limits.output_bytes, self._placeholders)
        mark = _unused_character([*_strings(checked), self.source or "", self._bos, self._eos])
        guarded = self._marks.guard(checked, mark)
        for message, original in zip(guarded, messages, strict=True):
            kinds = [kind for part in _parts_of(original) for kind in _placeholders_of(part)]
            shown = "".join(self._placeholders[kind] * kinds.count(kind) for kind in MEDIA if kind in kinds)
            if shown:
                message["content"] = shown + message["content"]
        tools = [_tools_of(message) for message in guarded if message.get("tools") is not None]
        for message in guarded:
            if isinstance(message.get("tools"), list):
                message["tools"] = json.dumps(message["tools"], ensure_ascii=False)  # as the Phi-4 template wants it
        variables = {
            "messages": guarded,
            "bos_token": self._bos,
            "eos_token": self._eos,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._rendered(variables, tools[0] if tools else None), mark
        except RaisedByTemplateError as error:
            raise InputError(f"the chat template refuses these messages: {error}", field="messages") from None
        except TemplateError as error:
            raise self._error(error) from None

    def _rendered(self, variables: dict[str, Any], tools: list[Any] | None) -> str:
        try:
            return self._template.render({**variables, "tools": tools})  # where most templates look for them
        except TemplateError:
            if tools is not None:
                raise
            # Without tools, transformers gives None and llama.cpp nothing; some templates only work with the latter.
            return self._template.render(variables)

    def _error(self, error: TemplateError) -> BundleError:
        return BundleError(f"the chat template {error}", path=self.path, field=_FIELD)


# Messages.


def template_of(
    metadata: Mapping[str, Any], tokenizer: Tokenizer, placeholders: Mapping[str, str], path: str
) -> ChatTemplate:
    """The chat template in the metadata of a model file; placeholders: kind -> the text that stands for it."""
    source = metadata.get("tokenizer.chat_template")

    def text_of(token: int | None) -> str:
        return "" if token is None else tokenizer.token_text(token)

    return ChatTemplate(
        source if isinstance(source, str) else None,
        special_tokens=tokenizer.special_tokens,
        bos=text_of(tokenizer.bos_id),
        eos=text_of(tokenizer.eos_id),
        placeholders=placeholders,
        path=path,
    )


def _parts_of(message: Message) -> Sequence[Mapping[str, Any]]:
    """Of a checked message; none when its content is a text."""
    content = message.get("content")
    return () if content is None or isinstance(content, str) else content


def _placeholders_of(part: Mapping[str, Any]) -> list[str]:
    """The kinds of the tokens that stand for a checked part."""
    kind = PART_TYPES.get(part["type"])
    return [] if kind is None else [kind] * MediaPart(part["type"], None, "", frames=part.get("frames")).n_items


def _checked_messages(messages: object, max_bytes: int, kinds: Collection[str]) -> list[dict[str, Any]]:
    """Plain copies, with ``content`` as one text, or None beside tool calls."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise InputError(f"must be a list of messages, got {type(messages).__name__}", field="messages")
    checked = [_checked_message(message, f"messages[{i}]", kinds) for i, message in enumerate(messages)]
    has_media = any(part["type"] in PART_TYPES for message in messages for part in _parts_of(message))
    if not has_media and not any(message["content"] or message.get("tool_calls") for message in checked):
        raise InputError("the prompt is empty", field="messages", hint="write something in a message's content")
    n_chars = sum(map(len, _strings(checked)))
    if n_chars > max_bytes:
        raise InputError(f"the messages have {n_chars} characters; the limit is {max_bytes}", field="messages")
    return checked


def _checked_message(message: object, field: str, kinds: Collection[str]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"must be a message with role and content, got {type(message).__name__}", field=field)
    role = message.get("role")
    if not isinstance(role, str):
        problem = f"must be a text, got {type(role).__name__}" if "role" in message else "is missing"
        raise InputError(problem, field=f"{field}.role")
    if not _ROLE.fullmatch(role):  # templates build control tokens from it
        raise InputError(f"must be a word such as 'user', got {role[:40]!r}", field=f"{field}.role")
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    plain: dict[str, Any] = {"role": str(role), "content": _checked_content(message, f"{field}.content", kinds)}
    plain.update(_plain(rest, field))
    tools = plain.get("tools")
    if tools is not None and not isinstance(tools, str | list):
        raise InputError(f"must be a list or its JSON text, got {type(tools).__name__}", field=f"{field}.tools")
    return plain


def _checked_content(message: Mapping[str, Any], field: str, kinds: Collection[str]) -> str | None:
    """The text; media are checked and left out."""
    content = message.get("content")
    if isinstance(content, str):
        return str(content)
    if content is None and message.get("tool_calls"):
        return None
    if "content" not in message:
        raise InputError("is missing", field=field)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InputError(f"must be a text or a list of parts, got {type(content).__name__}", field=field)
    return "".join(_checked_part(part, f"{field}[{i}]", kinds) for i, part in enumerate(content))


def _checked_part(part: object, field: str, kinds: Collection[str]) -> str:
    if not isinstance(part, Mapping):
        raise InputError(f"must be a part with a type, got {type(part).__name__}", field=field)
    kind = part.get("type")
    if isinstance(kind, str) and PART_TYPES.get(kind) in kinds:
        if part.get(kind) is None:
            raise InputError("is missing", field=f"{field}.{kind}", hint="give a path, bytes or an array")
        unknown = next((key for key in part if key not in ("type", kind, "frames" if kind == "video" else kind)), None)
        if unknown is not None:
            raise InputError(f"{str(unknown)[:40]!r} is not known in a part of type {kind!r}", field=field)
        frames = part.get("frames") if kind == "video" else None
        if frames is not None and (type(frames) is not int or not 1 <= frames <= MAX_FRAMES):
            raise InputError(f"is {frames!r:.40}, expected 1 to {MAX_FRAMES}", field=f"{field}.frames")
        return ""
    if kind != "text":
        readable = ", ".join(["text", *(each for each, stands in PART_TYPES.items() if stands in kinds)])
        raise InputError(
            f"is a part of type {str(kind)[:40]!r}, and this model reads only {readable}",
            field=field,
            hint="" if kinds else "images, audio and video need a bundle with encoders",
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise InputError(f"must be a text, got {type(text).__name__}", field=f"{field}.text")
    return str(text)


def _plain(value: object, field: str, depth: int = 0) -> Any:
    """A copy of exactly the types that JSON knows: methods of other objects are no business of a template."""
    if depth > _MAX_NESTING:
        raise InputError(f"is nested deeper than {_MAX_NESTING}", field=field[:80])
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"must have texts as keys, got {type(key).__name__}", field=field)
        return {str(key): _plain(item, f"{field}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{field}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise InputError(f"must be a type of JSON, got {type(value).__name__}", field=field)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _tools_of(message: Mapping[str, Any]) -> list[Any] | None:
    tools = message["tools"]
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            return None  # a text in a format of the template's own
    return tools if isinstance(tools, list) else None


# Marks.


def _unused_character(texts: Sequence[str]) -> str:
    """A private-use character that is in none of the texts, nor its JSON escape."""
    for code in range(0xE000, 0xF900):
        if not any(chr(code) in text or ("\\u" in text and _escape(chr(code)) in text.lower()) for text in texts):
            return chr(code)
    raise InputError("the messages use every private-use character of Unicode", field="messages")


def _escape(mark: str) -> str:
    return f"\\u{ord(mark):04x}"


class _Marks:
    """Puts marks into special tokens that a user typed, and finds them in what the template made of it."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._tokens = sorted(tokens, key=lambda token: (-len(token), token))  # the longest wins
        self._token = re.compile("|".join(map(re.escape, self._tokens)) or r"(?!)")
        self._heads = {token[:n] for token in self._tokens for n in range(1, len(token))}
        self._tails = {token[n:] for token in self._tokens for n in range(1, len(token))}
        self._longest = max(map(len, self._tokens), default=0)

    def guard(self, messages: Sequence[Mapping[str, Any]], mark: str) -> list[dict[str, Any]]:
        return [
            {key: value if key == "role" else self._guarded(value, mark) for key, value in message.items()}
            for message in messages
        ]

    def _guarded(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self.guard_text(value, mark)
        if isinstance(value, list):
            return [self._guarded(item, mark) for item in value]
        if isinstance(value, dict):
            return {self.guard_text(key, mark): self._guarded(item, mark) for key, item in value.items()}
        return value

    def guard_text(self, text: str, mark: str) -> str:
        """A mark after the first character of each special token, and wherever one could be completed from outside.

        Marks go inside of white space at the ends, so a template that strips still strips.
        """
        cuts = set()
        match = self._token.search(text)
        while match:
            cuts.add(match.start() + 1)
            match = self._token.search(text, match.start() + 1)  # tokens may overlap
        end = len(text.rstrip())
        begin = len(text) - len(text.lstrip())
        lengths = range(1, min(self._longest, end - begin + 1))
        if any(text[end - n : end] in self._heads for n in lengths):
            cuts.add(end)
        if any(text[begin : begin + n] in self._tails for n in lengths):
            cuts.add(begin)
        if not cuts:
            return text
        ends = sorted(cuts | {0, len(text)})
        pieces = [text[a:b] + (mark if b in cuts else "") for a, b in itertools.pairwise(ends)]
        return (mark if 0 in cuts else "") + "".join(pieces)

    def split(self, text: str, mark: str) -> list[Segment]:
        """Everything between two special tokens that holds a mark is plain, in one piece, encoded like any other text.

        White space at its beginning stays with the token before, which may swallow it.
        """
        if "\\u" in text:
            text = re.sub(re.escape(_escape(mark)), mark, text, flags=re.IGNORECASE)
        if mark not in text:
            return [Segment(text, True)] if text else []
        segments: list[Segment] = []
        special: list[str] = []
        begin = 0
        for match in [*self._token.finditer(text), None]:
            run = text[begin : match.start() if match else len(text)]
            if mark in run:
                plain = run.lstrip()
                special.append(run[: len(run) - len(plain)])
                _append(segments, "".join(special), True)
                _append(segments, plain.replace(mark, ""), False)
                special = []
            else:
                special.append(run)
            if match:
                special.append(match.group())
                begin = match.end()
        _append(segments, "".join(special), True)
        return segments


def _append(segments: list[Segment], text: str, special: bool) -> None:
    if text:
        segments.append(Segment(text, special))
