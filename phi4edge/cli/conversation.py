"""A chat without its terminal: messages, commands, answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi4edge.cli import answers, output
from phi4edge.errors import FileError, InputError, UsageError

if TYPE_CHECKING:
    from phi4edge.generation import Generation, GenerationConfig
    from phi4edge.model import Message, Model

HELP = """\
/help           this list
/system [TEXT]  show the system message, or set it; /system - removes it
/image FILE     show an image with the next message
/audio FILE     play a recording with the next message, which may be empty
/clear          forget the conversation; the system message stays
/regen          answer the last message again
/stats          counts and speeds of the last answer
/exit           leave; so does Ctrl-D
//TEXT          a message that starts with a slash
Alt-Enter starts a new line, Ctrl-C stops an answer."""


class Conversation:
    """Messages so far and the model that answers them.

    :meth:`handle` takes one line or paragraph that the user typed.
    """

    def __init__(
        self,
        model: Model,
        config: GenerationConfig,
        *,
        system: str | None,
        stats: bool,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._model = model
        self._config = config
        self._system = system
        self._stats = stats
        self._options = options or {}  # more of Model.stream
        self._messages: list[Message] = []
        self._last: Generation | None = None
        self._n_regenerated = 0
        self._attached: list[dict[str, str]] = []  # parts of the next message
        self._warned: set[str] = set()
        self.finished = False

    def handle(self, text: str) -> None:
        """Answers a message or obeys a command.  Ctrl-C ends the answer here and keeps what there is of it."""
        if text.startswith("/") and not text.startswith("//"):
            self._command(text)
        elif text.strip() or self._attached:
            text = text.removeprefix("/")
            parts, self._attached = self._attached, []
            if text.strip() and parts:
                parts.append({"type": "text", "text": text})
            self._answer([*self._messages, {"role": "user", "content": parts or text}], self._config)

    def _command(self, text: str) -> None:
        name, _, argument = text.strip().partition(" ")
        if name == "/help":
            self._tell(HELP)
        elif name in ("/exit", "/quit", "/bye"):
            self.finished = True
        elif name == "/clear":
            self._messages.clear()
            self._attached.clear()
            self._tell("The conversation is empty.")
        elif name == "/system":
            self._change_system(argument.strip())
        elif name in ("/image", "/audio"):
            self._attach(name.removeprefix("/"), argument.strip())
        elif name == "/regen":
            self._regenerate()
        elif name == "/stats":
            self._show_stats()
        else:
            self._tell(f"There is no command {name}; /help lists them, //... sends a message that starts with a slash.")

    def _change_system(self, text: str) -> None:
        if text:
            self._system = None if text == "-" else text
        self._tell(f"System message: {self._system}" if self._system else "There is no system message.")

    def _attach(self, kind: str, file: str) -> None:
        if not file:
            raise UsageError("names no file", field=f"/{kind}", hint=f"write /{kind} FILE")
        if kind not in self._model.modalities:
            raise InputError("this model reads only text", field=f"/{kind}", hint="use a bundle with encoders")
        if not Path(file).is_file():
            raise FileError("there is no such file", path=file)
        self._attached.append({"type": kind, kind: file})
        self._tell(f"{file} goes with the next message.")

    def _regenerate(self) -> None:
        answered = bool(self._messages) and self._messages[-1]["role"] == "assistant"
        messages = self._messages[:-1] if answered else self._messages
        if not messages:
            self._tell("There is nothing to answer yet.")
            return
        config = self._config
        if config.temperature == 0:
            output.hint("[temperature 0 gives the same answer again; start with --temperature 0.8]")
        elif config.seed is not None:
            self._n_regenerated += 1
            config = config.merged(seed=(config.seed + self._n_regenerated) % 2**64)
        self._answer(messages, config)

    def _show_stats(self) -> None:
        if self._last is None:
            self._tell("There is no answer yet.")
            return
        used = self._last.usage.prompt_tokens + self._last.usage.completion_tokens
        lines = [*answers.stats_lines(self._last), f"context {used:,} of {self._model.context:,} tokens"]
        self._tell("\n".join(lines))

    def _answer(self, messages: list[Message], config: GenerationConfig) -> None:
        """Answers the last of ``messages``; they become the conversation only when there is an answer."""
        start: list[Message] = [] if self._system is None else [{"role": "system", "content": self._system}]
        try:
            last = answers.stream_answer(self._model, [*start, *messages], config, **self._options)
        except KeyboardInterrupt:
            if self._model.last is None or not self._model.last.tokens:  # stopped before the first token
                return
            last = self._model.last
        for warning in last.warnings:
            if warning not in self._warned:
                output.warn(warning)
        self._warned.update(last.warnings)
        self._last = last
        self._messages = [*messages, {"role": "assistant", "content": last.text}]
        for line in answers.logprob_lines(last.logprobs, self._model.tokenizer):
            output.note(line)
        if last.finish_reason == "length":
            output.hint("[cut; --max-tokens or --context allow more]")
        if self._stats:
            self._show_stats()

    @staticmethod
    def _tell(text: str) -> None:
        for line in text.splitlines():
            output.note(line)
