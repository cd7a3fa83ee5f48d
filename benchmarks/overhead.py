"""Measures what a search costs beyond its trials' training and validation steps.

Run as `python benchmarks/overhead.py OUTPUT.json [--section.key value ...]`, with nothing else running. It runs
`search_spaces/demo.yaml` with 16 trials on one lane, then the same trials to the same steps back to back in one
process, then one trial in a fresh process and one in a fresh search.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from raylora.cli.command import parse_overrides
from raylora.config.load import load_config
from raylora.data.of_run import data_of_run
from raylora.quiet import quiet_libraries
from raylora.run.atomic import read_json
from raylora.run.directory import RunDirectory
from raylora.run.metrics import RungMetrics
from raylora.run.state import SearchState
from raylora.run.trial_row import TrialRow
from raylora.search.plan import plan_lanes
from raylora.search.ray.cluster import local_devices
from raylora.training.trl import TrlEngine

SPACE = "search_spaces/demo.yaml"
SETTINGS = [
    "--search.engine",
    "trl",
    "--search.scheduler",
    "asha",
    "--training.max_steps",
    "12",
    "--search.grace_period",
    "4",
    "--search.reduction_factor",
    "3",
]
N_TRIALS = 16


def main() -> None:
    output, *extra = sys.argv[1:]
    settings = [*SETTINGS, *extra]
    with tempfile.TemporaryDirectory() as folder:
        run = search(Path(folder) / "warm", settings, N_TRIALS)
        trials = sorted(SearchState.load(run).trials.values(), key=lambda trial: trial.number)
        lanes = read_json(run.lanes_file)
        lane = lanes["lanes"]["0"]
        on_lane = max(trial.ended_at or 0.0 for trial in trials) - lane["ready_at"]
        spent = sum(_steps(trial) for trial in trials)
        alone = back_to_back(run, settings, trials, Path(folder) / "alone")
        cold_process = time_of([sys.executable, "-m", "raylora.trial", SPACE, *settings, "--output", f"{folder}/cold"])
        cold_run = search(Path(folder) / "cold-lane", settings, 1)
        (cold,) = SearchState.load(cold_run).trials.values()
        result = {
            "date": date.today().isoformat(),
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {lane['device']}",
            "trials": len(trials),
            "states": {
                state: sum(trial.state == state for trial in trials) for state in ("finished", "stopped", "failed")
            },
            "search_seconds_on_lane": on_lane,
            "training_and_validation_seconds_in_search": spent,
            "training_and_validation_seconds_back_to_back": alone,
            "ratio": on_lane / alone,
            "seconds_outside_steps_per_trial_warm": (on_lane - spent) / len(trials),
            "seconds_outside_steps_per_trial_cold_process": cold_process - _steps(trials[0]),
            "seconds_outside_steps_per_trial_cold_lane": cold.wall_seconds - _steps(cold),
            "lane_start_seconds": lane["ready_at"] - trials[0].started_at,
            "of_which_loading_the_base": lane["load_seconds"],
            "peak_memory_mib_driver": lanes["driver"]["peak_memory_mib"],
            "peak_memory_mib_lane": max(trial.peak_memory_mib or 0.0 for trial in trials),
        }
    Path(output).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def search(path: Path, settings: list[str], n_trials: int) -> RunDirectory:
    """One search; held-out check and merge run too, and are not counted."""
    command = [sys.executable, "-m", "raylora.search", SPACE, *settings, "--search.n_trials", str(n_trials)]
    subprocess.run([*command, "--search.lanes", "1", "--output", str(path)], check=True, stdout=subprocess.DEVNULL)
    return RunDirectory(path)


def back_to_back(run: RunDirectory, settings: list[str], trials: list[TrialRow], folder: Path) -> float:
    """Seconds in training and validation steps of the same trials, in this process, without Ray."""
    quiet_libraries()
    config = load_config(SPACE, parse_overrides(settings))
    on_gpu, _ = plan_lanes(config, local_devices())
    torch.set_num_threads(local_devices().n_cpus)
    provenance = run.provenance()
    engine = TrlEngine.load(
        config,
        tokens_dir=data_of_run(run, config).tokens_dir,
        cache_dir=run.cache(config),
        device="cuda:0" if on_gpu else "cpu",
    )
    seconds = 0.0
    for trial in trials:

        def report(one: RungMetrics, last: int = trial.step) -> bool:
            nonlocal seconds
            seconds += one.train_seconds + one.eval_seconds
            return one.step >= last

        engine.fit(trial.assignment(), rungs=provenance["rungs"], directory=folder / str(trial.number), report=report)
    return seconds


def time_of(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def _steps(trial: TrialRow) -> float:
    return (trial.train_seconds or 0.0) + (trial.eval_seconds or 0.0)


if __name__ == "__main__":
    main()
