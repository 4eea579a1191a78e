"""The commands but for chat, as users meet them: answers, exit codes, pipes, signals."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from phi4edge import _core, machine
from phi4edge.cli import main
from phi4edge.cli.options import Sampling
from phi4edge.generation import GenerationConfig
from processes import COMMAND, DEADLINE, ENDLESSLY, ROOT, Terminal, endless_gguf, is_one_error_line, run
from tiny_models import tiny_gguf

COMMANDS = ("demo", "run", "chat", "transcribe", "convert", "verify", "info", "bench", "version")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_gguf(tmp_path_factory.mktemp("cli")))


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that writes for minutes."""
    return ["run", endless_gguf(tmp_path_factory.mktemp("cli")), "the cat", *ENDLESSLY]


Start = Callable[[list[str]], "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a command that goes on in the background, with pipes on its three streams."""
    pipe = subprocess.PIPE
    processes = []

    def start_one(arguments: list[str]) -> subprocess.Popen[str]:
        command = [*COMMAND, *arguments]
        processes.append(subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
        return processes[-1]

    yield start_one
    for process in processes:
        process.kill()
        with process:  # waits, and closes the pipes
            pass


HUGE_CONTEXT = 16_000_000  # 16 GiB of keys and values in the tiny model


def allow_4_gib() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))


# --- help and version


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "Examples:\n" in done.stdout
    assert f"  phi4edge {command}" in done.stdout


def test_the_help_of_run_lists_all_options() -> None:
    shown = run("run", "-h").stdout
    offered = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Sampling)}
    for option in offered | {"--json", "--system", "--raw", "--context", "--threads", "--kv-type", "--isa", "--stats"}:
        assert option in shown


def test_nothing_heavy_is_imported_for_help() -> None:
    heavy = "('rich', 'numpy', 'prompt_toolkit', 'phi4edge._core', 'phi4edge.model', 'jinja2')"
    code = f"import sys\nfrom phi4edge.cli import main\nmain(['run', '-h'])\nassert not set({heavy}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, check=True, timeout=DEADLINE)


def test_no_command_shows_the_commands_on_standard_error() -> None:
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    for command in COMMANDS:
        assert f"  {command} " in done.stderr


def test_version_for_people_and_for_programs() -> None:
    short = run("--version")
    assert (short.returncode, short.stderr) == (0, "")
    assert re.fullmatch(r"phi4edge \d+\.\d+\.\d+\S*\n", short.stdout)
    assert run("version").stdout.startswith(short.stdout)
    facts = json.loads(run("version", "--json").stdout)
    assert short.stdout.split()[1] == facts["version"]
    assert facts["isas"][-1] == "scalar"


def test_the_defaults_of_the_options_are_those_of_the_library() -> None:
    ours, theirs = Sampling(), GenerationConfig()
    for field in dataclasses.fields(Sampling):
        assert (getattr(ours, field.name) or None) == (getattr(theirs, field.name) or None), field.name
    assert Sampling().config() == theirs


# --- run


def test_run_prints_the_answer_alone(model: str) -> None:
    done = run("run", model, "the cat sat", "--max-tokens", "8")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.endswith("\n")


def test_run_json_has_the_answer_and_its_costs(model: str) -> None:
    done = run("run", model, "the cat sat", "-n", "8", "--json", "--logprobs", "2")
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert answer["model"] == model
    assert answer["finish_reason"] in ("stop", "length")
    assert len(answer["tokens"]) == answer["usage"]["completion_tokens"] <= 8
    assert answer["usage"]["prompt_tokens"] > 0
    assert answer["timings"]["decode_tokens_per_second"] > 0
    assert answer["peak_memory_bytes"] > 1 << 20
    assert len(answer["logprobs"]) == len(answer["tokens"])
    assert all(step["logprob"] <= 0 and len(step["top"]) == 2 for step in answer["logprobs"])


def test_run_text_and_json_are_the_same_answer(model: str) -> None:
    arguments = ("run", model, "the cat sat", "-n", "16", "--temperature", "0.9", "--seed", "7", "--top-k", "40")
    text = run(*arguments).stdout
    answer = json.loads(run(*arguments, "--json").stdout)
    assert text.removesuffix("\n") == answer["text"].removesuffix("\n")


