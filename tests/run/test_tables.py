"""Tables: their arithmetic, and that they are whole on disk after every event."""

from pathlib import Path
from threading import Thread

import pyarrow.parquet

from raylora.report.rank_vs_loss import rank_vs_loss, write_rank_vs_loss
from raylora.report.tables import markdown_table
from raylora.run.directory import RunDirectory
from raylora.run.tables import Records
from tests.training.test_trl import assignment

REPORT = {
    "step": 3,
    "epoch": 0.5,
    "eval_loss": 2.0,
    "train_loss": 2.5,
    "tokens_seen": 300,
    "train_seconds": 1.0,
    "eval_seconds": 0.5,
    "other_seconds": 0.25,
    "peak_memory_mib": 100.0,
    "trainable_parameters": 1000,
    "checkpoint": "checkpoint-3",
    "lane": "0",
}


def filled(path: Path) -> Records:
    """r = 4: losses 1.0 and 3.0 at 9 steps, one stopped at 3, one failed. r = 8: one at 2.0."""
    records = Records(RunDirectory(path), clock=lambda: 100.0)
    ends = [(4, 1.0, "finished"), (4, 3.0, "finished"), (4, None, "stopped"), (4, None, "failed"), (8, 2.0, "finished")]
    for number, (r, loss, state) in enumerate(ends):
        records.started(number, assignment(r=r), 9)
        if state != "failed":
            records.reported(number, {**REPORT, "eval_loss": 4.0 + number})
        if loss is not None:
            records.reported(number, {**REPORT, "step": 9, "eval_loss": loss, "tokens_seen": 900, "train_seconds": 2.0})
        records.ended(number, state, "why" if state == "failed" else None)
    return records


def test_rank_against_loss_compares_equal_steps_only(tmp_path: Path) -> None:
    records = filled(tmp_path)
    four, eight = rank_vs_loss(list(records.trials.values()), records.history)
    assert (four["n"], four["n_finished"], four["n_stopped"], four["n_failed"]) == (4, 2, 1, 1)
    assert (four["eval_loss_best"], four["eval_loss_median"], four["eval_loss_spread"]) == (1.0, 2.0, 2.0)
    # first rung: 4, 5 and 6 of the three trials that reached it
    assert (four["first_rung_step"], four["first_rung_eval_loss_best"], four["first_rung_eval_loss_median"]) == (
        3,
        4.0,
        5.0,
    )
    assert (eight["n"], eight["eval_loss_median"], eight["eval_loss_spread"]) == (1, 2.0, 0.0)


def test_tables_of_a_running_search_are_read_whole(tmp_path: Path) -> None:
    records = filled(tmp_path)

    def go_on() -> None:
        for number in range(5, 255):
            records.started(number, assignment(r=4), 9)

    search = Thread(target=go_on)
    search.start()
    while search.is_alive():
        seen = Records.load(RunDirectory(tmp_path)).trials
        assert list(seen) == list(range(len(seen)))
    search.join()


def test_times_add_up_over_reports_and_tokens_per_second_follow(tmp_path: Path) -> None:
    trial = filled(tmp_path).trials[0]
    assert (trial.train_seconds, trial.eval_seconds, trial.other_seconds) == (3.0, 1.0, 0.5)  # 1 + 2, twice each
    assert trial.tokens_per_second == 300.0  # 900 tokens in 3 seconds


def test_best_is_chosen_among_finished_trials(tmp_path: Path) -> None:
    records = filled(tmp_path)
    best = records.best()
    assert best is not None
    assert best.number == 0
    assert Records(RunDirectory(tmp_path / "other")).best() is None


def test_with_repetitions_the_choice_is_by_the_mean(tmp_path: Path) -> None:
    records = filled(tmp_path)  # trial 0 ended at 1.0, trial 4 at 2.0
    for number, repeat_of, seed, loss in ((5, 0, 1, 4.0), (6, 4, 1, 2.2), (7, 4, 2, 1.8)):
        records.started(number, assignment(r=8, seed=seed), 9, repeat_of)
        records.reported(number, {**REPORT, "step": 9, "eval_loss": loss})
        records.ended(number, "finished")
    first, second = records.repetitions()
    assert (first["number"], first["n"], first["eval_loss_mean"]) == (4, 3, 2.0)
    assert (second["number"], second["n"], second["eval_loss_mean"], second["eval_loss_spread"]) == (0, 2, 2.5, 3.0)
    best = records.best()
    assert best is not None
    assert best.number == 7  # the best run of the assignment with the lowest mean, not 0 with its lucky 1.0
    assert records.count("finished") == 3  # repetitions are no trials of their own
    assert Records.load(RunDirectory(tmp_path)).trials == records.trials


def test_leaders_came_furthest_and_lowest(tmp_path: Path) -> None:
    records = filled(tmp_path)
    assert [trial.number for trial in records.leaders(4)] == [0, 4, 1, 2]  # 2 stopped at the first rung, 3 failed


def test_a_paused_trial_is_paused_until_it_goes_on(tmp_path: Path) -> None:
    records = Records(RunDirectory(tmp_path), clock=lambda: 100.0)
    records.started(0, assignment(), 9)
    records.reported(0, REPORT)
    records.paused(0)
    assert Records.load(RunDirectory(tmp_path)).numbers("paused") == {0}
    records.resumed(0)
    assert (records.numbers("paused"), records.count("running")) == (set(), 1)


def test_tables_are_on_disk_after_every_event(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    records = Records(run, clock=lambda: 100.0)
    records.started(0, assignment(), 9)
    assert Records.load(run).trials == records.trials
    records.reported(0, REPORT)
    assert Records.load(run).history == records.history
    assert pyarrow.parquet.read_table(run.trials_file).to_pylist()[0]["state"] == "running"
    records.ended(0, "stopped", "not promoted from step 3")
    assert Records.load(run).trials == records.trials


def test_rank_table_is_written_in_three_forms(tmp_path: Path) -> None:
    records = filled(tmp_path)
    rows = rank_vs_loss(list(records.trials.values()), records.history)
    write_rank_vs_loss(RunDirectory(tmp_path), rows)
    assert pyarrow.parquet.read_table(tmp_path / "rank_vs_loss.parquet").to_pylist() == rows
    assert (tmp_path / "rank_vs_loss.csv").read_text().startswith('"r","n","n_finished"')
    assert "| 4 | 4 | 2 | 1 | 1 | 9 | 1 | 2 | 2 |" in (tmp_path / "rank_vs_loss.md").read_text()


def test_markdown_cells_are_short_and_safe() -> None:
    table = markdown_table([{"a": 0.123456, "b": None, "c": "x|y\nz", "d": 12345.678}])
    assert table.splitlines()[-1] == "| 0.1235 | - | x\\|y z | 12346 |"
