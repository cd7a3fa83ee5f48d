"""The README's cluster commands on three hosts, of which one is lost in mid-search. Run by `make ray-up`."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raylora.run.directory import RunDirectory
from raylora.run.events import read_events
from tests.cluster.hosts import ROOT
from tests.cluster.ray_cluster import RAY, WORKERS, Cluster, hosts_with_the_checkout, search_command
from tests.cluster.searches import check_that_nothing_is_lost, lanes_on, lost_lanes, reports, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("_hosts_can_be_made")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with hosts_with_the_checkout(tmp_path_factory.mktemp("lab")) as made:
        made.ray("up", "-y", str(made.file))
        yield made
        made.ray("down", "-y", str(made.file))


def wait_for_nodes(cluster: Cluster, n: int) -> None:
    """Wait until Ray has so many nodes."""
    code = "import ray; ray.init(log_to_driver=False); print('nodes', len([n for n in ray.nodes() if n['Alive']]))"
    deadline = time.monotonic() + 180
    while True:
        done = cluster.lab.ssh(cluster.lab.hosts["head"], f'cd raylora && .venv/bin/python -c "{code}"', check=False)
        if f"nodes {n}\n" in done.stdout:  # beside what Ray says of lost ones
            return
        assert time.monotonic() < deadline, f"not {n} nodes: {done.stdout}"
        time.sleep(2)


def test_a_search_outlives_a_lost_host_which_may_come_back(cluster: Cluster, tmp_path: Path) -> None:
    run = RunDirectory(cluster.lab.shared / "results" / "mine")
    search = search_command(n_trials=9, max_steps=2400)
    process = cluster.lab.start([RAY, "exec", str(cluster.file), search], tmp_path / "search.log", cwd=ROOT)
    try:
        events = wait_for(run, "lane on a worker", lambda events: lanes_on(events, *WORKERS) and reports(events))
        lane, host = lanes_on(events, *WORKERS)[0]
        cluster.lab.hosts[host].kill()
        wait_for(run, "lost lane", lost_lanes, 60)
        wait_for_nodes(cluster, 2)
        cluster.lab.restart(cluster.lab.hosts[host])
        assert process.wait(timeout=400) == 0, (tmp_path / "search.log").read_text()[-3000:]
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    events = list(read_events(run.events_file))
    (lost,) = lost_lanes(events)
    assert (lost.lane, lost.reason, lost.blames_trials) == (lane, "its node was lost", False)
    check_that_nothing_is_lost(events)
    assert run.page_file.is_file()
    wait_for_nodes(cluster, 3)
    cluster.ray("rsync-down", str(cluster.file), "/mnt/shared/results/mine/", f"{tmp_path}/mine/")
    assert (tmp_path / "mine" / "report.html").is_file()
