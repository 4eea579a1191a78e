"""Sounds from files, bytes and arrays to what the audio processor takes: one channel at 16 kHz.

>>> load_audio("question.wav").shape  # doctest: +SKIP
(25983,)

Files are hostile.  What a file is, is seen from its first bytes, not from its name, and only kinds on a list reach a
decoder: libsndfile for WAV, FLAC, Ogg, MP3 and the like; FFmpeg, if the package ``av`` is installed, for MP4, Matroska
and others.  Of FFmpeg's decoders only those of sounds on a list are used, so that no frame of a video is decoded, and
the index that it makes of an MP4 file is limited.  Everything then goes block by block through averaging, resampling
and the limit of the duration, so that no header decides how much memory is used.

Every other rate is resampled to 16 kHz, 8 kHz too.  The original processor only decimates by whole numbers, so that
44.1 kHz becomes 22.05 kHz which it takes for 16, and it leaves the upper mel bands of 8 kHz empty.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from phi4edge.audio_samples import Float32, Mono16k, from_array
from phi4edge.container_files import EXTRA, KINDS, START_BYTES, File, Kind, QuietFile, kind_of, open_regular
from phi4edge.errors import FileError, InputError, OutOfMemoryError, UnsupportedError
from phi4edge.media_source import data_of, path_of
from phi4edge.mp4_boxes import OPTIONS, check_boxes

MAX_SECONDS = 2 * 3600.0

AudioSource = str | os.PathLike[str] | bytes | tuple[npt.NDArray[Any], float]

_KNOWN_FRAMES = 1 << 62  # libsndfile says 2^63 - 1 when a header leaves the length open
_ROUNDING = 0.1  # seconds by which the header of a compressed file may be wrong
_MP3_COUNT = rb"(Xing|Info)...[\x01\x03\x05\x07\x09\x0b\x0d\x0f]|VBRI"  # in the first frame: how many there are
_MP3_BLOCK = 8 * 1152  # samples
# Demuxers of FFmpeg that guess the duration from the size of the file.
_GUESSING = ("aac", "amr", "mp3", "mpeg", "mpegts")
# Of FFmpeg: what sounds in the kinds of files that are read are made of.
_DECODERS = (
    *("aac", "aac_fixed", "aac_latm", "ac3", "ac3_fixed", "alac", "als", "amrnb", "amrwb", "ape", "atrac3"),
    *("adpcm_adx", "adpcm_ima_dk3", "adpcm_ima_dk4", "adpcm_ima_qt", "adpcm_ima_wav", "adpcm_ms", "adpcm_swf"),
    *("adpcm_yamaha", "atrac3al", "atrac3plus", "atrac3plusal", "cook", "dca", "dvaudio", "eac3", "flac", "g722"),
    *("g723_1", "g726", "g726le", "g729", "gsm", "gsm_ms", "ilbc", "libopencore_amrnb", "libopencore_amrwb", "libopus"),
    *("libvorbis", "mace3", "mace6", "mlp", "mp1", "mp1float", "mp2", "mp2float", "mp3", "mp3float", "nellymoser"),
    *("opus", "pcm_alaw", "pcm_bluray", "pcm_dvd", "pcm_f16le", "pcm_f24le", "pcm_f32be", "pcm_f32le", "pcm_f64be"),
    *("pcm_f64le", "pcm_mulaw", "pcm_s16be", "pcm_s16be_planar", "pcm_s16le", "pcm_s16le_planar", "pcm_s24be"),
    *("pcm_s24le", "pcm_s24le_planar", "pcm_s32be", "pcm_s32le", "pcm_s32le_planar", "pcm_s64be", "pcm_s64le"),
    *("pcm_s8", "pcm_s8_planar", "pcm_u16be", "pcm_u16le", "pcm_u24be", "pcm_u24le", "pcm_u32be", "pcm_u32le"),
    *("pcm_u8", "qcelp", "qdm2", "qdmc", "s302m", "speex", "truehd", "truespeech", "tta", "vorbis", "wavpack"),
    *("wmalossless", "wmapro", "wmav1", "wmav2", "wmavoice"),
)
# What libsndfile may find behind such a beginning; its other formats are old, and their readers little used.
_FORMATS = {"WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "NIST"}


def load_audio(source: AudioSource, *, max_seconds: float = MAX_SECONDS) -> Float32:
    """Float32 [n_samples] at 16 kHz, at least 400 samples; channels are averaged.

    source: a path; the bytes or the data URL of a file; or an array [n_samples] or [n_samples, n_channels] with its
    rate in Hz.  Arrays of int16, int32 and uint8 are scaled to [-1, 1].  Floats, in arrays and in files, are taken as
    they are, as the reference does: values beyond [-1, 1] are kept.  A NaN, an infinity, or a value above 100 is an
    error.

    Files that end early: what is there is the sound where the samples are plain or ADPCM, since programs that write to
    a pipe leave wrong lengths behind, and in Ogg, and in MP3 that does not tell its length.  FLAC and other MP3 are
    refused.

    Raises FileError when there is no readable regular file; InputError when it is not a sound, damaged, or longer than
    ``max_seconds`` (first by its header, then while it is decoded); UnsupportedError when ``av`` is needed and missing.
    """
    data = data_of(source, "audio")
    source = source if data is None else data
    path = str(path_of(source)) if isinstance(source, (str, os.PathLike)) else ""
    try:
        if isinstance(source, bytes):
            return _decode(io.BytesIO(source), "", max_seconds)
        if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], np.ndarray):
            return from_array(*source, max_seconds)
        if isinstance(source, (str, os.PathLike)):
            with open_regular(path_of(source)) as file:
                return _decode(file, path, max_seconds)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"cannot be read: {error.strerror}", path=path) from error
    except MemoryError as error:
        raise OutOfMemoryError("needs more memory than there is", path=path, field="sound") from error
    raise InputError(f"a sound cannot come from {type(source).__name__}", hint="give a path, bytes, or (array, rate)")


def _decode(file: File, path: str, max_seconds: float) -> Float32:
    start = file.read(START_BYTES)
    if not start:
        raise InputError("is empty", path=path, field="sound")
    kind = kind_of(start)
    if kind is None or not kind.sound:
        names = ", ".join(kind.name for kind in KINDS if kind.sound)
        raise InputError(
            f"starts with {start[:16]!r}, which is no sound of a kind that can be read",
            path=path,
            field="sound",
            hint=f"those are {names}",
        )
    if not kind.libsndfile:
        return _decode_with_av(file, kind, path, max_seconds)
    quiet = QuietFile(file, stretched=kind.name == "MP3" and not _tells_length(file))
    # libsndfile reads a descriptor by itself, so that no Ctrl-C can get lost in a call from C to Python.  Not on
    # Windows, where its descriptors may not be those of Python.
    itself = isinstance(file, io.FileIO) and not quiet.stretched and os.name == "posix"
    file.seek(0)
    try:
        sound_file = _ForwardOnly(file.fileno() if itself else quiet, closefd=False)
    except soundfile.SoundFileError:
        quiet.raise_failure()
        return _decode_with_av(file, kind, path, max_seconds)
    with sound_file:
        return _decode_with_libsndfile(sound_file, quiet, path, max_seconds)


def _tells_length(file: File) -> bool:
    """Whether the first frame of an MP3 file says how many there are."""
    file.seek(0)
    start = file.read(10)
    tag = 10 + sum(byte << 7 * place for place, byte in enumerate(reversed(start[6:]))) if start[:3] == b"ID3" else 0
    file.seek(tag)
    return re.search(_MP3_COUNT, file.read(2048), re.DOTALL) is not None


class _ForwardOnly(soundfile.SoundFile):  # type: ignore[misc]
    """soundfile seeks after each read to where it is, which fails at the end of FLAC of an unknown length."""

    def seekable(self) -> bool:
        return False


def _decode_with_libsndfile(file: Any, quiet: QuietFile, path: str, max_seconds: float) -> Float32:
    if file.format not in _FORMATS:
        raise InputError(f"is {file.format} inside, which is not read", path=path, field="sound")
    sound = Mono16k(file.samplerate, file.channels, path, max_seconds)
    n_expected = 0 if quiet.stretched or file.frames > _KNOWN_FRAMES else file.frames
    sound.check_duration(n_expected / file.samplerate, "lasts, by its header,")
    n_at_once = min(sound.block, _MP3_BLOCK) if quiet.stretched else sound.block
    n_read = 0
    while True:
        try:
            block = file.read(n_at_once, dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            quiet.raise_failure()
            if quiet.stretched and quiet.at_end:
                break  # in the middle of the last frame; most of its block is lost
            raise sound.refusal(f"is damaged after {n_read / file.samplerate:.1f} s", "get the file again") from error
        quiet.raise_failure()
        if len(block) == 0:
            break
        sound.add(block)
        n_read += len(block)
    if n_expected - n_read > _ROUNDING * file.samplerate:
        seconds, expected = n_read / file.samplerate, n_expected / file.samplerate
        raise sound.refusal(f"ends after {seconds:.1f} of {expected:.1f} s", "get the file again")
    return sound.finish()


def _decode_with_av(file: File, kind: Kind, path: str, max_seconds: float) -> Float32:
    """The first sound of a file, which may be a video."""
    try:
        import av
    except ImportError as error:
        if kind.libsndfile:
            raise InputError(
                f"is damaged, or {kind.name} with a codec that libsndfile does not know",
                path=path,
                field="sound",
                hint=f"{EXTRA} for more codecs",
            ) from error
        raise UnsupportedError(
            f"{kind.name} needs the package 'av'", path=path, field="sound", hint=f"{EXTRA}, or convert it to WAV"
        ) from error
    quiet = QuietFile(file)
    options = OPTIONS | {"codec_whitelist": ",".join(_DECODERS)}  # some packets are decoded to see what is in them
    try:
        if kind.demuxer == "mov":
            check_boxes(quiet, path, "sound")
        with av.open(quiet, format=kind.demuxer, options=options, metadata_errors="replace") as container:
            stream = next(iter(container.streams.audio), None)
            if stream is None:
                raise InputError(f"is {kind.name} without any sound", path=path, field="sound")
            if stream.codec_context is None:
                raise ValueError("no decoder")
            if stream.codec_context.codec.name not in _DECODERS:
                raise InputError(
                    f"has a sound in the format {stream.codec_context.codec.canonical_name}, which is not read",
                    path=path,
                    field="sound",
                    hint="convert it to WAV",
                )
            n_channels, rate = stream.codec_context.channels, stream.codec_context.sample_rate
            sound = Mono16k(rate, n_channels, path, max_seconds)
            if kind.demuxer not in _GUESSING and stream.duration and stream.time_base:
                sound.check_duration(float(stream.duration * stream.time_base), "lasts, by its header,")
            for block in _av_blocks(av, container, stream):
                sound.add(block)
    except (av.FFmpegError, ValueError) as error:
        quiet.raise_failure()
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"is damaged, or {kind.name} with a codec that FFmpeg does not know", path=path, field="sound"
        ) from error
    quiet.raise_failure()
    return sound.finish()


def _av_blocks(av: Any, container: Any, stream: Any) -> Iterator[Float32]:
    """Float32 [n_samples, n_channels]; ValueError when rate or channels change on the way."""
    to_float = av.AudioResampler(format="fltp")
    for frame in container.decode(stream):
        for converted in to_float.resample(frame):
            yield converted.to_ndarray().T
    for converted in to_float.resample(None):
        yield converted.to_ndarray().T
