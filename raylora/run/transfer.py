"""Moves files between object storage and a run's working copy on this machine.

A file that is the same in both places has the same time of change in both, in whole seconds: whoever moves one sets the
local time to that of the object.
"""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from raylora.errors import RunDirectoryError
from raylora.run.atomic import replacing
from raylora.run.parts import FOLDER
from raylora.run.storage import Storage, Stored

EVENTS, OWNER, STUDY, ACTIVITY = "events.jsonl", "owner.json", "study.db", "activity.json"

LATE = (STUDY, "logs", "tensorboard", "wandb")
"""Files and folders that change all the time and serve nobody elsewhere before the end."""

ELSEWHERE = (EVENTS, FOLDER, "trials", OWNER, "logs/tune", "logs/train")
"""Files and folders that go another way: events by `EventParts`, checkpoints by their lanes, Ray's own nowhere."""

ROUND_SECONDS = 10.0
"""Time between two looks for files that have changed."""

LAST_PATIENCE_SECONDS = 60.0
"""Time for which an outage is waited out at the end."""

Stamp = tuple[int, int]
"""Size in bytes and time of change in nanoseconds."""


class Uploads:
    """Uploads what has changed in a working copy: in a thread while a `with` block runs, and at its end.

    A failed upload is tried again in the next round. It is noted, and ends nothing.

    Args:
        storage: receives the files.
        path: the working copy.
        note: shows the user a line.
        allowed: False as soon as another process has taken the run directory over.
    """

    def __init__(
        self,
        storage: Storage,
        path: Path,
        note: Callable[[str], None] = lambda line: None,
        allowed: Callable[[], bool] = lambda: True,
    ) -> None:
        self._storage, self._path, self._note, self._allowed = storage, path, note, allowed
        self._sent: dict[str, Stamp] | None = None
        """Name -> stamp of the file that storage has."""

        self._over, self._failing, self._pushing = threading.Event(), False, threading.Lock()
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)

    def __enter__(self) -> "Uploads":
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._over.set()
        self._thread.join()
        if self._allowed():
            try:
                self.push(late=True, patience=LAST_PATIENCE_SECONDS)
            except OSError as error:
                self._note(f"not all of {self._path} is uploaded: {error}; raylora report {self._storage.url} does it")

    def _run(self) -> None:
        while not self._over.wait(ROUND_SECONDS):
            try:
                if self._allowed():
                    self.push()
                self._failing = False
            except OSError as error:
                if not self._failing:
                    self._note(f"tables and results are not uploaded now: {error}; trying again until the end")
                self._failing = True

    def push(self, *, late: bool = False, patience: float = 0.0) -> None:
        """Upload what has changed since the last call, and remove what is gone.

        Folders go first: where `merge.json` is new, the models that it describes are there.

        Args:
            late: include what is in `LATE`.
            patience: seconds for which an outage is waited out.

        Raises:
            RunDirectoryError: storage cannot be reached, or refuses.
            OSError: a local file cannot be read.
        """
        with self._pushing:
            self._push(self._storage.patient(patience), late=late)

    def _push(self, storage: Storage, *, late: bool) -> None:
        if self._sent is None:
            self._sent = self._find_sent(storage)
        files = _files(self._path, late=late)
        stamps = {name: _stamp(file) for name, file in files.items()}
        changed = sorted((name for name in files if self._sent.get(name) != stamps[name]), key=lambda n: "/" not in n)
        for name in changed:
            if files[name].is_file():
                storage.upload(files[name], name)
                self._sent[name] = stamps[name]
        for folder in sorted({name.partition("/")[0] for name in changed if "/" in name} - set(LATE)):
            stored = storage.list(folder)
            storage.remove(name for name in stored if not (self._path / name).exists())
            for name in stored.keys() & files.keys():
                self._sent[name] = _same_time(files[name], stamps[name], stored[name])
        gone = [name for name in self._sent if "/" not in name and not (self._path / name).exists()]
        storage.remove(gone)
        for name in gone:
            del self._sent[name]

    def _find_sent(self, storage: Storage) -> dict[str, Stamp]:
        """Return the files that storage has from an earlier process."""
        files = _files(self._path, late=True)
        stored = storage.list(below=False)
        for folder in {name.partition("/")[0] for name in files if "/" in name}:
            stored |= storage.list(folder)
        stamps = {name: _stamp(files[name]) for name in files.keys() & stored.keys()}
        return {name: stamp for name, stamp in stamps.items() if not _is_newer(stamp, stored[name])}


