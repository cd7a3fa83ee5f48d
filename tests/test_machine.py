"""Memory and CPUs are those of this process's control groups: made-up trees of both versions, and a real group."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from raylora import machine
from raylora.machine import HOST, cpu_limit, free_memory, memory_limit, n_cpus

GIB = 2**30

V2 = "30 25 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
NO_LIMIT = "9223372036854771712"
"""`memory.limit_in_bytes` of a group of version 1 without a limit: the largest whole number of pages."""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 GiB, 48 of them free, and 16 CPUs."""
    memory = psutil.virtual_memory()._replace(total=64 * GIB, available=48 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    return tmp_path


def write(root: Path, files: dict[str, str | int]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}".rstrip() + "\n")


def test_without_groups_the_machine_is_the_limit() -> None:
    assert memory_limit() == machine.Limit(64 * GIB, HOST)
    assert free_memory() == 48 * GIB
    assert (cpu_limit(), n_cpus()) == (machine.Limit(16, HOST), 16)


def test_the_smallest_limit_on_the_way_to_the_top_wins(root: Path) -> None:
    groups = "sys/fs/cgroup"
    write(root, {"proc/self/cgroup": "0::/slurm/job/step", "proc/self/mountinfo": V2})
    write(
        root,
        {
            f"{groups}/slurm/job/step/memory.max": "max",
            f"{groups}/slurm/job/step/memory.current": GIB,
            f"{groups}/slurm/job/step/cpu.max": "max 100000",
            f"{groups}/slurm/job/memory.max": 8 * GIB,
            f"{groups}/slurm/job/memory.current": 5 * GIB,
            f"{groups}/slurm/job/memory.stat": f"anon {GIB}\ninactive_file {3 * GIB}",
            f"{groups}/slurm/job/cpu.max": "250000 100000",
            f"{groups}/slurm/memory.max": 32 * GIB,
            f"{groups}/slurm/memory.current": 6 * GIB,
            f"{groups}/slurm/cpu.max": "400000 100000",
        },
    )
    assert memory_limit() == machine.Limit(8 * GIB, str(root / groups / "slurm/job/memory.max"))
    assert free_memory() == (8 - 5 + 3) * GIB  # the inactive file cache is free
    assert cpu_limit() == machine.Limit(2.5, str(root / groups / "slurm/job/cpu.max"))
    assert n_cpus() == 2


def test_a_container_sees_its_own_group_at_the_top(root: Path) -> None:
    write(root, {"proc/self/cgroup": "0::/", "proc/self/mountinfo": V2})
    write(root, {"sys/fs/cgroup/memory.max": 4 * GIB, "sys/fs/cgroup/cpu.max": "50000 100000"})
    assert memory_limit().amount == 4 * GIB
    assert (cpu_limit().amount, n_cpus()) == (0.5, 1)


@pytest.mark.parametrize("mounted", ["/", "/docker/abc"])
def test_version_1_is_read_where_the_host_or_the_container_mounts_it(root: Path, mounted: str) -> None:
    own = "/docker/abc/sub" if mounted == "/" else "/sub"
    write(root, {"proc/self/mountinfo": V1.format(root=mounted)})
    write(root, {"proc/self/cgroup": "9:memory:/docker/abc/sub\n4:cpu,cpuacct:/docker/abc/sub\n0::/"})
    top = f"{root}/sys/fs/cgroup"
    write(
        Path(top),
        {
            "memory/memory.limit_in_bytes": NO_LIMIT,
            f"memory{own}/memory.limit_in_bytes": 2 * GIB,
            f"memory{own}/memory.usage_in_bytes": GIB,
            f"memory{own}/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB // 2}",
            "cpu,cpuacct/cpu.cfs_quota_us": -1,
            "cpu,cpuacct/cpu.cfs_period_us": 100000,
            f"cpu,cpuacct{own}/cpu.cfs_quota_us": 300000,
            f"cpu,cpuacct{own}/cpu.cfs_period_us": 100000,
        },
    )
    assert memory_limit() == machine.Limit(2 * GIB, f"{top}/memory{own}/memory.limit_in_bytes")
    assert free_memory() == 1.5 * GIB
    assert cpu_limit() == machine.Limit(3.0, f"{top}/cpu,cpuacct{own}/cpu.cfs_quota_us")


def test_a_group_that_cannot_be_seen_gives_way_to_those_above(root: Path) -> None:
    write(root, {"proc/self/cgroup": "0::/../other", "proc/self/mountinfo": V2, "sys/fs/cgroup/memory.max": GIB})
    assert memory_limit().amount == GIB


def test_a_group_above_its_limit_has_nothing_free(root: Path) -> None:
    write(root, {"proc/self/cgroup": "0::/", "proc/self/mountinfo": V2})
    write(root, {"sys/fs/cgroup/memory.max": GIB, "sys/fs/cgroup/memory.current": 2 * GIB})
    assert free_memory() == 0


def test_a_process_in_a_real_group_finds_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", Path("/"))
    parent = next(machine._groups("memory"), None)
    if parent is None:
        pytest.skip("this machine mounts no hierarchy of groups for memory")
    group = parent / f"raylora-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no group can be made here: {error}")
    try:
        file = next((path for path in (group / "memory.max", group / "memory.limit_in_bytes") if path.exists()), None)
        if file is None:
            pytest.skip("the group above does not hand the memory controller down")
        file.write_text(str(GIB))
        enter = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')"
        look = "from raylora.machine import memory_limit; limit = memory_limit(); print(limit.amount, limit.source)"
        done = subprocess.run([sys.executable, "-c", f"{enter}\n{look}"], capture_output=True, text=True, check=False)
        assert done.stdout.split() == [str(GIB), str(file)], done.stderr
    finally:
        group.rmdir()
