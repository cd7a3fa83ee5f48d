"""Runs one search: Ray Tune carries what lanes report to the controller; Ray Train keeps the lanes."""

import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle

from raylora.errors import SearchError
from raylora.run.atomic import write_json
from raylora.run.directory import RunDirectory
from raylora.run.state import SearchState
from raylora.search.controller import SearchController
from raylora.search.messages import Lost, Pulse
from raylora.search.ray.broker import Broker
from raylora.search.ray.cluster import actor_here
from raylora.search.ray.lane import LaneSettings, lane_trainer
from raylora.search.ray.searcher import LaneSearcher
from raylora.search.ray.tune_trial import LaneTrial
from raylora.search.serve import PULSE_SECONDS, describe_failure
from raylora.search.views import Views

PATIENCE_SECONDS = 120
"""After so long without a lane, the user is told what it may be waiting for."""


def run_search(
    run: RunDirectory,
    lanes: list[LaneSettings],
    broker: ActorHandle,
    controller: SearchController,
    views: Views,
    note: Callable[[str], None],
    beat: Callable[[dict[str, Pulse]], None],
) -> None:
    """Run trials until the search's total is reached. Ray must be initialised.

    Args:
        run: receives checkpoints, tables and logs.
        lanes: settings of each lane.
        broker: from `start_broker`.
        controller: decides; its state is that of the search.
        views: kept up to date.
        note: shows the user a line.
        beat: takes the newest pulse of each lane, about once a second.

    Raises:
        SearchError: the first trials all failed, no trial finished, or the machines do not allow the search to go on.
        KeyboardInterrupt: Ctrl-C or SIGTERM; everything is kept.
    """
    interruption = _Interruption()
    try:
        controller.begin(socket.gethostname(), os.getpid())
        if not controller.done:
            _train(run, lanes, broker, controller, views, note, beat, interruption)
            with suppress(OSError):  # for tables alone
                _write_lanes(run, controller.state)
        if interruption.came and not controller.over:
            controller.interrupt()
            raise KeyboardInterrupt
    finally:
        views.close()
    if controller.error is not None:
        raise SearchError(controller.error)
    if controller.state.best() is None:
        what = "the first trials all failed" if controller.gave_up() else "no trial reached the full budget"
        raise SearchError(f"{what}; {_failures(controller.state)}")


def start_broker() -> ActorHandle:
    """Start the broker's actor."""
    return actor_here(Broker, max_concurrency=1000)


def _train(
    run: RunDirectory,
    lanes: list[LaneSettings],
    broker: ActorHandle,
    controller: SearchController,
    views: Views,
    note: Callable[[str], None],
    beat: Callable[[dict[str, Pulse]], None],
    interruption: "_Interruption",
) -> None:
    # Tune's only way to let it start a trial for each lane at once
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "1000")
    ending = threading.Event()
    threads = [_start_lane(lane, ending) for lane in lanes]
    patience = threading.Timer(PATIENCE_SECONDS, _say_what_is_missing, [controller, note, lanes[0].on_gpu])
    patience.daemon = True
    patience.start()
    searcher = LaneSearcher([lane.name for lane in lanes], controller, broker, views.write_if_due)
    try:
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(LaneTrial, broker=broker),
                # on the driver's node, where it takes no slot from a lane and no spot node's end can take it
                tune.PlacementGroupFactory([{f"node:{ray.util.get_node_ip_address()}": 0.001}]),
            ),
            tune_config=tune.TuneConfig(search_alg=searcher, num_samples=-1),  # the searcher says how many lanes
            run_config=tune.RunConfig(
                name=f"tune-{time.time_ns()}",
                storage_path=str(run.logs / "tune"),
                stop=_Stopper(interruption, broker, views, beat),
                failure_config=tune.FailureConfig(max_failures=-1),  # a `LaneTrial` that died is started again
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # lanes keep the checkpoints
                verbose=0,
            ),
        )
        with interruption.noted():
            tuner.fit()
    finally:
        patience.cancel()
        ending.set()
        ray.get(broker.close.remote())
    for thread in threads:
        thread.join(timeout=5 if interruption.came else 30)  # lanes that train end with Ray


class _Interruption:
    """The first Ctrl-C ends the search in order; a second one does what it did before."""

    def __init__(self) -> None:
        self.came = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM in `came` while the block runs."""

        def note(signum: int, frame: object) -> None:
            self.came = True
            for number, handler in before.items():
                signal.signal(number, handler)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Stopper(tune.Stopper):
    """Ends Tune's loop between two batches; Tune asks it several times a second, whatever happens."""

    def __init__(
        self,
        interruption: _Interruption,
        broker: ActorHandle,
        views: Views,
        beat: Callable[[dict[str, Pulse]], None],
    ) -> None:
        self._interruption, self._broker, self._views, self._beat = interruption, broker, views, beat
        self._asked: ray.ObjectRef | None = None
        """Pulses that the broker was asked for."""

        self._asked_at = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its settings for `Tuner.restore`, which is not used here."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        self._views.write_if_due()
        self._take_pulses()
        if self._interruption.came:
            self._broker.close.remote()
        return self._interruption.came

    def _take_pulses(self) -> None:
        """Hand on the pulses that were asked for, if they are there, and ask again once a second."""
        if self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
            self._beat(ray.get(self._asked))
            self._asked = None
        if self._asked is None and time.monotonic() - self._asked_at >= PULSE_SECONDS:
            self._asked, self._asked_at = self._broker.pulses.remote(), time.monotonic()


def _start_lane(settings: LaneSettings, ending: threading.Event) -> threading.Thread:
    """Start a lane in a thread of its own, which tells the broker if the lane ends too early."""

    def run() -> None:
        try:
            lane_trainer(settings).fit()
        except Exception as error:  # Ray Train raises whatever ended the run; the trials get the reason
            if ending.is_set():
                return  # Ray may be gone, and a call to it would end the process with exit code 1
            cause = next(iter(getattr(error, "worker_failures", {}).values()), error)
            ray.get(settings.broker.end.remote(settings.name, Lost(describe_failure(cause))))

    thread = threading.Thread(target=run, name=f"lane-{settings.name}", daemon=True)
    thread.start()
    return thread


def _say_what_is_missing(controller: SearchController, note: Callable[[str], None], on_gpu: bool) -> None:
    """Tell the user if no lane is up: a cluster without room for one would be waited for in silence."""
    if not controller.state.lanes:
        kind = "GPU" if on_gpu else "CPU"
        total, free = ray.cluster_resources().get(kind, 0), ray.available_resources().get(kind, 0)
        note(
            f"no lane is up after {PATIENCE_SECONDS} s: it loads the base, or waits for a {kind}; "
            f"the cluster has {total:g}, {free:g} free (`ray status` says more)"
        )


def _write_lanes(run: RunDirectory, state: SearchState) -> None:
    """Write where the lanes were, when they came up, and how much memory the driver took."""
    driver_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
    lanes = {
        name: {**lane.facts, "slots": lane.slots, **({"lost": lane.lost} if lane.lost else {})}
        for name, lane in state.lanes.items()
    }
    write_json(run.lanes_file, {"driver": {"peak_memory_mib": driver_mib}, "lanes": lanes})


def _failures(state: SearchState) -> str:
    reasons = [f"trial {number}: {state.trials[number].reason}" for number in sorted(state.numbers("failed"))]
    return "; ".join(reasons[:3] or ["none failed; raise search.n_trials or the time budget"])
