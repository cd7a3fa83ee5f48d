"""Simulates searches on many lanes in time: what does the controller cost the lanes, and what would break first?

Run as `python benchmarks/scale.py OUTPUT.json [--trials 1000 10000] [--lanes 64] [--slots 8] [--step-seconds 2]`.

Lanes train nothing: a step takes the time that the command line says. A lane that has reported waits until the
controller has answered all who reported before. The controller is the real one: halving, Optuna's sampler, the event
log written through to this disk, and tables. Lanes wait for its CPU time here, and for the disk.
`--ray-ms` adds Ray's own time for a batch. The study mirror has a thread of its own, so it is timed after the search.
"""

import argparse
import asyncio
import heapq
import json
import os
import platform
import random
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from rich.console import Console

import raylora.run.tables
import raylora.search.views
from raylora.config.load import build_config
from raylora.config.schema import SearchConfig
from raylora.report.progress import Progress
from raylora.run.directory import RunDirectory
from raylora.run.events import Event, EventLog, read_events
from raylora.run.metrics import RungMetrics
from raylora.search.controller import SearchController
from raylora.search.messages import Batch, News, Order, Ready, Report, Start
from raylora.search.mirror import StudyMirror
from raylora.search.ray.broker import Broker
from raylora.search.views import Views

RUNGS = [20, 60, 180, 540]
VIEWS_A_SECOND = 1
"""Views of the terminal; `activity.json`, once a second, takes a summary's forecast alone."""

MESSAGES_A_BATCH = 4
"""A lane posts it and asks for orders; a Tune trial asks for news; the controller delivers."""


@dataclass
class Lane:
    """One simulated lane."""

    name: str
    speed: float
    """Seconds of its step over those of the average lane."""

    trials: dict[int, Start] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    at: float = 0.0
    """Time of its last step's end."""

    round: int = 0
    is_waiting: bool = True
    inbox: list[Order] = field(default_factory=list)
    """Orders that came while it validated or waited for an answer."""

    plan: int = 0
    """Counts its changes of plan; an event of an earlier plan is void."""


