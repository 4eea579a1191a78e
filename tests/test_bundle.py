"""Bundles: what a manifest may say, and what `verify` finds (row L4)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi4edge.bundle import MANIFEST, UNFINISHED_PREFIX, Bundle, Manifest, Part, backbone_of
from phi4edge.errors import BundleError, FileError
from processes import is_one_error_line, run

CONTENT = b"the weights"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "backbone.gguf").write_bytes(CONTENT)
    part = Part("backbone", "backbone.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), {"mix": "Q8_0"})
    manifest = Manifest("phi4-text", (part,), {"image": "<|x|>"}, {"tool": "a test"})
    (tmp_path / MANIFEST).write_bytes(manifest.to_json())
    return tmp_path


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((bundle / MANIFEST).read_text())
    change(document)
    (bundle / MANIFEST).write_text(json.dumps(document))


def set_part(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["parts"][0].update(values)


def test_a_manifest_survives_writing_and_reading(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert Manifest.from_json(manifest.to_json(), "") == manifest
    assert manifest.parts[0].details == {"mix": "Q8_0"}


def test_a_whole_bundle_is_verified_with_progress(bundle: Path) -> None:
    shown: list[tuple[int, int]] = []
    Bundle.open(bundle).verify(lambda done, total: shown.append((done, total)))
    assert shown[-1] == (len(CONTENT), len(CONTENT))
    assert Bundle.open(bundle).part("backbone") == bundle / "backbone.gguf"


def test_a_path_that_is_no_bundle_is_left_alone(bundle: Path) -> None:
    assert backbone_of(bundle) == bundle / "backbone.gguf"
    assert backbone_of(bundle / "backbone.gguf") == bundle / "backbone.gguf"
    assert backbone_of("model.gguf") == "model.gguf"


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another format": (lambda d: d.update(format="zip"), "not the manifest"),
    "version 2": (lambda d: d.update(version=2), "version 2 cannot be read"),
    "version as text": (lambda d: d.update(version="1"), "version '1'"),
    "version true": (lambda d: d.update(version=True), "version True"),
    "no version": (lambda d: d.pop("version"), "version None"),
    "variant a number": (lambda d: d.update(variant=1), "variant"),
    "placeholders a list": (lambda d: d.update(placeholders=[]), "placeholders"),
    "provenance a text": (lambda d: d.update(provenance=""), "provenance"),
    "no parts": (lambda d: d.update(parts=[]), "parts"),
    "parts an object": (lambda d: d.update(parts={}), "parts"),
    "part a text": (lambda d: d.update(parts=["x"]), "part 0 is not an object"),
    "path upwards": (set_part(file="../backbone.gguf"), "plain name"),
    "two dots": (set_part(file=".."), "plain name"),
    "path downwards": (set_part(file="a/backbone.gguf"), "plain name"),
    "backslash": (set_part(file="..\\backbone.gguf"), "plain name"),
    "absolute path": (set_part(file="/etc/passwd"), "plain name"),
    "drive": (set_part(file="C:x"), "plain name"),
    "zero byte": (set_part(file="a\0b"), "plain name"),
    "newline": (set_part(file="backbone.gguf\n"), "plain name"),
    "hidden": (set_part(file=f"{UNFINISHED_PREFIX}x"), "plain name"),
    "the manifest itself": (set_part(file=MANIFEST), "plain name"),
    "role a number": (set_part(role=1), "role"),
    "negative size": (set_part(n_bytes=-1), "n_bytes"),
    "huge size": (set_part(n_bytes=1 << 63), "n_bytes"),
    "fractional size": (set_part(n_bytes=1.5), "n_bytes"),
    "short digest": (set_part(sha256="ab"), "sha256"),
    "capital digest": (set_part(sha256="A" * 64), "sha256"),
    "details a list": (set_part(details=[]), "details"),
    "two parts of one role": (lambda d: d["parts"].append(d["parts"][0] | {"file": "x"}), "two parts have the role"),
    "two parts of one file": (lambda d: d["parts"].append(d["parts"][0] | {"role": "x"}), "two parts have the file"),
    "missing file": (set_part(file="other.gguf"), "'other.gguf' is missing"),
    "wrong size": (set_part(n_bytes=12), "has 11 bytes instead of 12"),
}


@pytest.mark.parametrize("change, problem", BROKEN.values(), ids=BROKEN.keys())
def test_L4_a_wrong_manifest_is_a_bundle_error(
    bundle: Path, change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    edit(bundle, change)
    with pytest.raises(BundleError, match=problem):
        Bundle.open(bundle)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"a": 1, "a": 1}', b"[" * 100_000], ids=range(6))
def test_L4_a_manifest_that_is_not_json_is_a_bundle_error(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError):
        Bundle.open(bundle)


def test_L4_a_manifest_of_100_mb_is_not_read(bundle: Path) -> None:
    with (bundle / MANIFEST).open("wb") as file:
        file.truncate(100_000_000)
    with pytest.raises(BundleError, match="100000000 bytes"):
        Bundle.open(bundle)


def test_L4_symbolic_links_are_refused(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("backbone.gguf", MANIFEST):
        (bundle / name).rename(elsewhere / name)
        (bundle / name).symlink_to(elsewhere / name)
        with pytest.raises(BundleError, match="symbolic link"):
            Bundle.open(bundle)
        with pytest.raises(BundleError, match="symbolic link"):
            backbone_of(bundle)


def test_L4_verify_finds_a_changed_byte_and_a_file_too_many(bundle: Path) -> None:
    (bundle / "backbone.gguf").write_bytes(CONTENT[:-1] + b"S")
    (bundle / "stranger.txt").write_text("x")
    (bundle / f"{UNFINISHED_PREFIX}x").write_text("of a conversion that was killed")
    with pytest.raises(BundleError, match=r"'stranger.txt' is not in the manifest; 'backbone.gguf' is damaged"):
        Bundle.open(bundle).verify()


def test_L4_all_wrong_entries_are_listed(bundle: Path) -> None:
    edit(bundle, lambda d: d.update(variant=None, parts=[{}, 7]))
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle)
    for problem in ("variant", "role", "file", "n_bytes", "sha256", "part 1 is not an object"):
        assert problem in str(caught.value)


def test_a_directory_without_a_manifest_is_a_file_error(tmp_path: Path) -> None:
    with pytest.raises(FileError):
        Bundle.open(tmp_path)
    with pytest.raises(FileError):
        Bundle.open(tmp_path / "nothing")


def test_verify_of_a_damaged_bundle_exits_with_4(bundle: Path) -> None:
    assert run("verify", str(bundle)).returncode == 0
    (bundle / "backbone.gguf").write_bytes(CONTENT[:-1] + b"S")
    done = run("verify", str(bundle))
    assert (done.returncode, done.stdout) == (4, "")
    assert is_one_error_line(done.stderr)
