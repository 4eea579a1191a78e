"""``phi4edge chat``, from a pipe and on a terminal."""

from __future__ import annotations

import json
import re
import signal
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from processes import ENDLESSLY, PROMPT, Terminal, endless_gguf, is_one_error_line, run
from tiny_models import tiny_gguf

ANSWERING = r"\x1b\[\?2004l[^\x1b]{20}"  # the line editor has left, and an answer comes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_gguf(tmp_path_factory.mktemp("chat")))


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder of this test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


# --- from a pipe


def test_chat_answers_line_by_line(model: str) -> None:
    done = run("chat", model, "-n", "4", text="the cat\n/stats\nthe mat\n/stats\n\n/exit\nnever read\n")
    assert done.returncode == 0
    counts = re.findall(r"prompt  (\d+) tokens", done.stderr)
    assert len(counts) == 2
    assert int(counts[1]) > int(counts[0])  # the second prompt has the first in it
    assert "known already" in done.stderr


def test_chat_commands(model: str) -> None:
    typed = "/system\n/system Be brief.\n/regen\n/stats\n/help\n/nonsense\n//slash\n/regen\n/clear\n/regen\n"
    done = run("chat", model, "-n", "4", text=typed)
    assert done.returncode == 0
    for told in (
        "There is no system message.",
        "System message: Be brief.",
        "There is nothing to answer yet.",
        "There is no answer yet.",
        "/regen          answer the last message again",
        "There is no command /nonsense",
        "The conversation is empty.",
    ):
        assert told in done.stderr
    once = run("chat", model, "-n", "4", "--system", "Be brief.", text="//slash\n").stdout
    assert done.stdout == 2 * once  # the answer and the same one again


def test_chat_in_a_pipe_ends_at_the_first_error(model: str) -> None:
    done = run("chat", model, "--context", "64", "-n", "4", text="the cat " * 500 + "\nthe mat\n")
    assert done.returncode == 4
    assert is_one_error_line(done.stderr)


def test_chat_says_what_to_do_when_the_context_is_full(model: str) -> None:
    done = run("chat", model, "--context", "64", "-n", "9", text="the cat\n" * 9)
    assert done.returncode == 4 and is_one_error_line(done.stderr), done.stderr
    assert re.search(r"the prompt has \d+ tokens and the context holds 64, .*; /clear forgets", done.stderr)
    cleared = run("chat", model, "--context", "64", "-n", "9", text="the cat\n/clear\n" * 9)
    assert cleared.returncode == 0 and cleared.stdout.count("\n") >= 9
    first = run("chat", model, "--context", "64", "-n", "9", text="the cat " * 500 + "\n")
    assert first.returncode == 4 and "/clear" not in first.stderr


@pytest.mark.parametrize(
    ("arguments", "text", "code", "problem"),
    [
        ((), "/mic\n", 4, "/mic: this model reads only text"),
        ((), "/image a.png\n", 4, "/image: this model reads only text"),
        (("--max-crops", "2"), "the cat\n", 2, "--max-crops: this model takes no images"),
    ],
)
def test_chat_of_a_text_model_takes_no_media(
    model: str, arguments: tuple[str, ...], text: str, code: int, problem: str
) -> None:
    done = run("chat", model, *arguments, text=text)
    assert done.returncode == code and problem in done.stderr and is_one_error_line(done.stderr)


