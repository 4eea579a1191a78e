"""Checkpoints from a hub: continued when cut, found again offline, and never a byte outside the cache."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hub_server import COMMIT, LARGE, Hub, hub_server, repository
from phi4edge.bundle import Bundle
from phi4edge.cli import main
from phi4edge.converters.convert import convert
from processes import COMMAND, DEADLINE, ROOT, is_one_error_line, run
from tiny_checkpoints import tiny_checkpoint

REPO = "someone/tiny-phi"
SHARD = "model-00001-of-00002.safetensors"
HALF = 100_000
TOKEN = "hf_thisIsTheTokenThatNobodyMaySee"
UNWANTED = ["modeling_phi4mm.py", "pytorch_model.bin", "README.md", "onnx/model.safetensors", "chat_template.py"]
HOSTILE = [
    "../config.json",
    "/etc/tokenizer.json",
    "vision-lora/../../x.safetensors",
    "a\\b.safetensors",
    ".safetensors",
]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "checkpoint", n_shards=2)


@pytest.fixture
def hub(checkpoint: Path) -> Iterator[Hub]:
    files = repository(checkpoint) | dict.fromkeys(UNWANTED, b"code" * LARGE)
    with hub_server(Hub(REPO, files)) as served:
        yield served


class Puller:
    """The command with a cache of its own."""

    def __init__(self, hub: Hub, tmp_path: Path) -> None:
        self.home = tmp_path / "home"
        self.bundle = tmp_path / "bundle"
        self.environment = hub.environment | {"HF_HOME": str(self.home), "HF_HUB_CACHE": str(self.home / "hub")}

    def __call__(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        options["env"] = self.environment | options.get("env", {})
        return run("pull", REPO, str(self.bundle), "--quant", "q8_0", *arguments, **options)

    def files(self, suffix: str) -> list[Path]:
        return sorted(path for path in self.home.rglob("*") if path.name.endswith(suffix) and not path.is_symlink())


@pytest.fixture
def pull(hub: Hub, tmp_path: Path) -> Puller:
    return Puller(hub, tmp_path)


def sha256_of_backbone(bundle: Path) -> str:
    return Bundle.open(bundle).manifest.parts[0].sha256


def test_a_pull_is_a_conversion_of_the_same_files(checkpoint: Path, hub: Hub, pull: Puller, tmp_path: Path) -> None:
    hub.extra_names = HOSTILE
    around = set(tmp_path.iterdir())
    done = pull("--json", env={"HF_TOKEN": TOKEN})
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["commit"] == COMMIT
    assert done.stderr == ""
    assert run("verify", str(pull.bundle)).returncode == 0
    convert(checkpoint, tmp_path / "direct", "q8_0")
    assert sha256_of_backbone(pull.bundle) == sha256_of_backbone(tmp_path / "direct")

    wanted = {name for name in repository(checkpoint) if not name.startswith(".")}
    assert hub.names_asked_for() == wanted
    assert {request.headers["Authorization"] for request in hub.requests} == {f"Bearer {TOKEN}"}
    assert set(tmp_path.iterdir()) - around == {pull.home, pull.bundle, tmp_path / "direct"}
    for path in [*pull.home.rglob("*"), *pull.bundle.iterdir()]:
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes()

    # The hub's own library finds them, and nothing is fetched twice.
    script = f"import huggingface_hub as hub; print(hub.snapshot_download('{REPO}', local_files_only=True))"
    found = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | pull.environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == report["checkpoint"]
    assert repository(Path(report["checkpoint"])) == repository(checkpoint)
    hub.requests.clear()
    assert pull("--force").returncode == 0
    assert hub.names_asked_for() == set()


def test_U5_a_pull_that_was_interrupted_goes_on_where_it_was(hub: Hub, pull: Puller) -> None:
    hub.stop_after = {SHARD: HALF}
    command = [*COMMAND, "pull", REPO, str(pull.bundle), "--quant", "q8_0"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | pull.environment, stderr=subprocess.PIPE, text=True)
    assert hub.stopped.wait(DEADLINE)
    while sum(path.stat().st_size for path in pull.files(".incomplete")) < HALF // 2:
        assert process.poll() is None
    second = pull()
    assert second.returncode == 2
    assert "another pull" in second.stderr
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=DEADLINE)[1] == ""
    assert process.returncode == 130
    assert not pull.bundle.exists()
    (part,) = pull.files(".incomplete")
    have = part.stat().st_size

    hub.stop_after, hub.requests = {}, []
    done = pull()
    assert done.returncode == 0, done.stderr
    assert [request.headers.get("Range") for request in hub.asked_for(SHARD)] == [f"bytes={have}-"]
    assert pull.files(".incomplete") == []
    assert run("verify", str(pull.bundle)).returncode == 0


@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_U5_a_connection_that_is_cut_is_opened_again(hub: Hub, pull: Puller, ignores_ranges: bool) -> None:
    hub.drop_after, hub.ignores_ranges = {SHARD: HALF}, ignores_ranges
    done = pull("--download-only", "--json")
    assert done.returncode == 0, done.stderr
    assert [request.headers.get("Range") for request in hub.asked_for(SHARD)] == [None, f"bytes={HALF}-"]
    assert (Path(json.loads(done.stdout)["checkpoint"]) / SHARD).read_bytes() == hub.files[SHARD]


@pytest.mark.parametrize("other", ["other bytes", "more bytes"])
def test_U5_bytes_that_do_not_fit_their_hash_are_not_kept(hub: Hub, pull: Puller, other: str) -> None:
    right = hub.files[SHARD]
    hub.served = {SHARD: bytes(len(right)) if other == "other bytes" else right + b"more"}
    done = pull()
    assert done.returncode in (3, 4)
    assert is_one_error_line(done.stderr) and SHARD in done.stderr
    assert not pull.bundle.exists()
    hub.served = {}
    done = pull()
    assert done.returncode == 0, done.stderr


OFFLINE = """
import sys
def refuse(event, arguments):
    if event.startswith("socket."):
        raise RuntimeError(event)
