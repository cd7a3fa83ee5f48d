"""Keeps sums and the ranking of trials up to date as rows change, so that no decision or view scans all trials."""

from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass, field

from raylora.run.trial_row import TrialRow


@dataclass
class Totals:
    """Sums over all trials of a search, and their ranking. Each change costs the same however many trials there are."""

    steps: int = 0
    """Optimizer steps up to the last report of each trial."""

    reported_steps: int = 0
    """The same of those trials that have reported."""

    train_seconds: float = 0.0
    """Seconds of training behind `reported_steps`."""

    report_seconds: float = 0.0
    """Seconds of validating and saving."""

    standing: Counter[tuple[int, str]] = field(default_factory=Counter)
    """(step, state) -> trials, repetitions aside."""

    ranking: list[tuple[int, float, int]] = field(default_factory=list)
    """(-step, validation loss, number) of trials that have reported, best first; repetitions and failed aside."""

    def replace(self, before: TrialRow | None, after: TrialRow) -> None:
        """Take in a new row of a trial in place of the one before, if there was one."""
        if before is not None:
            self._count(before, -1)
        self._count(after, 1)
        old, new = None if before is None else _rank(before), _rank(after)
        if old == new:
            return
        if old is not None:
            del self.ranking[bisect_left(self.ranking, old)]
        if new is not None:
            insort(self.ranking, new)

    def _count(self, row: TrialRow, sign: int) -> None:
        self.steps += sign * row.step
        if row.train_seconds is not None:
            self.reported_steps += sign * row.step
            self.train_seconds += sign * row.train_seconds
        self.report_seconds += sign * ((row.eval_seconds or 0.0) + (row.other_seconds or 0.0))
        if row.repeat_of is None:
            self.standing[row.step, row.state] += sign


def _rank(row: TrialRow) -> tuple[int, float, int] | None:
    if row.repeat_of is not None or row.state == "failed" or row.eval_loss is None:
        return None
    return -row.step, row.eval_loss, row.number
