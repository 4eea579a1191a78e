"""Sounds to features: those of transformers, from any file, rate and kind of samples; a wrong one is one error."""

from __future__ import annotations

import functools
import io
import math
import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from peers import require
from phi4edge.audio_processor import AudioNumbers, load_audio, log_mels, n_tokens
from phi4edge.errors import BundleError, FileError, InputError, Phi4EdgeError, UnsupportedError

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


def written(samples: Any, rate: int, container: str, codec: str, **options: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, codec, format=container, **options)
    return file.getvalue()


def wav(data: bytes, *, rate: int = 16000, channels: int = 1, bits: int = 16, tag: int = 1, **changes: Any) -> bytes:
    """A WAV file, in which ``changes`` may be lies: order, block_align, data_size, size."""
    order = changes.get("order", "<")
    block = changes.get("block_align", channels * bits // 8)
    head = struct.pack(f"{order}HHIIHH", tag, channels, rate, rate * block & 0xFFFFFFFF, block & 0xFFFF, bits)
    body = b"WAVEfmt " + struct.pack(f"{order}I", len(head)) + head
    body += b"data" + struct.pack(f"{order}I", changes.get("data_size", len(data))) + data
    return (b"RIFF" if order == "<" else b"RIFX") + struct.pack(f"{order}I", changes.get("size", len(body))) + body


def flac_of_length(data: bytes, n_samples: int) -> bytes:
    """The same FLAC file whose header claims another number of samples; 0 stands for unknown."""
    place = slice(18, 26)  # rate, channels, bits, and in the last 36 bits the number of samples
    fields = int.from_bytes(data[place], "big") >> 36 << 36 | n_samples
    return data[:18] + fields.to_bytes(8, "big") + data[26:]


def without_count(mp3: bytes) -> bytes:
    """An MP3 file without the frame that says how many there are."""
    return mp3[mp3.index(mp3[:2], 4) :]


def similarity(found: Any, expected: Any) -> float:
    """Signal to error in dB."""
    assert found.shape == expected.shape
    return float(10 * np.log10(np.sum(expected**2) / np.sum((found - expected) ** 2)))


def pcm(samples: Any, order: str = "<") -> bytes:
    return bytes((samples * 32767).astype(f"{order}i2").tobytes())


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


# Files

_FILES = [  # container, codec, rate, at least so many dB, samples that the codec may add
    ("WAV", "PCM_U8", 16000, 35, 0),
    ("WAV", "PCM_16", 44100, 50, 0),
    ("WAV", "PCM_24", 8000, 30, 0),
    ("WAV", "PCM_32", 22050, 50, 0),
    ("WAV", "FLOAT", 48000, 50, 0),
    ("WAV", "DOUBLE", 11025, 50, 0),
    ("WAV", "ULAW", 8000, 25, 0),
    ("WAV", "ALAW", 8000, 25, 0),
    ("WAV", "IMA_ADPCM", 16000, 15, 2000),
    ("WAV", "MS_ADPCM", 16000, 15, 2000),
    ("WAV", "GSM610", 8000, 5, 2000),
    ("W64", "PCM_16", 16000, 60, 0),
    ("RF64", "PCM_16", 16000, 60, 0),
    ("FLAC", "PCM_16", 44100, 50, 0),
    ("OGG", "VORBIS", 44100, 15, 0),
    ("OGG", "OPUS", 48000, 10, 0),
    ("MP3", "MPEG_LAYER_III", 44100, 15, 0),
    ("AIFF", "PCM_16", 16000, 60, 0),
    ("AU", "PCM_16", 16000, 60, 0),
    ("CAF", "ALAC_16", 16000, 60, 0),
    ("NIST", "PCM_16", 16000, 60, 0),
]


@pytest.mark.parametrize(("container", "codec", "rate", "decibels", "n_more"), _FILES)
def test_M7_files_of_many_kinds(
    container: str, codec: str, rate: int, decibels: float, n_more: int, tmp_path: Path
) -> None:
    """The name says nothing, and bytes are as good as a file."""
    data = written(tones(2 * rate, rate), rate, container, codec)
    (tmp_path / "sound.txt").write_bytes(data)
    found = load_audio(tmp_path / "sound.txt")
    assert 32000 <= len(found) <= 32000 + n_more
    assert similarity(found[:32000], tones(32000, 16000)) > decibels
    np.testing.assert_array_equal(load_audio(data), found)
    np.testing.assert_array_equal(load_audio(str(tmp_path / "sound.txt")), found)


def test_M7_RIFX_is_big_endian() -> None:
    wave = reference_wave(5000)
    np.testing.assert_allclose(load_audio(wav(pcm(wave, ">"), order=">")), wave, atol=1e-4)


@pytest.mark.parametrize("data_size", [0xFFFFFFFF, 0x7FFFFFFF, 10_001, 12_000])
def test_M7_of_plain_samples_what_is_there_counts(data_size: int) -> None:
    """Programs that write to a pipe do not know the length."""
    wave = reference_wave(5000)
    found = load_audio(wav(pcm(wave), data_size=data_size, size=0xFFFFFFFF))
    np.testing.assert_allclose(found, wave, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 0},
        {"channels": 65535},
        {"rate": 0},
        {"rate": 1},
        {"rate": 0x7FFFFFFF},
        {"rate": 0x80000000},
        {"rate": 0xFFFFFFFF},
        {"bits": 0},
        {"bits": 65535},
        {"tag": 0},
        {"tag": 0x55},
        {"tag": 0xABCD},
        {"data_size": 0},
        {"data_size": 700},
        {"block_align": 0, "channels": 3},
        {"block_align": 0, "bits": 4, "tag": 0x11},
        {"block_align": 65535, "bits": 4, "tag": 0x11},
        {"block_align": 1, "bits": 4, "tag": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("with_av", [True, False])
def test_M7_headers_that_lie(
    changes: dict[str, Any], with_av: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_av:
        monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.wav").write_bytes(wav(pcm(reference_wave(5000)), **changes))
    try:
        found = load_audio(tmp_path / "a.wav")
    except InputError as error:
        assert str(error).startswith(f"{tmp_path / 'a.wav'}: ") and "\n" not in str(error)
    else:
        assert "block_align" in changes or "tag" in changes, "cannot be right"
        assert np.isfinite(found).all()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "is empty"),
        (b"This is not a sound, whatever its name says.", "no sound of a kind"),
        ("Auch dies ist Text.".encode("utf-16"), "no sound of a kind"),
        (b"<!DOCTYPE html><html></html>", "no sound of a kind"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "no sound of a kind"),
        (bytes(10_000), "no sound of a kind"),
        (b"#EXTM3U\n#EXTINF:1\nfile:///etc/passwd\n", "no sound of a kind"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "no sound of a kind"),
        (b"RIFF", "no sound of a kind"),
        (b"RIFF\x10\0\0\0WAVE", "damaged"),
        (b"fLaC" + bytes(100), "damaged"),
        (b"OggS" + bytes(100), "damaged"),
        (b"ID3" + b"\xff" * 100, "damaged"),
        (b"\xff\xfb\x90\x00" * 3, "damaged"),
        (wav(b""), "no samples|damaged"),
        (wav(bytes(200)), "lasts 6.2 ms"),
        (wav(np.array([0.1] * 500 + [np.nan], "<f4").tobytes(), bits=32, tag=3), "NaN"),
        (wav(np.array([0.1] * 500 + [np.inf], "<f4").tobytes(), bits=32, tag=3), "infinity"),
        (wav(np.array([0.1] * 500 + [3e4], "<f4").tobytes(), bits=32, tag=3), "full scale is 1"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_M1_what_is_no_sound_is_refused(data: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(InputError, match=problem) as caught:
        load_audio(tmp_path / "a.wav")
    assert str(caught.value).startswith(f"{tmp_path / 'a.wav'}: ") and "\n" not in str(caught.value)
    with pytest.raises(InputError, match=problem):
        load_audio(data)


@pytest.mark.parametrize("container", ["WAV", "AIFF", "AU", "W64", "NIST", "FLAC", "OGG", "MP3"])
def test_M7_a_file_that_was_cut_off(container: str) -> None:
    wave = np.concatenate([reference_wave(40000)] * 2)
    codec = {"OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}.get(container, "PCM_16")
    data = written(wave, 16000, container, codec)
    cut = data[: len(data) * 2 // 3]
    if container in ("FLAC", "MP3"):
        with pytest.raises(InputError, match=r"damaged|ends after 3\.\d of 5\.0 s"):
            load_audio(cut)
        return
    found = load_audio(cut)
    assert 0.5 * len(wave) < len(found) < 0.7 * len(wave)
    np.testing.assert_allclose(found, load_audio(data)[: len(found)], atol=0.3 if container == "OGG" else 0)


@pytest.mark.parametrize("container", ["WAV", "RF64", "W64", "AIFF", "CAF", "AU", "NIST", "FLAC", "OGG", "MP3"])
def test_M1_damage_anywhere_is_an_error_or_a_finite_sound(container: str) -> None:
    codec = {"OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}.get(container, "PCM_16")
    data = written(reference_wave(16000), 16000, container, codec)
    random = np.random.default_rng(len(data))
    n_head = min(len(data), 300)
    for index in range(150):
        damaged = bytearray(data if index % 3 else data[: random.integers(1, len(data))])
        for place in random.integers(0, n_head if index % 2 else len(data), 3):
            if place < len(damaged):
                damaged[place] = random.choice([0, 1, 0x7F, 0x80, 0xFF, int(random.integers(256))])
        try:
            found = load_audio(bytes(damaged), max_seconds=60)
        except Phi4EdgeError as error:
            assert "\n" not in str(error)
        else:
            assert np.isfinite(found).all() and 400 <= len(found) <= 60 * 16000


@pytest.mark.parametrize("cut", [False, True])
def test_MP3_without_a_length_is_read_to_its_end(cut: bool) -> None:
    """A decoder that guesses the length from the first frame stops at a sixth of this one."""
    loud = 0.3 * np.random.default_rng(0).standard_normal(44100 * 2)
    wave = np.concatenate([loud, np.zeros(44100 * 20), loud])
    mp3 = without_count(written(wave, 44100, "MP3", "MPEG_LAYER_III", bitrate_mode="VARIABLE"))
    found = load_audio(mp3[:-100] if cut else mp3)
    assert 24 * 16000 - 5000 * cut < len(found) < 24.1 * 16000
    assert np.abs(found[22 * 16000 + 2000 : 23 * 16000]).mean() > 0.05


def test_FLAC_without_a_length_is_read_to_its_end() -> None:
    flac = written(reference_wave(300_001), 16000, "FLAC", "PCM_16")
    np.testing.assert_array_equal(load_audio(flac_of_length(flac, 0)), load_audio(flac))
    with pytest.raises(InputError, match=r"ends after 18\.8 of 62\.5 s"):
        load_audio(flac_of_length(flac, 1_000_000))


@pytest.mark.parametrize(
    ("claimed", "problem"),
    [
        (2**36 - 1, "lasts, by its header, 143165"),
        (0, r"goes on for at least 1\.[01] minutes, and at most 1 are taken"),
    ],
)
def test_M8_hours_of_silence_stop_at_the_limit(claimed: int, problem: str) -> None:
    """Three hours in a few kilobytes of FLAC."""
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 8000, 1, "PCM_16", format="FLAC") as writer:
        for _ in range(3 * 60):
            writer.write(np.zeros(60 * 8000, np.int16))
    bomb = flac_of_length(file.getvalue(), claimed)
    assert len(bomb) < 1 << 20
    tracemalloc.start()
    with pytest.raises(InputError, match=problem):
        load_audio(bomb, max_seconds=60)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 << 20


def test_G23_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "loop.wav").symlink_to(tmp_path / "loop.wav")
    for path in (tmp_path, tmp_path / "pipe.wav", tmp_path / "loop.wav", tmp_path / "missing.wav", "/dev/zero", "a\0"):
        with pytest.raises(FileError, match=r"regular|cannot be read"):
            load_audio(path)


# What libsndfile does not read


def encoded(container: str, codec: str, samples: Any) -> bytes:
    """A stereo file of 16 kHz made with FFmpeg; the right channel is silent."""
    av = require("av")
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=16000, layout="stereo")
        stereo = np.stack([samples, np.zeros_like(samples)]).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(stereo, format="fltp", layout="stereo")
        frame.sample_rate = 16000
        to_codec = av.AudioResampler(stream.format, "stereo", 16000, frame_size=stream.frame_size)
        for part in [*to_codec.resample(frame), *to_codec.resample(None)]:
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize("container", ["ipod", "matroska", "adts"])
def test_other_kinds_are_read_with_av(container: str) -> None:
    found = load_audio(encoded(container, "aac", tones(48000, 16000)))
    expected = 0.5 * tones(48000, 16000)  # the average with silence
    assert 48000 <= len(found) < 48000 + 4 * 1024  # AAC has samples before and after the sound
    start = int(np.correlate(found[:13000], expected[:10000]).argmax())
    assert similarity(found[start : start + 44000], expected[:44000]) > 20


def test_other_kinds_have_limits_too() -> None:
    file = encoded("ipod", "aac", tones(16000 * 5, 16000))
    stream = encoded("adts", "aac", tones(16000 * 5, 16000))
    for sound, problem in ((file, r"header, 0\.1 minutes"), (stream, "goes on"), (file[: len(file) // 2], "damaged")):
        with pytest.raises(InputError, match=problem):
            load_audio(sound, max_seconds=2)
    assert 5 * 16000 <= len(load_audio(file, max_seconds=5.2)) < 5.2 * 16000


def test_other_codecs_are_not_read() -> None:
    samples = tones(16000, 8000)
    av = require("av")
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("real_144", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.int16(3000 * samples)[np.newaxis, :8000], format="s16", layout="mono")
        frame.sample_rate = 8000
        for part in av.AudioResampler(stream.format, "mono", 8000, frame_size=160).resample(frame):
            output.mux(stream.encode(part))
    with pytest.raises(InputError, match="has a sound in the format ra_144, which is not read; convert it to WAV"):
        load_audio(file.getvalue())


def test_M2_frames_of_a_video_are_not_decoded_for_its_sound(tmp_path: Path) -> None:
    av = require("av")
    png = io.BytesIO()
    Image.new("L", (10_000, 10_000)).save(png, "PNG", compress_level=1)
    with av.open(tmp_path / "a.mov", "w") as output:
        pictures, sound = output.add_stream("png", rate=1), output.add_stream("pcm_s16le", rate=16000, layout="mono")
        pictures.width, pictures.height, pictures.pix_fmt = 64, 64, "gray"
        output.start_encoding()
        packet = av.Packet(png.getvalue())
        packet.pts, packet.dts, packet.time_base, packet.stream, packet.is_keyframe = 0, 0, Fraction(1), pictures, True
        output.mux(packet)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        output.mux(sound.encode(frame))
    code = (
        "import sys, av; from phi4edge.audio_files import load_audio; "
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]); before = peak(); "
        "print(len(load_audio(sys.argv[1])), peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.mov")], capture_output=True, text=True)
    n_samples, n_kilobytes = map(int, done.stdout.split())
    assert n_samples == 16000 and n_kilobytes < 40_000


def test_other_kinds_without_av_name_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "talk.m4a").write_bytes(b"\0\0\0\x18ftypM4A " + bytes(100))
    with pytest.raises(UnsupportedError, match=r"talk.m4a: .*phi4edge\[media\]"):
        load_audio(tmp_path / "talk.m4a")
    with pytest.raises(InputError, match=r"damaged.*phi4edge\[media\]"):
        load_audio(wav(pcm(reference_wave(1000)), tag=0xABCD))
