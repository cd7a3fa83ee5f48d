"""Waits while a disk or a shared folder takes nothing: full, read-only for a while, or its server is away."""

import errno
import os
import time
from collections.abc import Callable
from typing import TypeVar

from raylora.errors import first_line

Result = TypeVar("Result")

PATIENCE_SECONDS = 300.0
"""Time for which an outage is waited out where nothing can go on without the file or object. Our choice."""

FIRST_PAUSE = 0.5
"""Wait before the second try, in seconds. It doubles each time, up to the longest."""

LONGEST_PAUSE = 10.0
"""Longest wait between two tries, in seconds. Our choice."""

OF_DISKS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE})
"""Errors of a disk or a shared folder that takes nothing."""

PASSING = OF_DISKS | {
    errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH
}  # fmt: skip
"""Errors that may pass: somebody frees space or mends the network. Refused access does not."""

TEXTS = (os.strerror(errno.ENOSPC), "inline_container.cc")
"""Texts by which safetensors and torch tell of a full disk, in errors that are no `OSError`."""


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
    deadline, pause = time.monotonic() + patience, FIRST_PAUSE
    while True:
        try:
            return write()
        except OSError as error:
            if error.errno not in PASSING or time.monotonic() + pause > deadline:
                raise
            if note is not None and pause == FIRST_PAUSE:
                note(f"waiting up to {patience:.0f} s: {first_line(error)}")
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def is_of_the_disk(error: BaseException) -> bool:
    """Return True if an error says that a disk takes nothing, whichever library raised it."""
    return getattr(error, "errno", None) in OF_DISKS or any(text in str(error) for text in TEXTS)
