"""GGUF to GGUF: as good as llama.cpp's quantizer, and safe against bad input, full disks and signals."""

from __future__ import annotations

import ctypes
import hashlib
import json
import random
import resource
import signal
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

import phi4edge
from gguf_builder import Built, Key, Tensor, build, reference
from peers import LlamaCpp, llama_cpp
from phi4edge.bundle import UNFINISHED_PREFIX
from phi4edge.converters.convert import convert
from phi4edge.converters.imatrix import Imatrix, InputSquares, write_imatrix
from phi4edge.converters.mixes import MIXES
from phi4edge.converters.quantize import quantize
from phi4edge.errors import BundleError, DiskError, Phi4EdgeError
from processes import COMMAND, DEADLINE, ROOT, is_one_error_line, run
from reference import log_probabilities, mean_divergence
from tiny_checkpoints import tiny_checkpoint
from tiny_models import tiny_gguf

Floats = npt.NDArray[np.float32]
TOKENS = [int(token) for token in np.random.default_rng(1).integers(0, 300, 48)]


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def types_of(path: Path) -> dict[str, str]:
    return {name: tensor.tensor_type.name for name, tensor in tensors_of(path).items()}


def values_of(tensor: gguf.ReaderTensor) -> npt.NDArray[np.float64]:
    return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float64)


def importance_for(path: Path) -> dict[str, Floats]:
    """Random importance of the columns of each matrix, as uneven as real ones."""
    rng = np.random.default_rng(3)
    return {
        name: np.exp(rng.normal(0, 1.5, int(tensor.shape[0]))).astype(np.float32)
        for name, tensor in tensors_of(path).items()
        if len(tensor.shape) > 1
    }


def imatrix_of(importance: dict[str, Floats], n_tokens: int = 1000) -> Imatrix:
    matrices = {name: InputSquares(n_tokens * row.astype(np.float64), n_tokens) for name, row in importance.items()}
    return Imatrix(matrices, chunk_size=512, n_chunks=2)


def llama_cpp_quantize(source: Path, mix: str, path: Path, importance: dict[str, Floats] | None = None) -> Path:
    api = llama_cpp()
    params = api.llama_model_quantize_default_params()
    params.ftype = getattr(api, "LLAMA_FTYPE_ALL_F32" if mix == "F32" else f"LLAMA_FTYPE_MOSTLY_{mix}")
    params.nthread = 2
    params.allow_requantize = True
    if importance is not None:
        entry, floats = api.llama_model_imatrix_data, ctypes.POINTER(ctypes.c_float)
        entries = [entry(name.encode(), row.ctypes.data_as(floats), row.size) for name, row in importance.items()]
        params.imatrix = (entry * (len(entries) + 1))(*entries, entry(None, None, 0))
    status = api.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params))
    assert status == 0
    return path


# --- as good as llama.cpp


@pytest.mark.parametrize("mix", [*MIXES])
def test_types_and_weighted_errors_are_those_of_llama_cpp_or_better(models: Path, tmp_path: Path, mix: str) -> None:
    source = tiny_gguf(models, layers=3)
    importance, original = importance_for(source), tensors_of(source)
    quantize(source, tmp_path / "ours.gguf", mix, imatrix=imatrix_of(importance), n_threads=2)
    theirs = tensors_of(llama_cpp_quantize(source, mix, tmp_path / "theirs.gguf", importance))
    assert types_of(tmp_path / "ours.gguf") == {name: tensor.tensor_type.name for name, tensor in theirs.items()}
    for name, tensor in tensors_of(tmp_path / "ours.gguf").items():
        exact, weights = values_of(original[name]), importance.get(name, np.ones(1))
        ours, others = (float(((values_of(t) - exact) ** 2 * weights).sum()) for t in (tensor, theirs[name]))
        assert ours <= others * 1.00001, name
    with (
        phi4edge.load(tmp_path / "ours.gguf", threads=1) as model,
        closing(LlamaCpp(tmp_path / "ours.gguf")) as peer,
    ):
        our_logits, their_logits = model.logits(TOKENS), peer.logits(TOKENS)
    assert mean_divergence(log_probabilities(their_logits), log_probabilities(our_logits)) <= 5e-3


