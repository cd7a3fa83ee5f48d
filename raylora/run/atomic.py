"""Replaces files and folders as a whole: after a kill or a power cut, the old or the new one is there."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PREFIX = ".tmp-"
"""Opens every temporary name, so that what a kill leaves behind is found."""

OLD = "old"
"""Name of the version that is on its way out."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, which takes its place if the block ends without an error.

    The caller makes the temporary name a file or a folder. On an error it is removed, and `path` stays as it was.

    Raises:
        IsADirectoryError: `path` is a folder, and a file would take its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{path.name}-", dir=path.parent))
    temporary = folder / path.name
    try:
        yield temporary
        sync(temporary)
        if path.is_dir() and not temporary.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if path.is_dir():
            os.replace(path, folder / OLD)  # no folder can be renamed onto one that holds files
        os.replace(temporary, path)
        sync_one(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Write a file, or a folder with all that is in it, through to the disk."""
    if path.is_dir():
        for inside in path.iterdir():
            sync(inside)
    sync_one(path)


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove what killed processes left in a folder under temporary names; nobody else may be writing there.

    A folder whose replacement was cut between its two renames gets the new version, which is whole by then.

    Args:
        folder: where to look.
        name: only what was to become a file or folder whose name begins so.
    """
    for left in folder.glob(f"{PREFIX}{name}*"):
        if (left / OLD).exists():
            for new in (path for path in left.iterdir() if path.name != OLD and not (folder / path.name).exists()):
                os.replace(new, folder / new.name)
        shutil.rmtree(left, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file at once, UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file at once."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def sync_one(path: Path) -> None:
    """Write one file, or the names in one folder, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