def test_the_prompt_can_come_from_standard_input(model: str) -> None:
    given = run("run", model, "the cat sat", "-n", "8")
    assert run("run", model, "-n", "8", text="the cat sat\n").stdout == given.stdout
    assert run("run", model, "-", "-n", "8", text="the cat sat\r\n").stdout == given.stdout
    assert run("run", model, "the cat sat", "-n", "8", text="ignored").stdout == given.stdout


def test_raw_and_system_change_the_prompt(model: str) -> None:
    def n_prompt(*options: str) -> int:
        return int(
            json.loads(run("run", model, "the cat", "-n", "1", "--json", *options).stdout)["usage"]["prompt_tokens"]
        )

    assert n_prompt("--raw") < n_prompt() < n_prompt("--system", "the station")


def test_stats_and_logprobs_are_on_standard_error(model: str) -> None:
    done = run("run", model, "the cat", "-n", "3", "--stats", "--logprobs", "1")
    assert "tokens/s" in done.stderr
    assert "tokens/s" not in done.stdout
    assert done.stdout == run("run", model, "the cat", "-n", "3").stdout


def test_bytes_that_are_not_text_do_not_end_the_program(model: str) -> None:
    arguments: list[Any] = [*COMMAND, "run", model, b"caf\xe9 \xff", "-n", "2"]
    assert subprocess.run(arguments, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=DEADLINE).returncode == 0
    piped = subprocess.run([*COMMAND, "run", model, "-n", "2"], cwd=ROOT, input=b"\xff\xfe\x00", timeout=DEADLINE)
    assert piped.returncode == 0


