"""Videos in conversations: their frames are images, within one crop budget."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phi4edge
import processes
from peers import require
from phi4edge.converters.convert import convert
from phi4edge.errors import InputError, UsageError
from phi4edge.video_files import video_frames
from processes import is_one_error_line
from tiny_media import tiny_multimodal
from tiny_videos import write_video

Message = dict[str, Any]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require("av")
    folder = tmp_path_factory.mktemp("video")
    convert(tiny_multimodal(folder / "checkpoint"), folder / "bundle", "F32", encoders="fp32", adapter_quant="F32")
    return folder / "bundle"


@pytest.fixture
def model(bundle: Path) -> Iterator[phi4edge.Model]:
    with phi4edge.load(bundle, context=2048, kv_type="f32", threads=2) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def clip() -> bytes:
    """Twenty frames of noise, of 300 x 200 pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 200, 300, 3), np.uint8)
    return write_video(list(noise), "avi", "mjpeg", pixels="yuvj420p")


def video(source: Any, frames: int | None = None) -> Message:
    return {"type": "video", "video": source} | ({} if frames is None else {"frames": frames})


def ask(*parts: Message, text: str = "the cat sat") -> list[Message]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def images(source: bytes, n_frames: int) -> list[Message]:
    """The same frames as images."""
    return [{"type": "image", "image": frame.image} for frame in video_frames(source, n_frames)]


@pytest.mark.parametrize(
    "n_frames, max_crops, share", [(None, None, 4), (1, None, 36), (3, 7, 2), (5, None, 7), (12, 5, 1)]
)
def test_a_video_is_its_frames_within_one_crop_budget(
    model: phi4edge.Model, clip: bytes, n_frames: int | None, max_crops: int | None, share: int
) -> None:
    as_video, as_images = ask(video(clip, n_frames)), ask(*images(clip, n_frames or 8))
    assert model.encode(as_video) == model.encode(as_images)
    logits = model.next_logits(as_video, max_crops=max_crops)
    np.testing.assert_array_equal(logits, model.next_logits(as_images, max_crops=share))
    if share < 6:  # a frame has pixels for 3 x 2 crops
        assert np.abs(logits - model.next_logits(as_images, max_crops=6)).max() > 1e-3
    answer = model.generate(as_video, max_tokens=2, max_crops=max_crops)
    alike = model.generate(as_images, max_tokens=2, max_crops=share)
    assert (answer.tokens, answer.usage.image_tokens) == (alike.tokens, alike.usage.image_tokens)
    assert answer.adapter == "vision" and answer.warnings == ()


def test_images_and_frames_keep_the_order_of_the_parts(model: phi4edge.Model, clip: bytes) -> None:
    picture = {"type": "image", "image": np.random.default_rng(1).integers(0, 256, (90, 150, 3), np.uint8)}
    sound = {"type": "audio", "audio": (np.sin(0.1 * np.arange(8000)).astype(np.float32), 16000)}
    first, *others = images(clip, 3)
    mixed = ask(sound, video(clip, 3), picture, video(clip, 1))
    alike = ask(sound, first, *others, picture, *images(clip, 1))
    logits = model.next_logits(mixed, max_crops=3)  # one for each of three, and three for one
    assert np.abs(logits - model.next_logits(alike, max_crops=1)).max() > 1e-3
    assert model.encode(mixed) == model.encode(alike)
    same_share = ask(sound, video(clip, 3), picture, *images(clip, 1))
    np.testing.assert_array_equal(logits, model.next_logits(same_share, max_crops=3))
    assert (
        np.abs(logits - model.next_logits(ask(sound, picture, *same_share[0]["content"][1:2]), max_crops=3)).max() > 0
    )
    answer = model.generate(mixed, max_tokens=1, max_crops=1)
    assert answer.usage.audio_tokens > 0 and answer.adapter == "vision"


