"""A disk that takes nothing for a while: nothing is lost, nothing is doubled."""

import errno
import os
from pathlib import Path

import pytest

from raylora.run import outage
from raylora.run.events import EventLog, Paused, read_events
from raylora.run.outage import wait_out


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
    """Half of a line is written before the disk is full, and again before it has room."""
    log = EventLog(tmp_path / "events.jsonl")
    events = [log.append(Paused(0))]
    log.flush()
    disk, write = Disk(monkeypatch, failures=4), log._file.write

    class Filling:
        """The log's file, on a disk that takes half of what it is given."""

        def __getattr__(self, name: str) -> object:
            return getattr(log_file, name)

        def write(self, content: memoryview) -> int:
            if disk.failures % 2 == 0 and disk.failures:
                disk.failures -= 1
                return write(content[: len(content) // 2])
            disk.check()
            return write(content)

    log_file = log._file
    monkeypatch.setattr(log, "_file", Filling())
    events += [log.append(Paused(1)), log.append(Paused(2))]
    log.flush()
    assert disk.failures == 0 and disk.now > 0
    assert list(read_events(tmp_path / "events.jsonl")) == events
    events.append(log.append(Paused(3)))
    log.flush()
    assert list(read_events(tmp_path / "events.jsonl")) == events
