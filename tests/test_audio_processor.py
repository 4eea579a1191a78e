"""Sounds to features: those of transformers, from any file, rate and kind of samples; a wrong one is one error."""

from __future__ import annotations

import functools
import math
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from peers import require
from phi4edge.audio_processor import AudioNumbers, load_audio, log_mels, n_tokens
from phi4edge.errors import BundleError, InputError

NUMBERS = AudioNumbers()
MANIFEST = {
    "sampling_rate": 16000,
    "feature_size": 80,
    "win_length": 400,
    "hop_length": 160,
    "n_fft": 512,
    "preemphasis": 0.97,
    "audio_compression_rate": 8,
}


@functools.cache
def reference_wave(n_samples: int) -> Any:
    """A tone of 440 Hz with the noise of a linear congruential generator."""
    state, noise = 1, np.empty(n_samples)
    for index in range(n_samples):
        state = (1103515245 * state + 12345) & 0x7FFFFFFF
        noise[index] = state / 2**30 - 1
    return (0.3 * np.sin(2 * np.pi * 440 * np.arange(n_samples) / 16000) + 0.05 * noise).astype(np.float32)


def tones(n_samples: int, rate: float) -> Any:
    """Something below 4 kHz with 23 ms of silence at both ends, at any rate; float64."""
    seconds = np.arange(n_samples) / rate
    wave = sum(0.2 * np.sin(2 * np.pi * hertz * seconds + hertz) for hertz in (133, 710, 1900, 3100))
    fade = np.minimum(seconds, seconds[-1] - seconds) - 0.023
    return wave * np.sin(np.pi / 2 * np.clip(fade / 0.05, 0, 1)) ** 2


def wav(data: bytes, *, rate: int = 16000, channels: int = 1, bits: int = 16, tag: int = 1, **changes: Any) -> bytes:
    """A WAV file, in which ``changes`` may be lies: order, block_align, data_size, size."""
    order = changes.get("order", "<")
    block = changes.get("block_align", channels * bits // 8)
    head = struct.pack(f"{order}HHIIHH", tag, channels, rate, rate * block & 0xFFFFFFFF, block & 0xFFFF, bits)
    body = b"WAVEfmt " + struct.pack(f"{order}I", len(head)) + head
    body += b"data" + struct.pack(f"{order}I", changes.get("data_size", len(data))) + data
    return (b"RIFF" if order == "<" else b"RIFX") + struct.pack(f"{order}I", changes.get("size", len(body))) + body


def similarity(found: Any, expected: Any) -> float:
    """Signal to error in dB."""
    assert found.shape == expected.shape
    return float(10 * np.log10(np.sum(expected**2) / np.sum((found - expected) ** 2)))


# Features


@pytest.mark.parametrize(
    ("n_samples", "n_frames", "tokens", "last", "mean", "std", "least", "most"),
    [
        (16000, 98, 13, (22.12654, 22.38995, 22.53775), 18.599178, 2.961452, 7.55275, 24.23638),
        (59200, 368, 46, (22.03133, 21.99126, 22.27564), 18.595966, 2.969622, 6.08180, 24.23638),
        (720000, 4498, 563, (22.16194, 22.06864, 22.42072), 18.590561, 2.976539, 2.79572, 24.23989),
    ],
)
def test_features_have_the_known_values(
    n_samples: int,
    n_frames: int,
    tokens: int,
    last: tuple[float, ...],
    mean: float,
    std: float,
    least: float,
    most: float,
) -> None:
    """Computed once with transformers 5.23."""
    features = log_mels(reference_wave(n_samples), NUMBERS)
    assert features.shape == (n_frames, 80)
    assert features.dtype == np.float32
    assert n_tokens(n_frames) == tokens
    near = functools.partial(pytest.approx, abs=1e-4)
    assert features[0, :5].tolist() == near([12.62556, 12.33695, 9.53364, 12.76491, 13.26072])
    assert features[10, 40] == near(18.39206)
    assert features[-1, -3:].tolist() == near(list(last))
    assert features.mean(dtype=float) == near(mean)
    assert features.std(dtype=float) == near(std)
    assert (features.min(), features.max()) == near((least, most))


@pytest.mark.parametrize(
    "samples",
    [
        pytest.param(lambda: reference_wave(400), id="one frame"),
        pytest.param(lambda: reference_wave(1023 * 160 + 400), id="a block"),
        pytest.param(lambda: reference_wave(1024 * 160 + 559), id="a block and a frame"),
        pytest.param(lambda: reference_wave(720000), id="45 s"),
        pytest.param(lambda: 90 * np.sign(reference_wave(20000)), id="far beyond full scale"),
        pytest.param(lambda: reference_wave(20000) / 30000, id="near silence"),
        pytest.param(lambda: np.full(20000, 0.5, np.float32), id="constant"),
        pytest.param(lambda: np.eye(1, 20000, 7777, dtype=np.float32)[0], id="a click"),
    ],
)
def test_features_are_those_of_transformers(samples: Callable[[], Any]) -> None:
    require("torch")
    extractor = require("transformers").Phi4MultimodalFeatureExtractor()
    wave = samples()
    expected = extractor(wave, sampling_rate=16000, return_tensors="np")
    features = log_mels(wave, NUMBERS)
    assert features.shape == expected["audio_input_features"][0].shape
    np.testing.assert_allclose(features, expected["audio_input_features"][0], rtol=0, atol=1e-4)
    assert n_tokens(len(features)) == expected["audio_embed_sizes"][0]


@pytest.mark.parametrize(("n_samples", "n_frames"), [(400, 1), (559, 1), (560, 2), (1000, 4)])
def test_silence_is_frames_of_zeros(n_samples: int, n_frames: int) -> None:
    features = log_mels(np.zeros(n_samples, np.float32), NUMBERS)
    assert features.shape == (n_frames, 80)
    assert not features.any()
    assert n_tokens(n_frames) == 1


@pytest.mark.parametrize(("n_frames", "tokens"), [(1, 1), (8, 1), (9, 2), (1098, 138), (1332, 167), (1344, 168)])
def test_a_token_is_eight_frames_or_what_is_left(n_frames: int, tokens: int) -> None:
    assert n_tokens(n_frames) == tokens


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros(399, np.float32),
        np.zeros(0, np.float32),
        np.zeros(16000),
        np.zeros((16000, 1), np.float32),
        np.full(16000, np.nan, np.float32),
        np.append(np.zeros(300000, np.float32), np.float32(np.inf)),
        np.full(16000, 1e20, np.float32),
    ],
    ids=["short", "empty", "float64", "2-D", "NaN", "inf at the end", "1e20"],
)
def test_samples_of_another_kind_are_refused(samples: Any) -> None:
    if len(samples) > 16000:
        samples = samples[-(160 * 1000 + 400) :]  # so that the last sample is in the last frame
    with pytest.raises(InputError):
        log_mels(samples, NUMBERS)


