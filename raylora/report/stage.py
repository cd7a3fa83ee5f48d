"""Shows a stage before or after the search, such as the merge, with a bar of how far its work is."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from raylora.run.activity import Activity

LINE_SECONDS = 10.0
"""Time between two plain lines where there is no terminal."""


class Stage:
    """Use as a context manager around the stage.

    Args:
        what: the stage in words.
        console: shows it.
    """

    def __init__(self, what: str, console: Console) -> None:
        self._what, self._console = what, console
        self._shown_at = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = (
            Progress(*columns, console=console, transient=True, redirect_stdout=False) if console.is_terminal else None
        )

    def __enter__(self) -> "Stage":
        self._console.print(f"{self._what} ...")
        if self._bar:
            self._task = self._bar.add_task(self._what, total=None)
            self._bar.start()
        return self

    def __exit__(self, *args: object) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, activity: Activity | None) -> None:
        """Show how far the stage is, if that is known; without a terminal, a line every ten seconds."""
        if activity is None:
            return
        if self._bar:
            self._bar.update(self._task, description=activity.what, completed=activity.done, total=activity.total)
        elif time.monotonic() - self._shown_at >= LINE_SECONDS:
            self._console.print(f"{activity.what}: {activity.done} of {activity.total}")
            self._shown_at = time.monotonic()
