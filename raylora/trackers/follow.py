"""Follows a search by its event log, as it goes on or afterwards, and keeps one tracker up to date."""

import hashlib
import tempfile
from pathlib import Path
from threading import Event

from raylora.run.directory import RunDirectory
from raylora.run.events import EventReader
from raylora.trackers.contents import scores_of, search_params, write_files
from raylora.trackers.records import Records
from raylora.trackers.tracker import Tracker

POLL_SECONDS = 1.0
"""Time between two looks at the log."""


def follow(run: RunDirectory, kind: type[Tracker], over: Event) -> str:
    """Send all that a run directory holds, and what comes until the end.

    Args:
        run: run directory, perhaps of a search that another process runs.
        kind: class of the tracker.
        over: set once nothing more is to come.

    Returns:
        Where to look at it.
    """
    reader = EventReader(run.events_file)
    records: Records | None = None
    tracker: Tracker | None = None
    is_over = False
    while not is_over:
        is_over = over.wait(POLL_SECONDS)  # asked before the log is read: what is written by then is sent
        for event in reader.read():
            records = records or Records(search_params(run.config(), run.provenance()))
            records.add(event)
        if records is not None:
            tracker = tracker or kind(run, _search_id(run))
            for record in records.take_changed():
                tracker.write(record)
    if records is None or tracker is None:
        return "nothing to send"
    tracker.write(records.end(scores_of(run), _last_change(run)))
    with tempfile.TemporaryDirectory() as folder:
        tracker.attach(write_files(run, Path(folder)))
        tracker.close()  # while the files are there
    return tracker.where.format(run=run.path)


def _search_id(run: RunDirectory) -> str:
    """Return a name of the search that its folder's name has no part in: a digest of its first event."""
    with run.events_file.open("rb") as log:
        return hashlib.sha256(log.readline()).hexdigest()[:8]


def _last_change(run: RunDirectory) -> float:
    """Return when events or scores were last written, in seconds since 1970."""
    files = (run.events_file, run.merge_file, run.evaluation_file)
    return max(file.stat().st_mtime for file in files if file.is_file())