def test_chat_of_a_text_model_reads_paths_as_text(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    done = run("chat", model, "-n", "2", text=f"See {tmp_path}/a.png\n{tmp_path}/a.png\n")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert done.stderr == (
        f"[{tmp_path}/a.png not attached: there is no such file, or this model cannot read it]\n"
        f"There is no file {tmp_path}/a.png that this model can read; /help lists commands, //... sends a message that "
        "starts with a slash.\n"
    )


# --- on a terminal


@pytest.fixture
def open_terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_one(*arguments: str, **options: Any) -> Terminal:
        opened.append(Terminal(list(arguments), **options))
        return opened[-1]

    yield open_one
    for terminal in opened:
        terminal.close()


@pytest.mark.parametrize("columns", [80, 20])
def test_chat_on_a_terminal(open_terminal: Callable[..., Terminal], model: str, state: Path, columns: int) -> None:
    terminal = open_terminal("chat", model, "-n", "5", columns=columns)
    terminal.expect(PROMPT)
    terminal.type("the cat\r")
    terminal.expect(PROMPT)
    terminal.type("/stats\r")
    terminal.expect("tokens/s")
    terminal.expect(PROMPT)
    terminal.type("one\x1b\rtwo\r")  # Alt-Enter
    terminal.expect(PROMPT)
    terminal.type("\x1b[200~three\nfour\x1b[201~\r")  # a paste
    terminal.expect(PROMPT)
    terminal.type("half a line\x03")  # Ctrl-C empties the line
    terminal.expect("Ctrl-D")
    terminal.expect(PROMPT)
    terminal.type("\x04")
    assert terminal.wait() == 0
    lines = (state / "phi4edge" / "chat-history").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ["the cat", "/stats", "one\ntwo", "three\nfour"]


def test_chat_ctrl_c_stops_the_answer_only(open_terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = open_terminal("chat", endless_gguf(tmp_path), *ENDLESSLY)
    terminal.expect(PROMPT)
    terminal.type("the cat\r")
    terminal.expect(r"the cat\W+\w+")
    time.sleep(0.5)
    terminal.type("\x03")
    terminal.expect(PROMPT)
    terminal.type("/stats\r")
    terminal.expect("finish: cancelled")
    terminal.expect(PROMPT)
    terminal.type("/exit\r")
    assert terminal.wait() == 0


def test_chat_does_not_mix_keys_into_an_answer(open_terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = open_terminal("chat", endless_gguf(tmp_path), *ENDLESSLY)
    terminal.expect(PROMPT)
    terminal.type("the cat\r")
    terminal.expect(ANSWERING)
    terminal.type("QQQ ZZZ")
    time.sleep(0.5)
    terminal.type("\x03")  # discards them, too
    terminal.expect(rf"(?s)\A(?!.*QQQ ZZZ).*{PROMPT}")
    terminal.type("\x04")
    assert terminal.wait() == 0


def test_chat_keeps_what_is_typed_during_an_answer_for_the_next_message(
    open_terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    terminal = open_terminal("chat", endless_gguf(tmp_path), "-n", "200", "--context", "4096")
    terminal.expect(PROMPT)
    terminal.type("the cat\r")
    terminal.expect(ANSWERING)
    terminal.type("QQQ ZZZ")
    terminal.expect(PROMPT)
    terminal.expect("QQQ ZZZ")
    terminal.type("\x03")
    terminal.expect(PROMPT)
    terminal.type("\x04")
    assert terminal.wait() == 0


def test_chat_restores_the_terminal_when_an_answer_is_ended(
    open_terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    terminal = open_terminal("chat", endless_gguf(tmp_path), *ENDLESSLY)
    terminal.expect(PROMPT)
    terminal.type("the cat\r")
    terminal.expect(ANSWERING)
    assert not termios.tcgetattr(terminal.slave)[3] & termios.ECHO
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.wait() == 143


def test_chat_goes_on_after_an_error(open_terminal: Callable[..., Terminal], model: str) -> None:
    terminal = open_terminal("chat", model, "--context", "64", "-n", "4")
    terminal.expect(PROMPT)
    terminal.type("\x1b[200~" + "the cat " * 200 + "\x1b[201~\r")
    terminal.expect("phi4edge: error: ")
    terminal.expect(PROMPT)
    terminal.type("the mat\r")
    terminal.expect(PROMPT)
    terminal.type("/stats\r")
    terminal.expect("answer  [1-4] tokens")
    terminal.expect(PROMPT)
    terminal.type("\x04")
    assert terminal.wait() == 0


def test_chat_on_a_dumb_terminal(open_terminal: Callable[..., Terminal], model: str) -> None:
    terminal = open_terminal("chat", model, "-n", "4", TERM="dumb")
    terminal.expect("> ")
    terminal.type("the cat\r")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.wait() == 0
    assert "\x1b" not in terminal.shown


def test_chat_ends_on_sigterm_with_the_terminal_restored(open_terminal: Callable[..., Terminal], model: str) -> None:
    terminal = open_terminal("chat", model)
    terminal.expect(PROMPT)
    time.sleep(0.5)
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.wait() == 143


def test_sigterm_while_the_editor_takes_the_terminal_restores_it_too(
    open_terminal: Callable[..., Terminal], model: str, tmp_path: Path
) -> None:
    """The signal comes when the settings are changed, and the editor is not yet ready to restore them."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "from prompt_toolkit.input.vt100 import raw_mode\n"
        "take = raw_mode.__enter__\n"
        "raw_mode.__enter__ = lambda self: (take(self), os.kill(os.getpid(), signal.SIGTERM))\n"
    )
    assert open_terminal("chat", model, PYTHONPATH=str(tmp_path)).wait() == 143


def test_U4_a_damaged_history_is_kept_aside(open_terminal: Callable[..., Terminal], model: str, state: Path) -> None:
    history = state / "phi4edge" / "chat-history"
    history.parent.mkdir(parents=True)
    history.write_bytes(b'"earlier"\n\x00\xff not json\n')
    terminal = open_terminal("chat", model, "-n", "2")
    terminal.expect("damaged; kept as chat-history.bak")
    terminal.expect(PROMPT)
    terminal.type("/help\r")
    terminal.expect("/regen")
    terminal.expect(PROMPT)
    terminal.type("\x04")
    assert terminal.wait() == 0
    assert history.with_name("chat-history.bak").read_bytes().startswith(b'"earlier"\n\x00')
    assert history.read_text() == '"/help"\n'
    assert history.stat().st_mode & 0o777 == 0o600


def test_U2_a_history_that_cannot_be_written_is_a_warning(
    open_terminal: Callable[..., Terminal], model: str, state: Path
) -> None:
    state.write_text("a file where the folder should be")
    terminal = open_terminal("chat", model, "-n", "2")
    terminal.expect(PROMPT)
    terminal.type("/help\r")
    terminal.expect("not remembered")
    terminal.expect(PROMPT)
    terminal.type("\x04")
    assert terminal.wait() == 0


def test_chat_remembers_earlier_lines(open_terminal: Callable[..., Terminal], model: str, state: Path) -> None:
    history = state / "phi4edge" / "chat-history"
    history.parent.mkdir(parents=True)
    history.write_text('"the first"\n"the second"\n')
    terminal = open_terminal("chat", model, "-n", "2")
    terminal.expect(PROMPT)
    time.sleep(0.5)
    terminal.type("\x1b[A\x1b[A")  # twice up
    terminal.expect("the first")
    terminal.type("\x03")
    terminal.expect(PROMPT)
    terminal.type("\x04")
    assert terminal.wait() == 0
