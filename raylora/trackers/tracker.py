"""Defines what a tracker does. Each of the four is a file beside this one, loaded only if it is asked for."""

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from raylora.errors import ConfigError
from raylora.run.directory import RunDirectory
from raylora.trackers.records import Point, Record

PROJECT = "raylora"
"""Project or experiment that receives the runs, if the tracker's own variables name no other."""

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb", "trackio": "trackio"}
"""Tracker -> package that writes to it."""


class Tracker(ABC):
    """A tracker that receives the records of one search.

    A point is known by its record and step. The tracker itself keeps the last step that it has of each record, or is
    written anew. So nothing is doubled, whether a search is resumed, killed or sent twice.

    Args:
        run: run directory of the search.
        search_id: name of the search that outlives a move of its folder.
    """

    where: str
    """Sentence that says where to look; `{run}` is the run directory."""

    def __init__(self, run: RunDirectory, search_id: str) -> None:
        self.run, self.search_id = run, search_id
        self._last: dict[str, int] = {}
        """Key -> last step that the tracker has."""

    def write(self, record: Record) -> None:
        """Bring the tracker's run of a record up to date."""
        if record.key not in self._last:
            self._last[record.key] = self.open(record)
        last = self._last[record.key]
        if points := [point for point in record.points if point.step > last]:
            self.log(record, points)
            self._last[record.key] = points[-1].step
        self.describe(record)

    @abstractmethod
    def open(self, record: Record) -> int:
        """Start the run of a record, or go on with it, and return the last step that it has; -1 if it has none."""

    @abstractmethod
    def log(self, record: Record, points: list[Point]) -> None:
        """Add points that the tracker does not have."""

    @abstractmethod
    def describe(self, record: Record) -> None:
        """Show the record's state, reason and scores; end its run if it has ended."""

    @abstractmethod
    def attach(self, files: list[Path]) -> None:
        """Put files beside the run of the search."""

    def close(self) -> None:  # noqa: B027  # nothing to do for most
        """Send what is left."""


def check_installed(names: Sequence[str]) -> None:
    """Check that the packages of these trackers are there, without loading them.

    Raises:
        ConfigError: one is missing, with the extra that brings it.
    """
    for name in names:
        spec = importlib.util.find_spec(PACKAGES[name])
        if spec is None or spec.origin is None:  # a folder of that name, such as W&B's own ./wandb, is no package
            raise ConfigError(f"report_to: {name} is not installed; pip install 'raylora[{name}]'")


def load_tracker(name: str) -> type[Tracker]:
    """Return the class of a tracker; only now its package is imported."""
    kind: type[Tracker] = importlib.import_module(f"raylora.trackers.{name}").TRACKER
    return kind
