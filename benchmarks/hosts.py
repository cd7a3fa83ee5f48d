"""Measures one search on one lane, on two lanes of one host, and on two hosts, one of which may be lost.

Run as root, as `python benchmarks/hosts.py OUTPUT.json`, with nothing else running. The hosts are namespaces of this
machine (`tests/cluster/hosts.py`): two lanes are two real processes, of two Ray nodes, that share its cores. Each has
one CPU thread. All searches do the same work: trials of a tiny random model, each to the full budget.
"""

import json
import os
import platform
import shutil
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from raylora.run.directory import RunDirectory  # noqa: E402
from raylora.run.events import Finished, LaneLost, LaneUp, Started, read_events  # noqa: E402
from tests.cluster.hosts import Lab  # noqa: E402
from tests.cluster.searches import lanes_on, reports, wait_for  # noqa: E402

N_TRIALS, STEPS = 8, 800
SEARCH = (
    "cd ~/project && python -m raylora.search search_spaces/smoke.yaml --address auto --device cpu "
    f"--search.n_trials {N_TRIALS} --search.scheduler none --search.trials_per_gpu 2 --training.max_steps {STEPS} "
    "--training.per_device_train_batch_size 8 --merge.strategy stochastic --merge.tolerance 1 "
    "--evaluation.max_new_tokens 1"
)


SEARCHES: dict[str, dict[str, Any]] = {
    "one lane on one host": {"cpus": {"head": 1}, "lanes": 1},
    "two lanes on one host": {"cpus": {"head": 2}, "lanes": 2},
    "two lanes on two hosts": {"cpus": {"head": 1, "worker": 1}, "lanes": 2},
    "two lanes on two hosts, one of them lost": {"cpus": {"head": 1, "worker": 1}, "lanes": 2, "lose": True},
}


def main() -> None:
    output = Path(sys.argv[1])
    done = json.loads(output.read_text())["searches"] if output.exists() else {}
    for name, settings in SEARCHES.items():
        if name in done:  # by an earlier run that was cut short
            continue
        done[name] = measure(**settings)
        result = {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "trials": N_TRIALS,
            "steps_a_trial": STEPS,
            "searches": done,
        }
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(cpus: dict[str, int], *, lanes: int, lose: bool = False) -> dict[str, Any]:
    """Run the search on new hosts.

    Args:
        cpus: name of each host, the head first -> CPUs that Ray may use there.
        lanes: lanes of the search.
        lose: take the worker away once it has trained for a while.
    """
    folder = Path(tempfile.mkdtemp(prefix="raylora-hosts-"))
    lab = Lab(folder, (ROOT, Path(sys.base_prefix)), {})
    try:
        began = time.time()
        for index, (name, n_cpus) in enumerate(cpus.items()):
            host = lab.add_with_project(name, 10 + index)
            role = "--head --port=6379 --dashboard-host=127.0.0.1" if name == "head" else "--address=10.77.0.10:6379"
            lab.ssh(host, f"ray start {role} --num-cpus={n_cpus}")
        started = time.time()
        process = lab.start_on("head", f"{SEARCH} --search.lanes {lanes} --output /mnt/shared/run", folder / "log")
        run = RunDirectory(lab.shared / "run")
        lost_at = 0.0
        if lose:
            wait_for(run, "lane on the worker", lambda events: lanes_on(events, "worker"), 300)
            wait_for(run, "report", reports, 300)
            time.sleep(5)
            lost_at = time.time()
            lab.hosts["worker"].kill()
        if process.wait(timeout=900):
            raise RuntimeError((folder / "log").read_text()[-3000:])
        row = {"hosts_to_ray_seconds": started - began, **_figures(run, started, lost_at)}
        print(json.dumps(row, indent=2), flush=True)
        return row
    finally:
        lab.close()
        shutil.rmtree(folder, ignore_errors=True)


def _figures(run: RunDirectory, started: float, lost_at: float) -> dict[str, float]:
    events = list(read_events(run.events_file))
    ups = [event.time for event in events if isinstance(event, LaneUp)]
    end = max(event.time for event in events if isinstance(event, Finished))
    figures = {
        "seconds_to_the_first_lane": min(ups) - started,
        "seconds_to_the_last_lane": max(ups) - started,
        "seconds_of_all_lanes": end - max(ups),
        "seconds_from_first_lane_to_end": end - min(ups),
        "trial_steps_per_second": N_TRIALS * STEPS / (end - min(ups)),
    }
    if lost_at:
        lost = next(event for event in events if isinstance(event, LaneLost))
        again = next(event.time for event in events if isinstance(event, Started) and event.time >= lost.time)
        figures |= {"seconds_until_noted": lost.time - lost_at, "seconds_until_trained_again": again - lost_at}
    return figures


if __name__ == "__main__":
    main()
