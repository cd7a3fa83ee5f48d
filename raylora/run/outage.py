"""Waits while a disk or a shared folder takes nothing: full, read-only for a while, or its server is away."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from raylora.errors import first_line

Result = TypeVar("Result")

PATIENCE_SECONDS = 300.0
"""Time for which an outage is waited out where nothing can go on without the file or object. Our choice."""

LONGEST_PAUSE = 10.0
"""Longest wait between two tries, in seconds. Our choice."""

PASSING = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN,
        errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNREFUSED,
    }
)  # fmt: skip
"""Errors that may pass: somebody frees space, mounts again, or mends the network. Refused access does not."""


def wait_out(
    write: Callable[[], Result], note: Callable[[str], object] | None = None, patience: float = PATIENCE_SECONDS
) -> Result:
    """Return what a function returns, and call it again and again while its disk takes nothing.

    Args:
        write: may be called several times.
        note: shows the user a line, once.
        patience: seconds for which errors in `PASSING` are waited out.

    Raises:
        OSError: it took nothing for so long, or for another reason.
    """
    deadline, pause = time.monotonic() + patience, 0.5
    while True:
        try:
            return write()
        except OSError as error:
            if error.errno not in PASSING or time.monotonic() + pause > deadline:
                raise
            if note is not None and pause == 0.5:
                note(f"waiting up to {patience:.0f} s: {first_line(error)}")
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
