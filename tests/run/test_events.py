"""The event log: whole lines only, whatever a kill leaves behind."""

from pathlib import Path

import pytest

from raylora.errors import RunDirectoryError
from raylora.run.events import EventLog, Failed, GivenBack, Paused, read_events
from tests.helpers import LANE, SESSION, history_of


def written(path: Path) -> list:
    log = EventLog(path, clock=lambda: 7.0)
    events = [log.append(event) for event in (SESSION, LANE, *history_of(0, {3: 2.0}, "finished"))]
    log.flush()
    return events


def test_events_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    events = written(tmp_path / "events.jsonl")
    assert list(read_events(tmp_path / "events.jsonl")) == events
    assert {event.time for event in events} == {7.0}


def test_nothing_is_written_before_it_is_flushed(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.append(Paused(0))
    assert list(read_events(tmp_path / "events.jsonl")) == []
    log.flush()
    assert len(list(read_events(tmp_path / "events.jsonl"))) == 1


def test_a_torn_last_line_is_dropped_wherever_it_is_torn(tmp_path: Path) -> None:
    events = written(tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    path = tmp_path / "events.jsonl"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        n_whole = whole[:size].count(b"\n")
        assert list(read_events(path)) == events[:n_whole]
        log = EventLog(path)  # a new session goes on after the last whole line
        log.append(Paused(5))
        log.flush()
        assert [type(event).__name__ for event in read_events(path)][n_whole:] == ["Paused"]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    written(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + '{"event": "Unheard"}\n' + lines[1])
    with pytest.raises(RunDirectoryError, match=r"events\.jsonl:2: not an event of this version of raylora"):
        list(read_events(path))


def test_a_log_that_does_not_exist_holds_nothing(tmp_path: Path) -> None:
    assert list(read_events(tmp_path / "none.jsonl")) == []


def test_optional_values_are_kept(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", clock=lambda: 1.0)
    events = [log.append(GivenBack(3, "no memory", None, slots=2)), log.append(Failed(3, "ünreadable"))]
    log.flush()
    assert list(read_events(tmp_path / "events.jsonl")) == events