def test_features_of_a_long_recording_need_little_more_memory_than_they_take() -> None:
    samples = np.zeros(16000 * 600, np.float32)
    tracemalloc.start()
    features = log_mels(samples, NUMBERS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < features.nbytes + (40 << 20)


def test_numbers_come_from_the_manifest() -> None:
    assert AudioNumbers.from_manifest({**MANIFEST, "of_a_later_version": 1}) == NUMBERS
    shorter = AudioNumbers.from_manifest({**MANIFEST, "win_length": 320, "hop_length": 80, "preemphasis": 0.9})
    assert log_mels(np.zeros(400, np.float32), shorter).shape == (2, 80)


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling_rate": 8000},
        {"feature_size": 128},
        {"audio_compression_rate": 4},
        {"win_length": 600},
        {"win_length": 1, "hop_length": 1},
        {"hop_length": 0},
        {"hop_length": 401},
        {"n_fft": 1 << 40},
        {"n_fft": None},
        {"hop_length": True},
        {"hop_length": 160.0},
        {"win_length": "400"},
        {"preemphasis": float("nan")},
        {"preemphasis": -1},
    ],
    ids=str,
)
def test_numbers_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"processors\.audio\."):
        AudioNumbers.from_manifest(MANIFEST | changes)


@pytest.mark.parametrize("entry", [None, {}, [], "audio"], ids=repr)
def test_a_manifest_without_numbers_is_refused(entry: Any) -> None:
    with pytest.raises(BundleError):
        AudioNumbers.from_manifest(entry)


# Rates, channels and arrays


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000, 192000])
def test_any_rate_becomes_16_khz(rate: int) -> None:
    """Compared with the same tones made at 16 kHz."""
    found = load_audio((tones(3 * rate, rate), rate))
    assert len(found) == 48000
    if rate == 8000:  # the filter's edge is near the highest tone
        assert similarity(found, tones(48000, 16000)) > 30
    else:
        assert similarity(found, tones(48000, 16000)) > 55


