"""Keeps an event log in object storage, where nothing can be appended: each flush is one numbered object.

An object is created only if its number is free, so the numbers keep a second writer out even where locks fail: whoever
comes second finds the number taken, and nothing that it decided is acted on.
"""

import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from raylora.errors import RunDirectoryError
from raylora.run.atomic import replacing
from raylora.run.storage import Storage

FOLDER = "events"

FOLD_EVERY = 100
"""Parts after which one object holds all events so far, so that reading a log takes few requests."""


class EventParts:
    """The remote log of one session.

    Args:
        storage: holds the run directory; it waits outages out.
        n_parts: parts that are there already.
    """

    def __init__(self, storage: Storage, n_parts: int) -> None:
        self._storage, self.n_parts = storage, n_parts

    def add(self, lines: bytes) -> None:
        """Write whole lines as the next part.

        Raises:
            RunDirectoryError: another search has written that part, or storage does not take it.
        """
        if not self._storage.create(_part(self.n_parts), lines):
            raise RunDirectoryError(
                f"{self._storage.url} is written by {_writer(self._storage)} too, which came first; one search at a "
                "time: wait for it, or end it first"
            )
        self.n_parts += 1

    def fold(self, file: Path) -> None:
        """Write the whole log as one object too, if that is due. It saves requests only, so it may fail."""
        if self.n_parts % FOLD_EVERY == 0:
            with suppress(OSError):
                replace(self._storage, patience=0.0).upload(file, _folded(self.n_parts))


def pull_events(storage: Storage, file: Path) -> EventParts:
    """Replace a local event log by the one in storage, and return that one, to go on with.

    Args:
        storage: holds the run directory.
        file: local `events.jsonl`.

    Raises:
        RunDirectoryError: storage cannot be reached, or a part of the log is missing.
    """
    content, n_parts = read_parts(storage)
    with replacing(file) as temporary:
        temporary.write_bytes(content)
    return EventParts(storage, n_parts)


def read_parts(storage: Storage) -> tuple[bytes, int]:
    """Return all lines of the log in storage, and the number of its parts.

    Raises:
        RunDirectoryError: storage cannot be reached, or a part is missing.
    """
    names = list(storage.list(FOLDER))
    n_folded = max((int(found[1]) for name in names if (found := re.search(r"folded-(\d+)\.jsonl$", name))), default=0)
    n_parts = 1 + max((int(found[1]) for name in names if (found := re.search(r"/(\d+)\.jsonl$", name))), default=-1)
    wanted = [_folded(n_folded)] if n_folded else []
    wanted += [_part(number) for number in range(n_folded, n_parts)]
    if missing := sorted(set(wanted) - set(names)):
        raise RunDirectoryError(f"{storage.url} lacks {missing[0]}, so its event log cannot be read to the end")
    contents = storage.read_all(wanted)
    return b"".join(contents[name] for name in wanted), n_parts


def _part(number: int) -> str:
    return f"{FOLDER}/{number:08d}.jsonl"


def _folded(n_parts: int) -> str:
    return f"{FOLDER}/folded-{n_parts:08d}.jsonl"


def _writer(storage: Storage) -> str:
    """Return the process whose session was the last to begin."""
    lines = read_parts(storage)[0].splitlines()
    sessions = [event for event in map(json.loads, lines) if event.get("event") == "SessionStarted"]
    return f"process {sessions[-1]['pid']} on {sessions[-1]['host']}" if sessions else "another process"
