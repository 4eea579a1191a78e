"""Images and sounds in a conversation: the logits of transformers in every mode, and a cache that never mixes them."""

from __future__ import annotations

import gc
import json
import re
import shlex
import shutil
import wave
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import phi4edge
import processes
from conversations import ANSWER, MODES, RATE, Message, ask, picture, sound
from media_oracle import MediaOracle, our_embeddings
from phi4edge.audio_processor import load_audio
from phi4edge.bundle import MANIFEST, Bundle
from phi4edge.converters.convert import convert
from phi4edge.errors import BundleError, Cancelled, InputError, UsageError
from phi4edge.image_processor import Crops, ImageNumbers
from processes import is_one_error_line
from reference import Reference, relative_difference
from tiny_media import MediaShape, tiny_multimodal

SHAPE = MediaShape()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_multimodal(tmp_path_factory.mktemp("media") / "checkpoint")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    """Everything in float32."""
    path = checkpoint.parent / "bundle"
    convert(checkpoint, path, "F32", encoders="fp32", adapter_quant="F32")
    return path


@pytest.fixture
def model(bundle: Path) -> Iterator[phi4edge.Model]:
    with phi4edge.load(bundle, context=2048, kv_type="f32", threads=2) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def oracle() -> MediaOracle:
    return MediaOracle.of_shape(SHAPE)


@pytest.mark.parametrize("mode", MODES)
def test_embeddings_are_those_of_transformers(
    bundle: Path, model: phi4edge.Model, oracle: MediaOracle, mode: str
) -> None:
    messages, adapter = MODES[mode]
    theirs = oracle.embeddings(model.encode(messages), messages)
    ours = our_embeddings(bundle, model, messages, Reference(bundle / "backbone.gguf").embedding, adapter)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("mode", MODES)
def test_logits_equal_those_of_transformers(model: phi4edge.Model, oracle: MediaOracle, mode: str) -> None:
    messages, adapter = MODES[mode]
    expected = oracle.logits(model.encode(messages), messages, adapter)
    logits = model.next_logits(messages)
    assert relative_difference(logits, expected) <= 1e-3
    for wrong in {"vision", "speech"} - {adapter}:
        assert relative_difference(model.next_logits(messages, adapter=wrong), expected) > 0.03
    without = model.next_logits(messages, adapter="none")
    np.testing.assert_array_equal(model.next_logits(messages, adapter_scale=0.0), without)
    assert relative_difference(without, logits) > 0.03 or adapter is None


def test_media_stand_before_the_text_images_first(model: phi4edge.Model) -> None:
    def ids(text: str) -> list[int]:
        return model.tokenizer.encode(text, special=True)

    message = ask("the cat", [picture(50, 50)] * 2, [sound(1)])
    message["content"].reverse()
    prompt = "<|user|><|endoftext10|><|endoftext10|><|endoftext11|>the cat<|end|><|assistant|>"
    assert model.encode([message]) == ids(prompt)
    assert ids("<|endoftext10|><|endoftext11|>") == list(model.placeholder_ids)


