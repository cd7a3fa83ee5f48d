"""Folds the events of a search to its state: every trial as it stands, every report, every lane.

Applying an event costs the same however many trials there are. Tables, terminal and decisions read this state only.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from raylora.run.atomic import read_json
from raylora.run.directory import RunDirectory
from raylora.run.events import (
    Event,
    Failed,
    Finished,
    GivenBack,
    LaneLost,
    LaneUp,
    Paused,
    Promoted,
    Proposed,
    Reported,
    SessionStarted,
    Started,
    Stopped,
    read_events,
)
from raylora.run.totals import Totals
from raylora.run.trial_row import HistoryRow, TrialRow

UNDER_WAY = ("queued", "running", "paused")
ENDED = ("finished", "stopped", "failed")
STATES = (*UNDER_WAY, *ENDED)

TIMES = ("train_seconds", "eval_seconds", "other_seconds")
"""Metrics that count from the last report; tables sum them from the trial's start."""


_HISTORY_COLUMNS = {column.name for column in fields(HistoryRow)}


@dataclass
class Lane:
    """One lane of the present session."""

    process: int
    slots: int
    facts: dict[str, Any]
    trials: set[int] = field(default_factory=set)
    """Numbers of the trials that train on it."""

    suspects: set[int] = field(default_factory=set)
    """Trials that were on it when its process died; they train alone until each has reported or left."""

    up: bool = True
    """False from the end of its process until another one can train."""

    down: str = ""
    """Why it is down."""

    lost: str | None = None
    """Why the lane is gone for good."""


