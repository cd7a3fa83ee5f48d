"""Runs one search: Ray Tune's trials, Optuna's proposals and ASHA's decisions on resident lanes."""

import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from raylora.broker import Broker
from raylora.errors import SearchError
from raylora.files import write_json
from raylora.lane import LaneSettings, describe_failure, lane_trainer
from raylora.progress import Progress
from raylora.proxy import TrialProxy
from raylora.records import HistoryRow, Records
from raylora.run_directory import RunDirectory
from raylora.study import Study

PATIENCE_SECONDS = 120
"""After so long without a lane, the user is told what it may be waiting for."""


@dataclass(frozen=True)
class Limits:
    """When a search ends."""

    n_trials: int
    max_steps: int
    max_initial_failures: int
    time_budget_minutes: float | None


class Bookkeeper(Searcher):
    """Tune's searcher: asks Optuna for assignments, and tells it and the tables what became of them.

    Every event of a trial passes here, so here alone its state is decided: finished when it reached the full budget,
    failed when it raised, stopped otherwise.
    """

    def __init__(
        self,
        study: Study,
        records: Records,
        broker: ActorHandle,
        limits: Limits,
        progress: Progress,
    ) -> None:
        super().__init__(metric="eval_loss", mode="min")
        self._study, self._records, self._broker = study, records, broker
        self._limits, self._progress = limits, progress
        self._numbers: dict[str, int] = {}
        self._to_resume = study.running()
        self._began = time.monotonic()
        self.no_lane: str | None = None
        """Why the last lane is gone, once it is."""

        self.interrupted = False
        """Set by Ctrl-C; trials under way then stay running, for a resumed search to take up."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        if self.interrupted or self.no_lane or self.gave_up() or self._out_of_time():
            return Searcher.FINISHED
        resume_from = None
        if self._to_resume:
            number = min(self._to_resume)
            assignment = self._to_resume.pop(number)
            if number in self._records.trials:
                resume_from = self._records.trials[number].checkpoint
        elif self._study.n_asked() < self._limits.n_trials:
            number, assignment = self._study.ask()
        else:
            return Searcher.FINISHED
        self._numbers[trial_id] = number
        self._records.started(number, assignment, self._limits.max_steps)
        self._progress.changed()
        return {"number": number, "assignment": assignment.model_dump(), "resume_from": resume_from}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        number = self._numbers[trial_id]
        if result.get("step", 0) > self._records.trials[number].step:
            self._study.report(number, result["step"], result["eval_loss"])
            self._records.reported(number, result)
            self._progress.reported(number)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if self.interrupted:
            return
        number = self._numbers[trial_id]
        result = result or {}
        self.on_trial_result(trial_id, result)
        trial = self._records.trials[number]
        reason = "Tune's actor of the trial died" if error else result.get("failure")
        if "no_lane" in result:
            self.no_lane = result["no_lane"]  # the trial stays running, for a resumed search to take up
            return
        if reason is not None:
            self._records.ended(number, "failed", reason)
            self._study.fail(number, reason)
        elif trial.step >= self._limits.max_steps and trial.eval_loss is not None:
            self._records.ended(number, "finished")
            self._study.finish(number, trial.eval_loss)
        else:
            self._records.ended(number, "stopped", f"ASHA at step {trial.step}")
            self._study.stop(number)
        self._broker.stop.remote(number)
        self._progress.ended(number)

    def gave_up(self) -> bool:
        """Whether the first trials all failed."""
        ended = [trial for trial in self._records.trials.values() if trial.state != "running"]
        return len(ended) >= self._limits.max_initial_failures and all(trial.state == "failed" for trial in ended)

    def _out_of_time(self) -> bool:
        budget = self._limits.time_budget_minutes
        return budget is not None and time.monotonic() - self._began > 60 * budget

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher for `Tuner.restore`, which is not used here; see `reconcile`."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: study and tables are on disk after every event."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore, likewise."""


def reconcile(study: Study, records: Records) -> None:
    """Makes the study agree with the tables, which are written first, after a kill between the two."""
    study.discard_unassigned()
    for number in study.running():
        trial = records.trials.get(number)
        if trial is None or trial.state == "running":
            continue
        if trial.state == "finished" and trial.eval_loss is not None:
            study.finish(number, trial.eval_loss)
        elif trial.state == "stopped":
            study.stop(number)
        else:
            study.fail(number, trial.reason or "unknown")