# --- exit codes


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["run", "MODEL", "hi", "--temperature", "-1"], 2, "--temperature"),
        (["run", "MODEL", "hi", "--max-tokens", "many"], 2, "--max-tokens"),
        (["run", "MODEL", "hi", "--kv-type", "q1"], 2, "--kv-type"),
        (["run", "MODEL", "hi", "--context", "0"], 2, "context"),
        (["run", "MODEL", "hi", "--nonsense"], 2, "--nonsense"),
        (["run", "MODEL", "hi", "--raw", "--system", "x"], 2, "--system"),
        (["run"], 4, "empty"),  # standard input is empty
        (["run", "modle.gguf"], 3, "modle.gguf"),
        (["transcribe"], 2, "FILE"),
        (["frobnicate"], 2, "frobnicate"),
        (["info", "MODEL", "--context", "-5"], 2, "context"),
        (["bench", "MODEL", "-p", "0"], 2, "--prompt-tokens"),
        (["run", "/nonexistent/model.gguf", "hi"], 3, "/nonexistent/model.gguf"),
        (["run", "/", "hi"], 3, "/"),
        (["info", "/nonexistent/model.gguf"], 3, "/nonexistent/model.gguf"),
        (["chat", "/nonexistent/model.gguf"], 3, "/nonexistent/model.gguf"),
        (["bench", "/nonexistent/model.gguf"], 3, "/nonexistent/model.gguf"),
        (["run", __file__, "hi"], 4, "test_cli.py"),
        (["info", __file__], 4, "test_cli.py"),
        (["run", "MODEL", ""], 4, "empty"),
        (["run", "MODEL"], 4, "empty"),  # standard input is empty
        (["run", "MODEL"], 4, "' was taken for the model"),
        (["run", "MODEL", "hi", "--isa", "z80"], 9, "z80"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else None,
)
def test_an_error_is_one_line_and_its_own_exit_code(
    model: str,
    arguments: list[str],
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    arguments = [model if argument == "MODEL" else argument for argument in arguments]
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert is_one_error_line(err), err
    assert says in err
    if arguments[0] in ("run", "info", "bench"):
        assert main([arguments[0], "--json", *arguments[1:]]) == code
        out, err = capsys.readouterr()
        assert err == ""
        assert set(json.loads(out)["error"]) == {"code", "message", "field", "path", "hint"}


def test_the_exit_code_reaches_the_shell(model: str) -> None:
    for arguments, code in (
        (["run", model, "hi", "--top-p", "x"], 2),
        (["info", "/nonexistent"], 3),
        (["info", __file__], 4),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (code, "")
        assert is_one_error_line(done.stderr)


def test_a_context_larger_than_the_memory_is_exit_code_6(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path, context=HUGE_CONTEXT)
    done = run("run", str(path), "hi", "--context", str(HUGE_CONTEXT), preexec_fn=allow_4_gib)
    assert done.returncode == 6, done.stderr
    assert is_one_error_line(done.stderr)


def test_a_full_disk_is_exit_code_5(model: str) -> None:
    for option in ([], ["--json"]):
        with Path("/dev/full").open("w") as full:
            command = [*COMMAND, "run", model, "hi", "-n", "2", *option]
            done = subprocess.run(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=DEADLINE,
            )
        assert done.returncode == 5
        assert is_one_error_line(done.stderr)


def test_a_prompt_without_an_end_is_refused(model: str) -> None:
    with Path("/dev/zero").open() as zeros:
        done = subprocess.run([*COMMAND, "run", model], cwd=ROOT, stdin=zeros, capture_output=True, timeout=DEADLINE)
    assert done.returncode == 4


def test_our_own_bug_asks_for_a_report(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "clamp_threads", lambda requested: 1 // 0)
    assert main(["run", model, "hi"]) == 70
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "report" in err and "ZeroDivisionError" in err
    assert main(["run", model, "hi", "--json"]) == 70
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "internal_error"
    monkeypatch.setenv("PHI4EDGE_DEBUG", "1")
    assert main(["run", model, "hi"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_U7_without_the_compiled_module_is_exit_code_9(model: str) -> None:
    code = (
        "import sys; sys.modules['phi4edge._core'] = None\n"
        f"from phi4edge.cli import main; sys.exit(main(['run', {model!r}, 'hi']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 9
    assert is_one_error_line(done.stderr)


def test_a_newline_in_a_name_does_not_make_two_lines() -> None:
    done = run("info", "no\nsuch\x1b[31m.gguf")
    assert done.returncode == 3
    assert is_one_error_line(done.stderr)
    assert "\x1b" not in done.stderr


# --- U1: streams that are closed, narrow or plain


def test_U1_a_reader_that_leaves_is_not_an_error(start: Start, endless: list[str]) -> None:
    process = start(endless)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.wait(DEADLINE) == 128 + signal.SIGPIPE
    assert process.stderr.read() == ""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_U1_closed_streams(model: str, closed: str) -> None:
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *COMMAND, "run", model, "the cat", "-n", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, "")


PLAIN = {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "20"}
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize("environment", [PLAIN, ASCII], ids=["plain", "ascii"])
def test_U1_any_environment(model: str, environment: dict[str, str]) -> None:
    for arguments in (["run", model, "café", "-n", "20"], ["info", model], ["run", "--help"]):
        done = run(*arguments, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert "\x1b" not in done.stdout
    answer = json.loads(run("run", model, "café", "-n", "20", "--json", env=environment).stdout)
    assert answer["text"] == json.loads(run("run", model, "café", "-n", "20", "--json").stdout)["text"]


# --- U6: signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_U6_a_signal_while_answering(start: Start, endless: list[str], number: signal.Signals, code: int) -> None:
    process = start(endless)
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(number)
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == code
    assert (first + out).endswith("\n")
    assert err == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_U6_a_signal_while_reading_a_long_prompt(
    start: Start, endless: list[str], number: signal.Signals, code: int
) -> None:
    process = start([*endless[:2], "-", *endless[3:]])
    assert process.stdin is not None
    process.stdin.write("the cat sat on the mat " * 4000)
    process.stdin.close()
    process.stdin = None
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(number)
    asked = time.monotonic()
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out, err) == (code, "", "")
    assert time.monotonic() - asked < 5


def test_U6_a_signal_at_any_time_leaves_no_traceback(start: Start, endless: list[str]) -> None:
    for delay in (0.05, 0.1, 0.2, 0.3, 0.5, 0.8):
        process = start(endless)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE)
        if delay > 0.15:  # before that Python itself may still be starting, which we cannot make quiet
            assert process.returncode in (130, -signal.SIGINT)
            assert "Traceback" not in err, f"after {delay} s"


def test_U6_an_interrupted_json_answer_is_json(start: Start, endless: list[str]) -> None:
    process = start([*endless, "--json"])
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130
    assert json.loads(out)["error"]["code"] == "cancelled"


# --- U8: threads


@pytest.mark.parametrize("threads", ["0", "-1", "10000"])
def test_U8_impossible_threads_are_clamped_with_a_warning(model: str, threads: str) -> None:
    done = run("run", model, "the cat", "-n", "2", "--threads", threads)
    assert done.returncode == 0
    assert done.stderr.startswith("phi4edge: warning: --threads")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_U8_affinity_limits_the_threads(model: str) -> None:
    one = {min(os.sched_getaffinity(0))}
    limited: Any = {"preexec_fn": lambda: os.sched_setaffinity(0, one)}
    done = run("bench", model, "-p", "8", "-n", "2", "-r", "1", "-t", "2", "--json", **limited)
    assert json.loads(done.stdout)["threads"] == 1
    assert "--threads" in done.stderr


# --- info and bench


def test_info_tells_what_the_file_is(model: str) -> None:
    done = run("info", model)
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("phi3", "n_layers", "F32", "32.00 bits per weight", "512 tokens", "<|endoftext|>", "available now"):
        assert text in done.stdout
    assert "blk.0.attn_qkv.weight" not in done.stdout
    assert "blk.0.attn_qkv.weight" in run("info", model, "--tensors").stdout


def test_info_json_knows_the_memory_for_a_context(model: str) -> None:
    short, long = (
        json.loads(run("info", model, "--json", "--context", context).stdout)["memory"] for context in ("512", "1024")
    )
    assert long["kv_cache_bytes"] == 2 * short["kv_cache_bytes"]
    parts = long["weights_bytes"] + long["kv_cache_bytes"] + long["scratch_bytes"]
    assert long["total_bytes"] == parts
    assert long["fits"] is True
    wide = json.loads(run("info", model, "--json", "--context", "1024", "--kv-type", "f32").stdout)["memory"]
    assert wide["kv_cache_bytes"] == long["kv_cache_bytes"] * (4 * 64) // (2 * 64 + 4)  # heads of 64
    narrow = json.loads(run("info", model, "--json", "--context", "1024", "--kv-type", "q8_0").stdout)["memory"]
    assert (narrow["kv_type"], narrow["kv_cache_bytes"]) == ("q8_0", wide["kv_cache_bytes"] * 34 // 128)


def test_every_type_of_the_cache_can_be_chosen(model: str) -> None:
    for kv_type in _core.kv_types():
        done = run("run", model, "the cat sat", "-n", "2", "--kv-type", kv_type)
        assert (done.returncode, done.stderr) == (0, "")
        done = run("bench", model, "-p", "4", "-n", "2", "-r", "1", "--json", "--kv-type", kv_type)
        assert done.returncode == 0, done.stderr


def test_info_json_adds_up(model: str) -> None:
    found = json.loads(run("info", model, "--json", "--tensors").stdout)
    assert found["architecture"] == "phi3"
    assert found["hyperparameters"]["hidden_size"] == 256
    assert sum(share["n_tensors"] for share in found["types"]) == len(found["tensors"])
    assert sum(share["n_values"] for share in found["types"]) == found["n_parameters"]
    assert found["tokenizer"]["special_ids"]["eos"]["text"] == "<|endoftext|>"
    assert found["metadata"]["tokenizer.ggml.tokens"] == {"items": 512}


def test_info_says_when_it_does_not_fit(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path, context=HUGE_CONTEXT)
    done = run("info", str(path), "--context", str(HUGE_CONTEXT), preexec_fn=allow_4_gib)
    assert done.returncode == 0
    assert "more than is available" in done.stdout


def test_bench_measures(model: str) -> None:
    done = run("bench", model, "-p", "40", "-n", "5", "-r", "3", "-t", "1", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(done.stdout)
    for name in ("prefill", "decode"):
        assert len(record[name]["all"]) == 3
        assert 0 < record[name]["median"] <= record[name]["best"]
        assert record[name]["unit"] == "tokens/s"
    assert record["threads"] == 1
    assert 0 < record["first_token"]["best"] <= record["first_token"]["median"]
    assert record["bytes_per_token"] > 0
    assert record["memory_bytes_per_second"] > 1e8
    assert record["peak_memory_bytes"] > 1 << 20
    assert "tokens/s median" in run("bench", model, "-p", "8", "-n", "2", "-r", "1").stdout


def test_a_control_character_does_not_reach_the_terminal() -> None:
    with closing(Terminal(["info", "evil\x1b]0;title\x07.gguf"])) as terminal:
        assert terminal.wait() == 3
        assert "\x1b" not in terminal.shown


def test_U6_ctrl_c_on_a_terminal(endless: list[str]) -> None:
    with closing(Terminal([*endless[:2], "the cat " * 15_000, *endless[3:]])) as terminal:
        terminal.expect("Reading the prompt")  # a progress bar
        terminal.type("\x03")
        assert terminal.wait() == 130
        assert "interrupted" in terminal.shown