class Stopwatch:
    """Seconds of each call, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def timed(
        self, name: str, function: Callable[..., Any], clock: Callable[[], float] = time.process_time
    ) -> Callable[..., Any]:
        """Wrap a function so that its calls are timed."""

        def run(*arguments: Any) -> Any:
            began = clock()
            try:
                return function(*arguments)
            finally:
                self.seconds[name].append(clock() - began)

        return run

    def total(self, name: str) -> float:
        return sum(self.seconds[name])


class _Recorder:
    """Stands in for the study mirror, and keeps its events."""

    def __init__(self, *_: object) -> None:
        self.events: list[Event] = []

    def add(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass


class Search:
    """A search on simulated lanes.

    Args:
        options: from the command line.
        n_trials: trials.
        folder: becomes its run directory.
    """

    def __init__(self, options: argparse.Namespace, n_trials: int, folder: Path) -> None:
        self.options, self.config, self.run_directory = options, config_of(n_trials, options), RunDirectory(folder)
        self.now, self.free_at, self.lane_busy, self.watch = 0.0, 0.0, 0.0, Stopwatch()
        self.waits: list[float] = []
        self._handling_since = time.process_time()
        draw = random.Random(0)
        self.lanes = {str(i): Lane(str(i), draw.uniform(0.9, 1.1)) for i in range(options.lanes)}
        self.draw, self._events, self._order = draw, list[tuple[float, int, Callable[[], None]]](), count()
        raylora.run.tables.time = SimpleNamespace(monotonic=self.clock)  # type: ignore[assignment]
        raylora.search.views.StudyMirror = _Recorder  # type: ignore[assignment, misc]
        log = EventLog(self.run_directory.events_file, self.clock)
        log.flush = self.watch.timed("flush", log.flush, time.perf_counter)  # type: ignore[method-assign]
        self.controller = SearchController(self.config, RUNGS, log, n_lanes=options.lanes, clock=self.clock)
        self.views = Views(self.run_directory, self.config, self.controller.state, [], print)
        self.controller.listen(self.views.add)
        for part, name in ((self.controller._sampler, "propose"), (self.views._tables, "write")):
            setattr(part, name, self.watch.timed(name, getattr(part, name)))
        self.handle = self.watch.timed("handle", self._handle)

    def clock(self) -> float:
        """Return the simulated time; while the controller works, its own time goes on."""
        return self.now + time.process_time() - self._handling_since

    def finish(self) -> None:
        """Simulate the search to its end."""
        self._handling_since = time.process_time()
        self.controller.begin("host", 1)
        for lane in self.lanes.values():
            self._post(lane, [Ready(self.options.slots, {"node": lane.name})])
        while self._events and not self.controller.over:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
        assert self.controller.done, self.controller.error

    def _at(self, moment: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (moment, next(self._order), happen))

    def _handle(self, batch: Batch) -> dict[str, list[Order]]:
        orders = self.controller.handle(batch)
        self.views.write_if_due()
        return orders

    def _post(self, lane: Lane, news: list[News]) -> None:
        """Let the controller answer a lane, once it has answered those before."""
        lane.round, lane.is_waiting, posted = lane.round + 1, True, self.now
        self.now = max(posted, self.free_at)
        self._handling_since = time.process_time()
        orders = self.handle(Batch(lane.name, 1, lane.round, news))
        self.watch.seconds["handle"][-1] += self.watch.seconds["flush"][-1]
        self.free_at = self.now + self.watch.seconds["handle"][-1] + self.options.ray_ms / 1000
        self.now = posted
        self.waits.append(self.free_at - posted)
        orders.setdefault(lane.name, [])
        for name, several in orders.items():
            self._at(self.free_at, lambda name=name, several=several: self._take(name, several, lane.name))  # type: ignore[misc]

    def _take(self, name: str, orders: list[Order], answered: str) -> None:
        """Give orders to a lane, at the end of its step."""
        lane = self.lanes[name]
        lane.inbox += orders
        if name == answered:
            lane.is_waiting, lane.at = False, self.now
        elif lane.is_waiting or not self._advance(lane):
            return
        for order in lane.inbox:
            if isinstance(order, Start):
                done = int(order.resume_from.rsplit("-", 1)[1]) if order.resume_from else 0
                lane.trials[order.number], lane.steps[order.number] = order, done
            else:
                del lane.trials[order.number], lane.steps[order.number]
        lane.inbox.clear()
        self._plan(lane)

    def _step_seconds(self, lane: Lane) -> float:
        return float(self.options.step_seconds * lane.speed * len(lane.trials) / self.options.slots)

    def _to_rung(self, lane: Lane) -> dict[int, int]:
        """Return the steps of each trial to its next rung."""
        return {
            number: next(rung for rung in start.rungs if rung > lane.steps[number]) - lane.steps[number]
            for number, start in lane.trials.items()
        }

    def _advance(self, lane: Lane) -> bool:
        """Train up to the end of the present step; False if the lane validates by then."""
        if not lane.trials:
            lane.at = self.now
            return True
        seconds = self._step_seconds(lane)
        n_steps = int((self.now - lane.at) / seconds) + 1
        if n_steps >= min(self._to_rung(lane).values()):
            return False
        lane.steps = {number: step + n_steps for number, step in lane.steps.items()}
        lane.at += n_steps * seconds
        self.lane_busy += n_steps * seconds
        return True

    def _plan(self, lane: Lane) -> None:
        """Let the lane train until its first trial is at a rung, and report."""
        lane.plan += 1
        if not lane.trials:
            return
        to_rung, plan = self._to_rung(lane), lane.plan
        n_steps = min(to_rung.values())
        there = [number for number, n in to_rung.items() if n == n_steps]

        def report() -> None:
            if plan == lane.plan:
                self.lane_busy += self.now - lane.at
                lane.steps = {number: step + n_steps for number, step in lane.steps.items()}
                self._post(lane, [self._report(lane, number) for number in there])

        seconds = n_steps * self._step_seconds(lane) + len(there) * self.options.report_seconds
        self._at(lane.at + seconds, report)

    def _report(self, lane: Lane, number: int) -> Report:
        start, step = lane.trials[number], lane.steps[number]
        loss = 1 + abs(start.assignment["learning_rate"] - 3e-4) * 1e3 + 10 / step + 0.1 * self.draw.random()
        checkpoint = f"trials/{number:04d}/checkpoint-{step}"
        seconds = self.options.step_seconds * step / self.options.slots
        n_steps = step - max(rung for rung in [0, *RUNGS] if rung < step)
        each = [3 * self.draw.random() for _ in range(n_steps)]
        metrics = RungMetrics(
            step,
            1.0,
            loss,
            1.0,
            1000 * step,
            seconds,
            self.options.report_seconds,
            0.1,
            1000.0,
            1_000_000,
            checkpoint,
            step_losses=each,
            step_learning_rates=each,
        )
        return Report(number, start.segment, metrics)


def config_of(n_trials: int, options: argparse.Namespace) -> SearchConfig:
    space = {
        "r": {"choice": [8, 16, 32, 64]},
        "lora_alpha": {"choice": [1, 2], "times": "r"},
        "lora_dropout": {"uniform": [0.0, 0.1]},
        "learning_rate": {"loguniform": [2e-5, 2e-3]},
    }
    search = {"n_trials": n_trials, "sampler": options.sampler}
    values = {"base_model": {"name": "x"}, "data": {"train": "x"}, "space": space, "search": search}
    return build_config(values, source="benchmark")


def figures(options: argparse.Namespace, n_trials: int) -> dict[str, Any]:
    """Simulate one search and return its figures."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        search = Search(options, n_trials, Path(folder))
        search.finish()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        search.views.close()
        return {"trials": n_trials, **_costs(search, peak, before), "resume": _resume(search), **_views(search)}


