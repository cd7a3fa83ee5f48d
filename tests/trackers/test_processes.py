"""A tracker that is down, slow or broken ends with one line to the user, and never holds a search up."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from raylora.cli.app import app
from raylora.errors import ConfigError, TrackerError
from raylora.run.directory import RunDirectory
from raylora.run.lock import locked
from raylora.trackers import tracker
from raylora.trackers.processes import TrackerProcesses, send_run

BLOCKS = "import time\ndef init(**values): time.sleep(600)\n"
RAISES = "def init(**values): raise ConnectionError('https://me:secret@host refused\\nsecond line')\n"
DIES = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """File of a package that takes the place of Trackio in the tracker's process."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    (tmp_path / "packages").mkdir()
    return tmp_path / "packages" / "trackio.py"


def test_a_tracker_that_blocks_is_left_after_its_time(run: RunDirectory, package: Path) -> None:
    package.write_text(BLOCKS)
    notes: list[str] = []
    began = time.monotonic()
    with TrackerProcesses(run, ["trackio"], notes.append, patience=1.0) as processes:
        assert time.monotonic() - began < 5  # a search starts at once; starting a process takes a moment
    # the process starts, waits a second for the tracker, and is killed five later at the latest
    assert time.monotonic() - began < 60
    assert notes == [
        "trackio failed: it did not take everything within 1 s; the run directory has it all. "
        f"Send it later: raylora report {run.path} --report_to trackio"
    ]
    assert processes.failed.keys() == {"trackio"}


def test_a_tracker_that_raises_is_named_with_its_cause_while_the_search_goes_on(
    run: RunDirectory, package: Path
) -> None:
    package.write_text(RAISES)
    notes: list[str] = []
    with TrackerProcesses(run, ["trackio"], notes.append):
        deadline = time.monotonic() + 60
        while not notes and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(notes) == 1
    assert notes[0].startswith("trackio failed: ConnectionError: https://...@host refused; the run directory has it")
    log = (run.logs / "tracker-trackio.log").read_text()
    assert "Traceback" in log and "second line" in log and "secret" not in log


def test_a_tracker_whose_process_dies_is_noted(run: RunDirectory, package: Path) -> None:
    package.write_text(DIES)
    with pytest.raises(TrackerError, match=r"trackio: its process ended without a word \(.*tracker-trackio\.log\)"):
        send_run(run, ["trackio"], lambda line: None)


def test_a_tracker_that_blocks_does_not_outlive_a_search_that_was_killed(run: RunDirectory, package: Path) -> None:
    package.write_text(BLOCKS)
    command = [sys.executable, "-m", "raylora.trackers", "trackio", str(run.path), "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.close()
        process.stdin.close()  # as the kernel does for a process that is killed
        assert process.wait(timeout=60) == 1


def test_without_trackers_no_process_starts(run: RunDirectory) -> None:
    with TrackerProcesses(run, [], lambda line: pytest.fail(line)) as processes:
        assert processes.failed == {}
    assert not list(run.logs.glob("tracker-*"))


def test_a_tracker_that_is_not_installed_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tracker.PACKAGES, "mlflow", "no_such_package")
    with pytest.raises(ConfigError, match=r"report_to: mlflow is not installed; pip install 'raylora\[mlflow\]'$"):
        tracker.check_installed(["tensorboard", "mlflow"])


def test_a_folder_with_the_name_of_a_package_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "files_of_wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(tracker.PACKAGES, "wandb", "files_of_wandb")
    with pytest.raises(ConfigError, match="wandb is not installed"):
        tracker.check_installed(["wandb"])
    assert "files_of_wandb" not in sys.modules


def test_a_report_to_an_unknown_tracker_names_the_known_ones(run: RunDirectory) -> None:
    result = CliRunner().invoke(app, ["report", str(run.path), "--report_to", "tensorboard,mlfow"])
    assert result.exit_code == 2
    message = "report_to.1 = 'mlfow': must be 'tensorboard', 'mlflow', 'wandb' or 'trackio'"
    assert message in " ".join(result.output.split())
    assert not run.report_file.exists()


def test_a_search_that_still_runs_is_not_sent_by_another_command(run: RunDirectory) -> None:
    with locked(run.path):
        result = CliRunner().invoke(app, ["report", str(run.path), "--report_to", "tensorboard"])
    assert result.exit_code == 2
    assert f"is in use by process {os.getpid()}" in " ".join(result.output.split())
    assert not (run.path / "tensorboard").exists()
