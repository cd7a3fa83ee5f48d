"""Times the controller of a search without Ray and without training: does an event cost more as trials add up?

Run as `python benchmarks/controller.py OUTPUT.json [--trials 1000 10000] [--samplers random tpe]`.

64 lanes of 8 slots whose trials report made-up losses at once. Everything else is the real thing: event log written
through to this disk, state, halving, Optuna's sampler, tables and study mirror.
"""

import argparse
import json
import platform
import random
import resource
import tempfile
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raylora.config.load import build_config
from raylora.config.schema import SearchConfig
from raylora.run.directory import RunDirectory
from raylora.run.events import EventLog, read_events
from raylora.run.metrics import RungMetrics
from raylora.run.state import SearchState
from raylora.search.controller import SearchController
from raylora.search.messages import Batch, Order, Ready, Report, Start
from raylora.search.views import Views

LANES, SLOTS = 64, 8
RUNGS = [20, 60, 180, 540]
LANE_SECONDS = 60.0
"""Lane time of one trial that the shares are stated for: 512 trials at a time, each under way for 8 minutes."""


def config_of(n_trials: int, sampler: str) -> SearchConfig:
    space = {
        "r": {"choice": [8, 16, 32, 64]},
        "lora_alpha": {"choice": [1, 2], "times": "r"},
        "lora_dropout": {"uniform": [0.0, 0.1]},
        "learning_rate": {"loguniform": [2e-5, 2e-3]},
    }
    search = {"n_trials": n_trials, "sampler": sampler}
    values = {"base_model": {"name": "x"}, "data": {"train": "x"}, "space": space, "search": search}
    return build_config(values, source="benchmark")


def metrics(number: int, step: int, loss: float) -> RungMetrics:
    checkpoint = f"trials/{number:04d}/checkpoint-{step}"
    return RungMetrics(step, 1.0, loss, 1.0, 100 * step, 1.0, 0.1, 0.1, 1000.0, 1_000_000, checkpoint)


class Clock:
    """Seconds and calls by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def timed(self, name: str, function: Any) -> Any:
        """Wrap a function so that its time is counted."""

        def run(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds[name] += time.perf_counter() - began
                self.calls[name] += 1

        return run


def search(n_trials: int, sampler: str, folder: Path) -> dict[str, Any]:
    """Run one search and return its figures."""
    config, run, clock = config_of(n_trials, sampler), RunDirectory(folder), Clock()
    log = EventLog(run.events_file)
    controller = SearchController(config, RUNGS, log, n_lanes=LANES)
    views = Views(run, config, controller.state, [], print)
    controller.listen(views.add)
    controller._sampler.propose = clock.timed("propose", controller._sampler.propose)  # type: ignore[method-assign]
    log.flush = clock.timed("flush", log.flush)  # type: ignore[method-assign]
    handle, write = clock.timed("handle", controller.handle), clock.timed("views", views.write_if_due)
    controller.begin("host", 1)
    lanes: dict[str, dict[int, Start]] = {str(index): {} for index in range(LANES)}
    rounds = dict.fromkeys(lanes, 0)
    draw = random.Random(0)
    marks: list[tuple[int, float]] = []

    def say(lane: str, news: list) -> None:
        rounds[lane] += 1
        obey(handle(Batch(lane, 1, rounds[lane], news)))
        write()
        marks.append((len(controller.state.trials), clock.seconds["handle"] - clock.seconds["propose"]))

    def obey(orders: dict[str, list[Order]]) -> None:
        for lane, several in orders.items():
            for order in several:
                if isinstance(order, Start):
                    lanes[lane][order.number] = order
                else:
                    del lanes[lane][order.number]

    for lane in lanes:
        say(lane, [Ready(SLOTS, {"node": lane})])
    while not controller.over:
        for lane, trials in lanes.items():
            reports = []
            for number, start in trials.items():
                row = controller.state.trials[number]
                step = next(rung for rung in RUNGS if rung > row.step)
                loss = 1 + abs(row.learning_rate - 3e-4) * 1e3 + 10 / step + 0.1 * draw.random()
                reports.append(Report(number, start.segment, metrics(number, step, loss)))
            if reports:
                say(lane, reports[:1] if draw.random() < 0.5 else reports)
    began = time.perf_counter()
    views.close()
    mirror_behind = time.perf_counter() - began
    log.close()
    began = time.perf_counter()
    events = list(read_events(run.events_file))
    resumed = SearchState(events)
    reading = time.perf_counter() - began
    assert resumed.trials == controller.state.trials
    deciding = clock.seconds["handle"] - clock.seconds["propose"] - clock.seconds["flush"]
    halves = _halves(marks)
    per_trial = (clock.seconds["handle"] + clock.seconds["views"]) / n_trials
    return {
        "trials": n_trials,
        "sampler": sampler,
        "events": len(events),
        "batches": clock.calls["handle"],
        "finished": controller.state.count("finished"),
        "ms_per_event": 1e3 * deciding / len(events),
        "ms_per_flush": 1e3 * clock.seconds["flush"] / clock.calls["flush"],
        "ms_per_proposal": 1e3 * clock.seconds["propose"] / clock.calls["propose"],
        "second_half_over_first": halves,
        "share_of_tables": clock.seconds["views"] / (clock.seconds["views"] + clock.seconds["handle"]),
        "seconds_that_the_mirror_was_behind": mirror_behind,
        "seconds_to_resume": reading,
        "ms_per_trial": 1e3 * per_trial,
        "share_of_lane_time": per_trial / LANE_SECONDS,
        "log_mib": run.events_file.stat().st_size / 2**20,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _halves(marks: list[tuple[int, float]]) -> float:
    """Return the time of a batch in the second half of a search over that in the first half."""
    middle = len(marks) // 2
    first = marks[middle][1] - marks[0][1]
    second = marks[-1][1] - marks[middle][1]
    return (second / (len(marks) - middle)) / (first / middle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--trials", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--samplers", nargs="+", default=["random", "tpe"])
    arguments = parser.parse_args()
    rows = []
    for sampler in arguments.samplers:
        for n_trials in arguments.trials:
            with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
                rows.append(search(n_trials, sampler, Path(folder)))
            print(json.dumps(rows[-1], indent=2))
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "lanes": LANES,
        "slots": SLOTS,
        "lane_seconds_per_trial": LANE_SECONDS,
        "searches": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
