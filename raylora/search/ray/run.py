"""Runs one search: Ray Tune drives the bookkeeper's trials on resident lanes."""

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle
from ray.tune.schedulers import FIFOScheduler

from raylora.errors import SearchError
from raylora.report.progress import Progress
from raylora.run.atomic import write_json
from raylora.run.directory import RunDirectory
from raylora.run.tables import Records
from raylora.search.ray.broker import Broker
from raylora.search.ray.lane import LaneSettings, describe_failure, lane_trainer
from raylora.search.ray.searcher import Bookkeeper
from raylora.search.ray.tune_trial import TrialProxy
from raylora.search.sampler import Study

PATIENCE_SECONDS = 120
"""After so long without a lane, the user is told what it may be waiting for."""


def run_search(
    run: RunDirectory,
    settings: list[LaneSettings],
    rungs: list[int],
    broker: ActorHandle,
    progress: Progress,
    records: Records,
    study: Study,
) -> None:
    """Runs trials until the search's total is reached. Ray must be initialised.

    Args:
        run: receives tables, study, checkpoints and logs.
        settings: one per lane.
        rungs: optimizer steps at which trials are compared; the last is the full budget.
        broker: from `start_broker`.
        progress: shown as the search goes on.
        records: the run's tables, as they stand.
        study: the run's study, as it stands.

    Raises:
        SearchError: the first trials all failed, no trial finished, or no lane came up.
        KeyboardInterrupt: Ctrl-C or SIGTERM; everything is kept.
    """
    # Tune's only way to let it start as many trials at once as the bookkeeper proposes
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "1000")
    bookkeeper = Bookkeeper(settings[0].config, rungs, len(settings), study, records, broker, progress)
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
                scheduler=_RungScheduler(bookkeeper),
                num_samples=-1,  # the bookkeeper says when to end, and how many train at once
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=f"tune-{time.time_ns()}",
                storage_path=str(run.logs / "tune"),
                stop=_StopWhenInterrupted(bookkeeper),
                # nothing to save: lanes keep the trials' checkpoints
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        )
        with _interrupting(bookkeeper):
            tuner.fit()
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


class _RungScheduler(FIFOScheduler):
    """Lets a trial go on past a rung or ends its leg, as the bookkeeper decides."""

    def __init__(self, bookkeeper: Bookkeeper) -> None:
        super().__init__()
        self._bookkeeper = bookkeeper

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self.CONTINUE if self._bookkeeper.goes_on(trial.trial_id, result) else self.STOP


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


def _failures(what: str, records: Records) -> str:
    reasons = [f"trial {trial.number}: {trial.reason}" for trial in records.trials.values() if trial.state == "failed"]
    return f"{what}; " + "; ".join(reasons[:3] or ["none failed; raise search.n_trials or the time budget"])