def write_media(folder: Path) -> tuple[Path, Path]:
    image, audio = folder / "a.png", folder / "q.wav"
    Image.fromarray(picture(150, 90)).save(image)
    with wave.open(str(audio), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((sound(1)[0] * 32767).astype(np.int16).tobytes())
    return image, audio


def test_paths_bytes_and_objects_are_the_same_part(model: phi4edge.Model, tmp_path: Path) -> None:
    image, audio = write_media(tmp_path)
    samples = load_audio(audio)
    with Image.open(image) as opened:
        forms: list[tuple[Any, Any]] = [
            (image, audio),
            (str(image), str(audio)),
            (image.read_bytes(), audio.read_bytes()),
            (opened, (samples, RATE)),
            (picture(150, 90), (samples, RATE)),
        ]
        rows = [model.next_logits([ask("the cat", [first], [second])]) for first, second in forms]
    for row in rows[1:]:
        np.testing.assert_array_equal(row, rows[0])


def test_a_prefix_is_kept_only_while_the_media_are_the_same(model: phi4edge.Model, bundle: Path) -> None:
    image, same_size = picture(150, 90), picture(150, 90, 7)
    first = ask("the cat sat", [image])
    conversations = [
        [first],
        [first],
        [first, ANSWER, ask("the mat")],
        [ask("the cat sat", [same_size])],
        [first],
        [ask("the cat sat", [image], [sound(1)])],
        [ask("the cat sat", [image], [sound(1, 5)])],
        [ask("the cat sat", sounds=[sound(1)])],
        [ask("the cat sat")],
    ]
    answers = [model.generate(messages, max_tokens=6) for messages in conversations]
    n_image = answers[0].usage.image_tokens
    n_prompt = answers[0].usage.prompt_tokens
    cached = [answer.usage.cached_tokens for answer in answers]
    assert cached[:2] == [0, n_prompt - 1]
    assert cached[2] >= n_image + 1
    assert cached[3:5] == [1, 1]  # <|user|>
    assert cached[5:] == [n_image + 1, n_image + 1, 0, 0]
    for messages, answer in zip(conversations, answers, strict=True):
        with phi4edge.load(bundle, context=2048, kv_type="f32", threads=2) as fresh:
            assert fresh.generate(messages, max_tokens=6).tokens == answer.tokens
    usage = answers[5].usage
    assert (usage.image_tokens, usage.audio_tokens) == (n_image, 13)
    assert usage.prompt_tokens == n_prompt + 13
    assert [answer.adapter for answer in answers[4:]] == ["vision", "vision", "vision", "speech", None]


def test_interleaved_conversations_do_not_change_each_other(model: phi4edge.Model) -> None:
    requests = [MODES["an image"][0], MODES["half a second"][0], MODES["text"][0], MODES["an image and a sound"][0]]
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 1.0, "seed": 1}
    alone = [model.generate(messages, **options) for messages in requests]
    assert len({answer.tokens for answer in alone}) == len(alone)
    sessions = [model.session() for _ in requests]
    streams = [
        model.stream(messages, session=session, **options) for messages, session in zip(requests, sessions, strict=True)
    ]
    together: list[list[int]] = [[] for _ in requests]
    for pieces in zip_longest(*streams):
        for tokens, piece in zip(together, pieces, strict=True):
            tokens += piece.tokens if piece is not None else ()
    assert [tuple(tokens) for tokens in together] == [answer.tokens for answer in alone]
    for messages, session in zip(requests, sessions, strict=True):
        np.testing.assert_allclose(
            model.next_logits(messages, session=session), model.next_logits(messages), rtol=0, atol=1e-4
        )


def test_encoders_can_be_released_and_come_back(model: phi4edge.Model) -> None:
    messages = MODES["an image and a sound"][0]
    before = model.next_logits(messages)
    model.release_encoders()
    np.testing.assert_array_equal(model.next_logits(messages), before)
    model.generate(messages, max_tokens=1)
    assert model.last is not None and model.last.timings.encoder_seconds > 0
    assert model.last.timings.processor_seconds > 0


def test_progress_covers_encoders_and_decoder_and_may_cancel(model: phi4edge.Model) -> None:
    messages = MODES["three images of odd sizes"][0]
    seen: list[tuple[int, int]] = []
    model.generate(messages, max_tokens=1, progress=lambda done, total: seen.append((done, total)))
    assert model.last is not None
    usage = model.last.usage
    (total,) = {total for _, total in seen}
    assert total == usage.prompt_tokens + usage.image_tokens
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and seen[-1][0] == total
    model.release_encoders()
    with pytest.raises(Cancelled):
        model.generate(messages[:1], max_tokens=1, session=model.session(), progress=lambda done, total: done < 200)
    assert model.generate(messages, max_tokens=4).tokens == model.generate(messages, max_tokens=4).tokens


def test_an_answer_is_cancelled_while_an_encoder_works(model: phi4edge.Model) -> None:
    messages = MODES["an image"][0]
    steps: list[int] = []

    def cancel(done: int, total: int) -> None:
        steps.append(done)
        model.cancel()

    with pytest.raises(Cancelled):
        model.generate(messages, max_tokens=3, progress=cancel)
    assert steps == [0]
    assert len(model.generate(messages, max_tokens=3).tokens) == 3


def test_an_answer_started_while_an_encoder_works_ends_the_first(model: phi4edge.Model) -> None:
    inner: list[tuple[int, ...]] = []

    def ask_again(done: int, total: int) -> None:
        if not inner:
            inner.append(model.generate(MODES["text"][0], max_tokens=3).tokens)

    with pytest.raises(UsageError, match="another answer"):
        model.generate(MODES["an image"][0], max_tokens=3, progress=ask_again)
    assert model.generate(MODES["text"][0], max_tokens=3).tokens == inner[0]


def test_what_encoders_take_is_freed_once_the_prompt_is_computed(model: phi4edge.Model) -> None:
    pieces = model.stream(MODES["an image"][0], max_tokens=20)
    next(pieces)
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is Crops]
    pieces.close()


