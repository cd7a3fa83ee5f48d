"""Writes the state of a search as Parquet tables: one of trials, one of their reports."""

import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from raylora.run.atomic import replacing
from raylora.run.directory import RunDirectory
from raylora.run.state import SearchState
from raylora.run.trial_row import HistoryRow, TrialRow

MIN_SECONDS = 2.0
"""Least time between two writes of the tables while a search runs."""

MAX_SHARE = 0.005
"""Largest share of the time that writing tables may take: long tables are written less often."""


class TableWriter:
    """Keeps the two tables of a running search near its state, at a bounded cost."""

    def __init__(self, run: RunDirectory, state: SearchState) -> None:
        self._run, self._state = run, state
        self._due = 0.0

    def is_due(self) -> bool:
        """Return True if the last write lies far enough back."""
        return time.monotonic() >= self._due

    def write(self) -> None:
        """Write both tables, and put the next write off in proportion to what this one took."""
        began = time.monotonic()
        try:
            write_tables(self._run, self._state)
        finally:
            took = time.monotonic() - began
            self._due = began + took + max(MIN_SECONDS, took / MAX_SHARE)


def write_tables(run: RunDirectory, state: SearchState) -> None:
    """Write `trials.parquet` and `history.parquet`, each at once."""
    write_table(run.trials_file, [vars(row) for row in state.trials.values()], TRIALS_SCHEMA)
    write_table(run.history_file, [vars(row) for row in state.history], HISTORY_SCHEMA)


def write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Write rows as one Parquet file, at once."""
    # `Table.from_pylist` takes eight times as long
    columns = {name: [row[name] for row in rows] for name in schema.names}
    with replacing(path) as temporary:
        pa.parquet.write_table(pa.table(columns, schema=schema), temporary)


def _schema(row_type: type) -> pa.Schema:
    """Return Arrow types from the annotations of a row class."""
    types = {"int": pa.int64(), "float": pa.float64(), "str": pa.string(), "bool": pa.bool_()}
    types["list"] = pa.list_(pa.float64())
    names = {column.name: str(getattr(column.type, "__name__", column.type)) for column in fields(row_type)}
    return pa.schema([(name, types[annotation.removesuffix(" | None")]) for name, annotation in names.items()])


TRIALS_SCHEMA = _schema(TrialRow)
HISTORY_SCHEMA = _schema(HistoryRow)
