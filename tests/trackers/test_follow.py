"""A tracker follows a log that is still written, point by point, and goes on where the tracker's own position is."""

import time
from pathlib import Path
from threading import Event, Thread

import pytest

from raylora.run.directory import RunDirectory
from raylora.trackers import follow as following
from raylora.trackers.follow import follow
from raylora.trackers.records import Point, Record
from raylora.trackers.tracker import Tracker
from tests.trackers.conftest import TO_THE_END, write_events, write_scores

Calls = list[tuple[str, list[int]]]


def recorder(calls: Calls, held: dict[str, int] | None = None) -> type[Tracker]:
    """Return a tracker that notes key and steps of the points it gets.

    Args:
        calls: receives them.
        held: last step that the tracker has of each record before the session.
    """

    class Recorder(Tracker):
        where = "in {run}"

        def open(self, record: Record) -> int:
            return (held or {}).get(record.key, -1)

        def log(self, record: Record, points: list[Point]) -> None:
            calls.append((record.key, [point.step for point in points]))

        def describe(self, record: Record) -> None:
            if record.scores:
                calls.append((f"{record.key} {record.state}", [len(record.scores)]))

        def attach(self, files: list[Path]) -> None:
            calls.append(("files", [len(files)]))

    return Recorder


def test_points_are_sent_while_the_search_goes_on(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "POLL_SECONDS", 0.01)
    calls: Calls = []
    over = Event()
    follower = Thread(target=follow, args=(run, recorder(calls), over))
    follower.start()
    deadline = time.monotonic() + 30
    while len(calls) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert calls == [("trial-0000", [1, 2]), ("trial-0001", [1, 2])]
    write_events(run, TO_THE_END)
    write_scores(run)
    over.set()
    follower.join(timeout=30)
    assert calls[2:] == [("search", [1, 2]), ("trial-0000", [3]), ("search finished", [6]), ("files", [1])]


def test_what_the_tracker_has_is_not_sent_again(run: RunDirectory) -> None:
    write_events(run, TO_THE_END)
    calls: Calls = []
    over = Event()
    over.set()
    assert follow(run, recorder(calls, held={"trial-0000": 2, "trial-0001": 2, "search": 1}), over) == f"in {run.path}"
    assert calls == [("search", [2]), ("trial-0000", [3]), ("files", [0])]


def test_a_search_without_events_sends_nothing(run: RunDirectory) -> None:
    run.events_file.unlink()
    over = Event()
    over.set()
    assert follow(run, recorder([]), over) == "nothing to send"