def test_paths_and_bytes_are_the_same_video_which_is_known_the_second_time(
    model: phi4edge.Model, clip: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "clip.avi"
    path.write_bytes(clip)
    first = model.generate(ask(video(clip, 2)), max_tokens=4)
    for source in (path, str(path)):
        again = model.generate(ask(video(source, 2)), max_tokens=4)
        assert again.tokens == first.tokens and again.usage.cached_tokens == first.usage.prompt_tokens - 1
    later = model.generate(
        [*ask(video(path, 2)), {"role": "assistant", "content": "the hat"}, *ask(text="the mat")], max_tokens=1
    )
    assert later.usage.cached_tokens > first.usage.image_tokens
    other = model.generate(ask(video(clip, 3)), max_tokens=1)
    assert other.usage.cached_tokens < first.usage.image_tokens


def test_a_video_with_fewer_frames_than_asked_for_says_so(model: phi4edge.Model, clip: bytes) -> None:
    noise = np.random.default_rng(2).integers(0, 256, (3, 112, 112, 3), np.uint8)
    short = write_video(list(noise), "avi", "mjpeg", pixels="yuvj420p")
    expected = model.next_logits(ask(*images(short, 3)))
    np.testing.assert_array_equal(model.next_logits(ask(video(short))), expected)
    np.testing.assert_array_equal(model.next_logits(ask(video(short, 64))), expected)
    assert model.generate(ask(video(short)), max_tokens=1).warnings == ()
    told = model.generate(ask(video(clip, 2), video(short, 9)), max_tokens=1).warnings
    assert told == ("video 2 has 3 frames to take, and 9 were asked for",)


@pytest.mark.parametrize("frames", [0, -1, 65, True, 2.0, "8"])
def test_a_wrong_number_of_frames_is_named(model: phi4edge.Model, clip: bytes, frames: Any) -> None:
    with pytest.raises(InputError, match=r"messages\[0\].content\[0\].frames: is .*, expected 1 to 64"):
        model.generate(ask({"type": "video", "video": clip, "frames": frames}))


def test_M6_too_many_frames_or_videos_are_an_error_before_any_is_read(model: phi4edge.Model) -> None:
    with pytest.raises(InputError, match="has 72 frames of videos, and 64 are allowed"):
        model.generate(ask(*[video("nowhere.mp4")] * 9))
    with pytest.raises(InputError, match="has 17 videos, and 16 are allowed"):
        model.generate(ask(*[video("nowhere.mp4", 1)] * 17))
    with pytest.raises(InputError, match="has 17 images, and 16 are allowed"):
        model.generate(ask(video("nowhere.mp4"), *[{"type": "image", "image": "nowhere.png"}] * 17))


def test_a_video_that_cannot_be_used_is_named(model: phi4edge.Model, clip: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"text")
    for part, problem in (
        ({"type": "video"}, r"messages\[0\].content\[0\].video: is missing; give a path, bytes or an array"),
        (video(b"text"), r"^messages\[0\].content\[0\].video: starts with"),
        (video(5), r"^messages\[0\].content\[0\].video: a video cannot come from int"),
        (video(path), rf"^{path}: starts with b'text', which is no video of a kind"),
    ):
        with pytest.raises(InputError, match=problem):
            model.generate(ask(part))
    for max_crops in (0, 37, 1.0):
        with pytest.raises(UsageError, match="max_crops"):
            model.generate(ask(video(clip)), max_crops=max_crops)
    assert model.generate("the cat", max_tokens=1).tokens


def test_a_prompt_that_does_not_fit_says_what_the_video_takes(bundle: Path, clip: bytes) -> None:
    with phi4edge.load(bundle, context=200) as loaded:
        # Each frame fills 112 x 74 pixels of one crop: 3 x 5 tokens of the grid, a separator, 4 x 5 of the overview.
        with pytest.raises(InputError, match=r"context holds 200, .*image 1 takes 36, video 1 takes 288; "):
            loaded.generate(ask(*images(clip, 1), video(clip)), max_crops=1)
        assert loaded.generate(ask(video(clip, 4)), max_tokens=1, max_crops=1).usage.image_tokens == 144


def test_a_model_without_a_vision_encoder_takes_no_videos(bundle: Path, clip: bytes, tmp_path: Path) -> None:
    with phi4edge.load(bundle / "backbone.gguf", context=256) as text, pytest.raises(InputError, match="only text"):
        text.generate(ask(video(clip)))
    gguf = str(bundle / "backbone.gguf")
    path = tmp_path / "clip.avi"
    path.write_bytes(clip)
    for arguments, code, problem in (
        ((gguf, "the cat", "--video", str(path)), 4, "--video: a model file alone reads text, not videos"),
        ((str(bundle), "the cat", "--frames", "3"), 2, "--frames: there is no video; give one with --video"),
        ((str(bundle), "the cat", "--video", str(path), "--frames", "0"), 2, "--frames: is 0, expected 1 to 64"),
        ((str(bundle), "the cat", "--video", str(path), "--frames", "65"), 2, "--frames: is 65, expected 1 to 64"),
        ((str(bundle), "the cat", "--video", str(path), "--max-crops", "99"), 2, "--max-crops: "),
        ((str(bundle), "the cat", "--video", "nowhere.mp4"), 3, "nowhere.mp4"),
        ((str(bundle), "the cat", "--raw", "--video", str(path)), 2, "--raw: "),
    ):
        done = processes.run("run", *arguments)
        assert done.returncode == code, (arguments, done.stderr)
        assert problem in done.stderr and is_one_error_line(done.stderr) and done.stdout == ""


def test_the_command_line_answers_about_videos(bundle: Path, clip: bytes, tmp_path: Path) -> None:
    path = tmp_path / "clip.avi"
    path.write_bytes(clip)
    for options, n_tokens in (
        (("--frames", "2", "--max-crops", "2"), 2 * 36),
        (("--max-crops", "1"), 8 * 36),
        (("--video", str(path), "--frames", "2", "--max-crops", "2"), 4 * 36),
    ):
        done = processes.run("run", str(bundle), "the cat", "--video", str(path), *options, "--json", "-n", "3")
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer["usage"]["image_tokens"] == n_tokens and answer["adapter"]["name"] == "vision"
    told = processes.run("run", str(bundle), "the cat", "--video", str(path), "--frames", "21", "--max-crops", "1")
    assert told.returncode == 0 and told.stderr == (
        "phi4edge: warning: video 1 has 20 frames to take, and 21 were asked for\n"
    )


def test_a_chat_takes_a_video_that_is_typed_or_dropped(bundle: Path, clip: bytes, tmp_path: Path) -> None:
    path = tmp_path / "my clip.mp4"
    path.write_bytes(clip)
    for typed in (f"'{path}' the cat", f"{path}\nthe cat", f"/video {path}\nthe cat"):
        done = processes.run("chat", str(bundle), "-n", "2", "--max-crops", "8", text=f"{typed}\n/stats\n")
        assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
        assert "adapter vision" in done.stderr and "image tokens, 0 audio tokens" in done.stderr
        assert ("[my clip.mp4 attached: video]" in done.stderr) != typed.startswith("/video")
