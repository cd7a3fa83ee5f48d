"""Forecasts a search from what has been trained: steps and validations that are left, and the seconds they take."""

from collections.abc import Mapping
from dataclasses import dataclass

from raylora.config.schema import SearchConfig
from raylora.run.state import SearchState
from raylora.run.trial_row import TrialRow


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

    Args:
        config: settings of the search.
        rungs: optimizer steps at which trials are compared, ascending; the last is the full budget.
    """

    def __init__(self, config: SearchConfig, rungs: list[int]) -> None:
        self._search, self._n_trials, self._rungs = config.search, config.n_trials(), rungs
        self._up_at: float | None = None
        """Time at which the first lane of this session was up."""

        self._done_before = 0
        """Steps that had been done by then."""

    def forecast(self, state: SearchState, now: float, steps: Mapping[int, int] | None = None) -> Forecast:
        """Return how far the search is.

        Args:
            state: the search as it stands.
            now: seconds since 1970.
            steps: running trial -> its step, where it is past its last report.
        """
        past = {number: step - state.trials[number].step for number, step in (steps or {}).items()}
        done = state.totals.steps + sum(past.values())
        if state.lanes and self._up_at is None:
            self._up_at, self._done_before = now, done
        steps_left, reports_left = self._left(state, past)
        n_lanes = sum(lane.up for lane in state.lanes.values())
        seconds = self._seconds(state, now, done, steps_left, reports_left)
        return Forecast(done, steps_left, reports_left, None if seconds is None or not n_lanes else seconds / n_lanes)

    def _seconds(self, state: SearchState, now: float, done: int, steps: int, reports: int) -> float | None:
        """Return the seconds of a lane that the rest takes: by what reports say, else by the clock."""
        totals = state.totals
        if not totals.reported_steps:
            if self._up_at is None or done <= self._done_before:
                return None
            n_lanes = max(1, len(state.lanes))
            return steps * n_lanes * (now - self._up_at) / (done - self._done_before)
        return steps * totals.train_seconds / totals.reported_steps + reports * state.seconds_per_report()

    def _left(self, state: SearchState, past: Mapping[int, int]) -> tuple[int, int]:
        """Return the steps and reports of trials on their way to a rung, and of those that will be admitted to one."""
        standing = state.totals.standing
        on_way = [state.trials[number] for number in state.numbers("queued", "running")]
        steps = sum(max(0, self._goal(row) - row.step - past.get(row.number, 0)) for row in on_way)
        reports, expected = len(on_way), self._n_trials
        for index, (before, rung) in enumerate(zip([0, *self._rungs], self._rungs, strict=False)):
            admitted = state.n_proposed()
            if index:
                waits = standing[before, "queued"] + standing[before, "running"]
                admitted = waits + sum(n for (step, _), n in tuple(standing.items()) if step >= rung)
                least = self._search.finalists if rung == self._rungs[-1] else 1
                expected = max(admitted, expected // self._search.reduction_factor, min(expected, least))
            steps += max(0, expected - admitted) * (rung - before)
            reports += max(0, expected - admitted)
        missing = self._search.repeat_best * self._search.repeats - (len(state.trials) - state.n_proposed())
        return steps + max(0, missing) * self._rungs[-1], reports + max(0, missing)

    def _goal(self, row: TrialRow) -> int:
        """Return the step at which a trial reports next."""
        return next((rung for rung in self._rungs if rung > row.step and row.repeat_of is None), self._rungs[-1])