def _costs(search: Search, peak: float, before: float) -> dict[str, Any]:
    watch, state = search.watch, search.controller.state
    handle, lane_seconds = watch.seconds["handle"], search.lane_busy + sum(search.waits)
    half = len(handle) // 2
    n_messages = MESSAGES_A_BATCH * len(handle)
    return {
        "hours": search.now / 3600,
        "lane_hours": lane_seconds / 3600,
        "share_of_lanes_without_a_trial": 1 - lane_seconds / search.now / len(search.lanes),
        "finished": state.count("finished"),
        "steps": sum(row.step for row in state.trials.values()),
        "batches": len(handle),
        "controller": {
            "seconds": sum(handle),
            "share_of_lane_time": sum(handle) / lane_seconds,
            "share_of_its_own_time": sum(handle) / search.now,
            "ms_per_batch": 1000 * fmean(handle),
            "ms_per_batch_in_second_half_over_first": fmean(handle[half:]) / fmean(handle[:half]),
            "longest_batch_seconds": max(handle),
            "share_of_proposals": watch.total("propose") / sum(handle),
            "share_of_flushes": watch.total("flush") / sum(handle),
            "share_of_tables": watch.total("write") / sum(handle),
            "ms_per_proposal": 1000 * fmean(watch.seconds["propose"]),
            "ms_per_flush": 1000 * fmean(watch.seconds["flush"]),
        },
        "lanes": {
            "share_that_waits_for_answers": sum(search.waits) / lane_seconds,
            "mean_wait_seconds": fmean(search.waits),
            "longest_wait_seconds": max(search.waits),
            "longest_wait_after_the_start_seconds": max(search.waits[2 * len(search.lanes) :]),
        },
        "log_mib": search.run_directory.events_file.stat().st_size / 2**20,
        "fsyncs": len(watch.seconds["flush"]),
        "memory_mib": {"before": before, "peak": peak},
        "messages_a_second": n_messages / search.now + len(search.lanes) + 1,
    }


def _resume(search: Search) -> dict[str, float]:
    """Return the seconds of taking the search up again from its log."""
    began = time.process_time()
    events = list(read_events(search.run_directory.events_file))
    read = time.process_time()
    log = EventLog(search.run_directory.events_file)
    controller = SearchController(search.config, RUNGS, log, events=events, n_lanes=len(search.lanes))
    folded = time.process_time()
    assert controller.state.trials == search.controller.state.trials
    controller._sampler.propose(len(controller.state.trials))
    proposed = time.process_time()
    return {
        "events": len(events),
        "read_seconds": read - began,
        "fold_seconds": folded - read,
        "first_proposal_seconds": proposed - folded,
    }


