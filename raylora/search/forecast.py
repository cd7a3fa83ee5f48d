"""Forecasts a search from what has been trained: steps and validations that are left, and the seconds they take."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from raylora.config.schema import SearchConfig, TrainingSection
from raylora.run.state import SearchState
from raylora.run.trial_row import TrialRow

PASS_TOKENS = {"cpu": 40.0, "cuda": 500.0}
"""Cost of a pack's step beside its trials' own tokens, in tokens: the base is dequantized once for all of them.

Measured on two CPU cores (benchmarks/search.md, "What a pass costs by itself"). That of a GPU is a prediction."""

VALIDATION_SHARE = 1 / 3
"""Time to validate a token over the time to train on one, which takes a backward pass too."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the data, in tokens."""

    step: float
    """Mean optimizer step of a trial; a space that names other batch sizes is left out."""

    validation: int
    """All validation rows."""

    @classmethod
    def of(cls, training: TrainingSection, parts: Mapping[str, Mapping[str, int]]) -> "Sizes":
        """Return the sizes of a search's data.

        Args:
            training: settings of the search.
            parts: part -> fields of `PartSummary`, as in `provenance.json`.
        """
        rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
        return cls(rows * parts["train"]["tokens"] / parts["train"]["rows"], parts["validation"]["tokens"])


@dataclass(frozen=True)
class Forecast:
    """Progress of a search, in optimizer steps of all trials together."""

    steps_done: int
    steps_left: int
    """Expected, were trials to be promoted as halving usually does."""

    reports_left: int
    """Validations expected."""

    seconds_left: float | None
    """None before any step was taken."""

    @property
    def steps_expected(self) -> int:
        """Steps of the whole search."""
        return self.steps_done + self.steps_left


