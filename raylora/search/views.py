"""Keeps what people read of a running search near its log: tables, and the study for optuna-dashboard."""

from collections.abc import Callable
from contextlib import suppress

from raylora.config.schema import SearchConfig
from raylora.run.directory import RunDirectory
from raylora.run.events import Event
from raylora.run.state import SearchState
from raylora.run.tables import TableWriter
from raylora.search.mirror import StudyMirror


class Views:
    """Tables and study mirror of one search; both can be made again from the log.

    Args:
        run: receives them.
        config: settings of the search.
        state: the search as it stands.
        events: all events so far.
        note: shows the user a line.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: SearchConfig,
        state: SearchState,
        events: list[Event],
        note: Callable[[str], None],
    ) -> None:
        self._tables = TableWriter(run, state)
        self._mirror = StudyMirror(run.study_file, config.search_space(), note)
        self._changed = True
        for event in events:
            self._mirror.add(event)

    def add(self, event: Event) -> None:
        """Take in an event, to be written soon."""
        self._mirror.add(event)
        self._changed = True

    def write_if_due(self) -> None:
        """Write the tables if they have changed, unless that was done a moment ago."""
        if self._changed and self._tables.is_due():
            with suppress(OSError):  # a disk that is full for a while costs the search nothing
                self._tables.write()
                self._changed = False

    def close(self) -> None:
        """Write what has changed, and stop. A disk that takes nothing hides no other error."""
        with suppress(OSError):
            self._tables.write()
        self._mirror.close()
