"""Starts a process for each tracker beside a search: a tracker that is down or slow never ends or slows the search."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from raylora.errors import TrackerError
from raylora.run.directory import RunDirectory

SECONDS_TO_CATCH_UP = 30.0
"""Longest wait for trackers at the end of a search."""

SECONDS_TO_END = 5.0
"""Longest wait beyond that for a process that should have ended by itself."""


class TrackerProcesses:
    """Use as a context manager around a search; at its end all trackers are waited for together.

    Args:
        run: run directory of the search; its `config.yaml` and `provenance.json` are on disk.
        names: trackers.
        note: shows the user a line.
        patience: longest wait at the end, in seconds.
    """

    def __init__(
        self,
        run: RunDirectory,
        names: Sequence[str],
        note: Callable[[str], None],
        patience: float = SECONDS_TO_CATCH_UP,
    ) -> None:
        self._run, self._names, self._note, self._patience = run, list(dict.fromkeys(names)), note, patience
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._listeners: list[threading.Thread] = []
        self.sent: dict[str, str] = {}
        """Tracker -> where to look."""

        self.failed: dict[str, str] = {}
        """Tracker -> cause."""

    def __enter__(self) -> "TrackerProcesses":
        self._run.logs.mkdir(parents=True, exist_ok=True)
        for name in self._names:
            with (self._run.logs / f"tracker-{name}.log").open("ab") as log:
                self._processes[name] = subprocess.Popen(
                    [sys.executable, "-m", "raylora.trackers", name, str(self._run.path), str(self._patience)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,  # Ctrl-C ends the search, and the tracker hears of that end
                )
            self._listeners.append(threading.Thread(target=self._listen, args=(name,), daemon=True))
            self._listeners[-1].start()
        return self

    def __exit__(self, *args: object) -> None:
        try:
            for process in self._processes.values():
                assert process.stdin is not None
                process.stdin.close()
            deadline = time.monotonic() + self._patience + SECONDS_TO_END
            for process in self._processes.values():
                process.wait(None if math.isinf(deadline) else max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in self._processes.values():
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # with helpers that its package has started
            for listener in self._listeners:
                listener.join()

    def _listen(self, name: str) -> None:
        """Tell the user how a tracker ended, as soon as it does."""
        process = self._processes[name]
        assert process.stdout is not None
        with process.stdout:
            outcome, _, text = process.stdout.read().strip().partition(" ")
        if outcome == "sent":
            self.sent[name] = text
            self._note(f"{name}: {text}")
            return
        self.failed[name] = text or f"its process ended without a word ({self._run.logs}/tracker-{name}.log)"
        self._note(
            f"{name} failed: {self.failed[name]}; the run directory has it all. "
            f"Send it later: raylora report {self._run.location} --report_to {name}"
        )


def send_run(run: RunDirectory, names: Sequence[str], note: Callable[[str], None]) -> None:
    """Send a run directory to trackers, for as long as they take.

    Raises:
        TrackerError: one of them failed; the others have it.
    """
    with TrackerProcesses(run, names, lambda line: None, patience=math.inf) as processes:
        pass
    for name, where in processes.sent.items():
        note(f"{name}: {where}")
    if processes.failed:
        raise TrackerError("; ".join(f"{name}: {cause}" for name, cause in processes.failed.items()))
