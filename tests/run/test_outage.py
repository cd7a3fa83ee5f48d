"""A disk that takes nothing for a while: nothing is lost, nothing is doubled."""

import errno
import os
from pathlib import Path

import pytest

from raylora.errors import RunDirectoryError
from raylora.run import outage
from raylora.run.events import EventLog, Paused, read_events
from raylora.run.outage import is_of_the_disk, wait_out


class Disk:
    """Fails as often as it is told to, and passes the time quickly."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failures: int, code: int = errno.ENOSPC) -> None:
        self.failures, self._code, self.now = failures, code, 0.0
        monkeypatch.setattr(outage.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(outage.time, "sleep", self._sleep)

    def check(self) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError(self._code, os.strerror(self._code))

    def _sleep(self, seconds: float) -> None:
        self.now += seconds


def test_an_outage_is_waited_out_and_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    disk, notes = Disk(monkeypatch, failures=5), list[str]()
    wait_out(disk.check, notes.append)
    assert disk.failures == 0
    assert notes == ["waiting up to 300 s: [Errno 28] No space left on device"]


def test_a_long_outage_ends_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, failures=10**6, code=errno.EROFS)
    with pytest.raises(OSError, match="Read-only file system"):
        wait_out(disk.check)
    assert 280 < disk.now <= 300


def test_what_does_not_pass_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, failures=1, code=errno.EACCES)
    with pytest.raises(PermissionError):
        wait_out(disk.check)
    assert disk.now == 0


def test_an_event_log_on_a_full_disk_holds_each_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    events = [log.append(Paused(0))]
    log.flush()
    disk, fsync = Disk(monkeypatch, failures=3), os.fsync

    def filling(descriptor: int) -> None:
        if disk.failures:  # a part of the lines was written
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - 7 * disk.failures)
        disk.check()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", filling)
    events += [log.append(Paused(1)), log.append(Paused(2))]
    log.flush()
    assert disk.failures == 0 and disk.now > 0
    assert list(read_events(tmp_path / "events.jsonl")) == events
    events.append(log.append(Paused(3)))
    log.flush()
    assert list(read_events(tmp_path / "events.jsonl")) == events


def test_a_search_that_another_one_has_followed_writes_no_more(tmp_path: Path) -> None:
    """Covers a folder whose server has freed the first one's lock."""
    first = EventLog(tmp_path / "events.jsonl")
    events = [first.append(Paused(0))]
    first.flush()
    second = EventLog(tmp_path / "events.jsonl")
    events.append(second.append(Paused(1)))
    second.flush()
    first.append(Paused(2))
    with pytest.raises(RunDirectoryError, match="is written by another search too"):
        first.flush()
    assert list(read_events(tmp_path / "events.jsonl")) == events


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EROFS, "Read-only file system"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
    ],
)
def test_what_a_full_disk_makes_libraries_raise_is_of_the_disk(error: Exception) -> None:
    assert is_of_the_disk(error)
    assert not is_of_the_disk(type(error)("something else"))
