"""One writer at a time, and nothing left of a killed one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from raylora.errors import RunDirectoryError
from raylora.run.atomic import PREFIX
from raylora.run.lock import locked


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    with locked(tmp_path), pytest.raises(RunDirectoryError, match=f"is in use by {owner}; wait for it"):
        command = (
            "import sys; from pathlib import Path; from raylora.run.lock import locked\n"
            "locked(Path(sys.argv[1])).__enter__()"
        )
        result = subprocess.run([sys.executable, "-c", command, tmp_path], capture_output=True, text=True, check=False)
        raise RunDirectoryError(result.stderr)
    with locked(tmp_path):
        pass  # free again


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    command = (
        "import os, signal, sys; from pathlib import Path; from raylora.run.lock import locked\n"
        "with locked(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", command, tmp_path], check=False)
    with locked(tmp_path):
        pass


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "trials" / "0000"):
        (folder / f"{PREFIX}checkpoint-3-x").mkdir(parents=True)
    with locked(tmp_path):
        assert [path.name for path in tmp_path.rglob(f"{PREFIX}*")] == []
        assert (tmp_path / "trials" / "0000").is_dir()
