"""Writes records as TensorBoard's event files, by tensorboardX, which loads no torch."""

import shutil
from pathlib import Path

from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams

from raylora.run.directory import RunDirectory
from raylora.trackers.records import SEARCH, Point, Record
from raylora.trackers.tracker import Tracker


class TensorBoardTracker(Tracker):
    """Event files in `tensorboard/` of the run directory: a folder for each record, written anew in each session."""

    where = "tensorboard --logdir {run}/tensorboard"

    def __init__(self, run: RunDirectory, search_id: str) -> None:
        super().__init__(run, search_id)
        self._folder = run.path / "tensorboard"
        self._writers: dict[str, SummaryWriter] = {}
        self._states: dict[str, str] = {}
        shutil.rmtree(self._folder, ignore_errors=True)

    def open(self, record: Record) -> int:
        """Start a folder with the record's settings."""
        # purge_step: a TensorBoard that is open meanwhile drops the points of the files before
        writer = self._writers[record.key] = SummaryWriter(str(self._folder / record.key), purge_step=0)
        if record.key == SEARCH:
            writer.add_text("settings", _table(record.params), walltime=record.started_at)
        else:
            for summary in hparams(record.params, {"eval/loss": 0}):
                writer.file_writer.add_summary(summary, walltime=record.started_at)
        return -1

    def log(self, record: Record, points: list[Point]) -> None:
        """Add scalars."""
        for point in points:
            for name, value in point.values.items():
                self._writers[record.key].add_scalar(name, value, point.step, walltime=point.time)

    def describe(self, record: Record) -> None:
        """Show the state and the reason as text, and scores as scalars."""
        writer, step = self._writers[record.key], record.points[-1].step if record.points else 0
        if self._states.get(record.key) != record.state:
            self._states[record.key] = record.state
            writer.add_text("state", f"{record.state}: {record.reason}" if record.reason else record.state, step)
        for name, value in record.scores.items():
            writer.add_scalar(name, value, step, walltime=record.ended_at)
        writer.flush()

    def attach(self, files: list[Path]) -> None:
        """Show the Markdown files as text; TensorBoard holds no others."""
        for file in files:
            if file.suffix == ".md":
                self._writers[SEARCH].add_text(file.stem, file.read_text(encoding="utf-8"))

    def close(self) -> None:
        """Close all files."""
        for writer in self._writers.values():
            writer.close()


def _table(params: dict[str, object]) -> str:
    return "\n".join(["|setting|value|", "|---|---|", *(f"|{name}|{value}|" for name, value in params.items())])


TRACKER = TensorBoardTracker
