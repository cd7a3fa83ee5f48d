"""Sends one run directory to one tracker, in a process of its own, until standard input ends.

Run as `python -m raylora.trackers TRACKER RUN_DIRECTORY PATIENCE` by `raylora.trackers.processes`. PATIENCE is the
number of seconds that it may take after the end of standard input. The last line on standard output is `sent WHERE` or
`failed CAUSE`; whatever the tracker's package prints goes to standard error.
"""

import os
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from raylora.errors import first_line
from raylora.run.directory import existing_run
from raylora.trackers.contents import without_secrets
from raylora.trackers.follow import follow
from raylora.trackers.tracker import load_tracker

NICENESS = 10
"""Added niceness: training comes first."""


def main(name: str, directory: str, patience: float) -> NoReturn:
    """Follow the search, and end the process."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.nice(NICENESS)
    over = threading.Event()
    once = threading.Lock()

    def end(line: str, code: int) -> NoReturn:
        """Say how it ended, and leave without the exit handlers of packages, which wait for what is down."""
        with once:
            with suppress(OSError):  # a search that was killed hears nothing any more
                answer.write(f"{without_secrets(line)}\n")
                answer.flush()
                sys.stderr.flush()
            os._exit(code)

    def wait_for_the_end() -> None:
        sys.stdin.buffer.read()
        over.set()
        threading.Event().wait(min(patience, threading.TIMEOUT_MAX))
        end(f"failed it did not take everything within {patience:.0f} s", 1)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    try:
        where = follow(existing_run(Path(directory)), load_tracker(name), over)
    except Exception as error:  # whatever the package raises is told and ends this process only
        sys.stderr.write(without_secrets(traceback.format_exc()))
        end(f"failed {type(error).__name__}: {first_line(error)[:300]}", 1)
    end(f"sent {where}", 0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