def _views(search: Search) -> dict[str, Any]:
    """Return what the terminal, a table and the study mirror cost at the end."""
    console = Console(file=Path(os.devnull).open("w"), force_terminal=True)  # noqa: SIM115
    progress = Progress(search.controller.state, search.config, RUNGS, console)
    began = time.process_time()
    for _ in range(10):
        progress.summary()
    forecast = (time.process_time() - began) / 10
    began = time.process_time()
    for _ in range(10):
        console.print(progress.view())
    view = (time.process_time() - began) / 10
    began = time.process_time()
    search.views._tables.write()
    tables = time.process_time() - began
    recorded: list[Event] = search.views._mirror.events  # type: ignore[attr-defined]
    mirror = StudyMirror(search.run_directory.path / "mirror.db", search.config.search_space(), print)
    began, began_cpu = time.perf_counter(), time.process_time()
    for event in recorded[: search.options.mirror_events]:
        mirror.add(event)
    mirror._events.put(None)
    mirror._thread.join()
    n_mirrored = min(len(recorded), search.options.mirror_events) or 1
    cpu = (time.process_time() - began_cpu) / n_mirrored
    return {
        "view": {
            "ms_per_summary": 1000 * forecast,
            "ms_per_view": 1000 * view,
            "share_of_a_core": VIEWS_A_SECOND * view,
        },
        "seconds_per_table_write": tables,
        "mirror": {
            "events": len(recorded),
            "ms_per_event": 1000 * (time.perf_counter() - began) / n_mirrored,
            "cpu_ms_per_event": 1000 * cpu,
            "share_of_a_core_in_the_search": cpu * len(recorded) / search.now,
        },
    }


async def _broker_speed(n_lanes: int, n_talking: int, n_messages: int = 10_000) -> float:
    """Return the messages a second of the broker as a plain object, where some lanes talk and the others wait."""
    broker, names = Broker(), [str(i) for i in range(n_lanes)]
    n_rounds = n_messages // MESSAGES_A_BATCH // n_talking

    async def lane(name: str) -> None:
        process = await broker.connect(name)
        for index in range(1, n_rounds + 1):
            await broker.post(Batch(name, process, index))
            await broker.orders(name, process, index - 1)

    async def controller(name: str) -> None:
        n_seen = 0
        for _ in range(n_rounds):
            news = await broker.news(name, n_seen)
            assert news is not None
            n_seen, batches = news
            for batch in batches:
                await broker.deliver({name: []}, {name: 1}, batch)

    waiting = [asyncio.create_task(ask) for name in names[n_talking:] for ask in _waiting(broker, name)]
    await asyncio.sleep(0)
    began = time.perf_counter()
    await asyncio.gather(*map(lane, names[:n_talking]), *map(controller, names[:n_talking]))
    seconds = time.perf_counter() - began
    await broker.close()
    await asyncio.gather(*waiting)
    return MESSAGES_A_BATCH * n_talking * n_rounds / seconds


def _waiting(broker: Broker, lane: str) -> list[Coroutine[Any, Any, Any]]:
    """Return what waits at the broker for a lane that trains: its process, and its Tune trial."""
    return [broker.orders(lane, 0, 0), broker.news(lane, 0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--trials", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--step-seconds", type=float, default=2.0, help="of a full pack, one step of all its trials")
    parser.add_argument("--report-seconds", type=float, default=2.0, help="to validate and save one trial at a rung")
    parser.add_argument("--ray-ms", type=float, default=0.0, help="added to each batch for Ray")
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--mirror-events", type=int, default=4000, help="events that the study mirror is timed with")
    options = parser.parse_args()
    searches = []
    for n_trials in options.trials:
        # a process of its own, whose peak memory is that of this search
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            searches.append(pool.submit(figures, options, n_trials).result())
        print(json.dumps(searches[-1], indent=2))
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {name: version(name) for name in ("optuna", "numpy", "pyarrow")}
        | {"python": platform.python_version()},
        "options": {name: value for name, value in vars(options).items() if name not in ("output", "trials")},
        "rungs": RUNGS,
        "broker_messages_a_second": {
            "all_lanes_talk": asyncio.run(_broker_speed(options.lanes, options.lanes)),
            "one_lane_talks": asyncio.run(_broker_speed(options.lanes, 1)),
        },
        "searches": searches,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
