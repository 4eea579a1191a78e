"""What a process may use of a machine: real for this one, and files in a folder for others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from phi4edge import machine


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_affinity", lambda: list(range(8)))


def test_this_machine_has_a_name_cores_and_memory() -> None:
    assert machine.cpu_name()
    assert 1 <= machine.physical_cores() <= machine.available_cpus() <= (os.cpu_count() or 1)
    total, peak = machine.total_memory(), machine.peak_memory()
    assert total is not None and peak is not None
    assert 1 << 20 < peak < total


def test_the_processor_is_named_as_its_maker_does(tmp_path: Path) -> None:
    x86 = write(tmp_path / "x86", {"proc/cpuinfo": "processor: 0\nmodel\t\t: 17\nmodel name\t: AMD EPYC 9354\n"})
    assert machine.cpu_name(x86) == "AMD EPYC 9354"
    pi = write(tmp_path / "pi", {"proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 108\n\nModel\t\t: Raspberry Pi 5\n"})
    assert machine.cpu_name(pi) == "Raspberry Pi 5"
    assert machine.cpu_name(tmp_path / "nothing")


@pytest.mark.usefixtures("eight_cpus")
def test_two_threads_of_a_core_count_once(tmp_path: Path) -> None:
    for cpu in range(8):
        folder = f"sys/devices/system/cpu/cpu{cpu}/topology"
        write(tmp_path, {f"{folder}/core_id": f"{cpu % 2}\n", f"{folder}/physical_package_id": f"{cpu // 4}\n"})
    assert machine.available_cpus(tmp_path) == 8
    assert machine.physical_cores(tmp_path) == 4


@pytest.mark.usefixtures("eight_cpus")
def test_without_a_topology_every_processor_is_a_core(tmp_path: Path) -> None:
    assert machine.physical_cores(tmp_path) == 8


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize(
    ("cpu_max", "quota", "cpus"),
    [
        ("max 100000", None, 8),
        ("50000 100000", 0.5, 1),
        ("250000 100000", 2.5, 2),
        ("1600000 100000", 16.0, 8),
        ("", None, 8),
        ("nonsense 0", None, 8),
        ("0 0", None, 8),
    ],
)
def test_U8_a_quota_limits_the_threads(tmp_path: Path, cpu_max: str, quota: float | None, cpus: int) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": cpu_max})
    assert machine.cpu_quota(root) == quota
    assert machine.available_cpus(root) == cpus
    assert machine.physical_cores(root) == cpus


@pytest.mark.usefixtures("eight_cpus")
def test_U8_the_tightest_group_around_us_counts(tmp_path: Path) -> None:
    groups = {"cpu.max": "max 100000", "a/cpu.max": "300000 100000", "a/b/cpu.max": "600000 100000"}
    root = write(tmp_path, {f"sys/fs/cgroup/{name}": text for name, text in groups.items()})
    write(root, {"proc/self/cgroup": "0::/a/b\n"})
    assert machine.cpu_quota(root) == 3.0


@pytest.mark.usefixtures("eight_cpus")
def test_U8_version_1_groups_and_a_path_of_the_host(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/cpu,cpuacct"
    root = write(tmp_path, {f"{folder}/cpu.cfs_quota_us": "150000\n", f"{folder}/cpu.cfs_period_us": "100000\n"})
    write(root, {"proc/self/cgroup": "4:memory:/docker/1f\n2:cpu,cpuacct:/docker/1f\n"})
    assert machine.cpu_quota(root) == 1.5
    write(root, {f"{folder}/cpu.cfs_quota_us": "-1\n"})
    assert machine.cpu_quota(root) is None


@pytest.mark.parametrize(
    ("group", "limit_file", "limit", "total"),
    [
        ("0::/box", "box/memory.max", "524288\n", 524288),
        ("0::/box", "box/memory.max", "max\n", 1000 * 1024),
        ("0::/box/inner", "box/memory.max", "524288\n", 524288),
        ("4:memory:/box", "memory/box/memory.limit_in_bytes", "524288\n", 524288),
        ("4:memory:/box", "memory/box/memory.limit_in_bytes", "9223372036854771712\n", 1000 * 1024),
        ("4:memory:/box", "memory/memory.limit_in_bytes", "nonsense", 1000 * 1024),
    ],
)
def test_memory_is_the_machines_or_the_limit_of_a_group(
    tmp_path: Path, group: str, limit_file: str, limit: str, total: int
) -> None:
    files = {"proc/meminfo": "MemTotal:       1000 kB\nMemFree:  1 kB\n", "proc/self/cgroup": f"{group}\n"}
    assert machine.total_memory(write(tmp_path, files | {f"sys/fs/cgroup/{limit_file}": limit})) == total


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize(
    ("requested", "threads", "warns"),
    [(None, 8, False), (1, 1, False), (8, 8, False), (0, 1, True), (-3, 1, True), (9, 8, True), (10_000, 8, True)],
)
def test_U8_threads_are_clamped_with_a_warning(
    tmp_path: Path, requested: int | None, threads: int, warns: bool
) -> None:
    clamped, warning = machine.clamp_threads(requested, tmp_path)
    assert clamped == threads
    assert bool(warning) is warns
    assert not warns or (str(requested) in warning and str(threads) in warning)