@pytest.mark.parametrize(("rate", "hertz"), [(22050, 9500), (44100, 11000), (48000, 13000), (96000, 20000)])
def test_what_16_khz_cannot_hold_is_not_heard(rate: int, hertz: int) -> None:
    tone = np.sin(2 * np.pi * hertz * np.arange(2 * rate) / rate)
    assert np.abs(load_audio((tone, rate))[1000:-1000]).max() < 1e-3


@pytest.mark.parametrize("n_channels", [2, 6, 255])
def test_channels_are_averaged(n_channels: int) -> None:
    channels = np.random.default_rng(n_channels).uniform(-1, 1, (3000, n_channels)).astype(np.float32)
    expected = channels.mean(axis=1, dtype=np.float64)
    np.testing.assert_allclose(load_audio((channels, 16000)), expected, atol=1e-6)
    file = wav(channels.tobytes(), channels=n_channels, bits=32, tag=3)
    np.testing.assert_allclose(load_audio(file), expected, atol=1e-6)


@pytest.mark.parametrize("n_samples", [1 << 18, (1 << 18) + 1, 1_000_000])
def test_blocks_leave_no_trace(n_samples: int) -> None:
    """Resampled in pieces, the sound has no seams."""
    tone = np.sin(2 * np.pi * 440 * np.arange(n_samples) / 48000)
    found = load_audio((tone, 48000))
    assert len(found) == round(n_samples / 3)
    expected = np.sin(2 * np.pi * 440 * np.arange(len(found)) / 16000)
    assert np.abs(found - expected)[1000:-1000].max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "silence", "scale"),
    [("<i2", 0, 2**15), (">i2", 0, 2**15), ("<i4", 0, 2**31), ("u1", 128, 2**7), ("f2", 0, 1), (">f8", 0, 1)],
)
def test_arrays_of_integers_are_scaled(kind: str, silence: int, scale: int) -> None:
    wave = reference_wave(1000).astype(np.float64) * (2 if kind[-2] == "f" else 1)
    stored = (wave * scale + silence).astype(kind)
    expected = (stored.astype(np.float64) - silence) / scale
    found = load_audio((stored, 16000))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-7)


@pytest.mark.parametrize(
    ("array", "rate", "problem"),
    [
        (np.zeros(0), 16000, "no samples"),
        (np.zeros((0, 2)), 16000, "no samples"),
        (np.zeros((1000, 0)), 16000, "0 channels"),
        (np.zeros(399), 16000, "24.9 ms"),
        (np.zeros(199), 8000, "24.9 ms"),
        (np.array([0.0] * 500 + [np.nan]), 16000, "NaN"),
        (np.array([0.0] * 500 + [-np.inf]), 44100, "NaN or an infinity"),
        (np.full(500, 1e300), 16000, "infinity"),
        (np.array([0.0, 20000.0] * 500), 16000, "divide 16-bit samples by 32768"),
        (np.zeros((2, 16000)), 16000, "transpose"),
        (np.zeros((10, 10, 10)), 16000, "expected floats"),
        (np.array(0.5), 16000, "expected floats"),
        (np.zeros(1000, np.int64), 16000, "expected floats"),
        (np.zeros(1000, bool), 16000, "expected floats"),
        (np.zeros(1000, complex), 16000, "expected floats"),
        (np.zeros(1000, object), 16000, "expected floats"),
        (np.zeros(1000), 0, "rate of 0"),
        (np.zeros(1000), -16000, "rate of -16000"),
        (np.zeros(1000), 2**31, "rate of 2147483648"),
        (np.zeros(1000), math.nan, "rate of nan"),
        (np.zeros(1000), "16000", "rate of '16000'"),
        (np.broadcast_to(np.float32(0), (8 * 3600 * 16000,)), 16000, "lasts 480.0 minutes, and at most 120 "),
    ],
)
def test_M9_arrays_that_are_no_sound(array: Any, rate: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        load_audio((array, rate))


@pytest.mark.parametrize("source", [None, 3, ["a.wav"], (np.zeros(1000),), (16000, np.zeros(1000))], ids=repr)
def test_other_sources_are_refused(source: Any) -> None:
    with pytest.raises(InputError, match="give a path"):
        load_audio(source)
