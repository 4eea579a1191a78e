"""``info --strict`` and ``info --check``: files that can be read and are not right.  G16, G22: kinds of bad input."""

from __future__ import annotations

from pathlib import Path

from phi4edge import _core
from processes import run
from tiny_models import tiny_gguf


def test_G16_trailing_bytes_are_a_warning_and_an_error_with_strict(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path)
    whole = run("info", str(path), "--strict")
    assert whole.returncode == 0, whole.stderr
    path.write_bytes(path.read_bytes() + b"rest")
    warned = run("info", str(path))
    assert warned.returncode == 0
    assert "warning" in warned.stderr
    strict = run("info", str(path), "--strict")
    assert strict.returncode == 4
    assert str(path) in strict.stderr
    assert len(strict.stderr.splitlines()) == 1


def test_G22_check_names_the_tensor_with_a_scale_that_is_not_a_number(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path, type="Q4_0")
    assert run("info", str(path), "--check").returncode == 0
    tensor = next(t for t in _core.GgufFile(path).tensors if t.name == "blk.0.ffn_down.weight")
    data = bytearray(path.read_bytes())
    data[tensor.offset + 18 : tensor.offset + 20] = b"\x00\x7e"  # the half scale of the second block
    path.write_bytes(data)
    found = run("info", str(path), "--check")
    assert found.returncode == 4
    assert "blk.0.ffn_down.weight" in found.stderr
    assert len(found.stderr.splitlines()) == 1
