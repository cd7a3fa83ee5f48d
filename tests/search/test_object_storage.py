"""A whole search whose run directory is a URL: killed, and resumed on a machine that has nothing of it."""

import shutil
import signal
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from raylora.cli.app import app
from raylora.run.directory import existing_run, run_at
from raylora.run.events import read_events
from raylora.run.state import SearchState
from raylora.run.storage import Storage
from tests.search.test_command import MANY_STEPS, QUICK_END, command, finish, space_file

__all__ = ["space_file"]  # the fixture

REST = [*map(str, QUICK_END)]

LONG = (*MANY_STEPS, "--training.max_steps", 400)
"""Settings of a search that outlives another command."""


def state_of(url: str) -> SearchState:
    """State of the search as storage has it."""
    return SearchState(read_events(existing_run(Path(url)).events_file))


@pytest.mark.ray
def test_a_killed_search_is_resumed_on_another_machine(
    bucket: str, space_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{bucket}/runs/one"
    storage = Storage(url)
    process = command(space_file, "--output", url, *LONG)
    watcher = tmp_path / "watching-machine"
    monkeypatch.setenv("XDG_CACHE_HOME", str(watcher))
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        if "config.yaml" in storage.list(below=False) and state_of(url).count("finished") >= 2:
            break
        time.sleep(0.5)
    # meanwhile a second search is refused, by name
    second, message = finish(command(space_file, "--output", url, *LONG, "--resume"))
    assert second == 2
    assert f"is in use by process {process.pid} on" in message.replace("\n", " ")
    process.send_signal(signal.SIGKILL)
    _, output = finish(process, timeout=60)
    before = state_of(url)
    assert 2 <= before.count("finished") < 6, output
    shutil.rmtree(tmp_path / "cache-home")
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(watcher)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second-machine"))
    code, output = finish(command(space_file, "--output", url, *LONG, "--resume"))
    assert code == 0, output
    assert "not uploaded" not in output
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "third-machine"))
    after = state_of(url)
    assert len(after.trials) == after.count("finished") == 6
    for number in before.numbers("finished"):
        assert after.trials[number] == before.trials[number]
    there = storage.list()
    assert "owner.json" not in there and "activity.json" not in there
    for name in ("trials.parquet", "study.db", "merge.json", "evaluation.json", "report.html", "lanes.json"):
        assert name in there
    assert any(name.startswith("merged_nf4/") for name in there)
    best = after.best()
    assert best is not None and f"{best.checkpoint}/adapter_model.safetensors" in there

    # the other commands need nothing but the URL; checkpoints stay where they are
    status = CliRunner().invoke(app, ["status", url])
    assert "6/6 trials" in status.output and "nothing runs here now" in status.output
    storage.remove(["report.md"])
    report = CliRunner().invoke(app, ["report", url])
    assert report.exit_code == 0, report.output
    assert b"## Best trial" in storage.read("report.md")
    exported = CliRunner().invoke(app, ["export", url, "--format", "nf4", "--output", str(tmp_path / "out")])
    assert exported.exit_code == 0, exported.output
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (run_at(url).path / "trials").exists()


def test_what_cannot_be_is_said_before_anything_starts(bucket: str, space_file: Path) -> None:
    for url, message in (
        ("s3://nowhere/run", "s3://nowhere/run: its bucket does not exist"),
        ("ftp://host/run", "a run directory is a folder or a URL of s3"),
    ):
        code, output = finish(command(space_file, "--output", url, *REST))
        assert code == 2
        assert message in output and "Traceback" not in output
