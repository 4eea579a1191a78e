"""A chat without its terminal: messages, commands, answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi4edge.cli import answers, output

if TYPE_CHECKING:
    from phi4edge.generation import Generation, GenerationConfig
    from phi4edge.model import Message, Model

HELP = """\
/help           this list
/system [TEXT]  show the system message, or set it
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

    def __init__(self, model: Model, config: GenerationConfig, *, system: str | None, stats: bool) -> None:
        self._model = model
        self._config = config
        self._system = system
        self._stats = stats
        self._messages: list[Message] = []
        self._last: Generation | None = None
        self.finished = False

    def handle(self, text: str) -> None:
        """Answers a message or obeys a command.  Ctrl-C ends the answer here and keeps what there is of it."""
        if text.startswith("/") and not text.startswith("//"):
            self._command(text)
        elif text.strip():
            self._messages.append({"role": "user", "content": text.removeprefix("/") if text[:1] == "/" else text})
            self._answer()

    def _command(self, text: str) -> None:
        name, _, argument = text.strip().partition(" ")
        if name == "/help":
            self._tell(HELP)
        elif name == "/exit":
            self.finished = True
        elif name == "/clear":
            self._messages.clear()
            self._tell("The conversation is empty.")
        elif name == "/system":
            self._change_system(argument.strip())
        elif name == "/regen":
            self._regenerate()
        elif name == "/stats":
            self._show_stats()
        else:
            self._tell(f"There is no command {name}; /help lists them, //... sends a message that starts with a slash.")

    def _change_system(self, text: str) -> None:
        if text:
            self._system = text
        self._tell(f"System message: {self._system}" if self._system else "There is no system message.")

    def _regenerate(self) -> None:
        if self._messages and self._messages[-1]["role"] == "assistant":
            self._messages.pop()
        if self._messages:
            self._answer()
        else:
            self._tell("There is nothing to answer yet.")

    def _show_stats(self) -> None:
        if self._last is None:
            self._tell("There is no answer yet.")
            return
        used = self._last.usage.prompt_tokens + self._last.usage.completion_tokens
        lines = [*answers.stats_lines(self._last), f"context {used:,} of {self._model.context:,} tokens"]
        self._tell("\n".join(lines))

    def _answer(self) -> None:
        """Answers the last message.  A message that cannot be answered is taken back."""
        start: list[Message] = [{"role": "system", "content": self._system}] if self._system else []
        try:
            self._last = answers.stream_answer(self._model, [*start, *self._messages], self._config)
        except KeyboardInterrupt:
            self._last = self._model.last
            if self._last is None or not self._last.tokens:  # stopped before the first token
                self._messages.pop()
                return
        except Exception:
            self._messages.pop()
            raise
        self._messages.append({"role": "assistant", "content": self._last.text})
        if self._last.finish_reason == "length":
            output.hint("[cut; --max-tokens or --context allow more]")
        if self._stats:
            self._show_stats()

    @staticmethod
    def _tell(text: str) -> None:
        for line in text.splitlines():
            output.note(line)
