"""Says what a run directory's process is doing now: `activity.json`, for the terminal and for `raylora status`.

Long loops wrap what they go through in `track`, or `tell`. They need not know whether anybody watches.
"""

import json
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")

SECONDS = 1.0
"""Least time between two writes."""


@dataclass(frozen=True)
class Activity:
    """Work of a process, and how much of it is done."""

    what: str
    """A phrase such as `answering held-out prompts`."""

    done: int
    total: int
    time: float = field(default_factory=time.time)
    """Seconds since 1970."""

    facts: dict[str, Any] = field(default_factory=dict)
    """More to show."""


class _Watch:
    """Somebody who wants to know.

    Args:
        hear: takes an activity.
    """

    def __init__(self, hear: Callable[[Activity], None]) -> None:
        self._hear, self._heard_at = hear, -SECONDS

    def tell(self, what: str, done: int, total: int) -> None:
        """Say how far the work is, if that is due."""
        if time.monotonic() - self._heard_at >= SECONDS:
            self._hear(Activity(what, done, total))
            self._heard_at = time.monotonic()


_watch: ContextVar[_Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watched(path: Path) -> Iterator[None]:
    """Write the activity of the block to a file, which is removed at its end."""
    try:
        with heard(partial(write_activity, path)):
            yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def heard(hear: Callable[[Activity], None]) -> Iterator[None]:
    """Hand the activity of the block to a function."""
    token = _watch.set(_Watch(hear))
    try:
        yield
    finally:
        _watch.reset(token)


def tell(what: str, done: int, total: int) -> None:
    """Say how far the work is, at most once a second, if anybody watches. Arguments are those of `Activity`."""
    if (watch := _watch.get()) is not None:
        watch.tell(what, done, total)


def track(items: Collection[Item], what: str) -> Iterator[Item]:
    """Yield items, and say before each how many are done.

    Args:
        items: what a loop goes through.
        what: as in `Activity`.
    """
    for done, item in enumerate(items):
        tell(what, done, len(items))
        yield item


def write_activity(path: Path, activity: Activity) -> None:
    """Replace the file by another activity. A full disk costs the view only.

    The file is not synced to the disk: it says nothing of value after a power cut.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(OSError):
        temporary.write_text(json.dumps(asdict(activity), ensure_ascii=False), encoding="utf-8")
        os.replace(temporary, path)


def read_activity(path: Path) -> Activity | None:
    """Return what is being done; None if nothing is, or nobody has said so yet."""
    try:
        return Activity(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
