"""Measures what a whole search costs, in fine-tunes: its wall time over that of one full-length run of its best trial.

Run as `python benchmarks/search_cost.py OUTPUT.json SPACE.yaml [--section.key value ...] [--regret]`, with nothing else
running. The one run is by TRL and peft alone, in a process of its own; both count from the start of their process, with
data and base in the cache. With `--regret`, all trials are then trained to the full budget, to see what the search
missed.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from raylora.data.of_run import data_of_run
from raylora.quiet import quiet_libraries
from raylora.run.atomic import read_json
from raylora.run.directory import RunDirectory
from raylora.run.metrics import RungMetrics
from raylora.run.state import SearchState
from raylora.run.trial_row import TrialRow
from raylora.search.ray.cluster import local_devices
from raylora.training.choose import load_packed


def main() -> None:
    output, space, *settings = sys.argv[1:]
    regret = "--regret" in settings
    settings = [setting for setting in settings if setting != "--regret"]
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        settings += ["--cache_dir", f"{folder}/cache"]
        # fills the cache, as an earlier search would have
        subprocess.run([*_search(space, settings, f"{folder}/dry"), "--dry-run"], check=True, stdout=subprocess.DEVNULL)
        one_step = ["--training.max_steps", "1", "--search.grace_period", "1"]
        _alone(space, [*settings, *one_step], None, Path(folder) / "first")
        began = time.time()
        subprocess.run(_search(space, settings, f"{folder}/run"), check=True, stdout=subprocess.DEVNULL)
        run = RunDirectory(Path(folder) / "run")
        state = SearchState.load(run)
        trials = list(state.trials.values())
        best = state.best()
        assert best is not None
        search_seconds = max(trial.ended_at or 0.0 for trial in trials) - began
        alone_seconds, alone_loss = _alone(space, settings, best, Path(folder) / "alone")
        lane = read_json(run.lanes_file)["lanes"]["0"]
        result = {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {lane['device']}",
            "space": space,
            "settings": settings[:-2],
            "engine": lane["engine"],
            "slots": lane["slots"],
            "trials": len(trials),
            "rungs": run.provenance()["rungs"],
            "reached": {step: sum(row.step == step for row in state.history) for step in run.provenance()["rungs"]},
            "search_seconds": search_seconds,
            "of_which_until_the_lane_is_ready": lane["ready_at"] - began,
            "of_which_training": sum(trial.train_seconds or 0.0 for trial in trials),
            "of_which_validation": sum(trial.eval_seconds or 0.0 for trial in trials),
            "of_which_checkpoints": sum(trial.other_seconds or 0.0 for trial in trials),
            "one_fine_tune_seconds": alone_seconds,
            "search_cost": search_seconds / alone_seconds,
            "seconds_from_a_report_to_the_next_trial": _gaps(state),
            "eval_loss_of_the_best_in_the_search": best.eval_loss,
            "eval_loss_of_the_same_trial_alone": alone_loss,
        }
        Path(output).write_text(json.dumps(result, indent=2) + "\n")
        if regret:
            losses = _train_all(run, trials, Path(folder) / "all")
            result["eval_loss_of_all_to_the_end"] = sorted(losses.values())
            result["regret"] = losses[best.number] / min(losses.values()) - 1
    Path(output).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def _search(space: str, settings: list[str], output: str) -> list[str]:
    return [sys.executable, "-m", "raylora.search", space, *settings, "--output", output]


def _gaps(state: SearchState) -> dict[str, float]:
    """From a report that gave a place up to the start of the next trial there: median and longest."""
    reports = sorted(row.reported_at for row in state.history)
    starts = [trial.started_at for trial in state.trials.values() if trial.started_at > reports[0]]
    gaps = [start - max(at for at in reports if at < start) for start in starts]
    return {"median": statistics.median(gaps), "max": max(gaps)}


def _alone(space: str, settings: list[str], trial: TrialRow | None, output: Path) -> tuple[float, float | None]:
    """Seconds of one fine-tune by TRL and peft in a fresh process, validated once at its end; and its loss."""
    fixed = []
    if trial is not None:
        for name in ("r", "lora_alpha", "lora_dropout", "learning_rate"):
            fixed += [f"--space.{name}", repr(getattr(trial, name))]
    command = [sys.executable, "-m", "raylora.trial", space, *settings, "--search.scheduler", "none", *fixed]
    began = time.perf_counter()
    shown = subprocess.run([*command, "--output", str(output)], check=True, capture_output=True, text=True).stdout
    seconds = time.perf_counter() - began
    return seconds, float(shown.split("eval_loss=")[1].split(",")[0])


def _train_all(run: RunDirectory, trials: list[TrialRow], folder: Path) -> dict[int, float]:
    """Validation loss of every trial at the full budget."""
    torch.set_num_threads(local_devices().n_cpus)
    config, provenance = run.config(), run.provenance()
    engine = load_packed(
        config,
        tokens_dir=data_of_run(run, config).tokens_dir,
        cache_dir=run.cache(config),
        device="cuda:0" if provenance["on_gpu"] else "cpu",
        slots=4,
    )
    waiting, losses = list(trials), {}
    while waiting or engine.trials:
        while waiting and len(engine.trials) < engine.slots:
            trial = waiting.pop()
            rungs = provenance["rungs"][-1:]
            engine.add(trial.number, trial.assignment(), rungs=rungs, directory=folder / str(trial.number))
        for number, report in engine.step().items():
            losses[number] = report.eval_loss if isinstance(report, RungMetrics) else float("inf")
            engine.remove(number)
    return losses


if __name__ == "__main__":
    main()
