"""Copies what only the driver's node has, tokens or a local base, to nodes that do not see it.

A copy has the path and the times of its original, so that every later step finds it without being told. Lanes of one
node that want the same copy wait for one of them to make it.
"""

import os
import shutil
import socket
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import ray
from ray.actor import ActorHandle

from raylora.errors import DeviceError
from raylora.run.activity import tell
from raylora.run.lock import made_once
from raylora.search.ray.cluster import actor_here

CHUNK_BYTES = 64 * 2**20
"""Bytes that one message carries."""


class Files:
    """Reads files and folders of its node for other nodes; an actor on the driver's node.

    Args:
        paths: all that it gives away.
    """

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._paths = paths

    def list(self, path: Path) -> dict[str, tuple[int, int]]:
        """Return the files of a folder, or one file: relative path -> bytes, and time of the last change in ns."""
        self._check(path)
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        states = {str(file.relative_to(path)): file.stat() for file in files}
        return {name: (state.st_size, state.st_mtime_ns) for name, state in states.items()}

    def read(self, path: Path, name: str, offset: int) -> bytes:
        """Return up to `CHUNK_BYTES` of a file of a folder."""
        self._check(path)
        with (path / name).open("rb") as file:
            file.seek(offset)
            return file.read(CHUNK_BYTES)

    def _check(self, path: Path) -> None:
        if path not in self._paths:
            raise ValueError(f"{path} is not given to other nodes")


def share_files(paths: tuple[Path, ...]) -> Callable[[], None]:
    """Return a function that copies what its caller's node lacks from the driver's.

    Args:
        paths: files and folders of the driver's node.
    """
    return partial(copy_missing, actor_here(Files, paths, max_concurrency=8), paths)


def copy_missing(files: ActorHandle, paths: Iterable[Path]) -> None:
    """Copy what this node does not see from the driver's node, and tell how far that is.

    Args:
        files: a `Files` actor.
        paths: files or folders of the driver's node.

    Raises:
        DeviceError: this node has too little room, or may not write there.
    """
    for path in paths:
        if not path.exists():
            try:
                made_once(path, partial(_copy, files, path))
            except PermissionError as error:
                raise DeviceError(
                    f"node {socket.gethostname()} does not see {path} and may not write it ({error.strerror}); put it "
                    "on storage that all nodes share, or name another cache_dir"
                ) from error


def _copy(files: ActorHandle, path: Path, target: Path) -> None:
    states: dict[str, tuple[int, int]] = ray.get(files.list.remote(path))
    total, done = sum(size for size, _ in states.values()), 0
    _check_room(path, total, target.parent)
    for name, (size, changed) in states.items():
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as out:
            for offset in range(0, size, CHUNK_BYTES):
                tell(f"copying {path.name} to {socket.gethostname()}, MiB", done // 2**20, total // 2**20)
                done += out.write(ray.get(files.read.remote(path, name, offset)))
        os.utime(file, ns=(changed, changed))


def _check_room(path: Path, total: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if total > free:
        raise DeviceError(
            f"node {socket.gethostname()} has {free / 2**30:.1f} GiB free for {path}, which takes "
            f"{total / 2**30:.1f}; free some, or give it a larger disk"
        )
