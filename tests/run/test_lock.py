"""One writer at a time, and nothing left of a killed one."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from raylora.errors import RunDirectoryError
from raylora.run.atomic import PREFIX
from raylora.run.lock import locked, made_once, user_of


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    with locked(tmp_path), pytest.raises(RunDirectoryError, match=f"is in use by {owner}; wait for it"):
        command = (
            "import sys; from pathlib import Path; from raylora.run.lock import locked, made_once\n"
            "locked(Path(sys.argv[1])).__enter__()"
        )
        result = subprocess.run([sys.executable, "-c", command, tmp_path], capture_output=True, text=True, check=False)
        raise RunDirectoryError(result.stderr)
    with locked(tmp_path):
        pass  # free again


def test_the_holder_is_seen_by_somebody_who_may_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert user_of(tmp_path / "none") is None
    opened: list[str] = []
    with locked(tmp_path):
        open_ = Path.open

        def noted(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            opened.append(mode)
            return open_(path, mode, *args, **options)

        monkeypatch.setattr(Path, "open", noted)
        assert user_of(tmp_path) == f"process {os.getpid()} on {socket.gethostname()}"
        assert opened[0] == "rb"
    assert user_of(tmp_path) is None


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    command = (
        "import os, signal, sys; from pathlib import Path; from raylora.run.lock import locked, made_once\n"
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


def test_two_that_want_the_same_cache_make_it_once(tmp_path: Path) -> None:
    made: list[str] = []

    def make(temporary: Path) -> None:
        temporary.mkdir()
        made.append(threading.current_thread().name)
        time.sleep(0.2)  # the other one comes meanwhile
        (temporary / "tokens").touch()

    (tmp_path / f"{PREFIX}cache-x").mkdir()  # of a killed process
    threads = [threading.Thread(target=made_once, args=(tmp_path / "cache", make)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert (tmp_path / "cache" / "tokens").exists()
    assert list(tmp_path.glob(f"{PREFIX}*")) == []