SHARED_VALUES: dict[str, Any] = {"layers": 17, "ffn": 256, "kv_heads": 1}  # four query heads for a key head


@pytest.mark.parametrize(
    "architecture, mix",
    [("llama", mix) for mix in ("Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "IQ4_NL")]
    + [("phi3", mix) for mix in ("Q2_K", "IQ4_XS")],
)
def test_types_of_separate_and_shared_values_are_those_of_llama_cpp(
    models: Path, tmp_path: Path, architecture: str, mix: str
) -> None:
    source = tiny_gguf(models, architecture=architecture, **SHARED_VALUES)
    quantize(source, tmp_path / "ours.gguf", mix, n_threads=2)
    assert types_of(tmp_path / "ours.gguf") == types_of(llama_cpp_quantize(source, mix, tmp_path / "theirs.gguf"))


def test_a_trained_model_is_quantized_again(smollm2: Path, english: str, tmp_path: Path) -> None:
    """From Q4_1 to Q2_K: closer to the source than llama.cpp comes, in each tensor that gets the same type."""
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    with pytest.raises(BundleError, match=r"is already Q4_1.*--allow-requantize"):
        quantize(smollm2, ours, "q2_k")
    quantize(smollm2, ours, "q2_k", allow_requantize=True, n_threads=2)
    original, other = tensors_of(smollm2), tensors_of(llama_cpp_quantize(smollm2, "Q2_K", theirs))
    n_compared = 0
    for name, tensor in tensors_of(ours).items():
        if tensor.tensor_type != other[name].tensor_type or tensor.tensor_type == original[name].tensor_type:
            continue
        exact = values_of(original[name])
        assert ((values_of(tensor) - exact) ** 2).sum() <= ((values_of(other[name]) - exact) ** 2).sum() * 1.00001, name
        n_compared += 1
    assert n_compared >= 30
    with phi4edge.load(ours, context=512, threads=2) as model, closing(LlamaCpp(ours)) as peer:
        tokens = model.tokenizer.encode(english)[:64]
        our_logits, their_logits = model.logits(tokens), peer.logits(tokens)
    # Two runtimes of 8-bit activations; see test_quantized_quality.py for how far each is from exact.
    assert mean_divergence(log_probabilities(their_logits), log_probabilities(our_logits)) <= 2e-2


def test_the_head_has_a_type_of_its_own(models: Path, tmp_path: Path) -> None:
    for tied, name in ((True, "token_embd.weight"), (False, "output.weight")):
        source, target = tiny_gguf(models, tied=tied), tmp_path / f"{name}.gguf"
        quantize(source, target, "q4_0", head="q8_0")
        assert {n for n, type_name in types_of(target).items() if type_name == "Q8_0"} == {name}


def test_what_has_its_type_already_is_copied(models: Path, tmp_path: Path) -> None:
    source = tiny_gguf(models, "Q8_0", layers=3)
    quantize(source, tmp_path / "out.gguf", "q8_0")
    assert reference(tmp_path / "out.gguf")[1] == reference(source)[1]


# --- small files, every byte of which is known

WIDTH = 32
SHAPES = {
    "token_embd": (WIDTH, 4),
    "blk.0.attn_norm": (WIDTH,),
    "blk.0.attn_qkv": (WIDTH, 3 * WIDTH),
    "blk.0.attn_output": (WIDTH, WIDTH),
    "blk.0.ffn_norm": (WIDTH,),
    "blk.0.ffn_up": (WIDTH, 2 * WIDTH),
    "blk.0.ffn_down": (WIDTH, WIDTH),
    "output_norm": (WIDTH,),
}
CONFIG: list[Key] = [
    ("general.architecture", "str", "phi3"),
    ("phi3.context_length", "u64", 64),  # wider than usual, which must stay
    ("phi3.embedding_length", "u32", WIDTH),
    ("phi3.feed_forward_length", "i32", WIDTH),
    ("phi3.block_count", "u16", 1),
    ("phi3.attention.head_count", "u32", 1),
    ("phi3.attention.layer_norm_rms_epsilon", "f64", 1e-5),
    ("general.quantization_version", "u32", 1),
    ("test.flags", "[bool]", [True, False]),
    ("test.bytes", "[u8]", [1, 2, 255]),
    ("test.names", "[str]", ["", "übung", "a"]),
    ("test.big", "u64", 2**63),
]


def small_file(keys: list[Key], tensors: list[Tensor], *, alignment: int = 32, canary: bytes = b"") -> Built:
    """Weights are normal numbers; the canary fills what belongs to no tensor, and follows the end."""
    built = build(keys, tensors, alignment=alignment)
    start, data = built.data_start, bytearray(built.data)
    rng, at = np.random.default_rng(4), start
    for tensor, end in zip(tensors, built.tensor_ends, strict=True):
        n_bytes = len(tensor.data())
        data[end - n_bytes : end] = rng.standard_normal(n_bytes // 4).astype("<f4").tobytes()
        at = -(-end // alignment) * alignment
        data[end:at] = (canary * alignment)[: at - end] or bytes(at - end)
    built.data = bytes(data) + canary * 100
    return built


TENSORS = [Tensor(f"{name}.weight", shape) for name, shape in SHAPES.items()]


def test_metadata_keep_their_types_and_order(tmp_path: Path) -> None:
    source, target = tmp_path / "in.gguf", tmp_path / "out.gguf"
    source.write_bytes(small_file(CONFIG, TENSORS).data)
    quantize(source, target, "q8_0")
    expected = {
        name: (field.types, field.contents())
        for name, field in gguf.GGUFReader(source).fields.items()
        if not name.startswith("GGUF.")
    }
    expected["general.quantization_version"] = ([gguf.GGUFValueType.UINT32], gguf.GGML_QUANT_VERSION)
    expected["general.file_type"] = ([gguf.GGUFValueType.UINT32], int(gguf.LlamaFileType.MOSTLY_Q8_0))
    found = {
        name: (field.types, field.contents())
        for name, field in gguf.GGUFReader(target).fields.items()
        if not name.startswith("GGUF.")
    }
    assert list(found.items()) == list(expected.items())


def test_shards_become_one_file(tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    whole.write_bytes(small_file(CONFIG, TENSORS).data)
    data = {name: payload for name, _, _, payload in reference(whole)[1]}
    for index, part in enumerate((TENSORS[:3], TENSORS[3:])):
        keys: list[Key] = CONFIG if index == 0 else []
        built = small_file([*keys, ("split.no", "u16", index), ("split.count", "u16", 2)], part)
        payload = bytearray(built.data)
        for tensor, end in zip(part, built.tensor_ends, strict=True):
            bytes_of = data[str(tensor.name)]
            payload[end - len(bytes_of) : end] = bytes_of
        (tmp_path / f"model-0000{index + 1}-of-00002.gguf").write_bytes(payload)
    quantize(whole, tmp_path / "from-whole.gguf", "q8_0")
    quantize(tmp_path / "model-00001-of-00002.gguf", tmp_path / "from-shards.gguf", "q8_0")
    assert (tmp_path / "from-shards.gguf").read_bytes() == (tmp_path / "from-whole.gguf").read_bytes()


CANARY = b"CANARY-7f3a "


def mutants() -> list[bytes]:
    """A valid file, then one field at a time wrong; between and behind the tensors there are canaries."""
    built = small_file([*CONFIG, ("general.alignment", "u32", 256)], TENSORS, alignment=256, canary=CANARY)
    assert built.data.count(CANARY[:6]) > 100
    values = [0, 1, 2, 3, 7, 31, 32, 33, 64, 96, 128, 256, 1 << 31, 1 << 32, 1 << 62, 1 << 63, -1, -32, -256]
    found = [built.data]
    for field in built.fields:
        old = built.number(field)
        if field.startswith(("tensor.", "n_")) or field.endswith(".type"):
            choices = {*values, *(old + d for d in (-256, -32, -1, 1, 32, 128, 256))} - {old}
            found += [built.patched(field, value) for value in sorted(choices)]
    found += [built.data[:size] for size in range(0, len(built.data) - 100 * len(CANARY), 97)]
    return found


def test_C11_no_byte_outside_of_a_tensor_reaches_the_output(tmp_path: Path) -> None:
    source, target = tmp_path / "in.gguf", tmp_path / "out.gguf"
    n_refused = n_made = 0
    for data in mutants():
        source.write_bytes(data)
        try:
            quantize(source, target, ("f32", "q8_0")[n_made % 2], force=True)
        except BundleError as error:
            assert error.path == str(source)
            n_refused += 1
            assert [path.name for path in tmp_path.iterdir() if path != target] == ["in.gguf"]
            continue
        n_made += 1
        assert CANARY[:6] not in target.read_bytes()
    assert n_refused > 1000
    assert n_made >= 1  # e.g. other key types that mean the same


@pytest.mark.parametrize("size, problem", [(3000, "became shorter"), (None, "was changed")])
def test_C11_a_file_that_shrinks_or_changes_meanwhile_is_an_error(
    tmp_path: Path, size: int | None, problem: str
) -> None:
    source = tmp_path / "in.gguf"
    source.write_bytes(small_file(CONFIG, TENSORS).data)

    def change(tensor: str, done: int, total: int) -> None:
        if tensor == "blk.0.ffn_up.weight":
            source.write_bytes(source.read_bytes()[:size])

    with pytest.raises(BundleError, match=problem):
        quantize(source, tmp_path / "out.gguf", "q8_0", progress=change)
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


# --- bad input


def with_value(models: Path, directory: Path, name: str, value: float) -> Path:
    """A tiny model with one weight replaced, the last of a tensor."""
    source = tiny_gguf(models, layers=3)
    tensor = tensors_of(source)[name]
    data = bytearray(source.read_bytes())
    end = tensor.data_offset + tensor.n_bytes
    data[end - 4 : end] = np.float32(value).tobytes()
    (directory / "in.gguf").write_bytes(data)
    return directory / "in.gguf"


DOWN = "blk.1.ffn_down.weight"


@pytest.mark.parametrize("mix", ["f32", "f16", "q2_k"])
@pytest.mark.parametrize("name", [DOWN, "output_norm.weight"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_C10_a_value_that_is_not_finite_names_its_tensor(
    models: Path, tmp_path: Path, name: str, value: float, mix: str
) -> None:
    source = with_value(models, tmp_path, name, value)
    with pytest.raises(BundleError, match=f"tensor '{name}'.*NaN or an infinity"):
        quantize(source, tmp_path / "out.gguf", mix)
    assert not (tmp_path / "out.gguf").exists()


def test_C10_a_weight_that_is_too_large_names_its_tensor(models: Path, tmp_path: Path) -> None:
    source = with_value(models, tmp_path, DOWN, 1e38)
    with pytest.raises(BundleError, match=f"tensor '{DOWN}'.*1e\\+38, too large"):
        quantize(source, tmp_path / "out.gguf", "q4_k_m")
    quantize(source, tmp_path / "out.gguf", "bf16")


def test_C10_an_importance_matrix_of_another_model_is_an_error(models: Path, tmp_path: Path) -> None:
    source, importance = tiny_gguf(models), importance_for(tiny_gguf(models))
    for wrong, problem in (
        ({f"x.{name}": row for name, row in importance.items()}, "knows none of the model's matrices"),
        ({name: row[:-1] for name, row in importance.items()}, "has 255 columns, expected 256"),
    ):
        write_imatrix(tmp_path / "wrong.imatrix", imatrix_of(wrong), force=True)
        options = ("--imatrix", str(tmp_path / "wrong.imatrix"))
        done = run("quantize", str(source), str(tmp_path / "out.gguf"), "--quant", "q2_k", *options)
        assert done.returncode == 4
        assert is_one_error_line(done.stderr) and problem in done.stderr
    assert not (tmp_path / "out.gguf").exists()


def test_a_head_that_the_importance_matrix_does_not_know_is_a_warning(models: Path, tmp_path: Path) -> None:
    """llama.cpp leaves out the head; an embedding that is no head has no inputs that could be known."""
    matrix = str(tmp_path / "x.imatrix")
    for tied, name, warned in ((True, "token_embd.weight", True), (False, "output.weight", True), (False, "", False)):
        source = tiny_gguf(models, tied=tied)
        known = {key: row for key, row in importance_for(source).items() if key not in (name, "token_embd.weight")}
        write_imatrix(matrix, imatrix_of(known), force=True)
        done = run("quantize", str(source), str(tmp_path / "out.gguf"), "--imatrix", matrix, "--force")
        assert done.returncode == 0
        assert (f"knows nothing of 1 matrices: {name}" in done.stderr) == warned
        assert bool(done.stderr) == warned


@pytest.mark.parametrize("kind", ["adapter", "imatrix"])
def test_files_that_are_no_models_are_refused(tmp_path: Path, kind: str) -> None:
    keys: list[Key] = [("general.type", "str", kind), *CONFIG]
    (tmp_path / "in.gguf").write_bytes(small_file(keys, TENSORS).data)
    done = run("quantize", str(tmp_path / "in.gguf"), str(tmp_path / "out.gguf"))
    assert done.returncode == 4
    assert is_one_error_line(done.stderr) and f"is '{kind}', expected 'model'" in done.stderr


@pytest.mark.parametrize("options", [("--quant", "q9"), ("--head", "q9"), ("--quant",), ("--imatrix", "missing")])
def test_options_that_make_no_sense_are_errors(models: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    done = run("quantize", str(tiny_gguf(models)), str(tmp_path / "out.gguf"), *options)
    assert done.returncode == (3 if "missing" in options else 2)
    assert is_one_error_line(done.stderr)
    assert options[-1] in done.stderr


# --- the place it goes to


def test_C7_an_output_that_must_stay_is_a_usage_error(models: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.gguf"
    source.write_bytes(tiny_gguf(models).read_bytes())
    (tmp_path / "link.gguf").symlink_to(source)
    (tmp_path / "hard.gguf").hardlink_to(source)
    write_imatrix(tmp_path / "x.imatrix", imatrix_of(importance_for(source)))
    (tmp_path / "mine").write_text("my own")
    (tmp_path / "folder").mkdir()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for target, force, code, problem in (
        ("in.gguf", True, 2, "is the input itself"),
        ("link.gguf", True, 2, "is the input itself"),
        ("hard.gguf", True, 2, "is the input itself"),
        ("x.imatrix", True, 2, "is the input itself"),
        ("mine", False, 2, "--force replaces it"),
        ("folder", True, 2, "not a regular file"),
        ("nowhere/out.gguf", False, 3, "does not exist"),
    ):
        options = ("--imatrix", str(tmp_path / "x.imatrix"), *(["--force"] if force else []))
        done = run("quantize", str(source), str(tmp_path / target), *options)
        assert (done.returncode, is_one_error_line(done.stderr)) == (code, True), target
        assert problem in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_json_says_what_was_made(models: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    target.write_text("old")
    done = run("quantize", str(tiny_gguf(models, layers=3)), str(target), "--quant", "q8_0", "--force", "--json")
    document = json.loads(done.stdout)
    assert document["sha256"] == hashlib.sha256(target.read_bytes()).hexdigest()
    assert document["n_bytes"] == target.stat().st_size
    assert set(document["types"]) == {"Q8_0", "F32"}
    assert 8.5 <= document["bits_per_weight"] < 8.6
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_the_backbone_of_a_bundle_is_an_input_too(tmp_path: Path) -> None:
    convert(tiny_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle", "f32")
    done = run("quantize", str(tmp_path / "bundle"), str(tmp_path / "out.gguf"), "--quant", "q4_k_m")
    assert done.returncode == 0 and "Q4_K" in done.stdout
    assert run("run", str(tmp_path / "out.gguf"), "the cat", "-n", "4").returncode == 0


def test_C12_the_same_input_gives_the_same_bytes(models: Path, tmp_path: Path) -> None:
    source = tiny_gguf(models, layers=3)
    imatrix = imatrix_of(importance_for(source))
    for n_threads in (1, 2):
        quantize(source, tmp_path / f"{n_threads}.gguf", "q3_k_m", imatrix=imatrix, n_threads=n_threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


# --- interruptions


def files_in(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("n_bytes", [0, 1000, 300_000])
@pytest.mark.parametrize("has_old", [False, True], ids=["new", "old"])
def test_C5_a_disk_that_is_full_leaves_everything_as_it_was(
    models: Path, tmp_path: Path, n_bytes: int, has_old: bool
) -> None:
    if has_old:
        (tmp_path / "out.gguf").write_text("old")
    before = files_in(tmp_path)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))

    done = run("quantize", str(tiny_gguf(models)), str(tmp_path / "out.gguf"), "--force", preexec_fn=limit)
    assert done.returncode == 5, done.stderr
    assert is_one_error_line(done.stderr)
    assert files_in(tmp_path) == before


def test_C5_too_little_space_is_found_before_anything_is_written(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1 << 10})
    monkeypatch.setattr("phi4edge.converters.new_file.shutil.disk_usage", lambda path: usage)
    with pytest.raises(DiskError, match="are free"):
        quantize(tiny_gguf(models), tmp_path / "out.gguf", "q8_0")
    assert files_in(tmp_path) == {}


def start(source: Path, target: Path) -> subprocess.Popen[str]:
    command = [*COMMAND, "quantize", str(source), str(target), "--quant", "q2_k", "--force"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_temporary(process: subprocess.Popen[str], directory: Path) -> None:
    deadline = time.monotonic() + DEADLINE
    while process.poll() is None and not any(p.name.startswith(UNFINISHED_PREFIX) for p in directory.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_C8_a_signal_leaves_everything_as_it_was(
    models: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    (tmp_path / "out.gguf").write_text("old")
    with start(tiny_gguf(models, layers=40, vocab=20_000), tmp_path / "out.gguf") as process:
        wait_for_temporary(process, tmp_path)
        process.send_signal(number)
        _, shown = process.communicate(timeout=DEADLINE)
    assert process.returncode == code, shown
    assert "Traceback" not in shown
    assert files_in(tmp_path) == {"out.gguf": b"old"}


def test_C6_a_kill_leaves_the_old_file_and_the_next_run_cleans_up(models: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    target.write_text("old")
    rng = random.Random(0)
    for _ in range(4):
        with start(tiny_gguf(models, layers=40, vocab=20_000), target) as process:
            wait_for_temporary(process, tmp_path)
            time.sleep(rng.uniform(0.0, 0.3))
            process.kill()
            process.communicate(timeout=DEADLINE)
        assert target.read_text() == "old"
        assert len(files_in(tmp_path)) == 2
    with pytest.raises(Phi4EdgeError):
        phi4edge.inspect(next(path for path in tmp_path.iterdir() if path != target))
    quantize(tiny_gguf(models), target, "q8_0", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_memory_does_not_grow_with_the_model(models: Path, tmp_path: Path) -> None:
    """200 MB of weights through pieces of 16 MiB."""
    source = tiny_gguf(models, layers=1, vocab=200_000)
    command = "import sys; from phi4edge.cli import main; main(sys.argv[1:]); import re; "
    command += "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr)"
    arguments = [COMMAND[0], "-c", command, "quantize", str(source), str(tmp_path / "out.gguf"), "--quant", "q8_0"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE, check=True)
    assert int(done.stderr) < 350 << 10  # KiB
