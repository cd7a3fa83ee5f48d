"""Keeps a second writer out of a run directory."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from raylora.errors import RunDirectoryError
from raylora.run.atomic import read_json, remove_leftovers, write_json

LOCK, OWNER = ".lock", ".owner.json"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run directory for this process, and clear what a killed one left behind.

    The operating system frees the lock when the process ends, however it ends.

    Raises:
        RunDirectoryError: another process holds it; the message names its host and process id.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=0):
            remove_leftovers(folder)
            for trial in (folder / "trials").glob("*"):
                remove_leftovers(trial)
            write_json(folder / OWNER, {"host": socket.gethostname(), "pid": os.getpid()})
            yield
    except Timeout as error:
        raise RunDirectoryError(f"{folder} is in use by {_owner(folder)}; wait for it, or end it first") from error


def _owner(folder: Path) -> str:
    try:
        owner = read_json(folder / OWNER)
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"
