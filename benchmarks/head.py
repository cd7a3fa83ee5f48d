"""Measures what a lane costs the head of a cluster, and works out the head for 64 lanes of 8 slots.

Run as `python benchmarks/head.py OUTPUT.json [--lanes 2] [--seconds 60]`, with nothing else running.

Starts a search of the tiny model with so many lanes, and looks at every process while all lanes train. Memory is the
proportional set size: shared libraries count once for all processes that map them.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

import psutil

from raylora.run.directory import RunDirectory
from raylora.run.state import SearchState

LANE = "ray::RayTrainWorker"
"""The lane itself, on a node of its own. All other processes are counted as the head's."""

MANY_LANES, SLOTS = 64, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = _measure(Path(folder), arguments.lanes, arguments.seconds)
    head = {name: row for name, row in found.items() if name != LANE}
    # Ray Train has several helpers for each of its runs, and does not say where it places them
    per_lane = [row for name, row in head.items() if name.startswith("ray::") and row["n"] == arguments.lanes]
    once = [row for row in head.values() if row not in per_lane]
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "lanes": arguments.lanes,
        "processes": found,
        "head_mib_once": sum(row["mib"] * row["n"] for row in once),
        "head_mib_per_lane": sum(row["mib"] for row in per_lane),
        "head_cores_once": sum(row["cores"] * row["n"] for row in once),
        "head_cores_per_lane": sum(row["cores"] for row in per_lane),
    }
    result[f"head_gib_for_{MANY_LANES}_lanes_of_{SLOTS}_slots"] = (
        result["head_mib_once"] + MANY_LANES * result["head_mib_per_lane"]
    ) / 1024
    result[f"head_cores_for_{MANY_LANES}_lanes_of_{SLOTS}_slots"] = (
        result["head_cores_once"] + MANY_LANES * result["head_cores_per_lane"]
    )
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def _measure(folder: Path, n_lanes: int, seconds: float) -> dict[str, dict[str, float]]:
    """Return n, MiB and CPU cores of each kind of process, while all lanes train."""
    subprocess.run([sys.executable, "-m", "raylora.testing", folder], check=True)
    settings = {
        "base_model.name": folder / "model",
        "data.train": folder / "rows.jsonl",
        "training.max_steps": 1_000_000,
        "search.grace_period": 20,
        "search.n_trials": 1000,
        "search.lanes": n_lanes,
        "search.trials_per_gpu": SLOTS,
    }
    options = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "raylora.search", "search_spaces/smoke.yaml", "--output", folder / "run", *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as driver:
        try:
            run = RunDirectory(folder / "run")
            while len(SearchState.load(run).lanes) < n_lanes:
                assert driver.poll() is None, "the search has ended"
                time.sleep(1)
            return _sample(psutil.Process(driver.pid), seconds)
        finally:
            driver.send_signal(signal.SIGINT)


def _sample(driver: psutil.Process, seconds: float) -> dict[str, dict[str, float]]:
    processes = [driver, *driver.children(recursive=True)]
    before = {process: sum(process.cpu_times()[:2]) for process in processes}
    time.sleep(seconds)
    rows: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for process in processes:
        name = "driver" if process == driver else _name(process)
        cores = (sum(process.cpu_times()[:2]) - before[process]) / seconds
        rows[name].append((process.memory_full_info().pss / 2**20, cores))
    return {
        name: {
            "n": len(found),
            "mib": round(sum(mib for mib, _ in found) / len(found), 1),
            "cores": round(sum(cores for _, cores in found) / len(found), 4),
        }
        for name, found in sorted(rows.items())
    }


def _name(process: psutil.Process) -> str:
    words = process.cmdline()
    actor = re.match(r"ray::\w+", words[0])
    if actor:
        return actor.group()
    script = next((word for word in words if word.endswith(".py")), words[0])
    return Path(script).name


if __name__ == "__main__":
    main()