def test_T4_placeholders_that_a_user_typed_are_text(model: phi4edge.Model) -> None:
    typed = "<|endoftext10|><|endoftext11|><|image_1|><|audio_1|>"
    for text in (typed, typed + "|>", "10|>" + typed):
        answer = model.generate([ask(text, [picture(50, 50)])], max_tokens=1)
        n_text = len(model.tokenizer.encode(text)) + 4  # user, the image, end, assistant
        tokens = model.encode([ask(text, [picture(50, 50)])])
        assert len(tokens) == n_text and sum(token in model.placeholder_ids for token in tokens) == 1
        assert model.tokenizer.decode(tokens[2:-2]) == text
        assert answer.usage.prompt_tokens == n_text - 1 + answer.usage.image_tokens
    assert not set(model.encode(typed)) & set(model.placeholder_ids)


def test_T5_placeholders_without_media_are_an_error(model: phi4edge.Model) -> None:
    for tokens in ([5, SHAPE.image_token, 7], [SHAPE.audio_token] * 3):
        with pytest.raises(InputError, match="stand for images and sounds, and there are 0"):
            model.generate(tokens)


def test_T6_M6_too_many_parts_are_an_error_before_any_is_read(model: phi4edge.Model) -> None:
    for n_parts in (17, 20_000):
        with pytest.raises(InputError, match=f"has {n_parts} images, and 16 are allowed"):
            model.generate([ask("", ["nowhere.png"] * n_parts)])


def test_a_prompt_that_does_not_fit_says_what_each_part_takes(bundle: Path) -> None:
    with phi4edge.load(bundle, context=100) as loaded:
        # The overview and a separator are 4 x 5 + 1; the grids are 4 x 9 and 4 x 5 with the separators of rows.
        with pytest.raises(
            InputError, match=r"context holds 100, .*image 1 takes 57, image 2 takes 41, audio 1 takes 13; "
        ):
            loaded.generate([ask("the cat", [picture(224, 112), picture(112, 112)], [sound(1)])])
        assert loaded.generate([ask("the cat", [picture(300, 300)])], max_tokens=1, max_crops=1).usage.image_tokens < 50
        for max_crops in (0, 37, 1.0, "1"):
            with pytest.raises(UsageError, match="max_crops"):
                loaded.generate([ask("the cat", [picture(300, 300)])], max_crops=max_crops)


