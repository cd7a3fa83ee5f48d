"""Keeps a second writer out of a run directory, and out of a cached folder while it is made."""

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from raylora.errors import RunDirectoryError
from raylora.run.atomic import read_json, remove_leftovers, replacing, write_json

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


def user_of(folder: Path) -> str | None:
    """Return the process that holds a run directory, in words; None if none does. Reading it is enough."""
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return _owner(folder)
    return None


def made_once(directory: Path, make: Callable[[Path], None]) -> Path:
    """Return a cached folder or file, and make it first if it is missing; processes that want the same one wait.

    Args:
        directory: the folder, or the file.
        make: writes it under the temporary name that it is given.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            remove_leftovers(directory.parent, directory.name)
            with replacing(directory) as temporary:
                make(temporary)
    return directory


def _owner(folder: Path) -> str:
    try:
        owner = read_json(folder / OWNER)
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"
