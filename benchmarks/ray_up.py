"""Measures how long `ray up` takes on three hosts, and how long a search then takes to its first trial.

Run as root, as `python benchmarks/ray_up.py OUTPUT.json`, with nothing else running. The hosts are namespaces of this
machine (`tests/cluster/hosts.py`), which share its cores. They have the packages already.
"""

import json
import os
import platform
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from raylora.run.directory import RunDirectory  # noqa: E402
from raylora.run.events import LaneUp, Started, read_events  # noqa: E402
from tests.cluster.ray_cluster import hosts_with_the_checkout, search_command  # noqa: E402


def main() -> None:
    with hosts_with_the_checkout(Path(tempfile.mkdtemp(prefix="raylora-ray-up-"))) as cluster:
        began = time.time()
        cluster.ray("up", "-y", str(cluster.file))
        up = time.time()
        cluster.ray("exec", str(cluster.file), search_command(n_trials=3, max_steps=900), timeout=600)
        done = time.time()
        events = list(read_events(RunDirectory(cluster.lab.shared / "results" / "mine").events_file))
        cluster.ray("down", "-y", str(cluster.file))
    lanes = sorted(event.time for event in events if isinstance(event, LaneUp))
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds_of_ray_up": up - began,
        "seconds_from_there_to_each_lane": [lane - up for lane in lanes],
        "seconds_from_there_to_the_first_trial": min(e.time for e in events if isinstance(e, Started)) - up,
        "seconds_from_there_to_the_end": done - up,
    }
    Path(sys.argv[1]).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
