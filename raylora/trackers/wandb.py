"""Sends records to Weights & Biases, online or offline, as W&B's own variables and `wandb login` say."""

import os
import shutil
from pathlib import Path
from typing import Any

import wandb

from raylora.run.directory import RunDirectory
from raylora.trackers.records import SEARCH, Point, Record
from raylora.trackers.tracker import PROJECT, Tracker

SETTINGS = wandb.Settings(
    # host, user, command line, source code, terminal and packages are nobody's business
    x_disable_meta=True,
    x_disable_machine_info=True,
    x_disable_stats=True,
    x_save_requirements=False,
    disable_git=True,
    disable_code=True,
    console="off",
    host="-",
    silent=True,
)


class WandbTracker(Tracker):
    """Runs of a W&B project, grouped by search. Their ids are those of the search and its records.

    Online, W&B says which step it has. Offline it cannot, so that a session writes a run anew and removes its older
    folder.
    """

    def __init__(self, run: RunDirectory, search_id: str) -> None:
        super().__init__(run, search_id)
        self._project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._runs: dict[str, Any] = {}
        self.where = f"project {self._project}"

    def open(self, record: Record) -> int:
        """Start the run, or go on with it."""
        run_id = f"{self.search_id}-{record.key}"
        earlier = list((self.run.path / "wandb").glob(f"offline-run-*-{run_id}"))
        opened = wandb.init(
            project=self._project,
            id=run_id,
            name=f"{self.run.path.name} {record.key}",
            group=f"{self.run.path.name} {self.search_id}",
            job_type=SEARCH if record.key == SEARCH else "trial",
            config=record.params,
            dir=str(self.run.path),
            resume="allow",
            reinit="create_new",
            settings=SETTINGS,
        )
        self._runs[record.key] = opened
        if opened.offline:
            for folder in earlier:
                shutil.rmtree(folder)
            self.where = f"wandb sync {self.run.path}/wandb/offline-run-*"
        else:
            self.where = f"{opened.project_url}"
        return opened.step - 1 if opened.resumed else -1

    def log(self, record: Record, points: list[Point]) -> None:
        """Add points with the time of their events."""
        for point in points:
            self._runs[record.key].log({**point.values, "_timestamp": point.time}, step=point.step)

    def describe(self, record: Record) -> None:
        """Set state, reason and scores in the summary, and end a run that has ended."""
        summary = {"state": record.state, "reason": record.reason, **record.scores}
        self._runs[record.key].summary.update({name: value for name, value in summary.items() if value is not None})
        if record.key != SEARCH and record.ended_at is not None:
            self._runs.pop(record.key).finish(exit_code=int(record.state == "failed"))

    def attach(self, files: list[Path]) -> None:
        """Send the files as one artifact; W&B keeps a version for each change."""
        artifact = wandb.Artifact(f"tables-{self.search_id}", type="tables")
        for file in files:
            artifact.add_file(str(file))
        self._runs[SEARCH].log_artifact(artifact)

    def close(self) -> None:
        """End all runs; those of paused trials are taken up again when the search is."""
        for run in self._runs.values():
            run.finish()


TRACKER = WandbTracker
