"""Lanes that train nothing: each order and report passes between them and the real controller in one thread."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylora.config.schema import SearchConfig
from raylora.run.directory import RunDirectory
from raylora.run.events import EventLog, read_events
from raylora.run.parts import pull_events
from raylora.run.storage import Storage
from raylora.search.controller import SearchController
from raylora.search.messages import Batch, Failure, Gone, Leave, Lost, News, Order, Ready, Report, Return, Start
from tests.helpers import metrics

RUNGS = [3, 9, 27]


def falling_with_the_rate(assignment: dict[str, Any], step: int) -> float:
    """Loss that falls with the learning rate and the step."""
    return 1 / (1 + 1000 * assignment["learning_rate"]) + 1 / step


@dataclass
class Training:
    """One trial on a lane."""

    start: Start
    step: int


@dataclass
class SimulatedLane:
    name: str
    process: int = 1
    round: int = 0
    trials: dict[int, Training] = field(default_factory=dict)
    last: Batch | None = None


class Simulation:
    """A search whose lanes are simulated; killed and resumed at will."""

    def __init__(
        self,
        config: SearchConfig,
        folder: Path,
        *,
        n_lanes: int = 1,
        slots: int = 3,
        loss: Callable[[dict[str, Any], int], float] = falling_with_the_rate,
        rungs: list[int] = RUNGS,
        storage: Storage | None = None,
    ) -> None:
        self.storage = storage
        self.config, self.run, self.rungs = config, RunDirectory(folder), rungs
        self.n_lanes, self.slots, self.loss = n_lanes, slots, loss
        self.begin()

    def begin(self) -> None:
        """Start a session, the first or a resumed one."""
        parts = pull_events(self.storage, self.run.events_file) if self.storage else None
        events = list(read_events(self.run.events_file))
        self.log = EventLog(self.run.events_file, parts=parts)
        self.controller = SearchController(
            self.config, self.rungs, self.log, events=events, n_lanes=self.n_lanes, clock=lambda: 0.0
        )
        self.controller.begin("host", 1)
        self.lanes = {str(index): SimulatedLane(str(index)) for index in range(self.n_lanes)}
        for lane in list(self.lanes.values()):
            self.say(lane, [Ready(self.slots, {"node": "node"})])

    def kill(self) -> None:
        """End the session as `kill -9` does."""

    def say(self, lane: SimulatedLane, news: list[News]) -> None:
        """Send news of a lane, and obey the answer."""
        if self.controller.over:
            return
        lane.round += 1
        lane.last = Batch(lane.name, lane.process, lane.round, news)
        self.obey(self.controller.handle(lane.last))

    def obey(self, orders: dict[str, list[Order]]) -> None:
        for name, several in orders.items():
            for order in several:
                if isinstance(order, Leave):
                    del self.lanes[name].trials[order.number]
                    continue
                assert not any(order.number in lane.trials for lane in self.lanes.values()), "on two lanes at once"
                done = int(order.resume_from.rsplit("-", 1)[1]) if order.resume_from else 0
                self.lanes[name].trials[order.number] = Training(order, done)
            assert len(self.lanes[name].trials) <= self.slots

    def step(self, lane: SimulatedLane) -> None:
        """Train all trials of a lane for one step; those at a rung report together, in a disorder of their own."""
        reports: list[News] = []
        for number, training in lane.trials.items():
            training.step += 1
            if training.step in training.start.rungs:
                loss = self.loss(training.start.assignment, training.step)
                reports.append(Report(number, training.start.segment, self.metrics(number, training.step, loss)))
        if reports:
            self.say(lane, sorted(reports, key=lambda report: hash(report.number)))  # type: ignore[union-attr]

    def metrics(self, number: int, step: int, loss: float) -> Any:
        return metrics(step, loss, checkpoint=f"trials/{number:04d}/checkpoint-{step}")

    def fail(self, lane: SimulatedLane, number: int, reason: str = "made up") -> None:
        """A trial fails."""
        self.say(lane, [Failure(number, lane.trials.pop(number).start.segment, reason)])

    def give_back(self, lane: SimulatedLane, numbers: list[int], **values: Any) -> None:
        """Trials leave a lane unfinished, with a checkpoint of where they are."""
        left = {number: lane.trials.pop(number) for number in numbers}
        checkpoints = {
            number: f"trials/{number:04d}/checkpoint-{training.step}" if training.step else None
            for number, training in left.items()
        }
        segments = {number: training.start.segment for number, training in left.items()}
        self.say(lane, [Return(checkpoints, segments, "made up", **values)])

    def restart(self, lane: SimulatedLane, node: str = "node") -> None:
        """The process of a lane dies, and another one comes up."""
        lane.process, lane.round, lane.trials = lane.process + 1, 0, {}
        self.say(lane, [Ready(self.slots, {"node": node})])

    def end(self, lane: SimulatedLane, *, node_lost: bool) -> None:
        """The process of a lane dies, and no other one finds room; `restart` brings the lane back."""
        lane.process, lane.round, lane.trials = lane.process + 1, 0, {}
        self.say(lane, [Gone("made up", node_lost=node_lost)])

    def lose(self, lane: SimulatedLane) -> None:
        """A lane is gone for good."""
        lane.process, lane.round, lane.trials = lane.process + 1, 0, {}
        self.say(lane, [Lost("node died")])
        del self.lanes[lane.name]

    def finish(self, limit: int = 100_000) -> "Simulation":
        """Train until the search is over."""
        for _ in range(limit):
            if self.controller.over:
                return self
            for lane in list(self.lanes.values()):
                self.step(lane)
        raise AssertionError("the search does not end")

    @property
    def states(self) -> list[str]:
        trials = self.controller.state.trials
        return [trials[number].state for number in sorted(trials)]

    def check(self) -> None:
        """Assert the invariants of every search, whatever happened to it."""
        state = self.controller.state
        reported: dict[int, list[int]] = {}
        for row in state.history:
            reported.setdefault(row.number, []).append(row.step)
        for number, steps in reported.items():
            assert steps == self.rungs[: len(steps)] or steps == self.rungs[-1:], f"trial {number} reported {steps}"
        if self.controller.done:
            assert not state.numbers("queued", "running", "paused")
        for row in state.finished():
            assert row.step == self.rungs[-1]