@pytest.mark.parametrize(
    "part, problem",
    [
        ({"type": "image"}, r"content\[0\].image: is missing"),
        (
            {"type": "document", "document": "a.pdf"},
            "type 'document', and this model reads only text, image, audio",
        ),
        (
            {"type": "image", "image": "a.png", "detail": "high"},
            r"content\[0\]: 'detail' is not known in a part of type",
        ),
        ({"type": "audio", "audio": "a.wav", "frames": 3}, r"content\[0\]: 'frames' is not known"),
        ({"type": "image", "image": b"no image"}, r"messages\[0\].content\[0\].image: .*"),
        ({"type": "image", "image": 5}, r"messages\[0\].content\[0\].image: is "),
        ({"type": "audio", "audio": b""}, r"messages\[0\].content\[0\].audio: is empty"),
        ({"type": "audio", "audio": (np.zeros(399, np.float32), RATE)}, r"messages\[0\].content\[0\].audio: "),
    ],
)
def test_a_part_that_cannot_be_used_is_named(model: phi4edge.Model, part: Message, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        model.generate([{"role": "user", "content": [part]}])
    assert model.generate([ask("the cat")], max_tokens=1).tokens  # and the next request is fine


def test_a_manifest_that_does_not_fit_its_files_is_an_error(bundle: Path, tmp_path: Path) -> None:
    cases: list[tuple[str, Any, str]] = [
        ("placeholders", {"image": "<|nothing|>"}, "placeholders.image"),
        ("placeholders", {"video": "<|endoftext10|>"}, "placeholders.video"),
        ("placeholders", {"image": "<|endoftext10|>", "audio": "<|endoftext10|>"}, "placeholders.audio"),
        ("router", {"image": {"adapter": 5}}, "router.image.adapter"),
        ("processors", {"image": {"crop_size": 112}, "audio": {}}, "processors.image"),
        ("processors", {"image": ImageNumbers(140, 14, 36, (0.5,) * 3, (0.5,) * 3), "audio": {}}, "140"),
    ]
    document = json.loads((bundle / MANIFEST).read_text())
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    for key, value, problem in cases:
        (copy / MANIFEST).write_text(
            json.dumps(
                document | {key: value},
                default=lambda numbers: {
                    name: getattr(numbers, name) for name in ("crop_size", "patch_size", "max_crops", "mean", "std")
                },
            )
        )
        with pytest.raises(BundleError, match=problem), phi4edge.load(copy, context=256) as loaded:
            loaded.generate([ask("the cat", [picture(50, 50)])], max_tokens=1)


@pytest.mark.parametrize("role", ["vision", "audio"])
def test_L6_an_encoder_of_another_model_is_found_when_the_bundle_is_loaded(
    bundle: Path, tmp_path: Path, role: str
) -> None:
    wider = convert(tiny_multimodal(tmp_path / "wider", hidden=128, ffn=384), tmp_path / "wider-bundle", "f32")
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    document = json.loads((copy / MANIFEST).read_text())
    (entry,) = (part for part in document["parts"] if part["role"] == role)
    (theirs,) = (part for part in wider.bundle.manifest.parts if part.role == role)
    shutil.copy(wider.bundle.part(role), copy / entry["file"])
    entry |= {"n_bytes": theirs.n_bytes, "sha256": theirs.sha256}
    (copy / MANIFEST).write_text(json.dumps(document))
    Bundle.open(copy).verify()
    with pytest.raises(BundleError, match=rf"{entry['file']}: phi4edge.hidden: is '128', expected '64'"):
        phi4edge.load(copy, context=256)


@pytest.fixture(scope="module")
def others(checkpoint: Path) -> dict[str, Path]:
    """Bundles without encoders, without adapters, and with one of these merged."""
    made = {name: checkpoint.parent / name for name in ("no encoders", "no adapters", "merged")}
    convert(checkpoint, made["no encoders"], "q8_0", encoders="none")
    convert(checkpoint, made["no adapters"], "q8_0", adapters="none")
    convert(checkpoint, made["merged"], "q8_0", adapters="merged:speech")
    return made


def test_the_command_line_answers_about_files(bundle: Path, tmp_path: Path) -> None:
    image, audio = map(str, write_media(tmp_path))
    # The picture of 150 x 90 fills 14 x 8 of 16 x 8 patches: 4 x (7 + 1) tokens, 1, and 4 x 5 for the overview.
    for arguments, adapter, n_image, n_audio in (
        (("the cat", "--image", image), "vision", 53, 0),
        (("the cat", "--image", image, "--image", image, "--max-crops", "1"), "vision", 2 * 36, 0),
        (("--audio", audio), "speech", 0, 13),
        (("the cat", "--audio", audio, "--audio", audio), "speech", 0, 26),
        (("--image", image, "--audio", audio), "vision", 53, 13),
        (("the cat",), None, 0, 0),
    ):
        done = processes.run("run", str(bundle), *arguments, "--json", "--max-tokens", "3")
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert (answer["adapter"] or {}).get("name") == adapter
        assert (answer["usage"]["image_tokens"], answer["usage"]["audio_tokens"]) == (n_image, n_audio)
        assert (answer["timings"]["encoder_seconds"] > 0) == (adapter is not None)
    as_it_is = processes.run("run", str(bundle), "the cat", "--image", image, "--adapter", "none", "--json", "-n", "3")
    assert json.loads(as_it_is.stdout)["adapter"] is None
    memory = json.loads(processes.run("info", str(bundle), "--json").stdout)["memory"]["when_used_bytes"]
    sizes = {part.role: part.n_bytes for part in Bundle.open(bundle).manifest.parts if part.role != "backbone"}
    assert memory == {role: int(size * (1 if "adapter" in role else 1.5)) for role, size in sizes.items()}
    told = processes.run("run", str(bundle), "the cat", "--image", image, "--stats", "--max-tokens", "3")
    assert "53 image tokens" in told.stderr and "adapter vision" in told.stderr


def test_the_command_line_tells_what_is_wrong_with_media(bundle: Path, others: dict[str, Path], tmp_path: Path) -> None:
    image, audio = map(str, write_media(tmp_path))
    (tmp_path / "b.png").write_bytes(b"text")
    gguf = str(bundle / "backbone.gguf")
    for arguments, code, problem in (
        ((gguf, "the cat", "--image", image), 4, "--image: a model file alone reads text"),
        ((str(others["no encoders"]), "--audio", audio), 4, "--audio: has no encoder for sounds"),
        ((str(others["no adapters"]), "the cat", "--image", image), 4, "needs the adapter 'vision'"),
        ((str(others["merged"]), "the cat", "--image", image), 4, "'speech' is merged"),
        ((str(bundle), "the cat", "--image", "nowhere.png"), 3, "nowhere.png"),
        ((str(bundle), "the cat", "--image", str(tmp_path / "b.png")), 4, "b.png: is not a PNG"),
        ((str(bundle), "the cat", "--audio", str(tmp_path / "b.png")), 4, "b.png"),
        ((str(bundle), "the cat", "--image", image, "--max-crops", "99"), 2, "--max-crops: "),
        ((str(bundle), "the cat", "--max-crops", "9"), 2, "--max-crops: there is no image"),
        ((str(bundle), "the cat", "--raw", "--image", image), 2, "--raw: "),
        (("nowhere", "the cat", "--image", image), 3, "nowhere"),
    ):
        done = processes.run("run", *arguments)
        assert done.returncode == code, (arguments, done.stderr)
        assert problem in done.stderr and is_one_error_line(done.stderr) and done.stdout == ""


def test_a_merged_bundle_answers_sounds_silently_and_text_with_a_warning(
    others: dict[str, Path], tmp_path: Path
) -> None:
    merged = str(others["merged"])
    _, audio = map(str, write_media(tmp_path))
    done = processes.run("run", merged, "--audio", audio, "--json", "--max-tokens", "3")
    answer = json.loads(done.stdout)
    assert (done.stderr, answer["adapter"], answer["merged_adapter"]) == ("", None, "speech")
    text = processes.run("run", merged, "the cat", "--max-tokens", "3")
    assert text.returncode == 0 and text.stderr.startswith("phi4edge: warning: the adapter 'speech' is merged")
    chat = processes.run("chat", merged, "--max-tokens", "3", text="the cat\nthe mat\n")
    assert chat.returncode == 0 and chat.stderr.count("warning") == 1
    assert Bundle.open(merged).manifest.parts[0].details["merged_adapter"] == "speech"


def test_a_chat_takes_files_and_keeps_them_in_mind(bundle: Path, others: dict[str, Path], tmp_path: Path) -> None:
    image, audio = map(str, write_media(tmp_path))
    typed = f"/image {image}\nthe cat\n/stats\non the mat\n/audio {audio}\n\n/stats\n"
    done = processes.run("chat", str(bundle), "--max-tokens", "3", text=typed)
    assert done.returncode == 0, done.stderr
    media, adapters = (re.findall(pattern, done.stderr) for pattern in (r"(\d+) image tokens, (\d+)", r"adapter (\w+)"))
    assert media == [("53", "0"), ("53", "13")] and adapters == ["vision", "vision"]
    assert done.stdout.count("\n") == 3
    image_words, audio_words = shlex.quote(image), Path(audio).as_uri()
    typed = f"the cat {image_words}\n/stats\n{audio_words}\n\n/stats\n/release\n/clear\n{image}\nthe mat\n/stats\n"
    done = processes.run("chat", str(bundle), "--max-tokens", "3", "--max-crops", "1", text=typed)
    assert done.returncode == 0, done.stderr
    media, adapters = (re.findall(pattern, done.stderr) for pattern in (r"(\d+) image tokens, (\d+)", r"adapter (\w+)"))
    assert media == [("36", "0"), ("36", "13"), ("36", "0")] and adapters == ["vision"] * 3
    assert re.findall(r"\[(.*) attached: (\w+)\]", done.stderr) == [
        ("a.png", "image"),
        ("q.wav", "audio"),
        ("a.png", "image"),
    ]
    assert done.stdout.count("\n") == 3 and "released" in done.stderr
    for path, line, code, problem in (
        (bundle, f"{image} the cat", 2, "--max-crops: is 99, expected 1 to 36"),
        (bundle, "/mic", 2, "/mic: nobody can press Enter to end it; write /mic SECONDS"),
        (bundle, "/mic 0", 2, "/mic: 0 seconds are not"),
        (bundle, "/mic nan", 2, "/mic: nan seconds are not"),
        (bundle, "/mic soon", 2, "/mic: 'soon' is no number of seconds"),
        (bundle, "/image", 2, "/image: names no file"),
        (bundle, "/audio nowhere.wav", 3, "nowhere.wav: there is no such file"),
        (others["no encoders"], f"/image {image}", 4, "/image: this model reads only text"),
    ):
        options = ("--max-crops", "99") if "max-crops" in problem else ()
        failed = processes.run("chat", str(path), *options, text=f"{line}\nthe cat\n")
        assert failed.returncode == code and problem in failed.stderr and failed.stdout == "", failed.stderr
