"""The README's cluster commands on three hosts, of which one is lost in mid-search. Run by `make cluster`."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from raylora.run.directory import RunDirectory
from raylora.run.events import read_events
from tests.cluster.hosts import ROOT, Lab
from tests.cluster.searches import check_that_nothing_is_lost, lanes_on, lost_lanes, reports, wait_for

RAY = str(Path(sys.executable).with_name("ray"))
pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("_hosts_can_be_made")]

WORKERS = ("worker1", "worker2")
SEARCH = (
    "cd raylora && python -m raylora.testing examples/tiny && python -m raylora.search search_spaces/smoke.yaml "
    "--address auto --device cpu --search.lanes 3 --search.n_trials 9 --training.max_steps 3600 "
    "--output /mnt/shared/results/mine"
)


@dataclass
class Cluster:
    """Three hosts that `ray up` has made a cluster of."""

    lab: Lab
    file: Path
    """The cluster file that it was made by."""

    def ray(self, *arguments: str, timeout: float = 300) -> str:
        """Run a command of Ray's on the laptop, and return what it prints."""
        done = self.lab.run([RAY, arguments[0], *arguments[1:]], cwd=ROOT, timeout=timeout)
        return done.stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("lab")
    lab = Lab(folder, (ROOT, Path(sys.base_prefix)), {"RAY_TMPDIR": str(folder / "laptop" / "tmp"), "TERM": "dumb"})
    try:
        for name, address in (("head", 10), ("worker1", 11), ("worker2", 12)):
            host = lab.add(name, address)
            # the packages of this checkout: hosts have no way to a package index
            (host.home / "raylora").mkdir()
            (host.home / "raylora" / ".venv").symlink_to(ROOT / ".venv")
        settings = yaml.safe_load((ROOT / "clusters" / "local.yaml").read_text())
        settings["provider"] |= {"head_ip": lab.hosts["head"].ip}
        settings["provider"] |= {"worker_ips": [lab.hosts[name].ip for name in WORKERS]}
        settings["auth"] = {"ssh_user": "root", "ssh_private_key": str(lab.key)}
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):  # a lane for each host
            settings[key] = [command.replace("ray start", "ray start --num-cpus=1") for command in settings[key]]
        file = folder / "local.yaml"
        file.write_text(yaml.safe_dump(settings))
        lab.run([RAY, "get-auth-token", "--generate"])
        made = Cluster(lab, file)
        made.ray("up", "-y", str(file))
        yield made
        made.ray("down", "-y", str(file))
    finally:
        lab.close()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_search_outlives_a_lost_host(cluster: Cluster, tmp_path: Path) -> None:
    run = RunDirectory(cluster.lab.shared / "results" / "mine")
    process = cluster.lab.start([RAY, "exec", str(cluster.file), SEARCH], tmp_path / "search.log", cwd=ROOT)
    try:
        events = wait_for(run, "lane on a worker", lambda events: lanes_on(events, *WORKERS) and reports(events))
        lane, host = lanes_on(events, *WORKERS)[0]
        cluster.lab.hosts[host].kill()
        wait_for(run, "lost lane", lost_lanes, 60)
        assert process.wait(timeout=400) == 0, (tmp_path / "search.log").read_text()[-3000:]
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    events = list(read_events(run.events_file))
    (lost,) = lost_lanes(events)
    assert (lost.lane, lost.reason, lost.blames_trials) == (lane, "its node was lost", False)
    check_that_nothing_is_lost(events)
    assert run.page_file.is_file()
    cluster.ray("rsync-down", str(cluster.file), "/mnt/shared/results/mine/", f"{tmp_path}/mine/")
    assert (tmp_path / "mine" / "report.html").is_file()
