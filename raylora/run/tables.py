"""Keeps the table of trials and the table of reports as Parquet files, whole after every change."""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from raylora.config.assignment import Assignment
from raylora.run.atomic import replacing
from raylora.run.directory import RunDirectory
from raylora.run.metrics import RungMetrics

STATES = ("running", "paused", "finished", "stopped", "failed")


ENDED = ("finished", "stopped", "failed")


TIMES = ("train_seconds", "eval_seconds", "other_seconds")


@dataclass(frozen=True)
class HistoryRow(RungMetrics):
    """One report of one trial."""

    number: int
    reported_at: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class TrialRow:
    """One trial as it stands."""

    number: int
    state: str
    reason: str | None
    r: int
    lora_alpha: float
    lora_dropout: float
    learning_rate: float
    target_modules: str
    use_rslora: bool
    weight_decay: float
    warmup_ratio: float
    lr_scheduler_type: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    seed: int
    step: int
    max_steps: int
    eval_loss: float | None
    train_loss: float | None
    trainable_parameters: int | None
    peak_memory_mib: float | None
    tokens_per_second: float | None
    train_seconds: float | None
    eval_seconds: float | None
    other_seconds: float | None
    wall_seconds: float | None
    lane: str | None
    checkpoint: str | None
    started_at: float
    ended_at: float | None
    repeat_of: int | None = None
    """Number of the trial whose assignment this one trains again with another seed."""

    def assignment(self) -> Assignment:
        """The trial's hyperparameters."""
        return Assignment(**{name: getattr(self, name) for name in Assignment.model_fields})


