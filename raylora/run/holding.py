"""Holds a run directory for one process: its folder by a lock, and its object storage by a record that is renewed."""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import psutil

from raylora.errors import RunDirectoryError
from raylora.run.directory import RunDirectory, pull, run_at
from raylora.run.lock import locked, user_of
from raylora.run.outage import PATIENCE_SECONDS
from raylora.run.storage import Storage
from raylora.run.transfer import LAST_PATIENCE_SECONDS, OWNER, Uploads

RENEW_SECONDS = 10.0
"""Time between two renewals of the owner's record."""

STALE_SECONDS = 60.0
"""Time without a renewal after which the owner counts as dead."""


@contextmanager
def held(run: RunDirectory, note: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Hold a run directory while the block runs. Object storage then has what the block changes, soon and at its end.

    Args:
        run: the run directory.
        note: shows the user a line where an upload fails.

    Yields:
        Function that returns when storage has all that has changed so far; for a folder it does nothing.

    Raises:
        RunDirectoryError: another process holds it, with its host and process id; or storage cannot be written.
    """
    with locked(run.path):
        if run.storage is None:
            yield lambda: None
            return
        with Ownership(run.storage) as owner, Uploads(run.storage, run.path, note, owner.is_ours) as uploads:
            yield partial(uploads.push, patience=PATIENCE_SECONDS)


@contextmanager
def borrowed(run: RunDirectory) -> Iterator[tuple[RunDirectory, bool]]:
    """Yield a run directory that a process on another node may hold, as this node has it.

    Where it lies in object storage, files, adapter and models are downloaded first, and uploaded after.

    Yields:
        The run directory, and True if its holder has to download what the block changes.
    """
    if run.remote is None:
        yield run, False
        return
    run = run_at(run.remote)
    if user_of(run.path) is not None:  # the holder's own node
        yield run, False
        return
    pull(run, folders=True)
    yield run, True
    assert run.storage is not None
    Uploads(run.storage, run.path).push(patience=PATIENCE_SECONDS)


def user_of_run(run: RunDirectory) -> str | None:
    """Return the process that holds a run directory, here or elsewhere, in words; None if none does."""
    user = user_of(run.path)
    if user is not None or run.storage is None:
        return user
    owner = _read(run.storage)
    return None if owner is None or _is_dead(owner) else _words(owner)


class Ownership:
    """The record of who writes to a run in object storage, as a context manager around the writing.

    It refuses early and by name. Two that take over a dead one's run at the same moment are told apart by
    `raylora.run.parts`.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage, self._lost, self._over = storage, False, threading.Event()
        created = psutil.Process().create_time()
        process = {"host": socket.gethostname(), "pid": os.getpid(), "process_started": created}
        self._record = {**process, "session": uuid.uuid4().hex}
        self._thread = threading.Thread(target=self._run, name="ownership", daemon=True)

    def __enter__(self) -> "Ownership":
        owner = _read(self._storage)
        if owner is None and not self._storage.create(OWNER, self._content()):
            owner = _read(self._storage)  # another one was faster
        if owner is not None:
            if not _is_dead(owner):
                raise RunDirectoryError(
                    f"{self._storage.url} is in use by {_words(owner)}; wait for it, or end it first"
                )
            self._storage.write(OWNER, self._content())
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._over.set()
        self._thread.join()
        with suppress(OSError):  # storage that is down leaves a record that is soon stale
            if self.is_ours():
                self._storage.patient(LAST_PATIENCE_SECONDS).remove([OWNER])

    def is_ours(self) -> bool:
        """Return False once another process has taken the run directory over."""
        if not self._lost:
            with suppress(OSError):  # during an outage nobody takes it over either
                owner = _read(self._storage)
                self._lost = owner is not None and owner["session"] != self._record["session"]
        return not self._lost

    def _run(self) -> None:
        while not self._over.wait(RENEW_SECONDS) and self.is_ours():
            with suppress(OSError):
                self._storage.write(OWNER, self._content())

    def _content(self) -> bytes:
        return json.dumps({**self._record, "time": time.time()}).encode()


def _read(storage: Storage) -> dict[str, Any] | None:
    try:
        owner: dict[str, Any] = json.loads(storage.read(OWNER))
    except FileNotFoundError:
        return None
    return owner


def _is_dead(owner: dict[str, Any]) -> bool:
    """Return True if an owner has not renewed its record for long, or was a process here that has ended."""
    if time.time() - owner["time"] > STALE_SECONDS:
        return True
    if owner["host"] != socket.gethostname():
        return False
    try:
        # another process may have the same number by now
        return abs(psutil.Process(owner["pid"]).create_time() - owner["process_started"]) > 1
    except psutil.NoSuchProcess:
        return True


def _words(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}"
