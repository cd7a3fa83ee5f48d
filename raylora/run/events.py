"""Appends the events of a search to `events.jsonl` and reads them back: the only truth about its trials.

Every event is one line of JSON, and is on disk, and in object storage where the run lies there, before anything acts on
it. `raylora.run.state` folds events to the state of the search, so that resuming a search is reading its log.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from raylora.errors import RunDirectoryError
from raylora.run.atomic import sync_one
from raylora.run.outage import PATIENCE_SECONDS, wait_out
from raylora.run.parts import EventParts


@dataclass(frozen=True)
class Event:
    """Base of all events."""

    time: float = field(default=0.0, kw_only=True)
    """Seconds since 1970; set when the event is appended."""


@dataclass(frozen=True)
class SessionStarted(Event):
    """A process takes up the search, for the first time or after an earlier one has ended."""

    n_trials: int
    host: str
    pid: int


@dataclass(frozen=True)
class Interrupted(Event):
    """The user ended the session with Ctrl-C or SIGTERM."""


@dataclass(frozen=True)
class LaneUp(Event):
    """A lane's process has loaded the base and can train."""

    lane: str
    process: int
    """Counts the processes of this lane within the session, from 1."""

    slots: int
    facts: dict[str, Any]
    """Host, device, engine and load time, as in `lanes.json`."""


@dataclass(frozen=True)
class LaneLost(Event):
    """A lane's process has ended; its trials go back to the queue."""

    lane: str
    reason: str
    for_good: bool
    """False if another process of the lane is to come."""

    blames_trials: bool
    """True if the process died on a node that lives on, so that one of its trials may have killed it."""


@dataclass(frozen=True)
class Proposed(Event):
    """A trial has its hyperparameters and waits for a slot."""

    number: int
    assignment: dict[str, Any]
    params: dict[str, Any]
    """The sampled values under Optuna's names; empty for a repetition."""

    max_steps: int
    repeat_of: int | None = None
    """Trial whose assignment this one trains again with another seed."""


@dataclass(frozen=True)
class Started(Event):
    """A lane is told to train a trial, from its start or from a checkpoint."""

    number: int
    segment: int
    """Counts the trial's stays on lanes, from 1."""

    lane: str
    resume_from: str | None
    """Checkpoint, relative to the run directory."""


@dataclass(frozen=True)
class Reported(Event):
    """A trial has reached a rung."""

    number: int
    segment: int
    metrics: dict[str, Any]
    """Fields of `RungMetrics`."""


@dataclass(frozen=True)
class Promoted(Event):
    """A trial may train to its next rung."""

    number: int
    rung: int
    """Index of that rung, from 1: rung 0 is open to every trial."""


@dataclass(frozen=True)
class Paused(Event):
    """A trial leaves its lane and waits at a rung."""

    number: int


@dataclass(frozen=True)
class GivenBack(Event):
    """A trial leaves its lane before its next rung and waits for a slot again."""

    number: int
    reason: str
    checkpoint: str | None
    """Checkpoint saved now, relative to the run directory; None leaves the newest one as it was."""

    slots: int | None = None
    """Slots that its lane has from now on, where memory ran short."""

    machine_fault: bool = False
    """True if disk, files or device failed, for which no hyperparameter is to blame."""


@dataclass(frozen=True)
class Finished(Event):
    """A trial has reached the full budget."""

    number: int


@dataclass(frozen=True)
class Stopped(Event):
    """A paused trial cannot be promoted any more."""

    number: int
    reason: str


@dataclass(frozen=True)
class Failed(Event):
    """A trial cannot go on, and its hyperparameters are to blame."""

    number: int
    reason: str


_KINDS = {
    kind.__name__: kind
    for kind in (
        SessionStarted,
        Interrupted,
        LaneUp,
        LaneLost,
        Proposed,
        Started,
        Reported,
        Promoted,
        Paused,
        GivenBack,
        Finished,
        Stopped,
        Failed,
    )
}


class EventLog:
    """The log of one session. Appended events are collected until `flush`, which returns when they are on disk."""

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.time,
        parts: EventParts | None = None,
        note: Callable[[str], object] | None = None,
    ) -> None:
        """Open the log and cut off a line that a kill has torn.

        Args:
            path: `events.jsonl`; made if it does not exist.
            clock: gives the time of each event.
            parts: the log in object storage, which holds the same events as the file.
            note: shows the user a line while the disk takes nothing.
        """
        self._path, self._clock, self._parts, self._note = path, clock, parts, note
        self._lines: list[str] = []
        self._patience = PATIENCE_SECONDS
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._size = path.read_bytes().rfind(b"\n") + 1
        """Bytes of whole lines."""

        self._is_torn = True
        """True if bytes may lie behind them: those of a try that failed, or of a session that was killed."""

        sync_one(path.parent)

    def append(self, event: Event) -> Event:
        """Return the event with its time; it is on disk after the next `flush`."""
        event = replace(event, time=self._clock())
        self._lines.append(json.dumps({"event": type(event).__name__, **vars(event)}, ensure_ascii=False) + "\n")
        return event

    def flush(self) -> None:
        """Write all appended events through to object storage, if the run lies there, and to the disk.

        An outage of either is waited out.

        Raises:
            RunDirectoryError: another search writes there, or object storage does not take them.
            OSError: the disk is full or gone. Either way nothing that the events say may be acted on.
        """
        if self._lines:
            content = "".join(self._lines).encode()
            if self._parts is not None:
                self._parts.add(content)
            wait_out(partial(self._write, content), self._note, self._patience)
            self._lines.clear()
            if self._parts is not None:
                self._parts.fold(self._path)

    def give_up_soon(self) -> None:
        """Wait no outage out from now on."""
        self._patience = 0.0

    def _write(self, content: bytes) -> None:
        with self._path.open("r+b", buffering=0) as file:  # anew, since a handle does not outlive an outage of NFS
            if self._is_torn:
                file.truncate(self._size)
            elif file.seek(0, os.SEEK_END) != self._size:
                raise RunDirectoryError(
                    f"{self._path} is written by another search too; one at a time: wait for it, or end it first"
                )
            self._is_torn = True
            file.seek(self._size)
            left = memoryview(content)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        self._size, self._is_torn = self._size + len(content), False


class EventReader:
    """Reads a log that another process may still be writing.

    Args:
        path: `events.jsonl`.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._position, self._n_lines = path, 0, 0

    def read(self) -> Iterator[Event]:
        """Yield the events since the last call in order; a torn last line is left out, a missing file holds none.

        Raises:
            RunDirectoryError: a line is broken, with its number.
        """
        if not self._path.is_file():
            return
        with self._path.open("rb") as lines:
            lines.seek(self._position)
            for line in lines:
                if not line.endswith(b"\n"):
                    return
                self._position, self._n_lines = self._position + len(line), self._n_lines + 1
                try:
                    values = json.loads(line)
                    yield _KINDS[values.pop("event")](**values)
                except (ValueError, KeyError, TypeError) as error:
                    raise RunDirectoryError(
                        f"{self._path}:{self._n_lines}: not an event of this version of raylora: {error}"
                    ) from error


def read_events(path: Path) -> Iterator[Event]:
    """Yield all events of a log in order, as `EventReader.read` does."""
    return EventReader(path).read()
