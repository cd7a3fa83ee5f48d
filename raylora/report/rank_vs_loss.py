"""Turns trials and their history into one row per rank: counts, and validation loss at equal steps."""

import statistics
from typing import Any

import pyarrow as pa
import pyarrow.csv

from raylora.report.tables import markdown_table
from raylora.run.atomic import replacing, write_text
from raylora.run.directory import RunDirectory
from raylora.run.state import ENDED
from raylora.run.tables import write_table
from raylora.run.trial_row import HistoryRow, TrialRow


def rank_vs_loss(trials: list[TrialRow], history: list[HistoryRow]) -> list[dict[str, Any]]:
    """Return a row for each r: counts, and the validation loss at equal steps.

    Losses are compared at the full budget among finished trials, and at the first rung among all trials that reached
    it. Repetitions are left out, since they repeat chosen trials only.

    Args:
        trials: all trials of a search.
        history: all their reports.

    Returns:
        Rows with the columns of `RANK_SCHEMA`, lowest r first.
    """
    trials = [trial for trial in trials if trial.repeat_of is None]
    first_rung = min((row.step for row in history), default=0)
    at_first = {row.number: row.eval_loss for row in history if row.step == first_rung}
    rows = []
    for r in sorted({trial.r for trial in trials}):
        of_rank = [trial for trial in trials if trial.r == r]
        final = [trial.eval_loss for trial in of_rank if trial.state == "finished" and trial.eval_loss is not None]
        first = [at_first[trial.number] for trial in of_rank if trial.number in at_first]
        rows.append(
            {
                "r": r,
                "n": len(of_rank),
                **{f"n_{state}": sum(trial.state == state for trial in of_rank) for state in ENDED},
                "max_steps": of_rank[0].max_steps,
                "eval_loss_best": min(final, default=None),
                "eval_loss_median": statistics.median(final) if final else None,
                "eval_loss_spread": max(final) - min(final) if final else None,
                "first_rung_step": first_rung,
                "first_rung_eval_loss_best": min(first, default=None),
                "first_rung_eval_loss_median": statistics.median(first) if first else None,
                "trainable_parameters": _median([trial.trainable_parameters for trial in of_rank]),
                "peak_memory_mib": max(
                    (trial.peak_memory_mib for trial in of_rank if trial.peak_memory_mib), default=None
                ),
                "tokens_per_second": _median([trial.tokens_per_second for trial in of_rank]),
            }
        )
    return rows


def short_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of `rank_vs_loss` with the columns that people look at, under short names."""
    return [{short: row[name] for name, short in SHORT.items()} for row in rows]


def write_rank_vs_loss(run: RunDirectory, rows: list[dict[str, Any]]) -> None:
    """Write the table as Parquet, CSV and Markdown.

    Args:
        run: run directory.
        rows: from `rank_vs_loss`.
    """
    write_table(run.path / "rank_vs_loss.parquet", rows, RANK_SCHEMA)
    with replacing(run.path / "rank_vs_loss.csv") as temporary:
        pa.csv.write_csv(pa.Table.from_pylist(rows, schema=RANK_SCHEMA), temporary)
    write_text(run.path / "rank_vs_loss.md", markdown_table(rows))


SHORT = {
    "r": "r",
    "n": "trials",
    "n_finished": "finished",
    "n_stopped": "stopped",
    "n_failed": "failed",
    "eval_loss_best": "best",
    "eval_loss_median": "median",
    "eval_loss_spread": "spread",
    "first_rung_eval_loss_best": "best, 1st rung",
    "first_rung_eval_loss_median": "median, 1st rung",
    "trainable_parameters": "parameters",
    "peak_memory_mib": "MiB",
    "tokens_per_second": "tokens/s",
}
"""Column of the rank table that people look at -> its short name."""


def _median(values: list[Any]) -> Any:
    """Return the lower median of the values that are known, or None."""
    present = [value for value in values if value is not None]
    return statistics.median_low(present) if present else None


RANK_SCHEMA = pa.schema(
    [(name, pa.int64()) for name in ("r", "n", "n_finished", "n_stopped", "n_failed", "max_steps")]
    + [(f"eval_loss_{name}", pa.float64()) for name in ("best", "median", "spread")]
    + [("first_rung_step", pa.int64())]
    + [(f"first_rung_eval_loss_{name}", pa.float64()) for name in ("best", "median")]
    + [("trainable_parameters", pa.int64()), ("peak_memory_mib", pa.float64()), ("tokens_per_second", pa.float64())]
)
