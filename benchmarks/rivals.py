"""The same search as others do it now: the wall time, and the loss of what is chosen.

Run as `python benchmarks/rivals.py OUTPUT.json SPACE.yaml [--section.key value ...]`, with nothing else running. All
start with data and base in the cache, all count from the start of their process, and all have the same space, seed,
trials, rungs, reduction factor and TRL trainer.

- optuna: a loop around TRL with Optuna's own pruner. It loads the base once, which not every loop does.
- tune: what Ray's documentation shows, a Tune function that starts a TorchTrainer for each trial, with ASHA. It needs
  the dashboard, and its address in each worker's environment; without them it hangs at the first trial that ASHA stops
  (ray#54305).
"""

import functools
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import optuna
import ray
import torch
from ray import tune
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from raylora.config.assignment import Assignment
from raylora.config.kinds import Suggester
from raylora.config.schema import SearchConfig
from raylora.data.of_run import data_of_run
from raylora.quiet import quiet_libraries
from raylora.run.directory import RunDirectory
from raylora.run.metrics import RungMetrics
from raylora.run.state import SearchState
from raylora.search.ray.cluster import local_devices
from raylora.training.trl import TrlEngine

TIMEOUT = 3600


def main() -> None:
    if sys.argv[1] == "--rival":
        name, run_path, folder, result_file = sys.argv[2:]
        quiet_libraries()
        found = RIVALS[name](RunDirectory(Path(run_path)), Path(folder))
        Path(result_file).write_text(json.dumps(found))
        return
    output, space, *settings = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        settings += ["--cache_dir", f"{folder}/cache"]
        # fills the cache
        warm = ["--training.max_steps", "1", "--search.grace_period", "1", "--output", f"{folder}/warm"]
        subprocess.run(
            [sys.executable, "-m", "raylora.trial", space, *settings, *warm], check=True, capture_output=True
        )
        search = [sys.executable, "-m", "raylora.search", space, *settings, "--output", f"{folder}/run"]
        began = time.time()
        subprocess.run(search, check=True, stdout=subprocess.DEVNULL)
        run = RunDirectory(Path(folder) / "run")
        state = SearchState.load(run)
        best = state.best()
        assert best is not None
        seconds = max(trial.ended_at or 0.0 for trial in state.trials.values()) - began
        steps = sum(trial.step for trial in state.trials.values())
        result: dict[str, Any] = {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "space": space,
            "settings": settings[:-2],
            "rungs": run.provenance()["rungs"],
            "raylora": {"seconds": seconds, "eval_loss": best.eval_loss, "steps": steps},
        }
        for name in RIVALS:
            result[name] = _rival(name, Path(folder), seconds)
            Path(output).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def _rival(name: str, folder: Path, our_seconds: float) -> dict[str, Any]:
    result_file = folder / f"{name}.json"
    command = [sys.executable, __file__, "--rival", name, folder / "run", folder / name, result_file]
    began = time.perf_counter()
    try:
        subprocess.run(command, check=True, timeout=TIMEOUT)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        return {"failed": str(error).replace(str(folder), "")}
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "over_raylora": seconds / our_seconds, **json.loads(result_file.read_text())}


def loop(run: RunDirectory, folder: Path) -> dict[str, Any]:
    """Optuna's TPE and SuccessiveHalvingPruner around TRL, on the data and with the settings of a run directory."""
    config, rungs = run.config(), run.provenance()["rungs"]
    engine = _load(run, config)
    steps = dict.fromkeys(range(config.n_trials()), 0)

    def objective(trial: optuna.Trial) -> float:
        losses: list[float] = []

        def report(one: RungMetrics) -> bool:
            losses.append(one.eval_loss)
            steps[trial.number] = one.step
            trial.report(one.eval_loss, one.step)
            return one.step < rungs[-1] and trial.should_prune()

        engine.fit(_suggested(config, trial), rungs=rungs, directory=folder / str(trial.number), report=report)
        if steps[trial.number] < rungs[-1]:
            raise optuna.TrialPruned
        return losses[-1]

    pruner = optuna.pruners.SuccessiveHalvingPruner(
        min_resource=rungs[0], reduction_factor=config.search.reduction_factor
    )
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=config.search.seed), pruner=pruner)
    for point in _starting_points(config):
        study.enqueue_trial(point)
    study.optimize(objective, n_trials=config.n_trials())
    return {"eval_loss": study.best_value, "steps": sum(steps.values())}


