"""Where the time of forward passes goes: every moment is somewhere, and work is counted as the weights say."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from lora_files import random_pairs, write_adapter
from phi4edge import _core
from phi4edge.cli import main
from tiny_models import tiny_gguf

SHAPES: dict[str, dict[str, Any]] = {
    "fused": {"rotary_fraction": 0.75},
    "split, untied": {"architecture": "llama", "tied": False, "layers": 3},
}
STEPS = {  # by role in GGUF names
    "attn_qkv": "qkv", "attn_q": "qkv", "attn_k": "qkv", "attn_v": "qkv", "attn_output": "attention output",
    "ffn_up": "gate up", "ffn_gate": "gate up", "ffn_down": "down", "token_embd": "head", "output": "head",
}  # fmt: skip
TOKENS = np.arange(40, dtype=np.int32)


def expected_work(path: Path, n_tokens: int, n_logits: int, n_passes: int) -> dict[str, tuple[int, int]]:
    """(bytes, operations) of each step with matrices, from the tensors of the file."""
    tensors = gguf.GGUFReader(path).tensors
    tied = not any(tensor.name == "output.weight" for tensor in tensors)
    work: dict[str, tuple[int, int]] = {}
    for tensor in tensors:
        role = tensor.name.split(".")[-2]
        if role not in STEPS or (role == "token_embd" and not tied):
            continue
        n_columns, n_rows = (int(size) for size in tensor.shape)
        blocks = np.frombuffer(tensor.data.tobytes(), np.uint8)
        packed = _core.PackedMatrix(int(tensor.tensor_type), blocks, n_rows, n_columns)
        seen = n_logits if STEPS[role] == "head" else n_tokens
        n_bytes, operations = work.get(STEPS[role], (0, 0))
        work[STEPS[role]] = n_bytes + n_passes * packed.n_bytes, operations + 2 * n_rows * n_columns * seen
    return work


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("type_name", ["F32", "Q8_0"])
def test_bytes_and_operations_are_those_of_the_packed_tensors(name: str, type_name: str, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path, type_name, **SHAPES[name])
    model = _core.Model(_core.GgufFile(path), 2)
    session = _core.Session(model, 64)
    session.collect_profile(True)
    session.extend(TOKENS)
    session.extend(TOKENS[:1])
    counted = session.profile()
    expected = expected_work(path, n_tokens=41, n_logits=2, n_passes=2)
    assert {step: counted[step][1:] for step in expected} == expected
    assert counted["attention"][1] == (40 + 41) * _core.kv_bytes_per_token(model.config)
    assert counted["adapter A"] == counted["adapter B"] == (0.0, 0, 0)


def test_sequences_that_are_computed_together_read_the_weights_once(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path, "Q8_0", **SHAPES["fused"])
    model = _core.Model(_core.GgufFile(path), 2)
    first, second = _core.Session(model, 64), _core.Session(model, 64)
    first.collect_profile(True)
    _core.extend_together([first, second], [TOKENS, TOKENS[:3]])
    counted = first.profile()
    expected = expected_work(path, n_tokens=43, n_logits=2, n_passes=1)
    assert {step: counted[step][1:] for step in expected} == expected
    assert counted["attention"][1] == 43 * _core.kv_bytes_per_token(model.config)


def test_a_pass_without_logits_has_no_head(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path)
    session = _core.Session(_core.Model(_core.GgufFile(path), 1), 64)
    session.collect_profile(True)
    session.extend(TOKENS, "none")
    assert session.profile()["head"] == (0.0, 0, 0)


def test_an_adapter_has_steps_of_its_own(tmp_path: Path) -> None:
    base = tiny_gguf(tmp_path, **SHAPES["fused"])
    pairs = random_pairs(base, 8)
    adapter = write_adapter(tmp_path / "lora.gguf", pairs, "F32", "F32", alpha=16.0, architecture="phi3")
    model = _core.Model(_core.GgufFile(base), 2)
    session = _core.Session(model, 64)
    session.set_adapter(_core.Adapter(model, _core.GgufFile(adapter)))
    session.collect_profile(True)
    session.extend(TOKENS)
    counted = session.profile()
    for step, suffix in (("adapter A", "lora_a"), ("adapter B", "lora_b")):
        tensors = [tensor for tensor in gguf.GGUFReader(adapter).tensors if tensor.name.endswith(suffix)]
        assert tensors
        assert counted[step][0] > 0
        assert counted[step][2] == sum(2 * int(tensor.n_elements) * len(TOKENS) for tensor in tensors)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_every_moment_of_the_threads_is_in_one_step(n_threads: int, tmp_path: Path) -> None:
    session = _core.Session(_core.Model(_core.GgufFile(tiny_gguf(tmp_path)), n_threads), 512)
    session.collect_profile(True)
    started = time.perf_counter()
    session.extend(np.zeros(300, np.int32))
    elapsed = time.perf_counter() - started
    steps = session.profile()
    assert 0 < sum(step[0] for step in steps.values()) <= elapsed
    assert all(steps[name][0] > 0 for name in ("start", "embed", "norm", "rope, kv store", "silu", "wait"))


def test_it_is_off_until_it_is_asked_for_and_changes_no_result(tmp_path: Path) -> None:
    session = _core.Session(_core.Model(_core.GgufFile(tiny_gguf(tmp_path)), 2), 64)
    plain = session.extend(TOKENS)
    assert session.profile() == {}
    session.truncate(0)
    session.collect_profile(True)
    np.testing.assert_array_equal(session.extend(TOKENS), plain)
    first = session.profile()
    session.collect_profile(True)
    assert all(total == (0.0, 0, 0) for total in session.profile().values())
    assert first.keys() == session.profile().keys()
    session.collect_profile(False)
    assert session.profile() == {}


def test_bench_says_where_the_time_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tiny_gguf(tmp_path, "Q8_0"))
    assert main(["bench", path, "-p", "16", "-n", "3", "-r", "1", "-t", "1", "--profile", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    profile = record["profile"]
    assert profile["int8_operations_per_second"] > 1e7
    for phase in ("prefill", "decode"):
        steps = profile[phase]["steps"]
        assert sum(step["share"] for step in steps) == pytest.approx(1.0)
        assert sum(step["seconds"] for step in steps) == pytest.approx(profile[phase]["seconds"])
        assert sum(step["bytes"] for step in steps) == profile[phase]["bytes"]
        names = [step["step"] for step in steps]
        assert {"qkv", "attention", "attention output", "gate up", "down", "head"} <= set(names)
        assert "adapter A" not in names
        for step in steps:
            assert step["bytes_per_second"] == pytest.approx(step["bytes"] / step["seconds"])
            of_limit = step["operations"] / step["seconds"] / profile["int8_operations_per_second"]
            assert step["share_of_int8_limit"] == pytest.approx(of_limit)
    assert profile["decode"]["bytes"] > 2 * profile["prefill"]["bytes"]  # three passes instead of one


def test_bench_prints_a_table_of_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tiny_gguf(tmp_path))
    assert main(["bench", path, "-p", "8", "-n", "2", "-r", "1", "-t", "1", "--profile"]) == 0
    shown = capsys.readouterr().out
    assert "int8 limit" in shown
    assert shown.count("attention output") == 2
    assert main(["bench", path, "-p", "8", "-n", "2", "-r", "1", "-t", "1"]) == 0
    assert "int8" not in capsys.readouterr().out
