"""What many do now: an Optuna loop around TRL's trainer, with Optuna's own pruner. The same search beside it.

Run as `python benchmarks/optuna_loop.py OUTPUT.json SPACE.yaml [--section.key value ...]`, with nothing else running.
Both start with data and base in the cache, both count from the start of their process, and both have the same space,
seed, trials, rungs and reduction factor. The loop loads the base once, which not every loop does.
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

import optuna
import torch

from raylora.cluster import local_devices
from raylora.noise import quiet_libraries
from raylora.records import Records
from raylora.run_directory import RunDirectory
from raylora.rung import Report
from raylora.space import Assignment
from raylora.training import TrlEngine


def main() -> None:
    if sys.argv[1] == "--loop":
        loop(*sys.argv[2:])
        return
    output, space, *settings = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        settings += ["--cache_dir", f"{folder}/cache"]
        search = [sys.executable, "-m", "raylora.search", space, *settings, "--output", f"{folder}/run"]
        # fills the cache
        warm = ["--training.max_steps", "1", "--search.grace_period", "1", "--output", f"{folder}/warm"]
        subprocess.run(
            [sys.executable, "-m", "raylora.trial", space, *settings, *warm], check=True, capture_output=True
        )
        began = time.time()
        subprocess.run(search, check=True, stdout=subprocess.DEVNULL)
        records = Records.load(RunDirectory(Path(folder) / "run"))
        ours = max(trial.ended_at or 0.0 for trial in records.trials.values()) - began
        best = records.best()
        assert best is not None
        began = time.perf_counter()
        command = [sys.executable, __file__, "--loop", f"{folder}/loop.json", f"{folder}/run", f"{folder}/loop"]
        subprocess.run(command, check=True)
        theirs = time.perf_counter() - began
        found = json.loads(Path(folder, "loop.json").read_text())
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "space": space,
        "settings": settings[:-2],
        "search_seconds": ours,
        "search_eval_loss": best.eval_loss,
        "search_steps": sum(trial.step for trial in records.trials.values()),
        "loop_seconds": theirs,
        **found,
        "faster": theirs / ours,
    }
    Path(output).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def loop(output: str, run_path: str, folder: str) -> None:
    """Optuna's TPE and SuccessiveHalvingPruner around TRL, on the data and with the settings of a run directory."""
    quiet_libraries()
    run = RunDirectory(Path(run_path))
    config, provenance = run.config(), run.provenance()
    rungs = provenance["rungs"]
    torch.set_num_threads(local_devices().n_cpus)
    engine = TrlEngine.load(
        config,
        tokens_dir=Path(provenance["tokens_dir"]),
        cache_dir=run.cache(config),
        device="cuda:0" if provenance["on_gpu"] else "cpu",
    )
    steps = dict.fromkeys(range(config.n_trials()), 0)

    def objective(trial: optuna.Trial) -> float:
        values = {name: getattr(config.training, name, None) for name in Assignment.model_fields}
        assignment = Assignment.model_validate({**values, **config.search_space().suggest(trial)})
        losses: list[float] = []

        def report(one: Report) -> bool:
            losses.append(one.eval_loss)
            steps[trial.number] = one.step
            trial.report(one.eval_loss, one.step)
            return one.step < rungs[-1] and trial.should_prune()

        engine.fit(assignment, rungs=rungs, directory=Path(folder) / str(trial.number), report=report)
        if steps[trial.number] < rungs[-1]:
            raise optuna.TrialPruned
        return losses[-1]

    pruner = optuna.pruners.SuccessiveHalvingPruner(
        min_resource=rungs[0], reduction_factor=config.search.reduction_factor
    )
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=config.search.seed), pruner=pruner)
    for point in config.starting_points:
        study.enqueue_trial(config.search_space().to_optuna(point, where="starting point"))
    study.optimize(objective, n_trials=config.n_trials())
    values = {"loop_eval_loss": study.best_value, "loop_steps": sum(steps.values())}
    Path(output).write_text(json.dumps(values))


if __name__ == "__main__":
    main()