def run_search(
    run: RunDirectory,
    settings: list[LaneSettings],
    broker: ActorHandle,
    progress: Progress,
    records: Records,
    study: Study,
) -> None:
    """Runs trials until the search's total is reached. Ray must be initialised.

    Args:
        run: receives tables, study, checkpoints and logs.
        settings: one per lane.
        broker: from `start_broker`.
        progress: shown as the search goes on.
        records: the run's tables, as they stand.
        study: the run's study, as it stands.

    Raises:
        SearchError: the first trials all failed, no trial finished, or no lane came up.
        KeyboardInterrupt: Ctrl-C or SIGTERM; everything is kept.
    """
    config, rungs = settings[0].config, settings[0].rungs
    limits = Limits(config.n_trials(), rungs[-1], config.search.max_initial_failures, config.search.time_budget_minutes)
    bookkeeper = Bookkeeper(study, records, broker, limits, progress)
    ending = threading.Event()
    lanes = [_start_lane(lane, ending) for lane in settings]
    patience = threading.Timer(PATIENCE_SECONDS, _say_what_is_missing, [broker, progress, settings[0].on_gpu])
    patience.daemon = True
    patience.start()
    try:
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(TrialProxy, broker=broker, max_steps=rungs[-1]),
                # on the driver's node, where it takes no place from a lane and no spot node's end can take it
                tune.PlacementGroupFactory([{f"node:{ray.util.get_node_ip_address()}": 0.001}]),
            ),
            tune_config=tune.TuneConfig(
                search_alg=bookkeeper,
                scheduler=_scheduler(config.search.scheduler, rungs, config.search.reduction_factor, records.history),
                num_samples=-1,
                max_concurrent_trials=len(settings),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=f"tune-{time.time_ns()}",
                storage_path=str(run.logs / "tune"),
                stop=_StopWhenInterrupted(bookkeeper),
                verbose=0,
            ),
        )
        with _interrupting(bookkeeper):
            try:
                tuner.fit()
            except Exception:  # whatever Tune stumbles over while it is being ended is no news
                if not bookkeeper.interrupted:
                    raise
    finally:
        patience.cancel()
        ending.set()
        ray.get(broker.close.remote())
    _write_lanes(run, ray.get(broker.lanes.remote()))
    if bookkeeper.interrupted:
        for lane in lanes:
            lane.join(timeout=5)  # those between trials; the others end with Ray
        raise KeyboardInterrupt
    if bookkeeper.no_lane:
        raise SearchError(f"no lane is left: {bookkeeper.no_lane}; mend it and go on with --resume")
    for lane in lanes:
        lane.join(timeout=30)
    if bookkeeper.gave_up():
        raise SearchError(_failures("the first trials all failed", records))
    if records.best() is None:
        raise SearchError(_failures("no trial reached the full budget", records))


class _StopWhenInterrupted(tune.Stopper):
    """Ends Tune's loop between two events, so that no table or study is left half-written."""

    def __init__(self, bookkeeper: Bookkeeper) -> None:
        self._bookkeeper = bookkeeper

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._bookkeeper.interrupted


@contextmanager
def _interrupting(bookkeeper: Bookkeeper) -> Iterator[None]:
    """The first Ctrl-C ends the search in order; a second one does what it did before."""

    def note(signum: int, frame: object) -> None:
        bookkeeper.interrupted = True
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_broker(n_lanes: int) -> ActorHandle:
    """The broker's actor, without a CPU of its own."""
    return ray.remote(num_cpus=0, max_concurrency=1000)(Broker).remote(n_lanes)


def _say_what_is_missing(broker: ActorHandle, progress: Progress, on_gpu: bool) -> None:
    """A cluster that has no room for a lane would otherwise be waited for in silence."""
    if not ray.get(broker.lanes.remote()):
        kind = "GPU" if on_gpu else "CPU"
        total, free = ray.cluster_resources().get(kind, 0), ray.available_resources().get(kind, 0)
        progress.note(
            f"no lane is up after {PATIENCE_SECONDS} s: it loads the base, or waits for a {kind}; "
            f"the cluster has {total:g}, {free:g} free (`ray status` says more)"
        )


def _write_lanes(run: RunDirectory, lanes: dict[str, dict[str, Any]]) -> None:
    """Where the lanes were, when they came up, and how much memory the driver took."""
    driver_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
    write_json(run.lanes_file, {"driver": {"peak_memory_mib": driver_mib}, "lanes": lanes})


def _start_lane(settings: LaneSettings, ending: threading.Event) -> threading.Thread:
    """A lane in a thread of its own; what ends it too early is told to the broker."""

    def run() -> None:
        try:
            lane_trainer(settings).fit()
        except Exception as error:  # Ray Train raises whatever ended the run; the trials get the reason
            if ending.is_set():
                return  # Ray may be gone, and a call to it would end the process with exit code 1
            cause = next(iter(getattr(error, "worker_failures", {}).values()), error)
            ray.get(settings.broker.lane_lost.remote(settings.name, describe_failure(cause)))

    thread = threading.Thread(target=run, name=f"lane-{settings.name}", daemon=True)
    thread.start()
    return thread


def _scheduler(name: str, rungs: list[int], reduction_factor: int, history: list[HistoryRow]) -> TrialScheduler:
    """ASHA that has already seen the reports of an earlier session."""
    if name == "none":
        return FIFOScheduler()
    scheduler = ASHAScheduler(
        time_attr="step",
        metric="eval_loss",
        mode="min",
        max_t=rungs[-1],
        grace_period=rungs[0],
        reduction_factor=reduction_factor,
    )
    for number in {row.number for row in history}:
        scheduler.on_trial_add(None, SimpleNamespace(trial_id=f"earlier-{number}"))
    for row in history:
        result = {"step": row.step, "eval_loss": row.eval_loss}
        scheduler.on_trial_result(None, SimpleNamespace(trial_id=f"earlier-{row.number}"), result)
    return scheduler


def _failures(what: str, records: Records) -> str:
    reasons = [f"trial {trial.number}: {trial.reason}" for trial in records.trials.values() if trial.state == "failed"]
    return f"{what}; " + "; ".join(reasons[:3] or ["none failed; raise search.n_trials or the time budget"])
