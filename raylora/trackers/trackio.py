"""Sends records to Trackio: local, or where its own variables say (`TRACKIO_SPACE_ID`, `TRACKIO_SERVER_URL`)."""

import os
from pathlib import Path
from typing import Any

import trackio

from raylora.run.directory import RunDirectory
from raylora.trackers.records import SEARCH, Point, Record
from raylora.trackers.tracker import PROJECT, Tracker


class TrackioTracker(Tracker):
    """Runs of a Trackio project, grouped by search. A run is open only while it is written to."""

    def __init__(self, run: RunDirectory, search_id: str) -> None:
        super().__init__(run, search_id)
        self._project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self.where = f"trackio show --project {self._project}"

    def open(self, record: Record) -> int:
        """Return the last step that Trackio has of the run; it comes to be with its first point."""
        return _last_step(self._started(record.key, record.params))

    def log(self, record: Record, points: list[Point]) -> None:
        """Add points."""
        run = self._started(record.key, record.params)
        for point in points:
            run.log(point.values, step=point.step)
        run.finish()

    def describe(self, record: Record) -> None:
        """Show the end of a trial as its last point, and the scores of the search as a run of their own.

        Trackio's runs have no summary.
        """
        if record.ended_at is None:
            return
        if record.key == SEARCH:
            step = round(record.ended_at - record.started_at)  # of later scores it is larger
            self._add_once(f"{SEARCH}-scores", record.params, record.scores, step)
        else:
            end = {"state": record.state, **({"reason": record.reason} if record.reason else {})}
            self._add_once(record.key, record.params, end, record.points[-1].step + 1 if record.points else 0)

    def _add_once(self, key: str, params: dict[str, Any], values: dict[str, Any], step: int) -> None:
        run = self._started(key, params)
        if values and _last_step(run) < step:
            run.log(values, step=step)
        run.finish()

    def attach(self, files: list[Path]) -> None:
        """Send the files as artifacts; Trackio keeps a version for each change."""
        run = self._started(SEARCH, {})
        for file in files:
            run.log_artifact(file, name=f"{self.search_id}-{file.name}", type="tables")
        run.finish()

    def _started(self, key: str, params: dict[str, Any]) -> Any:
        return trackio.init(
            project=self._project,
            name=f"{self.search_id}-{key}",
            group=self.run.path.name,
            config=params,
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )


def _last_step(run: Any) -> int:
    """Return the last step that Trackio has of a run, -1 if it has none; no public name tells it (Trackio 0.43)."""
    last: int = run._next_step - 1
    return last


TRACKER = TrackioTracker
