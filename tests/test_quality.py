"""``bench --quality``: items are read with distrust, answers count as generation would count them, sums are sums."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import peers
import phi4edge
from nano_items import CHECKPOINT, HELD_OUT, NANO, TEST_SET, answers_exactly, items
from phi4edge.cli import main
from phi4edge.cli.quality import show
from phi4edge.cli.quality_plot import Plot
from phi4edge.cli.quality_tables import tables
from phi4edge.converters.convert import convert
from phi4edge.errors import FileError, InputError, UsageError
from phi4edge.quality import measure, total
from phi4edge.quality_items import Item, families, item_files, nano_folder, read_items, some_of
from processes import COMMAND, DEADLINE, ROOT, is_one_error_line
from reference import log_probabilities, mean_divergence
from tiny_models import Array

QUESTION: dict[str, Any] = {
    "id": "one",
    "family": "text",
    "task": "sum",
    "adapter": None,
    "prompt": "<|user|>Calculate 20 - 4.<|end|><|assistant|>",
    "images": [],
    "audio": None,
    "expected": "16",
}
# Three turns: a picture, then a sound and another picture, then text.
TURNS: dict[str, Any] = {
    "id": "turns",
    "family": "turns",
    "task": "mixed",
    "adapter": "vision",
    "prompt": "<|system|>Be brief.<|end|><|user|><|image_1|>Read the number.<|end|><|assistant|>863<|end|>"
    "<|user|><|image_2|><|audio_1|><|end|><|assistant|>CAKE<|end|><|user|>What shape\nis it?<|end|><|assistant|>",
    "images": ["a.png", "b.png"],
    "audio": "ask.wav",
    "expected": "square",
}


def write_source(folder: Path, entries: Any = (QUESTION, TURNS)) -> Path:
    """A folder for ``--quality`` with the trained checkpoint and these entries; the path of its questions."""
    folder.mkdir()
    (folder / "checkpoint").symlink_to(CHECKPOINT)
    questions = folder / "mine" / "mine.json"
    questions.parent.mkdir()
    asked = json.loads(TEST_SET.read_text(encoding="utf-8"))
    pictures = [name for entry in asked for name in entry["images"] if name.endswith(".png")]
    sounds = [entry["audio"] for entry in asked if entry["images"] and entry["audio"]]
    for name, source in {"a.png": pictures[0], "b.png": pictures[-1], "ask.wav": sounds[0]}.items():
        (questions.parent / name).write_bytes((TEST_SET.parent / source).read_bytes())
    questions.write_text(entries if isinstance(entries, str) else json.dumps(entries), encoding="utf-8")
    return questions


@pytest.fixture(scope="module")
def model(nano_bundle: Path) -> Iterator[phi4edge.Model]:
    with phi4edge.load(nano_bundle, context=1024, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[phi4edge.Model]:
    """The same in as few bits as there are."""
    path = tmp_path_factory.mktemp("small") / "bundle"
    convert(CHECKPOINT, path, "q2_k_s", adapter_quant="q4_0")
    with phi4edge.load(path, context=1024, threads=1) as loaded:
        yield loaded


# --- items


def test_a_conversation_becomes_its_messages(tmp_path: Path) -> None:
    questions = write_source(tmp_path / "source")
    question, turns = read_items(questions)
    assert question.messages == [{"role": "user", "content": "Calculate 20 - 4."}]
    assert turns.messages == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": str(questions.parent / "a.png")},
                {"type": "text", "text": "Read the number."},
            ],
        },
        {"role": "assistant", "content": "863"},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": str(questions.parent / "b.png")},
                {"type": "audio", "audio": str(questions.parent / "ask.wav")},
            ],
        },
        {"role": "assistant", "content": "CAKE"},
        {"role": "user", "content": "What shape\nis it?"},
    ]


def test_the_chat_template_makes_the_prompt_of_every_item_again(model: phi4edge.Model, tmp_path: Path) -> None:
    placeholders = model.template._placeholders
    for item in (*read_items(write_source(tmp_path / "source")), *items(TEST_SET), *items(HELD_OUT)):
        prompt = re.sub(r"<\|(image|audio)_\d+\|>", lambda match: placeholders[match[1]], item.prompt)
        assert model.template.render(item.messages) == prompt


def test_a_conversation_with_media_in_its_turns_is_measured(model: phi4edge.Model, tmp_path: Path) -> None:
    (turns,) = read_items(write_source(tmp_path / "source", [TURNS]))
    (measured,) = measure(model, [turns], {})
    assert measured.n_positions == len(model.tokenizer.encode("square")) + 1
    assert measured.is_right == answers_exactly(model, turns)


def test_some_of_the_items_are_of_every_family_and_spread_over_its_tasks() -> None:
    everything = [*items(TEST_SET), *items(HELD_OUT)]
    some = some_of(everything, 9)
    assert families(some) == families(everything)
    for family in families(everything):
        of_family = [item for item in everything if item.family == family]
        chosen = [item for item in some if item.family == family]
        assert len(chosen) == min(9, len(of_family))
        assert set(chosen) <= set(of_family)
        n_tasks = len({item.task for item in of_family})
        assert len({item.task for item in chosen}) >= min(n_tasks, 9) / 2
    cycle = [replace(everything[0], task=f"task{index % 12:02}") for index in range(264)]
    assert [item.task for item in some_of(cycle, 12)] == sorted({item.task for item in cycle})
    assert some_of(everything, None) == everything


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"id": None}, "id", "missing"),
        ({"id": 7}, "id", "int"),
        ({"family": "a | b"}, "family", "short plain name"),
        ({"family": "a\x1b[2J"}, "family", "short plain name"),
        ({"task": ["sum"]}, "task", "list"),
        ({"adapter": 1}, "adapter", "int"),
        ({"adapter": ""}, "adapter", "empty"),
        ({"expected": None}, "expected", "missing"),
        ({"expected": ""}, "expected", "empty"),
        ({"expected": "x" * 2_000_000}, "expected", "limit"),
        ({"expected": "\ud800"}, "expected", "half a character"),
        ({"id": TURNS["id"]}, "id", "'turns' is the id of items[0] too"),
        ({"prompt": {}}, "prompt", "dict"),
        ({"prompt": "Calculate 20 - 4."}, "prompt", "no conversation"),
        ({"prompt": "<|user|>a<|end|>"}, "prompt", "no conversation"),
        ({"prompt": "<|assistant|>"}, "prompt", "no conversation"),
        ({"prompt": "<|user|>a<|end|><|assistant|>b<|end|><|assistant|>"}, "prompt", "no conversation"),
        ({"prompt": "<|user|>a<|end|> <|user|>a<|end|><|assistant|>"}, "prompt", "from character 16"),
        ({"prompt": "<|judge|>a<|end|><|user|>a<|end|><|assistant|>"}, "prompt", "no conversation"),
        ({"prompt": "<|user|>a<|user|>b<|end|><|assistant|>"}, "prompt", "<|user|> within the text"),
        ({"prompt": "<|user|>see <|image_1|><|end|><|assistant|>", "images": ["a.png"]}, "prompt", "before the text"),
        ({"prompt": "<|system|><|image_1|><|end|><|user|>a<|end|><|assistant|>"}, "prompt", "<|image_1|> within"),
        ({"prompt": "<|user|><|image_2|>a<|end|><|assistant|>", "images": ["a.png"]}, "prompt", "number 1 is the next"),
        ({"prompt": "<|system|>" + "<|tool|>" * 50_000 + "<|user|>" * 50_000}, "prompt", "no conversation"),
        ({"prompt": "<|user|><|image_99999|>a<|end|><|assistant|>"}, "prompt", "<|image_99999|> within"),
        ({"prompt": "<|user|><|image_\u0661|>a<|end|><|assistant|>", "images": ["a.png"]}, "prompt", "within the text"),
        (
            {"prompt": "<|user|><|audio_1|><|image_1|><|end|><|assistant|>", "images": ["a.png"], "audio": "ask.wav"},
            "prompt",
            "sound before an image",
        ),
        ({"prompt": "<|user|><|image_1|>a<|end|><|assistant|>"}, "images", "names 0, and the prompt has <|image_1|>"),
        ({"images": ["a.png"]}, "images", "names 1, and the prompt has a place for 0"),
        ({"audio": "ask.wav"}, "audio", "names 1, and the prompt has a place for 0"),
        ({"images": [None]}, "images[0]", "NoneType"),
        ({"images": {"a": "b"}}, "images", "dict"),
        ({"images": ["../mine.json"]}, "images[0]", "plain name"),
        ({"images": ["/etc/passwd"]}, "images[0]", "plain name"),
        ({"audio": "a\x00.wav"}, "audio", "plain name"),
        ({"images": ["there-is-none.png"]}, "images[0]", "no file 'there-is-none.png'"),
        ({"images": ["away.png"]}, "images[0]", "'away.png' is a link to a file elsewhere"),
    ],
)
def test_an_entry_that_cannot_be_used_is_named_with_its_field(
    tmp_path: Path, changes: dict[str, Any], field: str, says: str
) -> None:
    questions = write_source(tmp_path / "source", [TURNS, QUESTION | changes])
    (tmp_path / "away.png").touch()
    (questions.parent / "away.png").symlink_to(tmp_path / "away.png")
    with pytest.raises((InputError, FileError)) as caught:
        read_items(questions)
    assert (caught.value.path, caught.value.field) == (str(questions), f"items[1].{field}")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not the JSON we expect"),
        ("{}", "is not a JSON list"),
        ("[]", "has no entries"),
        ('[{"id": "a", "id": "b"}]', "comes twice"),
        ('["a"]', "must be an object, got str"),
        ("[" * 100_000, "is not the JSON we expect"),
        ("[NaN]", "NaN"),
    ],
)
def test_a_file_that_holds_no_items_is_named(tmp_path: Path, text: str, says: str) -> None:
    questions = write_source(tmp_path / "source", text)
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        read_items(questions)
    assert caught.value.path == str(questions)


def test_a_damaged_picture_and_an_unknown_adapter_name_their_item(model: phi4edge.Model, tmp_path: Path) -> None:
    questions = write_source(tmp_path / "source", [QUESTION, TURNS])
    (questions.parent / "b.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"mine\.json: items\[1\]: .*b\.png: is not a PNG"):
        measure(model, read_items(questions), {})
    questions.write_text(json.dumps([QUESTION, QUESTION | {"id": "two", "adapter": "law"}]))
    with pytest.raises(InputError, match=r"mine\.json: items\[1\]\.adapter: .*'law'.*vision, speech"):
        measure(model, read_items(questions), {})


def test_the_nano_checkpoint_is_found_from_within_its_clone(tmp_path: Path) -> None:
    assert nano_folder(NANO.parent) == NANO
    assert [path.name for path in item_files(NANO)] == ["heldout.json", "testset.json"]
    with pytest.raises(FileError, match="clone the repository"):
        nano_folder(tmp_path)
    with pytest.raises(FileError, match="is no folder"):
        item_files(tmp_path / "nothing")
    with pytest.raises(FileError, match="has no folder 'checkpoint'"):
        item_files(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(FileError, match="has no questions"):
        item_files(tmp_path)


def test_a_folder_that_may_not_be_entered_is_a_file_error(tmp_path: Path) -> None:
    write_source(tmp_path / "source")
    (tmp_path / "source").chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        with pytest.raises(FileError, match="cannot be read: Permission denied"):
            item_files(tmp_path / "source")
        with pytest.raises(FileError, match="clone the repository"):
            nano_folder(tmp_path / "source")
    finally:
        os.seteuid(user)
        (tmp_path / "source").chmod(0o700)


def test_a_current_directory_that_is_gone_is_a_file_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileError, match="the current directory: cannot be read: No such file"):
        nano_folder()


# --- measuring


@pytest.mark.parametrize("adapter", [None, "none", "vision"])
def test_what_counts_as_right_is_what_generation_would_write(small: phi4edge.Model, adapter: str | None) -> None:
    asked = items()[::2]
    for measured in measure(small, asked, {}, adapter=adapter):
        assert measured.is_right == answers_exactly(small, measured.item, adapter=adapter), measured.item.name


def test_the_right_text_in_other_tokens_is_right(model: phi4edge.Model) -> None:
    """Some answers come in other tokens than the tokenizer makes of them; generation is the judge here too."""
    asked = [item for item in items(HELD_OUT) if item.family == "text"][1::2]
    for measured in measure(model, asked, {}):
        assert measured.is_right == answers_exactly(model, measured.item), measured.item.name


def test_the_divergence_is_that_of_all_tokens_of_the_right_answers(
    model: phi4edge.Model, small: phi4edge.Model
) -> None:
    asked = [item for item in items() if item.family == "text"]
    exact: dict[Item, Array] = {}
    assert total(measure(model, asked, exact)).divergence == 0
    score = total(measure(small, asked, exact))

    def rows(of: phi4edge.Model, item: Item) -> Array:
        prompt, answer = of.encode(item.messages), of.tokenizer.encode(item.expected, special=True)
        return log_probabilities(of.logits([*prompt, *answer])[len(prompt) - 1 :])

    theirs, ours = (np.concatenate([rows(of, item) for item in asked]) for of in (model, small))
    assert score.n_positions == len(theirs)
    assert score.divergence == pytest.approx(mean_divergence(theirs, ours), rel=1e-3)
    assert score.divergence > 1e-4


# --- the command


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``--json`` prints for one question of each family of the test set, and a conversation."""
    folder = tmp_path_factory.mktemp("quality") / "source"
    questions = write_source(folder, [QUESTION, TURNS])
    others = json.loads(TEST_SET.read_text(encoding="utf-8"))
    for entry in (chosen := [next(e for e in others if e["family"] == family) for family in families(items())]):
        for name in [*entry["images"], *([entry["audio"]] if entry["audio"] else [])]:
            (questions.parent / name).write_bytes((TEST_SET.parent / name).read_bytes())
    questions.write_text(json.dumps([QUESTION, TURNS, *chosen]), encoding="utf-8")
    command = [*COMMAND, "bench", "--quality", str(folder), "--bits", "4", "--json", "-t", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=5 * DEADLINE)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_all_variants_are_measured_and_sums_are_sums(document: dict[str, Any], tmp_path: Path) -> None:
    assert (document["kv_type"], document["provider"]) == ("i16", "auto")
    results = {(each["backbone"], each["adapters"], each["encoders"]): each for each in document["results"]}
    assert len(results) == len(document["results"])
    assert next(iter(results)) == ("f32", "f32", "fp32")
    assert {("f32", "merged", "fp32"), ("q4_k_m", "q8_0", "int8"), ("q4_k_m", "merged", "int8")} < set(results)
    assert {("f32", adapters, "fp32") for adapters in ("f16", "q8_0", "q4_0", "iq4_nl")} < set(results)
    assert results["f32", "f32", "fp32"]["divergence"] == 0
    for result in results.values():
        assert [each["family"] for each in result["families"]] == [
            *families(items())[:1],
            "turns",
            *families(items())[1:],
        ]
        for key in ("n", "n_right", "n_positions"):
            assert result[key] == sum(each[key] for each in result["families"])
            for family in result["families"]:
                assert family[key] == sum(task[key] for task in family["tasks"])
        weighed = sum(each["divergence"] * each["n_positions"] for each in result["families"])
        assert result["divergence"] == pytest.approx(weighed / result["n_positions"])
    # The weights are the same numbers; merging rounds each once.
    assert results["f32", "merged", "fp32"]["divergence"] < 1e-6