class Forecaster:
    """Forecasts the end of a search.

    Its time is counted in loads. A step of one trial is a load of 1. Each step of a pack costs
    `PASS_TOKENS / sizes.step` loads more, however many trials share it. So late rungs, which few reach, are slow.

    Args:
        config: settings of the search.
        rungs: optimizer steps at which trials are compared, ascending; the last is the full budget.
        sizes: sizes of the data; None if they are not known, which leaves out packs, and validation until it is timed.
    """

    def __init__(self, config: SearchConfig, rungs: list[int], sizes: Sizes | None = None) -> None:
        self._search, self._n_trials, self._rungs, self._sizes = config.search, config.n_trials(), rungs, sizes
        self._up_at: float | None = None
        """Time at which the first lane of this session was up."""

        self._load_before = 0.0
        """Load that had been done by then."""

        self._arrived: dict[int, float] = {}
        """Trial at its rung -> time at which that was first seen."""

    def forecast(self, state: SearchState, now: float, steps: Mapping[int, int] | None = None) -> Forecast:
        """Return how far the search is.

        Args:
            state: the search as it stands.
            now: seconds since 1970.
            steps: running trial -> its step, where it is past its last report.
        """
        steps = steps or {}
        done = state.totals.steps + sum(step - state.trials[number].step for number, step in steps.items())
        admitted = self._admitted(state)
        expected = self._expected(admitted)
        left, reports = self._left(state, steps, admitted, expected)
        loads = self._loads(state, expected)
        reported = self._reported(state, loads)
        load = reported + sum(
            _load(step, self._rungs, loads) - _load(state.trials[number].step, self._rungs, loads)
            for number, step in steps.items()
        )
        waits = self._validating(state, steps, now)
        speed = self._speed(state, load, reported, reports, now, sum(seconds for _, seconds in waits.values()))
        n_lanes, seconds = sum(lane.up for lane in state.lanes.values()), None
        if speed is not None and n_lanes:
            per_load, per_report = speed
            seconds = sum(n * each for n, each in zip(left, loads, strict=True)) * per_load + sum(reports) * per_report
            seconds -= sum(min(waited, n * per_report) for n, waited in waits.values())
            seconds /= n_lanes
        return Forecast(done, sum(left), sum(reports), seconds)

    def _speed(
        self, state: SearchState, load: float, reported: float, reports: list[int], now: float, waited: float
    ) -> tuple[float, float] | None:
        """Return the seconds of a lane for a load and for a report; None before any step was taken.

        Args:
            state: the search as it stands.
            load: that was done.
            reported: its part behind the last reports.
            reports: expected at each rung.
            now: seconds since 1970.
            waited: seconds of all lanes together for validations that are not reported yet.
        """
        if state.lanes and self._up_at is None:
            self._up_at, self._load_before = now, load
        if state.totals.reported_steps:
            return state.totals.train_seconds / reported, state.seconds_per_report()
        if self._up_at is None or load <= self._load_before:
            return None
        training = len(state.lanes) * (now - self._up_at) - waited  # before the first report, the clock tells
        per_load = training / (load - self._load_before)
        return per_load, per_load * self._validation(reports) / max(1, sum(reports))

    def _validating(self, state: SearchState, steps: Mapping[int, int], now: float) -> dict[str, tuple[int, float]]:
        """Return the lanes that validate: lane -> trials at their rung that have not reported, seconds since then."""
        running = [state.trials[number] for number in state.numbers("running")]
        rows = [row for row in running if steps.get(row.number, row.step) >= self._goal(row) > row.step]
        self._arrived = {row.number: self._arrived.get(row.number, now) for row in rows}
        lanes: dict[str, tuple[int, float]] = {}
        for row in rows:
            assert row.lane is not None  # it is running
            n, waited = lanes.get(row.lane, (0, 0.0))
            lanes[row.lane] = n + 1, max(waited, now - self._arrived[row.number])
        return lanes

    def _admitted(self, state: SearchState) -> list[int]:
        """Return the trials that were admitted to each rung so far."""
        standing = state.totals.standing
        return [state.n_proposed()] + [
            standing[before, "queued"]
            + standing[before, "running"]
            + sum(n for (step, _), n in tuple(standing.items()) if step >= rung)
            for before, rung in pairwise(self._rungs)
        ]

    def _expected(self, admitted: list[int]) -> list[int]:
        """Return the trials that will have been admitted to each rung, were they promoted as halving usually does."""
        expected = [self._n_trials]
        for rung, so_far in zip(self._rungs[1:], admitted[1:], strict=True):
            least = self._search.finalists if rung == self._rungs[-1] else 1
            promoted = expected[-1] // self._search.reduction_factor
            expected.append(max(so_far, promoted, min(expected[-1], least)))
        return expected

    def _left(
        self, state: SearchState, steps: Mapping[int, int], admitted: list[int], expected: list[int]
    ) -> tuple[list[int], list[int]]:
        """Return the steps to each rung that are left, and the reports there.

        They are those of trials on their way to a rung, and of trials that will be admitted to one.
        """
        left, reports = [0] * len(self._rungs), [0] * len(self._rungs)
        for number in state.numbers("queued", "running"):
            row = state.trials[number]
            goal = self._goal(row)
            left[self._rungs.index(goal)] += max(0, goal - steps.get(number, row.step))
            reports[self._rungs.index(goal)] += 1
        for index, (before, rung) in enumerate(pairwise([0, *self._rungs])):
            missing = max(0, expected[index] - admitted[index])
            left[index] += missing * (rung - before)
            reports[index] += missing
        missing = max(0, self._search.repeat_best * self._search.repeats - (len(state.trials) - state.n_proposed()))
        left[-1] += missing * self._rungs[-1]
        reports[-1] += missing
        return left, reports

    def _loads(self, state: SearchState, expected: list[int]) -> list[float]:
        """Return the load of a trial's step on its way to each rung, with its part of the pack's own."""
        up = [lane for lane in state.lanes.values() if lane.up]
        if self._sizes is None or not up:
            return [1.0] * len(self._rungs)
        own = PASS_TOKENS["cpu" if up[0].facts.get("device", "cpu") == "cpu" else "cuda"] / self._sizes.step
        slots = max(lane.slots for lane in up)
        return [1.0 + own / max(1, min(slots, math.ceil(n / len(up)))) for n in expected]

    def _validation(self, reports: list[int]) -> float:
        """Return the load of validating for reports at each rung; early ones take no more rows than were trained on."""
        if self._sizes is None:
            return 0.0
        most = self._sizes.validation / self._sizes.step
        return VALIDATION_SHARE * sum(n * min(most, rung) for n, rung in zip(reports, self._rungs, strict=True))

    def _reported(self, state: SearchState, loads: list[float]) -> float:
        """Return the load behind `Totals.reported_steps`."""
        standing = [(step, n) for (step, _), n in tuple(state.totals.standing.items()) if n]
        repeated = state.totals.reported_steps - sum(n * step for step, n in standing)
        return sum(n * _load(step, self._rungs, loads) for step, n in standing) + repeated * loads[-1]

    def _goal(self, row: TrialRow) -> int:
        """Return the step at which a trial reports next."""
        return next((rung for rung in self._rungs if rung > row.step and row.repeat_of is None), self._rungs[-1])


def _load(step: int, rungs: list[int], loads: list[float]) -> float:
    """Return the load of a trial's first `step` steps."""
    return sum(
        load * (min(step, rung) - before)
        for (before, rung), load in zip(pairwise([0, *rungs]), loads, strict=True)
        if step > before
    )
