"""The vision and audio encoders of a checkpoint in fp32, fp16 and int8: what is lost, and what each takes.

``python -m benchmarks.encoders CHECKPOINT_DIR -t 2 --record benchmarks/records/encoders.jsonl``

Each precision is written to an ONNX file and runs in a process of its own, so that its peak memory is its own.  All get
the same random inputs: crops with partial masks, sounds of several lengths (one of two windows), both projectors.
Errors are those of the embeddings against fp32; a relative error is one over the largest value.  The time of a crop or
of 30 s of sound does not include the preparation of pictures or mels, and peak memory includes Python (about 60 MB).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.against_llama_cpp import BUSY, ROOT, Series, as_record, commit, cpu_name

KINDS = ("vision", "audio")
PRECISIONS = ("fp32", "fp16", "int8")
VALID = ((1.0, 1.0), (0.67, 1.0), (0.3, 0.55))  # shares of the rows and columns of a crop that are picture
N_FRAMES = (98, 1001, 2998, 4498)  # of 10 ms
FRAMES_TIMED = 2998  # 30 s

Float32 = npt.NDArray[np.float32]


# --- one precision, in a process of its own


def serve(kind: str, path: str, hidden: int, n_threads: int, n_rounds: int, outputs: Path) -> None:
    """Prints one JSON object; the embeddings of all inputs go to ``outputs``."""
    from phi4edge.encoders import AudioEncoder, VisionEncoder
    from phi4edge.machine import peak_memory

    started = time.perf_counter()
    encoder = (VisionEncoder if kind == "vision" else AudioEncoder)(path, hidden, threads=n_threads)
    answer: dict[str, Any] = {"load_seconds": time.perf_counter() - started, "load_peak_bytes": peak_memory()}
    arrays = dict(vision_cases(encoder) if isinstance(encoder, VisionEncoder) else audio_cases(encoder))
    np.savez(outputs, **arrays)  # type: ignore[arg-type]
    if isinstance(encoder, VisionEncoder):
        pixels, mask = crops(encoder.crop_size)
        answer["seconds"] = timed(lambda: encoder.encode(pixels[:1], mask[:1]), n_rounds)
    else:
        answer["seconds"] = timed(lambda: encoder.encode(log_mels(FRAMES_TIMED), "speech"), n_rounds)
    answer["peak_bytes"] = peak_memory()
    print(json.dumps(answer))


def vision_cases(encoder: Any) -> Iterator[tuple[str, Float32]]:
    pixels, mask = crops(encoder.crop_size)
    features = encoder.encode(pixels, mask)
    for (rows, columns), crop in zip(VALID, features.crops, strict=True):
        yield f"crop, {rows:.0%} x {columns:.0%} valid", crop
    yield "separators", np.stack([features.row_separator, features.view_separator])


def audio_cases(encoder: Any) -> Iterator[tuple[str, Float32]]:
    for n_frames in N_FRAMES:
        yield f"{n_frames / 100:.1f} s", encoder.encode(log_mels(n_frames), "speech")
    yield f"{N_FRAMES[0] / 100:.1f} s, beside a picture", encoder.encode(log_mels(N_FRAMES[0]), "vision")


def crops(size: int) -> tuple[Float32, npt.NDArray[np.bool_]]:
    """Coarse and fine random structure in -1..1; white outside of what is valid."""
    random = np.random.default_rng(0)
    n_patches = size // 14
    mask = np.zeros((len(VALID), n_patches, n_patches), np.bool_)
    for crop, (rows, columns) in zip(mask, VALID, strict=True):
        crop[: round(rows * n_patches), : round(columns * n_patches)] = True
    coarse = random.uniform(-1, 1, (len(VALID), 3, n_patches, n_patches)).repeat(14, axis=2).repeat(14, axis=3)
    pixels = 0.7 * coarse + 0.3 * random.uniform(-1, 1, coarse.shape)
    valid = mask[:, np.newaxis].repeat(14, axis=2).repeat(14, axis=3)
    return np.where(valid, pixels, 1.0).astype(np.float32), mask


def log_mels(n_frames: int) -> Float32:
    """Logarithms of energies, with the mean and deviation that speech has, correlated in time."""
    noise = np.random.default_rng(n_frames).standard_normal((n_frames + 7, 80))
    smooth = np.stack([noise[at : at + n_frames] for at in range(8)]).sum(axis=0) / 8**0.5
    mels: Float32 = (16 + 3 * smooth).astype(np.float32)
    return mels


def timed(run: Callable[[], object], n_rounds: int) -> list[float]:
    seconds = []
    for _ in range(n_rounds):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return seconds


# --- the comparison


def write_encoder(checkpoint_path: Path, kind: str, precision: str, path: Path) -> int:
    """Writes an ONNX file; the width of the language model."""
    from phi4edge.converters import audio, vision
    from phi4edge.converters.checkpoint import Checkpoint
    from phi4edge.converters.variants import read_config, variant_of

    with Checkpoint(checkpoint_path) as checkpoint:
        variant, hidden = variant_of(checkpoint), read_config(checkpoint).hidden
        if kind == "vision":
            vision.write_vision(path, vision.build_vision(checkpoint, variant, hidden, precision), ignore)
        else:
            audio.write_audio(path, audio.build_audio(checkpoint, variant, hidden, precision), ignore)
    return hidden


def ignore(name: str, done: int, total: int) -> None:
    """A progress that is not shown."""


def errors(found: Float32, expected: Float32) -> dict[str, float]:
    a, b = found.astype(np.float64), expected.astype(np.float64)
    rows = (a * b).sum(axis=1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
    largest = float(np.abs(a - b).max())
    return {
        "cosine, worst row": float(rows.min()),
        "cosine": float((a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30)),
        "max error": largest,
        "max relative error": largest / float(np.abs(b).max()),
    }


def measure(options: argparse.Namespace, kind: str, precision: str, folder: Path) -> dict[str, Any]:
    """Writes an encoder and runs it in a child process."""
    path, outputs = folder / f"{kind}.onnx", folder / f"{kind}.{precision}.npz"
    hidden = write_encoder(options.checkpoint, kind, precision, path)
    command = [sys.executable, "-m", "benchmarks.encoders", str(path), "--serve", kind, "--outputs", str(outputs)]
    command += ["--hidden", str(hidden), "-t", str(options.threads), "-r", str(options.rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
    result: dict[str, Any] = json.loads(done.stdout) | {"encoder": kind, "precision": precision}
    result["file_bytes"] = path.stat().st_size
    path.unlink()
    with np.load(outputs) as arrays, np.load(folder / f"{kind}.{PRECISIONS[0]}.npz") as reference:
        result["errors"] = {case: errors(arrays[case], reference[case]) for case in reference.files}
    return result


def series_of(result: dict[str, Any]) -> Iterator[Series]:
    for case, values in result["errors"].items():
        if result["precision"] != PRECISIONS[0]:
            yield from (Series(f"{case}: {name}", "", [value]) for name, value in values.items())
    yield Series("file", "B", [float(result["file_bytes"])])
    yield Series("load", "s", [result["load_seconds"]])
    yield Series("peak memory of loading", "B", [float(result["load_peak_bytes"])])
    yield Series("peak memory", "B", [float(result["peak_bytes"])])
    yield Series("one crop" if result["encoder"] == "vision" else "30 s of sound", "s", result["seconds"])


# --- what the user sees


def print_table(results: list[dict[str, Any]]) -> None:
    row = "{:<8}{:<7}{:>10}{:>14}{:>12}{:>12}{:>12}{:>10}{:>10}{:>10}"
    columns = "encoder type cosine worst-row max-error relative file/MB load/MB run/MB s"
    print(row.format(*columns.split()))
    for result in results:
        cases = result["errors"].values()
        lowest = [f"{min(case[name] for case in cases):.7f}" for name in ("cosine", "cosine, worst row")]
        highest = [f"{max(case[name] for case in cases):.2e}" for name in ("max error", "max relative error")]
        sizes = [f"{result[name] / 1e6:.1f}" for name in ("file_bytes", "load_peak_bytes", "peak_bytes")]
        seconds = f"{min(result['seconds']):.3f}"
        print(row.format(result["encoder"], result["precision"], *lowest, *highest, *sizes, seconds))
    print("load and run: peak memory after loading and at the end; s: best time of a crop, or of 30 s of sound")


def append_records(path: Path, options: argparse.Namespace, load_average: float, results: list[dict[str, Any]]) -> None:
    """One line per quantity."""
    import onnxruntime

    common = {
        "commit": commit(),
        "cpu": cpu_name(),
        "threads": options.threads,
        "model": options.checkpoint.name,
        "rounds": options.rounds,
        "load_average": load_average,
        "system": f"onnxruntime {onnxruntime.__version__}",
    }
    lines = [
        common
        | {"encoder": result["encoder"], "precision": result["precision"], "case": series.case}
        | as_record(series)
        for result in results
        for series in series_of(result)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--rounds", type=int, default=3)
    parser.add_argument("--encoders", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--record", type=Path, help="append one JSON line per quantity to this file")
    parser.add_argument("--work", type=Path, help="where the ONNX files are written for a while; 1.9 GB at full size")
    parser.add_argument("--serve", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--hidden", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--outputs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.checkpoint = options.checkpoint.resolve()
    if options.serve:
        path = str(options.checkpoint)
        serve(options.serve, path, options.hidden, options.threads, options.rounds, options.outputs)
        return
    load_average = os.getloadavg()[0]  # before we add to it
    if load_average > BUSY:
        print(f"Busy machine (load average {load_average:.1f}): do not trust the times.")
    results = []
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        for kind in options.encoders:
            for precision in PRECISIONS:
                results.append(measure(options, kind, precision, Path(folder).resolve()))
                if options.record:
                    append_records(options.record, options, load_average, results[-1:])
    print_table(results)


if __name__ == "__main__":
    main()