def test_merged_adapters_count_all_bundles_that_they_take(document: dict[str, Any], tmp_path: Path) -> None:
    (merged,) = [each for each in document["results"] if (each["backbone"], each["adapters"]) == ("q4_k_m", "merged")]
    n_bytes = 0
    for number, (adapters, encoders) in enumerate(
        (("none", "none"), ("merged:vision", "int8"), ("merged:speech", "int8"))
    ):
        done = convert(CHECKPOINT, tmp_path / str(number), "q4_k_m", adapters=adapters, encoders=encoders)
        n_bytes += sum(part.n_bytes for part in done.bundle.manifest.parts)
    assert (merged["n_bundles"], merged["n_bytes"]) == (3, n_bytes)
    assert merged["bits_per_weight"] == done.bundle.manifest.parts[0].details["bits_per_weight"]


def test_the_wrong_adapters_are_beside_the_right_one(document: dict[str, Any]) -> None:
    for backbone in ("f32", "q4_k_m"):
        rows = {row["family"]: row for row in document["routing"] if row["backbone"] == backbone}
        (result,) = [
            each
            for each in document["results"]
            if each["backbone"] == backbone and each["adapters"] in ("f32", "q8_0") and each["compares"] == "bits"
        ]
        for family in result["families"]:
            row = rows[family["family"]]
            assert list(row["adapters"]) == ["none", "vision", "speech"]
            assert row["adapters"][row["right"]]["n_right"] == family["n_right"]
            assert all(score["n"] == family["n"] for score in row["adapters"].values())
    wrong = [
        score["n_right"]
        for row in document["routing"]
        for name, score in row["adapters"].items()
        if name != row["right"]
    ]
    assert sum(wrong) < len(wrong) / 2


