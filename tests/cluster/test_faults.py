"""Does to a search what befalls it on a cluster: lost and new nodes, a full disk, a killed driver."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from raylora.run.directory import RunDirectory
from raylora.run.events import SessionStarted, read_events
from raylora.run.state import SearchState
from tests.cluster.hosts import ROOT, Host, Lab
from tests.cluster.searches import check_that_nothing_is_lost, lanes_on, lost_lanes, reports, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("_hosts_can_be_made")]

HOSTS = ("head", "worker1", "worker2")
SHARED_MIB = 64
"""Size of the shared folder."""


FLAGS = ("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check")
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
AUTOSCALER = {
    "cluster_name": "from-zero",
    "max_workers": 2,
    "idle_timeout_minutes": 5,
    # all nodes have the head's address, and need no set-up
    "provider": {"type": "fake_multinode", **dict.fromkeys(FLAGS, True)},
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    "head_node_type": "ray.head.default",
    # as `ray up` fills them in
    "auth": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "upscaling_speed": 1.0,
    **{f"{key}_commands": [] for key in COMMANDS},
}
"""Settings of Ray's autoscaler, whose nodes are processes of the head's host."""


def search(name: str, *settings: str) -> str:
    """Return a command of the head's user that searches into a folder that all hosts share."""
    return (
        "cd ~/project && python -m raylora.search search_spaces/smoke.yaml --address auto --device cpu "
        f"--search.lanes 2 --search.n_trials 6 --output /mnt/shared/{name} {' '.join(settings)}"
    )


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Head and one worker of a running cluster, and a second worker that has not joined."""
    folder = tmp_path_factory.mktemp("lab")
    made = Lab(folder, (ROOT, Path(sys.base_prefix)), {})
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SHARED_MIB}m", "tmpfs", str(made.shared)])
    assert mounted.returncode == 0
    try:
        head = made.add_with_project("head", 10)
        made.ssh(head, "ray start --head --num-cpus=1 --port=6379 --dashboard-host=127.0.0.1")
        join(made, made.add_with_project("worker1", 11))
        made.add_with_project("worker2", 12)
        yield made
    finally:
        try:
            made.close()
        finally:
            subprocess.run(["umount", str(made.shared)], check=True)
            shutil.rmtree(folder, ignore_errors=True)


def join(lab: Lab, host: Host) -> None:
    """Have a host join the cluster, with room for one lane."""
    lab.ssh(host, f"ray start --address={lab.hosts['head'].ip}:6379 --num-cpus=1")


def test_a_cut_network_costs_a_lane_and_a_new_node_brings_one(lab: Lab, tmp_path: Path) -> None:
    run = RunDirectory(lab.shared / "cut")
    process = lab.start_on("head", search("cut", "--training.max_steps 3600"), tmp_path / "search.log")
    wait_for(run, "report and lane on the worker", lambda events: lanes_on(events, "worker1") and reports(events))
    lab.hosts["worker1"].unplug()
    join(lab, lab.hosts["worker2"])
    (lost,) = lost_lanes(wait_for(run, "lost lane", lost_lanes))
    assert (lost.reason, lost.blames_trials) == ("its node was lost", False)
    wait_for(run, "lane on the new node", lambda events: lanes_on(events, "worker2"))
    assert process.wait(timeout=400) == 0, (tmp_path / "search.log").read_text()[-3000:]
    check_that_nothing_is_lost(list(read_events(run.events_file)))
    assert run.page_file.is_file()


def test_a_full_folder_is_waited_out_and_a_killed_driver_is_followed_by_a_ray_job(lab: Lab, tmp_path: Path) -> None:
    run = RunDirectory(lab.shared / "full")
    settings = ("--training.max_steps 1800",)
    process = lab.start_on("head", search("full", *settings), tmp_path / "search.log")
    wait_for(run, "two lanes and a report", lambda events: len(lanes_on(events, *HOSTS)) == 2 and reports(events))
    filler = lab.shared / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(1 << 16))
    deadline = time.monotonic() + 200
    while "waiting up to 300 s: [Errno 28] No space left on device" not in (tmp_path / "search.log").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(1)
    n_before = reports(list(read_events(run.events_file)))
    time.sleep(20)
    filler.unlink()
    events = wait_for(run, "later report", lambda events: reports(events) > n_before)
    assert not SearchState(events).numbers("failed")
    (session,) = [event for event in events if isinstance(event, SessionStarted)]
    lab.ssh(lab.hosts["head"], f"kill -KILL {session.pid}")
    assert process.wait(timeout=60) != 0
    before = SearchState(read_events(run.events_file))
    assert before.count("finished") + before.count("stopped") < 6

    job = search("full", *settings, "--resume")
    done = lab.ssh(lab.hosts["head"], f"ray job submit -- bash -c '{job}'", check=False, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    events = list(read_events(run.events_file))
    check_that_nothing_is_lost(events)
    after = SearchState(events)
    for number in before.numbers("finished"):
        assert after.trials[number] == before.trials[number]
    assert run.page_file.is_file()


def test_lanes_wait_for_an_autoscaler_that_starts_from_zero(lab: Lab, tmp_path: Path) -> None:
    host = lab.add_with_project("scaler", 13)
    (host.home / "autoscaler.yaml").write_text(yaml.safe_dump(AUTOSCALER))
    start = "ray start --head --num-cpus=0 --port=6379 --autoscaling-config=autoscaler.yaml"
    lab.ssh(host, f"AUTOSCALER_UPDATE_INTERVAL_S=1 RAY_FAKE_CLUSTER=1 {start}")
    run = RunDirectory(lab.shared / "from-zero")
    process = lab.start_on("scaler", search("from-zero", "--training.max_steps 900"), tmp_path / "search.log")
    assert process.wait(timeout=400) == 0, (tmp_path / "search.log").read_text()[-3000:]
    events = list(read_events(run.events_file))
    assert {lane for lane, _ in lanes_on(events, "scaler")} == {"0", "1"}
    check_that_nothing_is_lost(events)
