"""Compares settings of halving on recorded learning curves: how far over the best does a search end, at what price?

Run as `python benchmarks/search_rules.py record CURVES.json SPACE.yaml [--section.key value ...]`, which trains every
point of a grid to the full budget; then as `python benchmarks/search_rules.py simulate OUTPUT.json CURVES.json ...`.

A simulated search has the real controller, halving and sampler. Its lane trains nothing: losses come from the curves,
interpolated, times a random factor for what chance does to a trial. So hundreds of searches take minutes, and settings
are told apart that single searches leave open.
"""

import json
import math
import os
import platform
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from raylora.config.load import load_config
from raylora.config.schema import SearchConfig
from raylora.quiet import quiet_libraries
from raylora.run.directory import open_run
from raylora.run.events import EventLog
from raylora.run.metrics import RungMetrics
from raylora.search.controller import SearchController
from raylora.search.messages import Batch, Order, Ready, Report, Start
from raylora.search.plan import make_plan
from raylora.search.ray.cluster import local_devices
from raylora.search.sampler import complete
from raylora.training.choose import load_packed

SHARES = (1 / 27, 1 / 18, 2 / 27, 1 / 9, 1 / 6, 2 / 9, 1 / 3, 1 / 2, 2 / 3, 1)
"""Shares of the full budget at which curves are recorded."""

SLOTS = 8
"""Trials at once where curves are recorded; half of them in a simulation."""

CHANCE = {0.05: 0.001, 0.9: 0.008, 1.0: 0.006}
"""Up to this share of the budget -> standard deviation of the log loss of trials whose settings are nearly the same.

Measured: 17 trials of another search against the curves of E2E (benchmarks/search.md).
"""

SEEDS = range(60)
"""Values of `search.seed`."""

RULES: dict[str, dict[str, str]] = {
    "27 trials": {},
    "27 trials, finalists 1": {"search.finalists": "1"},
    "27 trials, finalists 5": {"search.finalists": "5"},
    "27 trials, in step": {"search.scheduler": "halving"},
    "27 trials, at random": {"search.sampler": "random"},
    "27 trials, reduction factor 2": {"search.reduction_factor": "2"},
    "27 trials, rungs 4, 12, 36": {"search.grace_period": "4"},
    "27 trials, rungs 6, 18": {"search.grace_period": "6"},
    "27 trials, no rungs": {"search.scheduler": "none"},
    "16 trials, rungs 4, 12, 36": {"search.n_trials": "16", "search.grace_period": "4"},
    "16 trials, rungs 6, 18": {"search.n_trials": "16", "search.grace_period": "6"},
    "6 trials, no rungs": {"search.n_trials": "6", "search.scheduler": "none"},
}
"""Name -> what differs from `COST`."""

COST = {
    "search.n_trials": "27",
    "search.reduction_factor": "3",
    "search.grace_period": "2",
    "training.max_steps": "54",
}
"""Settings of the search whose cost is measured: rungs at 2, 6, 18 and 54 steps."""


def record(output: Path, space: Path, settings: list[str]) -> None:
    """Train every point of a grid to the full budget, the fastest first, and write the curves so far at each end."""
    overrides = {key.removeprefix("--"): value for key, value in zip(settings[::2], settings[1::2], strict=True)}
    config = load_config(space, overrides)
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(Path(folder) / "run", config, resume=False)
        plan = make_plan(config, run, local_devices())
        torch.set_num_threads(plan.threads)
        engine = load_packed(
            config,
            tokens_dir=plan.data.tokens_dir,
            cache_dir=run.cache(config),
            device="cuda:0" if plan.on_gpu else "cpu",
            slots=SLOTS,
        )
        last = plan.rungs[-1]
        steps = sorted({max(1, round(share * last)) for share in SHARES})
        points = sorted(config.search_space().grid(), key=lambda point: -float(point["learning_rate"]))
        losses: list[dict[int, float]] = [{} for _ in points]
        waiting = list(range(len(points)))
        while waiting or engine.trials:
            while waiting and len(engine.trials) < engine.slots:
                number = waiting.pop(0)
                assignment = complete(points[number], config.training)
                engine.add(number, assignment, rungs=steps, directory=run.trial(number))
            for number, report in engine.step().items():
                if isinstance(report, RungMetrics):
                    losses[number][report.step] = report.eval_loss
                if not isinstance(report, RungMetrics) or report.step == last:
                    engine.remove(number)
                    curves = [{**points[i], "eval_loss": losses[i]} for i in range(len(points)) if losses[i]]
                    facts = {"date": date.today().isoformat(), "machine": _machine(), "settings": settings}
                    output.write_text(json.dumps({**facts, "curves": curves}) + "\n")