def tune_and_train(run: RunDirectory, folder: Path) -> dict[str, Any]:
    """A Tune function that starts a TorchTrainer for each trial, one at a time, with OptunaSearch and ASHA."""
    config, provenance = run.config(), run.provenance()
    rungs, devices = provenance["rungs"], local_devices()

    def train(values: dict[str, Any]) -> None:
        quiet_libraries()
        directory = folder / "checkpoints" / values["name"]

        def report(one: RungMetrics) -> bool:
            ray.train.report({"eval_loss": one.eval_loss, "step": one.step})
            return False

        _load(run, config).fit(Assignment(**values["assignment"]), rungs=rungs, directory=directory, report=report)

    def trial(values: dict[str, Any]) -> None:
        name = tune.get_context().get_trial_id()
        TorchTrainer(
            train,
            train_loop_config={**values, "name": name},
            scaling_config=ScalingConfig(num_workers=1, use_gpu=provenance["on_gpu"]),
            run_config=RunConfig(name=name, storage_path=str(folder / "train"), callbacks=[TuneReportCallback()]),
        ).fit()

    with tempfile.TemporaryDirectory() as temporary:
        os.environ["RAY_GCS_SERVER_PORT"] = port = str(_free_port())
        address = f"{ray.util.get_node_ip_address()}:{port}"
        ray.init(
            num_cpus=2,
            include_dashboard=True,
            _temp_dir=temporary,
            log_to_driver=False,
            runtime_env={"env_vars": {"RAY_ADDRESS": address}},
        )
        os.environ["OMP_NUM_THREADS"] = str(devices.n_cpus)
        tuner = tune.Tuner(
            tune.with_resources(trial, {"CPU": 1}),
            tune_config=tune.TuneConfig(
                metric="eval_loss",
                mode="min",
                num_samples=config.n_trials(),
                max_concurrent_trials=1,
                search_alg=OptunaSearch(
                    space=functools.partial(_defined_by_run, config),
                    points_to_evaluate=_starting_points(config),
                    metric="eval_loss",
                    mode="min",
                    seed=config.search.seed,
                ),
                scheduler=ASHAScheduler(
                    time_attr="step",
                    grace_period=rungs[0],
                    reduction_factor=config.search.reduction_factor,
                    max_t=rungs[-1],
                ),
            ),
            run_config=tune.RunConfig(storage_path=str(folder / "tune"), verbose=0),
        )
        results = [one.metrics for one in tuner.fit() if one.metrics and "step" in one.metrics]
        ray.shutdown()
    finished = [one["eval_loss"] for one in results if one["step"] == rungs[-1]]
    return {"eval_loss": min(finished), "steps": sum(one["step"] for one in results), "trials": len(results)}


RIVALS: dict[str, Callable[[RunDirectory, Path], dict[str, Any]]] = {"optuna": loop, "tune": tune_and_train}


def _load(run: RunDirectory, config: SearchConfig) -> TrlEngine:
    provenance = run.provenance()
    torch.set_num_threads(local_devices().n_cpus)
    device = "cuda:0" if provenance["on_gpu"] else "cpu"
    tokens_dir = data_of_run(run, config).tokens_dir
    return TrlEngine.load(config, tokens_dir=tokens_dir, cache_dir=run.cache(config), device=device)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _suggested(config: SearchConfig, trial: Suggester) -> Assignment:
    values = {name: getattr(config.training, name, None) for name in Assignment.model_fields}
    return Assignment.model_validate({**values, **config.search_space().suggest(trial)})


def _defined_by_run(config: SearchConfig, trial: Suggester) -> dict[str, Any]:
    """A search space as OptunaSearch takes it: what is returned goes to the trial beside the suggested values."""
    return {"assignment": _suggested(config, trial).model_dump()}


def _starting_points(config: SearchConfig) -> list[dict[str, Any]]:
    space = config.search_space()
    return [space.to_optuna(point, where="starting point") for point in config.starting_points]


if __name__ == "__main__":
    main()
