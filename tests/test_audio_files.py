"""Files to sounds: every kind that is one, whatever its header says; a damaged or endless one is one error of ours."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from peers import require
from phi4edge.audio_processor import load_audio
from phi4edge.errors import FileError, InputError, Phi4EdgeError, UnsupportedError
from test_audio_processor import reference_wave, similarity, tones, wav


def written(samples: Any, rate: int, container: str, codec: str, **options: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, codec, format=container, **options)
    return file.getvalue()


def flac_of_length(data: bytes, n_samples: int) -> bytes:
    """The same FLAC file whose header claims another number of samples; 0 stands for unknown."""
    place = slice(18, 26)  # rate, channels, bits, and in the last 36 bits the number of samples
    fields = int.from_bytes(data[place], "big") >> 36 << 36 | n_samples
    return data[:18] + fields.to_bytes(8, "big") + data[26:]


def without_count(mp3: bytes) -> bytes:
    """An MP3 file without the frame that says how many there are."""
    return mp3[mp3.index(mp3[:2], 4) :]


def pcm(samples: Any, order: str = "<") -> bytes:
    return bytes((samples * 32767).astype(f"{order}i2").tobytes())


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