sys.addaudithook(refuse)
from phi4edge.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_offline_opens_no_socket(hub: Hub, pull: Puller) -> None:
    def pull_offline() -> subprocess.CompletedProcess[str]:
        arguments = ["pull", REPO, str(pull.bundle), "--bits", "8", "--offline"]
        return subprocess.run(
            [sys.executable, "-c", OFFLINE, *arguments],
            cwd=ROOT,
            env=os.environ | pull.environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )

    cold = pull_offline()
    assert cold.returncode == 3
    assert is_one_error_line(cold.stderr)
    assert "not in the cache" in cold.stderr and "without --offline" in cold.stderr

    assert pull("--download-only").returncode == 0
    hub.requests.clear()
    warm = pull_offline()
    assert warm.returncode == 0, warm.stderr
    assert run("verify", str(pull.bundle)).returncode == 0
    assert hub.requests == []

    for path in pull.files(""):
        if path.is_file() and path.stat().st_size == len(hub.files[SHARD]):
            path.unlink()
    lacking = pull_offline()
    assert lacking.returncode == 2  # the bundle is there
    lacking = run("pull", REPO, "--offline", "--download-only", env=pull.environment)
    assert lacking.returncode == 3
    assert SHARD in lacking.stderr


@pytest.mark.parametrize(
    "path, status, error_code, expected",
    [
        ("/api/", 404, "RepoNotFound", "not found"),
        ("/api/", 401, "", "hf auth login"),
        ("/resolve/", 403, "GatedRepo", "licence"),  # the names of a gated repository's files are public
        ("/api/", 404, "RevisionNotFound", "no revision 'main'"),
        ("/api/", 503, "", "503"),
    ],
)
def test_U5_an_answer_that_is_a_refusal_says_what_to_do(
    hub: Hub, pull: Puller, path: str, status: int, error_code: str, expected: str
) -> None:
    hub.refuses, hub.status, hub.error_code = path, status, error_code
    done = pull(env={"HF_TOKEN": TOKEN})
    assert done.returncode == 3
    assert is_one_error_line(done.stderr)
    assert expected in done.stderr
    assert TOKEN not in done.stderr
    assert not pull.bundle.exists()


@pytest.mark.parametrize(
    "listing",
    [
        b"<html>",
        b'{"id": "x", "sha": "../../..", "siblings": []}',
        b'{"id": "x", "sha": "%s", "siblings": [{"rfilename": "config.json", "size": 2, "blobId": "../../x"}]}'
        % COMMIT.encode(),
    ],
)
def test_U5_an_answer_that_is_no_listing_is_an_error(hub: Hub, pull: Puller, listing: bytes) -> None:
    hub.listing = listing
    done = pull()
    assert done.returncode == 3
    assert is_one_error_line(done.stderr) and "HF_ENDPOINT" in done.stderr
    assert not pull.home.exists()