def test_the_tables_are_markdown_with_every_number(document: dict[str, Any]) -> None:
    text = tables(document)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == len(document["results"]) + len(document["routing"]) + 3 * 2
    for lengths in (
        {len(line) for line in block.splitlines()} for block in text.split("\n\n") if block.startswith("|")
    ):
        assert len(lengths) == 1  # aligned
    assert "| turns (1) |" in text
    assert text.count("**") == 2 * len(document["routing"])
    assert not text.count("nan")


def test_the_plot_is_svg_with_its_text_as_text(document: dict[str, Any], tmp_path: Path) -> None:
    peers.require("matplotlib")
    for name in ("a.svg", "b.svg"):
        Plot(str(tmp_path / name)).write(document)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.svg"]
    texts = {
        "".join(each.itertext()).strip()
        for each in ElementTree.parse(tmp_path / "a.svg").iter()
        if each.tag.endswith("}text")
    }
    assert {"q4_k_m", "f32", "32.0", "turns (1)", "adapters merged", "exactly right answers, %"} <= texts


def test_the_plot_takes_the_place_of_its_own_file_alone(document: dict[str, Any], tmp_path: Path) -> None:
    peers.require("matplotlib")
    (tmp_path / "a.svg").write_text("an older one")
    (tmp_path / "precious").write_text("keep")
    (tmp_path / "a.svg.part").symlink_to(tmp_path / "precious")
    Plot(str(tmp_path / "a.svg")).write(document)
    assert (tmp_path / "a.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert (tmp_path / "precious").read_text() == "keep"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "a.svg.part", "precious"]
    (tmp_path / "b.svg").mkdir()
    with pytest.raises(UsageError, match="not a regular file"):  # before anything is measured
        Plot(str(tmp_path / "b.svg"))


def test_results_are_printed_where_the_plot_cannot_be_written(
    document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers.require("matplotlib")
    (tmp_path / "folder").mkdir()
    plot = Plot(str(tmp_path / "folder" / "a.svg"))
    (tmp_path / "folder").rmdir()
    with pytest.raises(FileError, match="cannot be written"):
        show(document, plot, as_json=False)
    assert capsys.readouterr().out == tables(document)
    with pytest.raises(typer.Exit) as caught:
        show(document, plot, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert (caught.value.exit_code, printed.pop("error")["code"]) == (3, "file_error")
    assert printed == document


def test_without_matplotlib_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["bench", "--quality", str(NANO), "--plot", str(tmp_path / "a.svg")]) == 9
    out, err = capsys.readouterr()
    assert out == ""
    assert is_one_error_line(err)
    assert "--plot" in err and "phi4edge[plot]" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--quality", "nano"], 3, "clone the repository"),  # the current directory is none
        (["--quality", "nothing"], 3, "nothing: is no folder"),
        (["--quality", str(NANO), "model.gguf"], 2, "leave 'model.gguf' out"),
        (["--quality", "x" * 5000], 3, "File name too long"),
        (["--quality", str(NANO), "-p", "8"], 2, "leave -p, -n, -r and --profile out"),
        (["--quality", str(NANO), "-p", "512"], 2, "leave -p, -n, -r and --profile out"),
        (["--quality", str(NANO), "--profile"], 2, "leave -p, -n, -r and --profile out"),
        (["--quality", str(NANO), "--bits", "5"], 2, "--bits: 5"),
        (["--quality", str(NANO), "--items", "0"], 2, "--items"),
        (["--quality", str(NANO), "--plot", "a.png"], 2, ".svg"),
        (["--quality", str(NANO), "--plot", "nothing/a.svg"], 3, "nothing: does not exist"),
        (["--quality", str(NANO), "--plot", "x" * 300 + ".svg"], 3, "File name too long"),
        (["--quality", str(NANO), "--items", "1", "--provider", "none"], 2, "--provider"),
        (["--items", "3", "model.gguf"], 2, "--items: is for --quality"),
        (["--bits", "4", "model.gguf"], 2, "--bits: is for --quality"),
    ],
)
def test_arguments_that_make_no_sense_are_one_line(
    arguments: list[str],
    code: int,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert is_one_error_line(err), err
    assert says in err
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [*COMMAND, "bench", "--quality", str(NANO), "-t", "1"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        deadline = time.monotonic() + DEADLINE
        while not list(tmp_path.glob("phi4edge-*/bundle/manifest.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_an_error_of_an_item_is_one_json_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = write_source(tmp_path / "source", [QUESTION | {"adapter": "law"}])
    assert main(["bench", "--quality", str(tmp_path / "source"), "--json"]) == InputError.exit_code
    out, err = capsys.readouterr()
    assert err == ""
    error = json.loads(out)["error"]
    assert (error["path"], error["field"]) == (str(questions), "items[0].adapter")
