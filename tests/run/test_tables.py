"""Tables are views of the state, whole on disk, and written seldom enough to cost little."""

from pathlib import Path
from threading import Thread

import pyarrow.parquet
import pytest

from raylora.run import tables
from raylora.run.directory import RunDirectory
from raylora.run.events import Started
from raylora.run.state import SearchState
from raylora.run.tables import TableWriter, write_tables
from tests.helpers import LANE, SESSION, history_of, proposed, reported


def test_tables_hold_a_row_per_trial_and_per_report(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    state = SearchState([SESSION, LANE, *history_of(0, {3: 4.0, 9: 1.0}, "finished"), *history_of(1, {}, "failed")])
    write_tables(run, state)
    trials = pyarrow.parquet.read_table(run.trials_file).to_pylist()
    assert [(row["number"], row["state"], row["step"], row["eval_loss"], row["reason"]) for row in trials] == [
        (0, "finished", 9, 1.0, None),
        (1, "failed", 0, None, "why"),
    ]
    history = pyarrow.parquet.read_table(run.history_file).to_pylist()
    assert [(row["number"], row["step"], row["eval_loss"]) for row in history] == [(0, 3, 4.0), (0, 9, 1.0)]


def test_history_holds_the_loss_and_learning_rate_of_each_step(tmp_path: Path) -> None:
    steps = {"step_losses": [3.0, 2.5, 2.0], "step_learning_rates": [0.0, 1e-3, 2e-3]}
    state = SearchState([SESSION, LANE, proposed(0), Started(0, 1, "0", None), reported(0, 3, 4.0, **steps)])
    write_tables(RunDirectory(tmp_path), state)
    (row,) = pyarrow.parquet.read_table(RunDirectory(tmp_path).history_file).to_pylist()
    assert {name: row[name] for name in steps} == steps


def test_a_log_without_the_losses_of_steps_is_read(tmp_path: Path) -> None:
    report = reported(0, 3, 4.0)
    for name in ("step_losses", "step_learning_rates"):
        del report.metrics[name]
    (row,) = SearchState([SESSION, LANE, proposed(0), Started(0, 1, "0", None), report]).history
    assert (row.eval_loss, row.step_losses) == (4.0, [])


def test_tables_of_a_running_search_are_read_whole(tmp_path: Path) -> None:
    run, state = RunDirectory(tmp_path), SearchState([SESSION, LANE])
    write_tables(run, state)

    def go_on() -> None:
        for number in range(100):
            state.apply(proposed(number))
            write_tables(run, state)

    search = Thread(target=go_on)
    search.start()
    while search.is_alive():
        with pyarrow.parquet.ParquetFile(run.trials_file) as table:
            seen = table.read().column("number").to_pylist()
        assert seen == list(range(len(seen)))
    search.join()


def test_long_tables_are_written_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, takes = 100.0, 0.0

    def write(run: RunDirectory, state: SearchState) -> None:
        nonlocal now
        now += takes

    monkeypatch.setattr(tables.time, "monotonic", lambda: now)
    monkeypatch.setattr(tables, "write_tables", write)
    writer = TableWriter(RunDirectory(tmp_path), SearchState())
    for seconds, pause in ((0.01, 2.0), (1.0, 200.0)):  # two seconds at least, and 0.5 % of the time at most
        takes = seconds
        assert writer.is_due()
        writer.write()
        now += pause - 0.1
        assert not writer.is_due()
        now += 0.2