class SearchState:
    """All trials, reports and lanes of one search."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.trials: dict[int, TrialRow] = {}
        self.history: list[HistoryRow] = []
        self.lanes: dict[str, Lane] = {}
        self.params: dict[int, dict[str, Any]] = {}
        """Sampled values of each trial under Optuna's names."""

        self.resume_from: dict[int, str | None] = {}
        """Newest checkpoint of each trial, relative to the run directory."""

        self.deaths: dict[int, int] = {}
        """Processes that died under each trial since its last report."""

        self.undecided: set[int] = set()
        """Trials that have reported at a rung, of which nothing has come yet."""

        self.machine_faults = 0
        """Faults of disk, files or devices since any trial's last report."""

        self.totals = Totals()
        self._numbers: dict[str, set[int]] = {state: set() for state in STATES}
        self._repetitions: set[int] = set()
        for event in events:
            self.apply(event)

    @classmethod
    def load(cls, run: RunDirectory) -> "SearchState":
        """Read the state of a run directory; without a log it is empty."""
        return cls(read_events(run.events_file))

    def apply(self, event: Event) -> None:
        """Take in one event; events come in the order of the log."""
        match event:
            case SessionStarted():
                self.lanes.clear()
                self.deaths.clear()
                self.machine_faults = 0
                for number in sorted(self._numbers["running"]):
                    self._change(number, state="queued")
            case LaneUp():
                suspects = self.lanes[event.lane].suspects if event.lane in self.lanes else set[int]()
                self.lanes[event.lane] = Lane(event.process, event.slots, event.facts, suspects=suspects)
            case LaneLost():
                self._lose_lane(event)
            case Proposed():
                self._propose(event)
            case Started():
                for name, lane in self.lanes.items():
                    if name != event.lane:
                        lane.suspects.discard(event.number)
                self.lanes[event.lane].trials.add(event.number)
                self._change(event.number, state="running", segment=event.segment, lane=event.lane)
            case Reported():
                self._report(event)
            case Promoted():
                self.undecided.discard(event.number)
                if self.trials[event.number].state == "paused":
                    self._change(event.number, state="queued")
            case Paused():
                self._leave_lane(event.number)
                self._change(event.number, state="paused")
            case GivenBack():
                self._give_back(event)
            case Finished() | Stopped() | Failed():
                self._leave_lane(event.number)
                started = self.trials[event.number].started_at
                ended = {"ended_at": event.time, "wall_seconds": event.time - started}
                reason = None if isinstance(event, Finished) else event.reason
                self._change(event.number, state=type(event).__name__.lower(), reason=reason, **ended)

    def numbers(self, *states: str) -> set[int]:
        """Return the numbers of the trials in any of these states."""
        return set().union(*(self._numbers[state] for state in states))

    def count(self, state: str) -> int:
        """Count the trials in one state, repetitions aside."""
        return len(self._numbers[state]) - len(self._repetitions & self._numbers[state])

    def n_proposed(self) -> int:
        """Count all trials, repetitions aside."""
        return len(self.trials) - len(self._repetitions)

    def finished(self) -> list[TrialRow]:
        """Return the trials that reached the full budget, lowest validation loss first."""
        rows = [self.trials[number] for number in self._numbers["finished"]]
        return sorted((row for row in rows if row.final_loss < math.inf), key=lambda row: (row.final_loss, row.number))

    def merge_of(self, run: RunDirectory) -> dict[str, Any] | None:
        """Return the content of `merge.json`; None if it is missing, or if trials have finished since that merge."""
        merge = read_json(run.merge_file) if run.merge_file.is_file() else {}
        return merge if merge.get("finished") == [trial.number for trial in self.finished()] else None

    def best(self) -> TrialRow | None:
        """Return the finished trial of lowest validation loss.

        Where the leading assignment was repeated with other seeds, choose the repeated one of lowest mean, and its best
        run.
        """
        repetitions = self.repetitions()
        if any(row["number"] == leader.number for row in repetitions for leader in self.leaders(1)):
            return min(self.runs_of(repetitions[0]["number"]), key=lambda row: row.final_loss)
        if not self._numbers["finished"]:
            return None
        leaders = (self.trials[number] for _, _, number in self.totals.ranking)
        return next((row for row in leaders if row.final_loss < math.inf), None)

    def seconds_per_report(self) -> float:
        """Return the mean time of a report, to validate and to save, in seconds; 0 before the first."""
        return self.totals.report_seconds / max(1, len(self.history))

    def leaders(self, n: int) -> list[TrialRow]:
        """Return the n assignments that came furthest, and there had the lowest validation loss."""
        return [self.trials[number] for _, _, number in self.totals.ranking[:n]]

    def runs_of(self, number: int) -> list[TrialRow]:
        """Return a trial and its repetitions."""
        repeated = [self.trials[other] for other in self._repetitions if self.trials[other].repeat_of == number]
        return [self.trials[number], *sorted(repeated, key=lambda row: row.number)]

    def repetitions(self) -> list[dict[str, Any]]:
        """Return a row for each repeated assignment, lowest mean first: final validation losses over seeds."""
        rows = []
        for number in {self.trials[repetition].repeat_of for repetition in self._repetitions}:
            assert number is not None
            losses = [row.final_loss for row in self.runs_of(number) if row.final_loss < math.inf]
            if losses:
                mean, spread = statistics.fmean(losses), max(losses) - min(losses)
                rows.append({"number": number, "n": len(losses), "eval_loss_mean": mean, "eval_loss_spread": spread})
        return sorted(rows, key=lambda row: (row["eval_loss_mean"], row["number"]))

    def _propose(self, event: Proposed) -> None:
        number = event.number
        unknown = dict.fromkeys(column.name for column in fields(TrialRow))
        known = {"number": number, "state": "queued", "step": 0, "segment": 0, "max_steps": event.max_steps}
        known |= {"started_at": event.time, "repeat_of": event.repeat_of}
        row = TrialRow(**{**unknown, **event.assignment, **known})  # type: ignore[arg-type]
        self.trials[number] = row
        self.totals.replace(None, row)
        self._numbers["queued"].add(number)
        self.params[number], self.resume_from[number] = event.params, None
        if event.repeat_of is not None:
            self._repetitions.add(number)

    def _report(self, event: Reported) -> None:
        row = self.trials[event.number]
        times = {name: event.metrics[name] + (getattr(row, name) or 0.0) for name in TIMES}
        values = {**event.metrics, **times, "number": event.number, "reported_at": event.time}
        self.history.append(HistoryRow(**{name: values[name] for name in _HISTORY_COLUMNS & values.keys()}))
        known = {column.name: values[column.name] for column in fields(TrialRow) if column.name in values}
        speed = values["tokens_seen"] / times["train_seconds"] if times["train_seconds"] else None
        self._change(event.number, **known, tokens_per_second=speed)
        self.resume_from[event.number] = event.metrics["checkpoint"]
        self.undecided.add(event.number)
        self.deaths.pop(event.number, None)
        self.machine_faults = 0
        if row.lane in self.lanes:
            self.lanes[row.lane].suspects.discard(event.number)

    def _give_back(self, event: GivenBack) -> None:
        lane = self._leave_lane(event.number)
        if lane is not None and event.slots is not None:
            lane.slots = event.slots
        self.resume_from[event.number] = event.checkpoint or self.resume_from[event.number]
        self.machine_faults += event.machine_fault
        self._change(event.number, state="queued")

    def _lose_lane(self, event: LaneLost) -> None:
        lane = self.lanes.setdefault(event.lane, Lane(0, 0, {}))
        numbers, lane.trials = lane.trials, set()
        for number in numbers:
            self._change(number, state="queued")
            if event.blames_trials:
                self.deaths[number] = self.deaths.get(number, 0) + 1
        lane.suspects = lane.suspects | numbers if event.blames_trials else set()
        lane.up, lane.down = False, event.reason
        if event.for_good:
            lane.lost, lane.slots = event.reason, 0

    def _leave_lane(self, number: int) -> Lane | None:
        self.undecided.discard(number)
        lane = self.lanes.get(self.trials[number].lane or "")
        if lane is not None:
            lane.trials.discard(number)
            lane.suspects.discard(number)
        return lane

    def _change(self, number: int, /, **values: Any) -> None:
        row = self.trials[number]
        self.trials[number] = replace(row, **values)
        self.totals.replace(row, self.trials[number])
        if "state" in values:
            self._numbers[row.state].discard(number)
            self._numbers[values["state"]].add(number)
