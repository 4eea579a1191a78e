"""This computer, as far as this process may use it: processor, cores, memory.

Cores are counted by what the scheduler will give us: the affinity mask and the CPU quota of our control groups, which
is what a container has.  Everything is read from the system at each call; nothing is cached.

Functions that read ``/proc`` and ``/sys`` take the ``root`` they are below, so that tests can build another machine.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ROOT = Path("/")
_V1_UNLIMITED = 1 << 60  # version 1 control groups write a number near 2^63 for "no limit"


def cpu_name(root: Path = _ROOT) -> str:
    """The processor as its maker calls it, e.g. ``"AMD EPYC 9354"``; the architecture if the system does not tell."""
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware") and value.strip():
            return value.strip()
    if sys.platform == "darwin":
        return _sysctl_text("machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def available_cpus(root: Path = _ROOT) -> int:
    """Logical processors this process may keep busy, by affinity and by quota; 1 or more."""
    quota = cpu_quota(root)
    # Rounded down: threads that meet at a barrier all wait for the one that the quota puts to sleep.
    limit = len(_affinity()) if quota is None else min(len(_affinity()), int(quota))
    return max(1, limit)


def physical_cores(root: Path = _ROOT) -> int:
    """Physical cores among :func:`available_cpus`; 1 or more.  Two hyper-threads of one core count once."""
    if sys.platform == "darwin":  # the fast cores only: a slow one would hold up the others at every barrier
        cores = _sysctl_int("hw.perflevel0.physicalcpu") or _sysctl_int("hw.physicalcpu") or available_cpus(root)
        return max(1, min(cores, available_cpus(root)))
    cores_seen = set()
    for cpu in _affinity():
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        core, package = _read(topology / "core_id").strip(), _read(topology / "physical_package_id").strip()
        cores_seen.add((package, core) if core else ("", f"cpu{cpu}"))
    return max(1, min(len(cores_seen), available_cpus(root)))


def clamp_threads(requested: int | None, root: Path = _ROOT) -> tuple[int, str]:
    """The number of threads to use, and a warning when that is not what was asked for (``""`` when it is).

    ``None`` asks for one thread per physical core.

    >>> clamp_threads(1)
    (1, '')
    """
    if requested is None:
        return physical_cores(root), ""
    available = available_cpus(root)
    if requested < 1:
        return 1, f"{requested} threads cannot work; using 1"
    if requested > available:
        return available, f"{requested} threads would wait for {available} available processor(s); using {available}"
    return requested, ""


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Processors' worth of time that the control groups of this process allow, e.g. ``0.5``; ``None`` if unlimited."""
    quotas = []
    for folder in _control_groups("cpu", root):
        words = _read(folder / "cpu.max").split()  # version 2: "max 100000" or "50000 100000"
        if len(words) != 2:
            words = [_read(folder / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
        quota, period = (_int(word) for word in words)
        if quota is not None and period is not None and quota > 0 and period > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def total_memory(root: Path = _ROOT) -> int | None:
    """Bytes of memory that this process could ever use: the machine's, or the limit of its control groups.

    How much of it is free now is the decoder's to tell, which must not take more: ``_core.available_memory()``.
    """
    known = [_meminfo("MemTotal", root) or _psutil_value(lambda psutil: psutil.virtual_memory().total)]
    for folder in _control_groups("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):  # version 2, version 1
            limit = _int(_read(folder / name).strip())
            known.append(limit if limit is not None and limit < _V1_UNLIMITED else None)
    return min((n_bytes for n_bytes in known if n_bytes is not None), default=None)


def peak_memory() -> int | None:
    """The most memory this process has occupied so far (resident set), in bytes; ``None`` if that is not known."""
    try:
        import resource
    except ImportError:  # Windows
        return _psutil_value(lambda psutil: psutil.Process().memory_info().peak_wset)
    # On Linux the number of getrusage() outlives exec(): a child begins with its parent's.
    match = re.search(r"VmHWM:\s*(\d+) kB", _read(Path("/proc/self/status")))
    if match:
        return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_memory() -> None:
    """Gives the system back what was freed and the C library kept for later; glibc keeps hundreds of megabytes."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        return
    trim(ctypes.c_size_t(0))


def _affinity() -> list[int]:
    try:
        return sorted(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not Linux
        return list(range(os.cpu_count() or 1))


def _control_groups(controller: str, root: Path) -> list[Path]:
    """The folders whose limits apply to this process: its group and all the groups around it, version 1 or 2."""
    mount = root / "sys/fs/cgroup"
    folders = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            base = mount
        elif controller in controllers.split(","):
            base = mount / controllers if (mount / controllers).is_dir() else mount / controller
        else:
            continue
        group = Path(path.lstrip("/"))
        # Inside a container the path may be the host's while the mount shows only our own group: `base` is tried too.
        folders += [base / parent for parent in (group, *group.parents)]
    return folders


def _meminfo(key: str, root: Path) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            kilobytes = _int(value.replace("kB", "").strip())
            return None if kilobytes is None else kilobytes * 1024
    return None


def _psutil_value(ask: Callable[[Any], int]) -> int | None:
    try:
        return ask(importlib.import_module("psutil"))
    except Exception:  # no psutil, or not on this platform
        return None


def _sysctl_bytes(name: str) -> bytes:
    """A value of macOS's ``sysctlbyname``; empty when there is none of that name."""
    try:
        call = ctypes.CDLL(None).sysctlbyname
    except (AttributeError, OSError, TypeError):
        return b""
    size = ctypes.c_size_t(256)
    value = ctypes.create_string_buffer(size.value)
    failed = call(name.encode(), value, ctypes.byref(size), None, ctypes.c_size_t(0))
    return b"" if failed else value.raw[: size.value]


def _sysctl_text(name: str) -> str:
    return _sysctl_bytes(name).rstrip(b"\0").decode("utf-8", "replace")


def _sysctl_int(name: str) -> int | None:
    value = _sysctl_bytes(name)
    return int.from_bytes(value, sys.byteorder) if value else None


def _read(path: Path) -> str:
    """The file's text; empty when it is missing or unreadable, as many of these files are on other systems."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _int(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None