def test_U5_a_hub_that_is_not_there_is_an_error(hub: Hub, pull: Puller) -> None:
    done = pull(env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert done.returncode == 3
    assert is_one_error_line(done.stderr) and "cannot be reached" in done.stderr


def test_C4_a_repository_of_pickles_is_refused(hub: Hub, pull: Puller) -> None:
    hub.files = {name: data for name, data in hub.files.items() if not name.endswith(".safetensors")}
    done = pull()
    assert done.returncode == 4
    assert is_one_error_line(done.stderr) and "pickle refused: pytorch_model.bin" in done.stderr
    assert hub.names_asked_for() == set()


def test_C3_another_model_is_refused_before_its_weights_are_fetched(hub: Hub, pull: Puller) -> None:
    hub.files["config.json"] = b'{"model_type": "llama"}'
    done = pull()
    assert done.returncode == 4
    assert is_one_error_line(done.stderr) and "'llama' cannot be converted" in done.stderr
    assert hub.names_asked_for() == {"config.json"}


def test_C7_what_makes_no_sense_is_refused_before_anything_is_asked(
    hub: Hub, pull: Puller, capsys: pytest.CaptureFixture[str]
) -> None:
    pull.bundle.mkdir()
    (pull.bundle / "precious").touch()
    free = str(pull.bundle.with_name("free"))
    for arguments in (
        [REPO, str(pull.bundle)],
        [REPO, str(pull.bundle), "--force"],
        [REPO, free, "--quant", "q9"],
        [REPO, free, "--quant", "q8_0", "--bits", "4"],
        [REPO, free, "--revision", "../x"],
        ["../../etc", free],
        ["a/b/c", free],
    ):
        assert main(["pull", *arguments]) == 2
        assert is_one_error_line(capsys.readouterr().err)
    assert hub.requests == []


def test_C5_too_much_for_the_disk_is_refused_before_it_is_fetched(hub: Hub, pull: Puller) -> None:
    listing = json.loads(hub.describe())
    for number in range(2000):
        large = {"sha256": f"{number:064x}", "size": 49 * 10**9, "pointerSize": 134}
        listing["siblings"].append({"rfilename": f"model-{number}.safetensors", "size": large["size"], "lfs": large})
    hub.listing = json.dumps(listing).encode()
    done = pull()
    assert done.returncode == 5
    assert is_one_error_line(done.stderr) and "are free" in done.stderr and "--checkpoint-dir" in done.stderr
    assert hub.names_asked_for() == {"config.json"}


def test_C5_a_full_disk_keeps_what_has_arrived(hub: Hub, pull: Puller) -> None:
    done = pull(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, HALF)))
    assert done.returncode == 5
    assert is_one_error_line(done.stderr)
    hub.requests.clear()
    done = pull()
    assert done.returncode == 0, done.stderr
    assert any(request.headers.get("Range") for request in hub.asked_for(SHARD))


@pytest.mark.parametrize("layout", ["phi4mm", "phi4_multimodal"])
def test_a_directory_of_ones_own_holds_what_the_layout_needs(
    hub: Hub, pull: Puller, tmp_path: Path, layout: str
) -> None:
    adapters = {
        f"{name}-lora/{file}" for name in ("vision", "speech") for file in ("adapter_config.json", "x.safetensors")
    }
    hub.files = repository(tiny_checkpoint(tmp_path / layout, layout)) | dict.fromkeys(adapters, b"x" * LARGE)
    target = tmp_path / "mine"
    done = pull("--download-only", "--checkpoint-dir", str(target))
    assert done.returncode == 0, done.stderr
    expected = {name: data for name, data in hub.files.items() if layout != "phi4mm" or name not in adapters}
    assert repository(target) == expected  # phi4mm has the adapters among its weights
    assert not pull.home.exists()

    damaged = target / "model.safetensors"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    hub.requests.clear()
    assert pull("--download-only", "--checkpoint-dir", str(target)).returncode == 0
    assert hub.names_asked_for() == {"model.safetensors"}
    assert repository(target) == expected