def pull_files(storage: Storage, path: Path, *, folders: bool = False) -> None:
    """Download the files of a run directory that are missing here or newer there: settings, tables, results.

    Args:
        storage: holds the run directory.
        path: the working copy.
        folders: include adapter and merged models.

    Raises:
        RunDirectoryError: storage cannot be reached, or refuses.
    """
    stored = storage.list(below=folders)
    for name in stored:
        if "/" not in name and name not in (*LATE, *ELSEWHERE) and not _is_current(path / name, stored[name]):
            _download(storage, name, path / name, stored[name])
    if ACTIVITY not in stored:
        (path / ACTIVITY).unlink(missing_ok=True)  # nobody works there any more
    for folder in sorted({name.partition("/")[0] for name in stored if "/" in name} - {*LATE, *ELSEWHERE}):
        pull_folder(storage, path, folder)


def pull_folder(storage: Storage, path: Path, name: str) -> None:
    """Make a folder of the working copy what it is in storage.

    Args:
        storage: holds the run directory.
        path: the working copy.
        name: of the folder, such as a checkpoint, relative to it.

    Raises:
        RunDirectoryError: there is no such folder, or storage cannot be reached.
    """
    stored = storage.list(name)
    if not stored:
        raise RunDirectoryError(f"{storage.url} holds no {name}")
    here = {str(file.relative_to(path)) for file in (path / name).rglob("*") if file.is_file()}
    if here == stored.keys() and all(_is_same(path / file, stored[file]) for file in stored):
        return
    with replacing(path / name) as temporary:
        files = {file: temporary / Path(file).relative_to(name) for file in stored}
        storage.download_all(files)
        for file, local in files.items():
            os.utime(local, (stored[file].modified,) * 2)


def push_checkpoint(storage: Storage, path: Path, name: str) -> None:
    """Upload a checkpoint, and remove those of its trial that are gone here.

    Args:
        storage: receives it.
        path: the working copy.
        name: of the checkpoint, relative to it.

    Raises:
        RunDirectoryError: storage does not take it.
    """
    files = {str(file.relative_to(path)): file for file in (path / name).rglob("*") if file.is_file()}
    stamps = {file: _stamp(local) for file, local in files.items()}
    storage.upload_all(files)
    stored = storage.list(str(Path(name).parent))
    for file, local in files.items():
        _same_time(local, stamps[file], stored[file])
    # a file of the trial itself, such as its last error, stays
    checkpoints = {file: Path(*Path(file).parts[:3]) for file in stored if len(Path(file).parts) > 3}
    storage.remove(file for file, checkpoint in checkpoints.items() if not (path / checkpoint).is_dir())


def clear(path: Path) -> None:
    """Empty a working copy, but for its lock."""
    for inside in path.glob("*"):
        if inside.is_dir():
            shutil.rmtree(inside)
        elif not inside.name.startswith("."):
            inside.unlink()


def _files(path: Path, *, late: bool) -> dict[str, Path]:
    """Return name -> file of what `Uploads` looks after."""
    left_out = ELSEWHERE if late else (*ELSEWHERE, *LATE)
    found: dict[str, Path] = {}
    for folder, folders, files in os.walk(path):
        relative = Path(folder).relative_to(path)
        folders[:] = [one for one in folders if not one.startswith(".") and str(relative / one) not in left_out]
        names = (str(relative / one) for one in files if not one.startswith("."))
        found |= {name: path / name for name in names if name not in left_out}
    return found


def _download(storage: Storage, name: str, file: Path, stored: Stored) -> None:
    with replacing(file) as temporary:
        storage.download(name, temporary)
        os.utime(temporary, (stored.modified,) * 2)


def _is_current(file: Path, stored: Stored) -> bool:
    """Return True if a local file is the one in storage, or newer: one that could not be uploaded yet."""
    return file.is_file() and int(file.stat().st_mtime) >= stored.modified


def _is_same(file: Path, stored: Stored) -> bool:
    found = file.stat()
    return (found.st_size, int(found.st_mtime)) == (stored.size, stored.modified)


def _is_newer(stamp: Stamp, stored: Stored) -> bool:
    size, changed_at = stamp
    return changed_at // 10**9 > stored.modified or size != stored.size


def _stamp(file: Path) -> Stamp:
    try:
        found = file.stat()
    except FileNotFoundError:  # replaced meanwhile
        return (-1, -1)
    return found.st_size, found.st_mtime_ns


def _same_time(file: Path, stamp: Stamp, stored: Stored) -> Stamp:
    """Give a file the time of its object, unless it has changed since; return its stamp, or the old one if it has."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        return stamp
    try:
        found = os.fstat(descriptor)
        if (found.st_size, found.st_mtime_ns) != stamp:
            return stamp
        os.utime(descriptor, (stored.modified,) * 2)
        return found.st_size, stored.modified * 10**9
    finally:
        os.close(descriptor)
