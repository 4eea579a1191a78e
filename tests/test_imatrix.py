"""Importance matrices: the sums are those of transformers, the files those of llama.cpp, and bad files are errors."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

import phi4edge
from peers import require
from phi4edge import _core
from phi4edge.converters.convert import convert
from phi4edge.converters.imatrix import Imatrix, InputSquares, collect_imatrix, read_imatrix, write_imatrix
from phi4edge.errors import BundleError
from phi4edge.tokenizer import Tokenizer
from processes import COMMAND, DEADLINE, ROOT, is_one_error_line, run
from reference import log_probabilities, mean_divergence
from tiny_checkpoints import tiny_checkpoint
from tiny_models import tiny_gguf, tiny_transformers

Doubles = npt.NDArray[np.float64]
# A piece that is read in several steps, one in one step, one token.
PIECES = [np.random.default_rng(n).integers(0, 300, n).tolist() for n in (150, 40, 1)]

SHAPES: dict[str, dict[str, Any]] = {
    "phi3": {"layers": 3, "original_context": 64, "rotary_fraction": 0.75},
    "phi3, untied": {"tied": False},
    "llama": {"architecture": "llama"},
}


def gguf_name(module: str, *, tied: bool) -> str:
    """``model.layers.0.self_attn.qkv_proj`` -> ``blk.0.attn_qkv.weight``."""
    if module == "lm_head":
        return "token_embd.weight" if tied else "output.weight"
    _, _, layer, _, name = module.split(".")
    names = {"o_proj": "attn_output", "gate_up_proj": "ffn_up", "down_proj": "ffn_down"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up"}
    return f"blk.{layer}.{names.get(name, 'attn_' + name.removesuffix('_proj'))}.weight"


def transformers_squares(pieces: Sequence[Sequence[int]], **options: Any) -> dict[str, tuple[Doubles, int]]:
    """Sums of squares of the inputs of all linears, and the tokens."""
    torch = require("torch")
    model = tiny_transformers(**options)
    found: dict[str, tuple[Doubles, int]] = {}

    def hook(name: str) -> Callable[[Any, Any], None]:
        def add(module: Any, inputs: Any) -> None:
            x = inputs[0][0].double().numpy()
            sums, n_tokens = found.get(name, (np.zeros(x.shape[1]), 0))
            found[name] = sums + (x**2).sum(axis=0), n_tokens + len(x)

        return add

    for module_name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(gguf_name(module_name, tied=options.get("tied", True))))
    with torch.no_grad():
        for piece in pieces:
            model(torch.tensor([piece]), use_cache=False)
    return found


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
def test_sums_of_squares_are_those_of_transformers(models: Path, options: dict[str, Any]) -> None:
    found = collect_imatrix(tiny_gguf(models, **options), lambda metadata: PIECES, chunk_size=150, n_threads=2)
    expected = transformers_squares(PIECES, **options)
    assert found.matrices.keys() == expected.keys()
    assert (found.n_chunks, found.chunk_size) == (3, 150)
    for name, (sums, n_tokens) in expected.items():
        assert found.matrices[name].n_tokens == n_tokens == 191
        np.testing.assert_allclose(found.matrices[name].sums, sums, rtol=1e-3, err_msg=name)


# --- files


TEXT = "the cat sat on the mat and then the other cats ran to the station in the morning when the rain was heavy. " * 20


def write_text(directory: Path, text: str = TEXT) -> str:
    path = directory / "corpus.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_file_is_as_llama_cpp_writes_it(models: Path, tmp_path: Path) -> None:
    source, target = tiny_gguf(models, layers=3), tmp_path / "out.imatrix"
    options = ("--text", write_text(tmp_path), "-o", str(target), "--context", "100", "--chunks", "3", "--json")
    done = run("imatrix", str(source), *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) | {"n_bytes": 0} == {
        "imatrix": str(target),
        "n_bytes": 0,
        "matrices": 13,
        "chunks": 3,
        "chunk_size": 100,
        "tokens": 300,
    }
    reader = gguf.GGUFReader(target)
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert metadata == {
        "general.type": "imatrix",
        "imatrix.datasets": ["corpus.txt"],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 100,
    }
    matrices = {t.name: int(t.shape[0]) for t in gguf.GGUFReader(source).tensors if len(t.shape) > 1}
    assert matrices["token_embd.weight"] == 256  # the tied head, under the name that llama.cpp asks for
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert found.keys() == {f"{name}{end}" for name in matrices for end in (".in_sum2", ".counts")}
    assert all(tensor.tensor_type == gguf.GGMLQuantizationType.F32 for tensor in found.values())
    tokens = Tokenizer.from_metadata(_core.GgufFile(source).metadata).encode(TEXT)
    expected = transformers_squares([tokens[first : first + 100] for first in (0, 100, 200)], layers=3)
    for name, n_columns in matrices.items():
        assert found[f"{name}.in_sum2"].shape.tolist() == [n_columns, 1]
        assert found[f"{name}.counts"].data.ravel().tolist() == [300.0]
        np.testing.assert_allclose(found[f"{name}.in_sum2"].data.ravel(), expected[name][0], rtol=1e-3, err_msg=name)


def test_every_chunk_begins_as_the_tokenizer_begins_a_text(models: Path, tmp_path: Path) -> None:
    data = bytearray(tiny_gguf(models).read_bytes())
    key = b"tokenizer.ggml.add_bos_token"
    data[data.index(key) + len(key) + 4] = 1
    source, target = tmp_path / "bos.gguf", tmp_path / "out.imatrix"
    source.write_bytes(data)
    tokenizer = Tokenizer.from_metadata(_core.GgufFile(source).metadata)
    ids, bos = tokenizer.encode(TEXT, add_bos=False), tokenizer.bos_id
    assert tokenizer.add_bos and bos is not None
    done = run("imatrix", str(source), "--text", write_text(tmp_path), "-o", str(target), "-c", "100", "--chunks", "2")
    assert done.returncode == 0, done.stderr
    expected = transformers_squares([[bos, *ids[:99]], [bos, *ids[99:198]]])
    for name, squares in read_imatrix(target).matrices.items():
        np.testing.assert_allclose(squares.sums, expected[name][0], rtol=1e-3, err_msg=name)


def test_the_whole_text_counts_and_the_bytes_are_the_same_on_any_number_of_threads(
    models: Path, tmp_path: Path
) -> None:
    source, text = tiny_gguf(models), write_text(tmp_path)
    n_tokens = len(Tokenizer.from_metadata(_core.GgufFile(source).metadata).encode(TEXT))
    made = []
    for n_threads in ("1", "2"):
        target = tmp_path / f"{n_threads}.imatrix"
        assert run("imatrix", str(source), "--text", text, "-o", str(target), "-t", n_threads).returncode == 0
        made.append(target.read_bytes())
    assert made[0] == made[1]
    assert {squares.n_tokens for squares in read_imatrix(tmp_path / "1.imatrix").matrices.values()} == {n_tokens}


def test_a_matrix_that_was_written_is_read_again(tmp_path: Path) -> None:
    squares = {"blk.0.ffn_up.weight": InputSquares(np.array([1.5, 0.0, 8.0]), 4)}
    squares["token_embd.weight"] = InputSquares(np.array([3.0, 5.0]), 2)
    squares["blk.1.ffn_up.weight"] = InputSquares(np.zeros(3), 0)
    write_imatrix(tmp_path / "x.imatrix", Imatrix(squares, 512, 7, ("a.txt", "ü.txt")))
    found = read_imatrix(tmp_path / "x.imatrix")
    assert (found.chunk_size, found.n_chunks, found.datasets) == (512, 7, ("a.txt", "ü.txt"))
    assert found.importance("blk.0.ffn_up.weight", 3).tolist() == [0.375, 0.0, 2.0]  # type: ignore[union-attr]
    assert found.importance("output.weight", 2).tolist() == [1.5, 2.5]  # type: ignore[union-attr]
    assert found.importance("blk.1.ffn_up.weight", 3) is None  # never used
    assert found.importance("blk.2.ffn_up.weight", 3) is None
    with pytest.raises(BundleError, match="has 3 columns, expected 4: it is of another model"):
        found.importance("blk.0.ffn_up.weight", 4)
    with pytest.raises(BundleError, match="knows none"):
        found.require_model({"blk.7.ffn_up.weight": 3})
    found.require_model({"blk.7.ffn_up.weight": 3, "blk.0.ffn_up.weight": 3})


# --- bad files


def imatrix_file(path: Path, metadata: dict[str, Any], tensors: Mapping[str, npt.NDArray[Any]]) -> Path:
    """A file by the gguf package, of one matrix."""
    writer = gguf.GGUFWriter(str(path), "none")
    adders: dict[type, Callable[[str, Any], None]]
    adders = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}
    for key, value in ({"general.type": "imatrix", "imatrix.chunk_size": 512} | metadata).items():
        adders[type(value)](key, value)
    for name, data in tensors.items():
        writer.add_tensor(f"blk.0.ffn_up.weight.{name}", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def floats(*values: float) -> npt.NDArray[np.float32]:
    return np.array([values], np.float32)


GOOD = {"in_sum2": floats(1, 2, 3), "counts": floats(9)}
BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a model": ({"general.type": "model"}, GOOD, "general.type: is 'model', expected 'imatrix'"),
    "no tensors": ({}, {}, "has no matrices"),
    "sums alone": ({}, {"in_sum2": floats(1, 2)}, "counts': is missing"),
    "counts alone": ({}, {"counts": floats(1)}, "counts': does not belong to a pair"),
    "a stranger": ({}, GOOD | {"mean": floats(1)}, "mean': does not belong to a pair"),
    "halves": ({}, GOOD | {"in_sum2": floats(1).astype(np.float16)}, "in_sum2': is F16, expected F32"),
    "negative": ({}, GOOD | {"in_sum2": floats(1, -1)}, "negative or not finite"),
    "NaN": ({}, GOOD | {"in_sum2": floats(1, np.nan)}, "negative or not finite"),
    "infinite": ({}, GOOD | {"in_sum2": floats(1, np.inf)}, "negative or not finite"),
    "count NaN": ({}, GOOD | {"counts": floats(np.nan)}, "counts': has a value that is negative or not finite"),
    "count negative": ({}, GOOD | {"counts": floats(-1)}, "counts': has a value that is negative or not finite"),
    "count 0": ({}, GOOD | {"counts": floats(0)}, "is 0, but there are sums"),
    "experts": ({}, GOOD | {"counts": floats(1, 2).reshape(2, 1)}, "mixture of experts"),
    "chunk size": ({"imatrix.chunk_size": "many"}, GOOD, "imatrix.chunk_size"),
    "datasets": ({"imatrix.datasets": [1, 2]}, GOOD, "imatrix.datasets"),
}


@pytest.mark.parametrize("metadata, tensors, problem", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_an_error(
    tmp_path: Path, metadata: dict[str, Any], tensors: dict[str, Any], problem: str
) -> None:
    path = imatrix_file(tmp_path / "x.imatrix", metadata, tensors)
    with pytest.raises(BundleError) as caught:
        read_imatrix(path)
    assert problem in str(caught.value)
    assert caught.value.path == str(path)
    assert "\n" not in str(caught.value)


def test_a_file_of_the_gguf_package_is_read(tmp_path: Path) -> None:
    found = read_imatrix(imatrix_file(tmp_path / "x.imatrix", {}, GOOD))
    importance = found.importance("blk.0.ffn_up.weight", 3)
    assert importance is not None
    np.testing.assert_allclose(importance, np.array([1, 2, 3]) / 9, rtol=1e-6)


def test_the_old_format_is_an_error_that_names_the_fix(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "old.dat"
    name = b"blk.0.ffn_up.weight"
    numbers = np.array([1, len(name)], "<i4").tobytes() + name + np.array([1, 2], "<i4").tobytes()
    path.write_bytes(numbers + np.ones(2, "<f4").tobytes())
    done = run("quantize", str(tiny_gguf(models)), str(tmp_path / "out.gguf"), "--imatrix", str(path))
    assert done.returncode == 4
    assert is_one_error_line(done.stderr) and f"llama-imatrix --in-file {path}" in done.stderr


@pytest.mark.parametrize("n_bytes", [0, 3, 100, 300])
def test_a_cut_file_is_an_error(tmp_path: Path, n_bytes: int) -> None:
    path = imatrix_file(tmp_path / "x.imatrix", {}, GOOD)
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(BundleError):
        read_imatrix(path)


# --- the command


def test_options_that_make_no_sense_are_errors(models: Path, tmp_path: Path) -> None:
    source, text = str(tiny_gguf(models)), write_text(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    (tmp_path / "old.imatrix").write_text("old")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    target = str(tmp_path / "out.imatrix")
    for arguments, code, problem in (
        ((source, "--text", str(tmp_path / "none.txt"), "-o", target), 3, "none.txt"),
        ((source, "--text", str(tmp_path / "empty.txt"), "-o", target), 4, "no text"),
        ((source, "--text", str(tmp_path / "latin.txt"), "-o", target), 4, "not UTF-8 at byte 1"),
        ((source, "--text", text, "-o", str(tmp_path / "old.imatrix")), 2, "--force replaces it"),
        ((source, "--text", text, "-o", text, "--force"), 2, "is the input itself"),
        ((source, "--text", text, "-o", target, "--chunks", "0"), 2, "--chunks"),
        ((source, "--text", text, "-o", target, "--context", "1"), 2, "--context"),
        ((source, "--text", text, "-o", target, "--context", "4096"), 2, "--context: the model was made for 2048"),
        ((source, "-o", target), 2, "--text"),
        ((str(tmp_path / "none.gguf"), "--text", text, "-o", target), 3, "none.gguf"),
    ):
        done = run("imatrix", *arguments)
        assert (done.returncode, is_one_error_line(done.stderr)) == (code, True), done.stderr
        assert problem in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_C8_a_signal_leaves_nothing(models: Path, tmp_path: Path) -> None:
    source, target = tiny_gguf(models, layers=12), tmp_path / "out.imatrix"
    command = [*COMMAND, "imatrix", str(source), "--text", write_text(tmp_path, TEXT * 200), "-o", str(target)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(2.0)
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130, shown
    assert "Traceback" not in shown
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]


def test_importance_brings_a_small_model_closer_to_its_source(models: Path, tmp_path: Path) -> None:
    """The whole way through the commands, on two bits."""
    source, matrix = tiny_gguf(models, layers=3), str(tmp_path / "x.imatrix")
    text = write_text(tmp_path)
    assert run("imatrix", str(source), "--text", text, "-o", matrix).returncode == 0
    logits = {}
    tokens = Tokenizer.from_metadata(_core.GgufFile(source).metadata).encode(TEXT)[:256]
    for name, options in (("plain", ()), ("weighted", ("--imatrix", matrix))):
        target = tmp_path / f"{name}.gguf"
        done = run("quantize", str(source), str(target), "--quant", "q2_k_s", "--head", "q2_k", *options)
        assert (done.returncode, done.stderr) == (0, "")
        logits[name] = model_logits(target, tokens)
    exact = model_logits(source, tokens)
    plain, weighted = (mean_divergence(exact, logits[name]) for name in ("plain", "weighted"))
    print(f"{plain:.4f} {weighted:.4f}")
    assert weighted < 0.95 * plain


def model_logits(path: Path, tokens: list[int]) -> npt.NDArray[np.float32]:
    with phi4edge.load(path, context=512, threads=1) as model:
        return log_probabilities(model.logits(tokens))


def test_convert_takes_the_matrix_of_its_own_backbone(tmp_path: Path) -> None:
    checkpoint, matrix = tiny_checkpoint(tmp_path / "checkpoint"), tmp_path / "x.imatrix"
    convert(checkpoint, tmp_path / "exact", "f32")
    bundle = str(tmp_path / "exact")
    assert run("imatrix", bundle, "--text", write_text(tmp_path), "-o", str(matrix)).returncode == 0
    options = ("--quant", "q2_k", "--imatrix", str(matrix))
    converted = run("convert", str(checkpoint), str(tmp_path / "converted"), *options)
    quantized = run("quantize", bundle, str(tmp_path / "quantized.gguf"), *options)
    assert (converted.returncode, quantized.returncode) == (0, 0), converted.stderr + quantized.stderr
    backbone = next((tmp_path / "converted").glob("backbone*.gguf"))
    data = [
        {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}
        for path in (backbone, tmp_path / "quantized.gguf")
    ]
    assert data[0] == data[1]
    other = tiny_checkpoint(tmp_path / "other", hidden=512)
    refused = run("convert", str(other), str(tmp_path / "refused"), *options)
    assert refused.returncode == 4 and is_one_error_line(refused.stderr)
    assert str(matrix) in refused.stderr and "of another model" in refused.stderr
    assert not (tmp_path / "refused").exists()
