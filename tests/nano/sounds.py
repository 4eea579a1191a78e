"""Recordings of number words, commands and questions, spoken by espeak-ng in many voices, and questions about them."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from nano.texts import Conversation, one
from nano.words import (
    COMMANDS,
    NUMBER_WORDS,
    SPEECH_QUESTIONS,
    SPOKEN_QUESTIONS,
    TEST,
    THEN_TRANSLATE,
    TRAIN,
    WATCH,
    split_of,
    translated,
)
from peers import require

RATE: Final = 16000
_SPEAKERS: Final = ("", "+m1", "+m3", "+m5", "+m7", "+f1", "+f2", "+f3", "+f5")
VOICES: Final = tuple(accent + speaker for accent in ("en-us", "en-gb", "en-gb-x-rp") for speaker in _SPEAKERS)
# Numbers, commands and questions in each split.
COUNTS: Final = {TRAIN: (9500, 2500, 2500), WATCH: (200, 75, 100), TEST: (400, 150, 200)}
Samples = npt.NDArray[np.int16]


def speak(text: str, voice: str, words_per_minute: int, pitch: int) -> npt.NDArray[np.float32]:
    """Mono, 16 kHz, within -1..1."""
    command = ["espeak-ng", "-v", voice, "-s", str(words_per_minute), "-p", str(pitch), "--stdout", text]
    wave = subprocess.run(command, capture_output=True, check=True).stdout[44:]  # after the header
    samples = np.frombuffer(wave[: len(wave) // 2 * 2], np.int16).astype(np.float32) / 32768
    return np.asarray(require("soxr").resample(samples, 22050, RATE), np.float32)


def record(text: str, seed: str) -> Samples:
    """Any voice, speed, pitch, loudness and noise, with silence before and after."""
    random = Random(seed)
    noise = np.random.default_rng(random.getrandbits(63))
    spoken = speak(text, random.choice(VOICES), random.randint(120, 190), random.randint(30, 70))
    before, after = (np.zeros(random.randint(400, 4000), np.float32) for _ in range(2))
    sound = np.concatenate([before, spoken, after]) * random.uniform(0.25, 1.0)
    sound += noise.standard_normal(len(sound), dtype=np.float32) * np.float32(10 ** random.uniform(-4, -2.1))
    return np.clip(sound * 32768, -32768, 32767).astype(np.int16)


def some_numbers(random: Random, split: str) -> str:
    """One to four number words; sequences are in one split only."""
    n = random.choices([1, 2, 3, 4], [2, 3, 3, 3])[0]
    while True:
        words = " ".join(random.choice(NUMBER_WORDS) for _ in range(n))
        if n == 1 or split_of(f"S{words}") == split:
            return words


def plan(split: str) -> list[tuple[str, str]]:
    """Kind and text of each recording."""
    random = Random(f"recordings {split}")
    numbers, commands, questions = COUNTS[split]
    all_questions = [question for kind in SPOKEN_QUESTIONS.values() for question in kind]
    return [
        *(("number", some_numbers(random, split)) for _ in range(numbers)),
        *(("command", random.choice(COMMANDS)) for _ in range(commands)),
        *(("question", random.choice(all_questions)) for _ in range(questions)),
    ]


def log_mels(samples: Samples) -> npt.NDArray[np.float32]:
    """[frames, 80], by transformers."""
    extractor = require("transformers").Phi4MultimodalFeatureExtractor()
    scaled = samples.astype(np.float32) / 32768
    found = extractor(scaled, sampling_rate=RATE, return_tensors="pt")["audio_input_features"][0]
    return np.asarray(found.numpy(), np.float32)


def _mels_of(job: tuple[str, str]) -> npt.NDArray[np.float16]:
    require("torch").set_num_threads(1)
    return log_mels(record(*job)).astype(np.float16)


def make_recordings(path: Path, split: str) -> None:
    """Their log-mels, one after the other, in an npz file."""
    planned = plan(split)
    with Pool(2) as pool:
        jobs = [(text, f"{split} {i}") for i, (_, text) in enumerate(planned)]
        mels = pool.map(_mels_of, jobs, chunksize=64)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(
            file,
            mels=np.concatenate(mels),
            lengths=np.array([len(each) for each in mels]),
            kinds=np.array([kind for kind, _ in planned]),
            texts=np.array([text for _, text in planned]),
        )
    part.replace(path)


@dataclass(frozen=True)
class Recordings:
    """The log-mels of a split."""

    mels: list[npt.NDArray[np.float16]]
    kinds: list[str]
    texts: list[str]

    @staticmethod
    def of(work: Path, split: str) -> Recordings:
        path = work / f"recordings-{split}.npz"
        if not path.exists():
            make_recordings(path, split)
        with np.load(path) as stored:
            mels = np.split(stored["mels"], np.cumsum(stored["lengths"])[:-1])
            return Recordings(mels, stored["kinds"].tolist(), stored["texts"].tolist())

    def by_length(self, indices: Sequence[int]) -> list[list[int]]:
        """Those of exactly one length together, as transformers needs no mask for them."""
        groups: dict[int, list[int]] = {}
        for index in indices:
            groups.setdefault(len(self.mels[index]), []).append(index)
        return list(groups.values())

    def batch(self, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        """[n, frames, 80] of recordings of one length."""
        return np.stack([self.mels[index] for index in indices]).astype(np.float32)

    def disturbed(self, indices: Sequence[int], random: Random) -> tuple[npt.NDArray[np.float32], list[int]]:
        """[n, frames, 80] of recordings of about one length, and the frame at which each begins.

        Shifted, louder or softer, with noise, and with a band and a moment blanked (SpecAugment, arXiv:1904.08779).
        There are few lengths in all, because kernels are compiled for each.
        """
        noise = np.random.default_rng(random.getrandbits(63))
        n_frames = -(-(max(len(self.mels[index]) for index in indices) + 1) // 24) * 24 + 13 * random.randrange(2)
        batch = np.empty((len(indices), n_frames, 80), np.float32)
        starts = []
        for row, index in zip(batch, indices, strict=True):
            mels = self.mels[index].astype(np.float32)
            start = random.randint(0, min(n_frames - len(mels), 20))
            end = start + len(mels)
            row[:start] = mels[noise.integers(0, 3, start)]
            row[start:end] = mels
            row[end:] = mels[-3:][noise.integers(0, 3, n_frames - end)]
            starts.append(start)
        batch += noise.random((len(indices), 1, 1), np.float32) * 3 - 2
        batch += noise.standard_normal(batch.shape, np.float32) * (0.3 * noise.random((len(indices), 1, 1), np.float32))
        for row in batch:
            mean = row.mean()
            band, moment = random.randrange(72), random.randrange(n_frames - 8)
            row[:, band : band + random.randrange(9)] = mean
            row[moment : moment + random.randrange(7)] = mean
        return batch.clip(min=0), starts

    def word_edges(self, index: int) -> npt.NDArray[np.float64]:
        """About where the words of a recording begin and end, in frames: what is loud, shared by letters."""
        loudness = self.mels[index].astype(np.float32).mean(1)
        quiet, loud = np.quantile(loudness, [0.05, 0.95])
        (speech,) = np.nonzero(loudness > quiet + 0.3 * (loud - quiet))
        shares = np.cumsum([0] + [max(3, len(word)) for word in self.texts[index].split()])
        edges: npt.NDArray[np.float64] = speech[0] + (speech[-1] + 1 - speech[0]) * shares / shares[-1]
        return edges


def conversation(random: Random, kind: str, text: str, task: str | None = None) -> Conversation:
    """About a recording; only numbers are translated."""
    if task is None:
        task = random.choices(["transcribe", "translate", "turns"], [5, 4, 1])[0] if kind == "number" else "transcribe"
    if task == "turns":
        ask = random.choice(SPEECH_QUESTIONS["transcribe"])
        return Conversation(task, ((ask, text), (THEN_TRANSLATE, translated(text, "French"))))
    answer = translated(text, "French") if task == "translate" else text
    return one(task, random.choice(SPEECH_QUESTIONS[task]), answer)


def kind_of_question(text: str) -> str:
    return next(kind for kind, questions in SPOKEN_QUESTIONS.items() if text in questions)


def neighbours(order: Sequence[int], random: Random, n: int) -> list[Any]:
    """n of an order by length that stand near each other."""
    near = min(len(order), 4 * n)
    start = random.randint(0, len(order) - near)
    return random.sample(order[start : start + near], n)
