"""Turns the events of a search into the runs that a tracker shows: one for each trial, and one for the search."""

from dataclasses import dataclass, field
from typing import Any

from raylora.run.events import Event, Failed, Finished, Proposed, Reported, SessionStarted, Stopped
from raylora.run.state import ENDED, UNDER_WAY, SearchState

SEARCH = "search"
"""Key of the search's own record."""


@dataclass(frozen=True)
class Point:
    """Figures of one step. A record never has two points of one step."""

    step: int
    """Optimizer step of a trial; for the search, number of trials that have ended."""

    time: float
    """Seconds since 1970 of the event that told it."""

    values: dict[str, float]


@dataclass
class Record:
    """One run as a tracker shows it."""

    key: str
    """`search`, or the trial as in `trial-0007`."""

    params: dict[str, Any]
    started_at: float
    state: str
    reason: str | None = None
    ended_at: float | None = None
    points: list[Point] = field(default_factory=list)
    """Points in ascending order of their steps."""

    scores: dict[str, float] = field(default_factory=dict)
    """Figures of the merge and the held-out check; of the search only."""


class Records:
    """All records of one search, as far as its events tell.

    Args:
        params: settings of the search that its own record shows.
    """

    def __init__(self, params: dict[str, Any]) -> None:
        self.search = Record(SEARCH, params, 0.0, "running")
        self._trials: dict[int, Record] = {}
        self._state = SearchState()
        self._touched: set[str] = set()

    def add(self, event: Event) -> None:
        """Take in one event."""
        self._state.apply(event)
        match event:
            case SessionStarted():
                self.search.started_at = self.search.started_at or event.time
                self._touched.add(SEARCH)
            case Proposed():
                key = f"trial-{event.number:04d}"
                params = {**event.assignment, "max_steps": event.max_steps}
                if event.repeat_of is not None:
                    params["repeat_of"] = event.repeat_of
                self._trials[event.number] = Record(key, params, event.time, "queued")
                self._touched.add(key)
            case Reported():
                record = self._trials[event.number]
                record.points += points_of(event)
                self._touched.add(record.key)
            case Finished() | Stopped() | Failed():
                self.search.points.append(self._so_far(event.time))
                self._touched.add(SEARCH)

    def take_changed(self) -> list[Record]:
        """Return the records that have changed since the last call, the search's first."""
        for number, record in self._trials.items():
            row = self._state.trials[number]
            if row.state != record.state:
                record.state, record.reason, record.ended_at = row.state, row.reason, row.ended_at
                self._touched.add(record.key)
        changed = [record for record in (self.search, *self._trials.values()) if record.key in self._touched]
        self._touched.clear()
        return changed

    def end(self, scores: dict[str, float], time: float) -> Record:
        """Return the search's record as it stands when nothing more is to come.

        Args:
            scores: figures of the merge and the held-out check.
            time: seconds since 1970.
        """
        is_whole = bool(self._trials) and not self._state.numbers(*UNDER_WAY)
        self.search.state, self.search.ended_at, self.search.scores = "finished" if is_whole else "paused", time, scores
        return self.search

    def _so_far(self, time: float) -> Point:
        """Return the point of the search at the end of a trial."""
        state, best = self._state, self._state.best()
        values: dict[str, float] = {f"search/{name}": len(state.numbers(name)) for name in ENDED}
        values["search/optimizer_steps"] = sum(row.step for row in state.trials.values())
        values["search/hours"] = (time - self.search.started_at) / 3600
        if best is not None:
            values["search/best_eval_loss"] = best.final_loss
        return Point(len(state.numbers(*ENDED)), time, values)


def points_of(event: Reported) -> list[Point]:
    """Return a point for each step since the report before; the last one has the figures of the rung too."""
    metrics = event.metrics
    losses, rates = metrics.get("step_losses", []), metrics.get("step_learning_rates", [])
    first = metrics["step"] - len(losses) + 1
    points = [
        Point(first + index, event.time, {"train/loss": loss, "train/learning_rate": rate})
        for index, (loss, rate) in enumerate(zip(losses, rates, strict=True))
    ]
    rung = {
        "eval/loss": metrics["eval_loss"],
        "train/mean_loss": metrics["train_loss"],
        "train/epoch": metrics["epoch"],
        "train/tokens_seen": metrics["tokens_seen"],
        "peak_memory_mib": metrics["peak_memory_mib"],
    }
    last = points.pop().values if points else {}
    return [*points, Point(metrics["step"], event.time, {**last, **rung})]