class Curves:
    """Validation loss of any assignment at any step, in nats per token, by recorded curves.

    Between recorded learning rates and steps, the logarithm of the loss is linear in theirs. Dropout is ignored.

    Args:
        curves: entries of a recorded file; those that did not reach the full budget are left out.
    """

    def __init__(self, curves: list[dict[str, Any]]) -> None:
        self.steps = np.array([int(step) for step in curves[0]["eval_loss"]])
        self._kinds: dict[tuple[int, float], tuple[list[float], list[list[float]]]] = {}
        for curve in sorted(curves, key=lambda curve: float(curve["learning_rate"])):
            if len(curve["eval_loss"]) == len(self.steps):
                rates, losses = self._kinds.setdefault((curve["r"], curve["lora_alpha"] / curve["r"]), ([], []))
                rates.append(math.log(curve["learning_rate"]))
                losses.append([math.log(loss) for loss in curve["eval_loss"].values()])

    def loss(self, assignment: dict[str, Any], step: int) -> float:
        """Return the loss of an assignment at a step. Beyond the recorded rates, the nearest one counts."""
        rates, losses = self._kinds[assignment["r"], assignment["lora_alpha"] / assignment["r"]]
        rate = math.log(assignment["learning_rate"])
        curve = [np.interp(rate, rates, column) for column in zip(*losses, strict=True)]
        return math.exp(np.interp(math.log(step), np.log(self.steps), curve))

    def best(self) -> float:
        """Return the lowest recorded loss at the full budget."""
        return math.exp(min(loss[-1] for _, losses in self._kinds.values() for loss in losses))


def search(curves: Curves, config: SearchConfig) -> dict[str, float]:
    """Simulate one search.

    Returns:
        regret: expected loss of the chosen trial over the best recorded one, less 1.
        steps: steps of all trials.
    """
    budget = int(curves.steps[-1])
    chance, factors = Random(config.search.seed), dict[tuple[int, int], float]()

    def report(start: Start, step: int) -> Report:
        deviation = next(value for share, value in CHANCE.items() if step <= share * budget)
        factor = factors.setdefault((start.number, step), math.exp(chance.gauss(0, deviation)))
        loss = factor * curves.loss(start.assignment, step)
        return Report(
            start.number,
            start.segment,
            RungMetrics(step, 1.0, loss, loss, 0, 1.0, 1.0, 1.0, 1.0, 1, f"trials/{start.number}/checkpoint-{step}"),
        )

    with tempfile.TemporaryDirectory() as folder:
        log = EventLog(Path(folder) / "events.jsonl")
        log.flush = lambda: None  # type: ignore[method-assign]
        controller = SearchController(config, config.rungs(budget), log)
        controller.begin("here", 1)
        trials: dict[int, tuple[Start, int]] = {}
        orders: list[Order] = controller.handle(Batch("0", 1, 1, [Ready(SLOTS // 2, {})]))["0"]
        n_steps, round_ = 0, 1
        while not controller.over:
            for order in orders:
                if isinstance(order, Start):
                    done = int(order.resume_from.rsplit("-", 1)[1]) if order.resume_from else 0
                    trials[order.number] = order, done
                else:
                    del trials[order.number]
            to_go = min(next(rung for rung in start.rungs if rung > step) - step for start, step in trials.values())
            n_steps += to_go * len(trials)
            trials = {number: (start, step + to_go) for number, (start, step) in trials.items()}
            reports = [report(start, step) for start, step in trials.values() if step in start.rungs]
            round_ += 1
            orders = controller.handle(Batch("0", 1, round_, list(reports))).get("0", [])
        best = controller.state.best()
        assert best is not None
        expected = curves.loss(best.assignment().model_dump(), budget)
        return {"regret": expected / curves.best() - 1, "steps": n_steps}


def _simulate_one(job: tuple[list[dict[str, Any]], dict[str, str], int]) -> dict[str, float]:
    """Simulate one search in the demo's space, as far as it was recorded."""
    curves, overrides, seed = job
    ranks, scalings = {curve["r"] for curve in curves}, {curve["lora_alpha"] // curve["r"] for curve in curves}
    space = {
        "space.r": f"{{choice: {sorted(ranks)}}}",
        "space.lora_alpha": f"{{choice: {sorted(scalings)}, times: r}}",
    }
    settings = {**COST, **space, **overrides, "search.seed": str(seed)}
    return search(Curves(curves), load_config(Path("search_spaces/demo.yaml"), settings))


def simulate(recorded: Path, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Simulate searches by each rule on one file of curves, with the space's starting points and without."""
    curves = json.loads(recorded.read_text())["curves"]
    found: dict[str, Any] = {name: {} for name in RULES}
    for start, points in (("starting points", {}), ("no starting points", {"starting_points": "[]"})):
        for name, rule in RULES.items():
            results = list(pool.map(_simulate_one, [(curves, {**points, **rule}, seed) for seed in SEEDS], chunksize=5))
            regrets = [result["regret"] for result in results]
            found[name][start] = {
                "mean_regret": statistics.mean(regrets),
                "standard_error": statistics.stdev(regrets) / math.sqrt(len(regrets)),
                "worst_of_ten": sorted(regrets)[len(regrets) * 9 // 10],
                "mean_steps": statistics.mean(result["steps"] for result in results),
            }
            print(recorded.stem, start, name, found[name][start], flush=True)
    return found


def _machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    quiet_libraries()
    what, first, second, *others = sys.argv[1:]
    if what == "record":
        record(Path(first), Path(second), others)
    else:
        with ProcessPoolExecutor() as workers:
            rules = {Path(file).stem: simulate(Path(file), workers) for file in (second, *others)}
        facts = {"date": date.today().isoformat(), "machine": _machine(), "seeds": len(SEEDS)}
        Path(first).write_text(json.dumps({**facts, "curves": rules}, indent=1) + "\n")
