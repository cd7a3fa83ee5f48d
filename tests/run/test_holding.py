"""One writer at a time in object storage, whatever machine it is on."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from raylora.config.schema import SearchConfig
from raylora.errors import RunDirectoryError
from raylora.run import holding
from raylora.run.atomic import write_text
from raylora.run.directory import RunDirectory, existing_run, open_run, run_at, url_of
from raylora.run.holding import Ownership, borrowed, held, user_of_run
from raylora.run.provenance import write_provenance
from raylora.run.storage import Storage


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """Run in fsspec's memory, with a working copy of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))
    return run_at(f"memory:/{tmp_path}/run")


def owner(host: str, pid: int, *, age: float = 0.0, process_started: float = 0.0) -> bytes:
    record = {"host": host, "pid": pid, "session": "other", "process_started": process_started}
    return json.dumps({**record, "time": time.time() - age}).encode()


def storage_of(run: RunDirectory) -> Storage:
    assert run.storage is not None
    return run.storage


def test_urls_are_known_from_paths() -> None:
    assert url_of("s3://bucket/run/") == url_of(Path("s3://bucket/run")) == "s3://bucket/run"
    assert url_of("results/run") is url_of("/s3:/x") is None
    assert run_at("s3://bucket/one").path.name == "one"
    assert run_at("s3://bucket/one").path != run_at("s3://other/one").path


def test_a_run_is_held_and_left(run: RunDirectory) -> None:
    with held(run, pytest.fail):
        record = json.loads(storage_of(run).read("owner.json"))
        assert (record["host"], record["pid"]) == (socket.gethostname(), os.getpid())
        (run.path / "merge.json").write_text("{}")
    assert storage_of(run).list().keys() == {"merge.json"}


def test_a_fresh_owner_elsewhere_refuses_by_name(run: RunDirectory) -> None:
    storage_of(run).write("owner.json", owner("elsewhere", 12, age=30))
    assert user_of_run(run) == "process 12 on elsewhere"
    with pytest.raises(RunDirectoryError, match="is in use by process 12 on elsewhere; wait for it, or end it first"):
        held(run, pytest.fail).__enter__()
    assert json.loads(storage_of(run).read("owner.json"))["pid"] == 12


def test_a_stale_owner_elsewhere_is_taken_over(run: RunDirectory) -> None:
    storage_of(run).write("owner.json", owner("elsewhere", 12, age=61))
    assert user_of_run(run) is None
    with held(run, pytest.fail):
        assert json.loads(storage_of(run).read("owner.json"))["pid"] == os.getpid()


def test_a_dead_owner_on_this_host_is_taken_over_at_once(run: RunDirectory) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid in (ended.pid, os.getpid()):  # the second number belongs to another process by now: this one
        storage_of(run).write("owner.json", owner(socket.gethostname(), pid, process_started=1.0))
        with held(run, pytest.fail):
            pass


def test_a_living_owner_on_this_host_refuses(run: RunDirectory) -> None:
    started = psutil.Process().create_time()
    storage_of(run).write("owner.json", owner(socket.gethostname(), os.getpid(), process_started=started))
    with pytest.raises(RunDirectoryError, match=f"is in use by process {os.getpid()} on"):
        held(run, pytest.fail).__enter__()


def test_the_record_is_renewed_until_another_takes_over(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "RENEW_SECONDS", 0.05)
    storage = storage_of(run)
    with Ownership(storage) as ours:
        first = json.loads(storage.read("owner.json"))["time"]
        deadline = time.monotonic() + 30
        while json.loads(storage.read("owner.json"))["time"] == first and time.monotonic() < deadline:
            time.sleep(0.05)
        assert json.loads(storage.read("owner.json"))["time"] > first
        monkeypatch.setattr(Ownership, "_content", lambda self: owner("elsewhere", 12))
        while ours.is_ours() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not ours.is_ours()
    assert json.loads(storage.read("owner.json"))["host"] == "elsewhere"  # not ours to remove


def test_settings_are_read_back_by_another_machine(
    run: RunDirectory,
    make_config: Callable[..., SearchConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, place = make_config(), Path(run.remote or "")
    with pytest.raises(RunDirectoryError, match=r"nothing to resume: memory://.*run does not exist"):
        open_run(place, config, resume=True)
    with pytest.raises(RunDirectoryError, match=r"memory://.*run is no run directory: it holds no config\.yaml"):
        existing_run(place)
    assert open_run(place, config, resume=False) == run
    with held(run, pytest.fail) as push:
        write_provenance(run, config, {"rungs": [9]})
        push()
        assert storage_of(run).list(below=False).keys() == {"config.yaml", "provenance.json", "owner.json"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another-machine"))
    there = existing_run(place)
    assert there.path != run.path
    assert there.config() == config
    assert open_run(place, config, resume=True) == there
    with pytest.raises(RunDirectoryError, match="is not empty; `--resume` goes on with it"):
        open_run(place, config, resume=False)
    with pytest.raises(RunDirectoryError, match="was started with another config"):
        open_run(place, make_config(training={"max_steps": 10}), resume=True)


def test_what_another_search_left_in_the_working_copy_is_not_taken_for_this_ones(
    run: RunDirectory, make_config: Callable[..., SearchConfig]
) -> None:
    with held(run, pytest.fail):
        write_provenance(run, make_config(), {})
        write_text(run.merge_file, "{}")
    storage_of(run).remove(storage_of(run).list())
    new = open_run(Path(run.remote or ""), make_config(), resume=False)
    assert not new.merge_file.exists() and not new.config_file.exists()


def test_a_working_copy_in_use_is_not_touched(run: RunDirectory, make_config: Callable[..., SearchConfig]) -> None:
    with held(run, pytest.fail) as push:
        write_provenance(run, make_config(), {})
        push()
        run.events_file.write_text("newer than storage\n")
        assert existing_run(Path(run.remote or "")).events_file.read_text() == "newer than storage\n"


def test_a_stage_on_another_node_reads_from_storage_and_writes_there(
    run: RunDirectory,
    make_config: Callable[..., SearchConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with held(run, pytest.fail) as push:
        write_provenance(run, make_config(), {})
        write_text(run.best_adapter / "a", "adapter")
        push()
        with borrowed(run) as (here, is_elsewhere):
            assert here == run and not is_elsewhere
        with monkeypatch.context() as other:
            other.setenv("XDG_CACHE_HOME", str(tmp_path / "another-node"))
            with borrowed(run) as (there, is_elsewhere):
                assert there.path != run.path and is_elsewhere
                assert (there.best_adapter / "a").read_text() == "adapter"
                write_text(there.merge_file, "{}")
        assert storage_of(run).read("merge.json") == b"{}"
