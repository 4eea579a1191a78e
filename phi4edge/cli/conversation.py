"""A chat without its terminal: messages, commands, answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi4edge.cli import answers, output
from phi4edge.cli.attachments import Attached, attached_file
from phi4edge.cli.dropped import missing_files, take_files
from phi4edge.cli.options import named_as_option
from phi4edge.errors import FileError, InputError, Phi4EdgeError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from phi4edge.generation import Generation, GenerationConfig
    from phi4edge.model import Message, Model

HELP = """\
/help           this list
/system [TEXT]  show the system message, or set it; /system - removes it
/image FILE     show an image with the next message
/audio FILE     play a recording with the next message, which may be empty
/video FILE     show frames of a video with the next message, without its sound
/mic [SECONDS]  record one with the microphone, until Enter or for so long
/release        give the memory of the image and audio encoders back
/clear          forget the conversation, or else what is attached; the system message stays
/regen          answer the last message again
/stats          counts and speeds of the last answer
/exit           leave; so does Ctrl-D
//TEXT          a message that starts with a slash, in which paths are text
The path of an image, a recording or a video in a message, typed or dropped, attaches that file.
Alt-Enter starts a new line, Ctrl-C stops an answer."""
_FULL = "/clear forgets the conversation, and a larger --context holds more"
_PART = re.compile(r"messages\[(\d+)\]\.content\[(\d+)\]")  # how the fields of errors name a part


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
        self._attached: list[Attached] = []  # for the next message
        self._kept: list[Attached] = []  # in the conversation
        self._n_recorded = 0
        self._warned: set[str] = set()
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda argument: self._tell(HELP),
            "/system": self._change_system,
            "/image": lambda file: self._attach("image", file),
            "/audio": lambda file: self._attach("audio", file),
            "/video": lambda file: self._attach("video", file),
            "/mic": self._record,
            "/release": self._release,
            "/clear": self._clear,
            "/regen": self._regenerate,
            "/stats": self._show_stats,
            **dict.fromkeys(("/exit", "/quit", "/bye"), self._finish),
        }
        self.finished = False

    def handle(self, text: str) -> None:
        """Answers a message or obeys a command.  Ctrl-C ends the answer here and keeps what there is of it."""
        name, _, argument = text.strip().partition(" ")
        if text.startswith("/") and name in self._commands:
            self._commands[name](argument.strip())
        elif text.startswith("//"):
            self._send(text.removeprefix("/"))
        elif text.strip():
            self._send_with_files(text)
        elif self._attached:
            self._send("")

    def _send_with_files(self, text: str) -> None:
        files, rest = take_files(text, self._kinds())
        missing = missing_files(rest)
        if rest.startswith("/"):
            name = rest.split()[0]
            what = f"file {name} that this model can read" if missing else f"command {name}"
            self._tell(f"There is no {what}; /help lists commands, //... sends a message that starts with a slash.")
            return
        for word in missing:
            self._tell(f"[{word} not attached: there is no such file, or this model cannot read it]")
        self._attached += [attached_file(kind, file) for kind, file in files]
        for kind, file in files:
            self._tell(f"[{Path(file).name} attached: {kind}]")
        if rest:
            self._send(rest)
        else:
            self._tell("The next message takes it along; Enter alone sends it.")

    def _send(self, text: str) -> None:
        """What is attached goes with it, and stays for the next message when there is no answer."""
        parts = [each.part for each in self._attached]
        if text.strip() and parts:
            parts.append({"type": "text", "text": text})
        n_before = len(self._messages)
        try:
            for each in self._attached:
                if not each.is_there:
                    raise FileError("is gone, or was changed since it was attached", path=each.name)
            self._answer([*self._messages, {"role": "user", "content": parts or text}], self._config)
        except Phi4EdgeError as error:
            if len(self._messages) == n_before:
                self._drop_what_is_wrong(error)
            raise
        finally:
            if len(self._messages) > n_before:
                self._kept += self._attached
                self._attached = []
            elif self._attached:
                output.hint(f"[still attached: {self._names()}]")

    def _drop_what_is_wrong(self, error: Phi4EdgeError) -> None:
        """An attachment that can never be read would be in the way of every message."""
        wrong = [each for each in self._attached if each.name == error.path]
        if wrong and isinstance(error, (InputError, FileError, UnsupportedError)):
            self._attached.remove(wrong[0])
            output.hint(f"[not attached any more: {wrong[0].short_name}]")

    def _names(self) -> str:
        return ", ".join(each.short_name for each in self._attached)

    def _finish(self, argument: str) -> None:
        self.finished = True

    def _clear(self, argument: str) -> None:
        """What is attached stays at first: it may be what the conversation had no room for."""
        if self._attached and not self._messages:
            self._attached = []
        self._messages.clear()
        self._kept.clear()
        self._tell("The conversation is empty.")
        if self._attached:
            self._tell(f"Still attached: {self._names()}; /clear once more drops it.")

    def _release(self, argument: str) -> None:
        self._model.release_encoders()
        self._tell("The encoders are released; the next image or sound loads them again.")

    def _change_system(self, text: str) -> None:
        if text:
            self._system = None if text == "-" else text
        self._tell(f"System message: {self._system}" if self._system else "There is no system message.")

    def _attach(self, kind: str, file: str) -> None:
        if not file:
            raise UsageError("names no file", field=f"/{kind}", hint=f"write /{kind} FILE")
        self._require(kind, f"/{kind}")
        dropped, rest = take_files(file, {kind})  # in quotes, for example
        file = dropped[0][1] if len(dropped) == 1 and not rest else file
        if not Path(file).is_file():
            raise FileError("there is no such file", path=file)
        self._attached.append(attached_file(kind, file))
        self._tell(f"{file} goes with the next message.")

    def _record(self, argument: str) -> None:
        from phi4edge.cli.microphone import record

        self._require("audio", "/mic")
        try:
            seconds = float(argument) if argument else None
        except ValueError:
            raise UsageError(f"{argument!r:.40} is no number of seconds", field="/mic", hint="write /mic 10") from None
        samples, rate = record(seconds)
        self._n_recorded += 1
        self._attached.append(Attached("audio", (samples, rate), f"recording {self._n_recorded}"))
        self._tell(f"{len(samples) / rate:.1f} s go with the next message; Enter alone sends them.")

    def _kinds(self) -> set[str]:
        """Types of parts that the model takes."""
        from phi4edge.prompt import PART_TYPES

        return {kind for kind, shown in PART_TYPES.items() if shown in self._model.modalities}

    def _require(self, kind: str, field: str) -> None:
        if kind not in self._kinds():
            raise InputError("this model reads only text", field=field, hint="use a bundle with encoders")

    def _regenerate(self, argument: str) -> None:
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

    def _show_stats(self, argument: str = "") -> None:
        if self._last is None:
            self._tell("There is no answer yet.")
            return
        used = self._last.usage.prompt_tokens + self._last.usage.completion_tokens
        lines = [*answers.stats_lines(self._last), f"context {used:,} of {self._model.context:,} tokens"]
        self._tell("\n".join(lines))

    def _answer(self, messages: list[Message], config: GenerationConfig) -> None:
        """Answers the last of ``messages``; they become the conversation only when there is an answer.

        Of an answer that is ended by Ctrl-C or by an error, what came is kept.
        """
        start: list[Message] = [] if self._system is None else [{"role": "system", "content": self._system}]
        prompt = [*start, *messages]
        before = self._model.last
        failure: Exception | None = None
        for each in self._kept:
            if not each.is_there:
                problem = f"'{each.name}' of an earlier message is gone, or was changed"
                raise FileError(problem, hint="/clear forgets the conversation, which needs it")
        try:
            last = answers.stream_answer(self._model, prompt, config, **self._options)
        except (KeyboardInterrupt, Exception) as error:
            begun = self._model.last
            if begun is not None and begun is not before and begun.tokens:
                last, failure = begun, error if isinstance(error, Exception) else None
            elif isinstance(error, Phi4EdgeError):
                raise self._explained(error, prompt) from error
            elif isinstance(error, Exception):
                raise
            else:
                return
        self._keep(messages, last)
        if failure is not None:
            raise failure

    def _explained(self, error: Phi4EdgeError, prompt: Sequence[Message]) -> Phi4EdgeError:
        """An error in the words of a chat: with names of options and files, and what helps here."""
        if isinstance(error, InputError) and self._messages and "the context holds" in error.problem:
            return InputError(error.problem, hint=_FULL)
        source: Any = None
        place = _PART.match(error.field)
        if place is not None:
            part = prompt[int(place[1])]["content"][int(place[2])]
            source = part.get(part["type"])
        for each in (*self._attached, *self._kept):
            if each.source is source or each.name == error.path:
                hint = error.hint if each in self._attached else "/clear forgets the conversation, which needs it"
                return type(error)(error.problem, path=each.name, hint=hint)
        return named_as_option(error, ("max_crops",))

    def _keep(self, messages: list[Message], last: Generation) -> None:
        """The answer becomes a part of the conversation; tells what there is to tell about it."""
        for warning in last.warnings:
            if warning not in self._warned:
                output.warn(warning)
        self._warned.update(last.warnings)
        self._last = last
        self._messages = [*messages, {"role": "assistant", "content": last.text}]
        for line in answers.logprob_lines(last.logprobs, self._model.tokenizer):
            output.note(line)
        if last.finish_reason == "length":
            used = last.usage.prompt_tokens + last.usage.completion_tokens
            is_full = used >= self._model.context
            output.hint(f"[cut: the context is full; {_FULL}]" if is_full else "[cut; --max-tokens allows more]")
        if self._stats:
            self._show_stats()

    @staticmethod
    def _tell(text: str) -> None:
        for line in text.splitlines():
            output.note(line)