class Records:
    """The two tables of one run, in memory and on disk."""

    def __init__(self, run: RunDirectory, clock: Callable[[], float] = time.time) -> None:
        self._run, self._clock = run, clock
        self.trials: dict[int, TrialRow] = {}
        self.history: list[HistoryRow] = []

    @classmethod
    def load(cls, run: RunDirectory) -> "Records":
        """The tables as they stand on disk; empty where nothing is written yet."""
        records = cls(run)
        if run.trials_file.is_file():
            records.trials = {row["number"]: TrialRow(**row) for row in read_table(run.trials_file)}
        if run.history_file.is_file():
            records.history = [HistoryRow(**row) for row in read_table(run.history_file)]
        return records

    def started(self, number: int, assignment: Assignment, max_steps: int, repeat_of: int | None = None) -> None:
        """A trial begins, or goes on after a resumed search."""
        if number not in self.trials:
            unknown = dict.fromkeys(field.name for field in fields(TrialRow))
            known = {
                "number": number,
                "state": "running",
                "step": 0,
                "max_steps": max_steps,
                "started_at": self._clock(),
                "repeat_of": repeat_of,
            }
            self.trials[number] = TrialRow(**{**unknown, **assignment.model_dump(), **known})
        self._save()

    def reported(self, number: int, report: dict[str, Any]) -> None:
        """A trial reached a rung. The report's times count from the last report; the tables' from the trial's start."""
        before = self.trials[number]
        times = {name: report[name] + (getattr(before, name) or 0.0) for name in TIMES}
        values = {**report, **times, "number": number, "reported_at": self._clock()}
        self.history.append(HistoryRow(**{field.name: values[field.name] for field in fields(HistoryRow)}))
        known = {field.name: values[field.name] for field in fields(TrialRow) if field.name in values}
        self.trials[number] = replace(before, **known, tokens_per_second=values["tokens_seen"] / times["train_seconds"])
        self._save()

    def paused(self, number: int) -> None:
        """A trial waits at a rung for others."""
        self._set_state(number, "paused")

    def resumed(self, number: int) -> None:
        """A paused trial goes on."""
        self._set_state(number, "running")

    def ended(self, number: int, state: str, reason: str | None = None) -> None:
        """A trial is finished, stopped or failed."""
        assert state in ENDED
        now = self._clock()
        trial = self.trials[number]
        self.trials[number] = replace(
            trial, state=state, reason=reason, ended_at=now, wall_seconds=now - trial.started_at
        )
        self._save()

    def best(self) -> TrialRow | None:
        """The trial of lowest validation loss among those that reached the full budget.

        Where assignments were repeated with other seeds, the one of lowest mean is chosen among them, and its best run.
        """
        finished = self.finished()
        repeated = _repeated(finished)
        if not repeated:
            return finished[0] if finished else None
        chosen = min(repeated, key=lambda number: statistics.fmean(self._final_losses(number)))
        return min(self.runs_of(chosen), key=_final_loss)

    def finished(self) -> list[TrialRow]:
        """Trials that reached the full budget, lowest validation loss first."""
        return sorted(filter(lambda trial: _final_loss(trial) < math.inf, self.trials.values()), key=_final_loss)

    def leaders(self, n: int) -> list[TrialRow]:
        """The n assignments that came furthest, and there had the lowest validation loss."""
        known = [trial for trial in self.trials.values() if trial.repeat_of is None and trial.eval_loss is not None]
        kept = [trial for trial in known if trial.state != "failed"]
        return sorted(kept, key=lambda trial: (-trial.step, trial.eval_loss))[:n]

    def runs_of(self, number: int) -> list[TrialRow]:
        """A trial and its repetitions."""
        return [trial for trial in self.trials.values() if number in (trial.number, trial.repeat_of)]

    def repetitions(self) -> list[dict[str, Any]]:
        """One row for each repeated assignment, lowest mean first: final validation losses over seeds."""
        rows = []
        for number in _repeated(self.trials.values()):
            losses = self._final_losses(number)
            if losses:
                mean, spread = statistics.fmean(losses), max(losses) - min(losses)
                rows.append({"number": number, "n": len(losses), "eval_loss_mean": mean, "eval_loss_spread": spread})
        return sorted(rows, key=lambda row: row["eval_loss_mean"])

    def numbers(self, state: str) -> set[int]:
        """Trials in one state."""
        return {trial.number for trial in self.trials.values() if trial.state == state}

    def count(self, state: str) -> int:
        """How many trials are in one state, repetitions aside."""
        return sum(trial.state == state and trial.repeat_of is None for trial in self.trials.values())

    def _final_losses(self, number: int) -> list[float]:
        return [_final_loss(trial) for trial in self.runs_of(number) if _final_loss(trial) < math.inf]

    def _set_state(self, number: int, state: str) -> None:
        self.trials[number] = replace(self.trials[number], state=state)
        self._save()

    def _save(self) -> None:
        write_table(self._run.trials_file, [asdict(trial) for trial in self.trials.values()], TRIALS_SCHEMA)
        write_table(self._run.history_file, [asdict(row) for row in self.history], HISTORY_SCHEMA)


def _final_loss(trial: TrialRow) -> float:
    """Validation loss at the full budget; infinite for a trial that did not get there."""
    return trial.eval_loss if trial.state == "finished" and trial.eval_loss is not None else math.inf


def _repeated(trials: Iterable[TrialRow]) -> set[int]:
    """Numbers of the trials whose assignments were trained again."""
    return {trial.repeat_of for trial in trials if trial.repeat_of is not None}


def write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Writes rows as one Parquet file, at once."""
    with replacing(path) as temporary:
        pa.parquet.write_table(pa.Table.from_pylist(rows, schema=schema), temporary)


def read_table(path: Path) -> list[dict[str, Any]]:
    """Opens the file once, as a running search may replace it; `read_table` opens it again for each part."""
    with pa.parquet.ParquetFile(path) as table:
        return table.read().to_pylist()


def _schema(row_type: type) -> pa.Schema:
    """Arrow types from the annotations of a row class."""
    types = {"int": pa.int64(), "float": pa.float64(), "str": pa.string(), "bool": pa.bool_()}
    names = {field.name: str(getattr(field.type, "__name__", field.type)) for field in fields(row_type)}
    return pa.schema([(name, types[annotation.removesuffix(" | None")]) for name, annotation in names.items()])


TRIALS_SCHEMA = _schema(TrialRow)


HISTORY_SCHEMA = _schema(HistoryRow)
