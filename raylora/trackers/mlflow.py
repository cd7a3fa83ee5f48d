"""Sends records to MLflow: the run of the search, and those of its trials nested in it.

MLflow's own variables say where: `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`.
"""

import os
from pathlib import Path

import mlflow
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from raylora.run.directory import RunDirectory
from raylora.trackers.records import SEARCH, Point, Record
from raylora.trackers.tracker import PROJECT, Tracker

POINTS = 100
"""Points in one request; MLflow takes 1000 figures."""

SEARCH_TAG, KEY_TAG, STEP_TAG = "raylora.search", "raylora.key", "raylora.step"
"""Tags by which a search, its records and the last step of each are found again."""

RETRIES = "3"
"""Retries of a request, 14 seconds in all, unless the user has set another number; MLflow's own take four minutes."""

STATUS = {"finished": "FINISHED", "stopped": "KILLED", "paused": "KILLED", "failed": "FAILED"}
"""State of a record that has ended -> MLflow's status."""


class MlflowTracker(Tracker):
    """Runs in an MLflow experiment. Each request with points sets the tag of the last step too."""

    def __init__(self, run: RunDirectory, search_id: str) -> None:
        super().__init__(run, search_id)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", RETRIES)
        self._client = mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        self._experiment = found.experiment_id if found else self._client.create_experiment(name)
        self.where = f"experiment {name} at {mlflow.get_tracking_uri()}"
        self._runs = {known.data.tags[KEY_TAG]: known.info.run_id for known in self._known()}

    def _known(self) -> list[Run]:
        """Return the runs of this search that are there already."""
        found: list[Run] = []
        token: str | None = ""
        while token is not None:
            page = self._client.search_runs(
                [self._experiment], f"tags.`{SEARCH_TAG}` = '{self.search_id}'", page_token=token or None
            )
            found += page
            token = page.token or None
        return found

    def open(self, record: Record) -> int:
        """Create the run, or go on with it."""
        if record.key in self._runs:
            tags = self._client.get_run(self._runs[record.key]).data.tags
            self._client.update_run(self._runs[record.key], status="RUNNING")
            return int(tags.get(STEP_TAG, -1))
        name = self.run.path.name
        tags = {SEARCH_TAG: self.search_id, KEY_TAG: record.key}
        if record.key != SEARCH:
            tags[MLFLOW_PARENT_RUN_ID] = self._runs[SEARCH]
        created = self._client.create_run(
            self._experiment,
            start_time=_milliseconds(record.started_at),
            tags=tags,
            run_name=name if record.key == SEARCH else f"{name} {record.key}",
        )
        self._runs[record.key] = created.info.run_id
        params = [Param(name, str(value)) for name, value in record.params.items()]
        self._client.log_batch(created.info.run_id, params=params)
        return -1

    def log(self, record: Record, points: list[Point]) -> None:
        """Add points, and the tag of the last step with each request."""
        for start in range(0, len(points), POINTS):
            part = points[start : start + POINTS]
            metrics = [
                Metric(name, value, _milliseconds(point.time), point.step)
                for point in part
                for name, value in point.values.items()
            ]
            tags = [RunTag(STEP_TAG, str(part[-1].step))]
            self._client.log_batch(self._runs[record.key], metrics=metrics, tags=tags)

    def describe(self, record: Record) -> None:
        """Set the tags of state and reason, new scores, and the status of a run that has ended."""
        run_id, step = self._runs[record.key], record.points[-1].step if record.points else 0
        tags = {"state": record.state, "reason": record.reason}
        known = self._client.get_run(run_id).data.metrics if record.scores else {}
        scores = {name: value for name, value in record.scores.items() if known.get(name) != value}
        self._client.log_batch(
            run_id,
            metrics=[Metric(name, value, _milliseconds(record.ended_at), step) for name, value in scores.items()],
            tags=[RunTag(name, value) for name, value in tags.items() if value],
        )
        if record.ended_at is not None:
            self._client.set_terminated(run_id, STATUS[record.state], _milliseconds(record.ended_at))

    def attach(self, files: list[Path]) -> None:
        """Put the files among the artifacts of the search; those of before are replaced."""
        for file in files:
            self._client.log_artifact(self._runs[SEARCH], str(file))


def _milliseconds(seconds: float | None) -> int:
    return round(1000 * (seconds or 0.0))


TRACKER = MlflowTracker
