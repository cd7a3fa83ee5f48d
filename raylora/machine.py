"""Says how much memory and how many CPUs this process may use: those of its control groups (cgroups), not of the host.

A container, a Slurm job or a systemd unit may use a part of its host. psutil and `os.cpu_count` know nothing of it, and
Ray looks at the topmost group alone. Here each group from the process's own to the topmost counts, in versions 1 and 2,
and the smallest limit wins.

Source: Linux kernel documentation, admin-guide/cgroup-v2.rst and admin-guide/cgroup-v1/memory.rst; cgroups(7).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

ROOT = Path("/")
"""Folder that holds `proc` and the mounted hierarchies; a test has a tree of its own."""

HOST = "this machine"

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""Environment of a process that is to work on CPUs, where Ray hides no GPU (2.60)."""


@dataclass(frozen=True)
class Limit:
    """Largest amount that this process may use."""

    amount: float
    """Bytes of memory, or CPUs."""

    source: str
    """File that says so, or `HOST`."""


def memory_limit() -> Limit:
    """Return the memory that this process may use, in bytes."""
    limits = [Limit(psutil.virtual_memory().total, HOST)]
    for group in _groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _number(group / name)
            if limit is not None:
                limits.append(Limit(limit, str(group / name)))
    return min(limits, key=lambda limit: limit.amount)


def free_memory() -> float:
    """Return the memory that is still free for this process, in bytes.

    Of a group's memory, what the kernel can take back at once is free: its inactive file cache, which reading a base
    fills.
    """
    free = [float(psutil.virtual_memory().available)]
    for group in _groups("memory"):
        for limit_name, used_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _number(group / limit_name), _number(group / used_name)
            if limit is not None and used is not None:
                free.append(limit - used + _statistic(group / "memory.stat", cache_name))
    return max(0.0, min(free))


def cpu_limit() -> Limit:
    """Return the CPUs that this process may use: those it is bound to, or the share of time that its groups get."""
    limits = [Limit(len(os.sched_getaffinity(0)), HOST)]
    for group in _groups("cpu"):
        quota, period = _words(group / "cpu.max")[:2] or ["max", "1"]
        if quota != "max":
            limits.append(Limit(int(quota) / int(period), str(group / "cpu.max")))
        old_quota, old_period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if old_quota is not None and old_period is not None and old_quota > 0:  # -1 is no limit
            limits.append(Limit(old_quota / old_period, str(group / "cpu.cfs_quota_us")))
    return min(limits, key=lambda limit: limit.amount)


def n_cpus() -> int:
    """Return the CPUs that this process can keep busy, at least 1; of 2.5 CPUs these are 2."""
    return max(1, int(cpu_limit().amount))


def _groups(controller: str) -> Iterator[Path]:
    """Yield the directories of this process's groups, from its own to the topmost that is mounted."""
    own = _own_groups()
    for line in _lines(ROOT / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        mounted, point = before.split()[3:5]
        kind, _, options = after.split()[:3]
        name = {"cgroup2": "", "cgroup": controller}.get(kind)
        if name is None or name not in own or (name and name not in options.split(",")):
            continue
        top, path = ROOT / point.lstrip("/"), PurePosixPath(own[name])
        # a container may see the host's path, of which only the part below its own group is mounted
        below = path.relative_to(mounted) if path.is_relative_to(mounted) else PurePosixPath()
        for folder in (below, *below.parents):
            yield top / folder


def _own_groups() -> dict[str, str]:
    """Return controller -> path of this process's group; the name of version 2's single hierarchy is empty."""
    own: dict[str, str] = {}
    for line in _lines(ROOT / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    return own


def _lines(file: Path) -> list[str]:
    """Return the lines of a file; none if this kernel or group has no such file."""
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _words(file: Path) -> list[str]:
    return " ".join(_lines(file)).split()


def _number(file: Path) -> int | None:
    """Return the number in a file; None without the file, and for `max`, which is no limit."""
    words = _words(file)
    return int(words[0]) if words and words[0] != "max" else None


def _statistic(file: Path, name: str) -> int:
    """Return an entry of `memory.stat` in bytes; 0 if it has none."""
    return next((int(line.split()[1]) for line in _lines(file) if line.split()[0] == name), 0)
