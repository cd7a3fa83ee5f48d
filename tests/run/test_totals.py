"""Sums and ranking that are kept as rows change agree with those of a scan, and cost no scan."""

import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raylora.config.schema import SearchConfig
from raylora.report.progress import Progress
from raylora.run.state import SearchState
from tests.search.simulation import RUNGS, Simulation
from tests.search.test_forecast import config


def searched(folder: Path, settings: SearchConfig) -> SearchState:
    """Return the state of a search in which a trial failed, one was given back, and a lane's process died."""
    search = Simulation(settings, folder, n_lanes=2)
    first, second = search.lanes.values()
    search.fail(first, next(iter(first.trials)))
    search.step(second)
    search.give_back(second, [next(iter(second.trials))])
    search.restart(first)
    for _ in range(12):
        search.step(first)
        search.step(second)
    return search.controller.state


def test_totals_are_those_of_a_scan_over_all_trials(tmp_path: Path) -> None:
    state = searched(tmp_path, config(n_trials=30, repeat_best=2))
    rows, totals = list(state.trials.values()), state.totals
    assert totals.steps == sum(row.step for row in rows)
    assert totals.reported_steps == sum(row.step for row in rows if row.train_seconds is not None)
    assert totals.train_seconds == pytest.approx(sum(row.train_seconds or 0.0 for row in rows))
    seconds = sum((row.eval_seconds or 0.0) + (row.other_seconds or 0.0) for row in rows)
    assert totals.report_seconds == pytest.approx(seconds)
    known = [row for row in rows if row.repeat_of is None and row.state != "failed" and row.eval_loss is not None]
    by_hand = sorted(known, key=lambda row: (-row.step, row.eval_loss, row.number))
    assert by_hand and [number for _, _, number in totals.ranking] == [row.number for row in by_hand]
    for (step, name), n in totals.standing.items():
        assert n == sum((row.step, row.state, row.repeat_of) == (step, name, None) for row in rows)


class Counting(dict[int, Any]):
    """Counts the rows that are looked at."""

    n_reads = 0

    def __getitem__(self, key: int) -> Any:
        self.n_reads += 1
        return super().__getitem__(key)

    def values(self) -> Any:
        self.n_reads += len(self)
        return super().values()

    def items(self) -> Any:
        self.n_reads += len(self)
        return super().items()


def test_a_view_of_a_long_search_looks_at_no_more_rows_than_one_of_a_short_search(tmp_path: Path) -> None:
    reads = []
    for n_trials in (60, 600):
        settings = config(n_trials=n_trials)
        search = Simulation(settings, tmp_path / str(n_trials), n_lanes=2).finish()
        state = search.controller.state
        state.trials = counting = Counting(state.trials)
        progress = Progress(state, settings, RUNGS, Console())
        progress.view()
        progress.activity()
        best = state.best()
        assert best is not None and best.final_loss < math.inf
        reads.append(counting.n_reads)
    assert reads[0] == reads[1]
