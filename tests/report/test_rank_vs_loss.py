"""Rank against loss: only what is comparable stands in one column."""

from pathlib import Path

import pyarrow.parquet

from raylora.report.rank_vs_loss import rank_vs_loss, write_rank_vs_loss
from raylora.report.tables import markdown_table
from raylora.run.directory import RunDirectory
from tests.run.test_state import filled


def test_rank_against_loss_compares_equal_steps_only() -> None:
    state = filled()
    four, eight = rank_vs_loss(list(state.trials.values()), state.history)
    assert (four["n"], four["n_finished"], four["n_stopped"], four["n_failed"]) == (4, 2, 1, 1)
    assert (four["eval_loss_best"], four["eval_loss_median"], four["eval_loss_spread"]) == (1.0, 2.0, 2.0)
    # first rung: 4, 5 and 6 of the three trials that reached it
    assert (four["first_rung_step"], four["first_rung_eval_loss_best"], four["first_rung_eval_loss_median"]) == (
        3,
        4.0,
        5.0,
    )
    assert (eight["n"], eight["eval_loss_median"], eight["eval_loss_spread"]) == (1, 2.0, 0.0)


def test_rank_table_is_written_in_three_forms(tmp_path: Path) -> None:
    state = filled()
    rows = rank_vs_loss(list(state.trials.values()), state.history)
    write_rank_vs_loss(RunDirectory(tmp_path), rows)
    assert pyarrow.parquet.read_table(tmp_path / "rank_vs_loss.parquet").to_pylist() == rows
    assert (tmp_path / "rank_vs_loss.csv").read_text().startswith('"r","n","n_finished"')
    assert "| 4 | 4 | 2 | 1 | 1 | 9 | 1 | 2 |" in (tmp_path / "rank_vs_loss.md").read_text()


def test_markdown_cells_are_short_and_safe() -> None:
    table = markdown_table([{"a": 0.123456, "b": None, "c": "x|y\nz", "d": 12345.678}])
    assert table.splitlines()[-1] == "| 0.1235 | - | x\\|y z | 12346 |"
