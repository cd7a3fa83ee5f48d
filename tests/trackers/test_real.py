"""The real trackers hold every point once, though a search was cut off, resumed, moved and sent again.

A test skips where its tracker is not installed.
"""

import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from raylora.run.directory import RunDirectory
from raylora.trackers.processes import send_run
from tests.trackers.conftest import TO_THE_END, write_events, write_scores

TRIAL = {1: 4.0, 2: 3.0, 3: 2.0}
"""Training losses of trial 0 by step."""

Points = list[tuple[int, float]]
Reader = Callable[[str, str], Points]
"""Returns all points of a figure: of a record's key and the figure's name."""


def send_twice(run: RunDirectory, name: str) -> RunDirectory:
    """Send a search that was cut off, go on with it elsewhere, and send it twice; return where it lies now."""
    send_run(run, [name], lambda line: None)
    moved = RunDirectory(run.path.rename(run.path.with_name("elsewhere")))
    write_events(moved, TO_THE_END)
    send_run(moved, [name], lambda line: None)
    write_scores(moved)
    send_run(moved, [name], lambda line: None)
    return moved


def check(points: Reader) -> None:
    """Assert that the tracker has what both sessions told, once each."""
    assert points("trial-0000", "train/loss") == list(TRIAL.items())
    assert points("trial-0000", "train/learning_rate") == [(1, 1e-3), (2, 2e-3), (3, 3e-3)]
    assert points("trial-0000", "eval/loss") == [(2, 2.0), (3, 1.5)]
    assert points("trial-0001", "eval/loss") == [(2, 2.5)]
    assert points("search", "search/failed") == [(1, 1.0), (2, 1.0)]
    assert points("search", "search/best_eval_loss") == [(2, 1.5)]


def test_tensorboard_reads_its_files_back(run: RunDirectory) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard")
    hparams = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    moved = send_twice(run, "tensorboard")

    def loaded(key: str) -> Any:
        found = accumulator.EventAccumulator(str(moved.path / "tensorboard" / key))
        found.Reload()
        return found

    def points(key: str, name: str) -> Points:
        # scalars are float32
        return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in loaded(key).Scalars(name)]

    check(points)
    assert points("search", "heldout/adapter/bleu") == [(2, 50.0)]
    failed = loaded("trial-0001")
    assert failed.Tensors("state/text_summary")[-1].tensor_proto.string_val == [b"failed: diverged"]
    content = failed.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert hparams.HParamsPluginData.FromString(content).session_start_info.hparams["r"].number_value == 8


@pytest.fixture
def mlflow_store(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def mlflow_server(mlflow_store: str, tmp_path: Path) -> Iterator[str]:
    """Address of a real MLflow server."""
    if find_spec("mlflow") is None or find_spec("mlflow.server.handlers") is None or find_spec("flask_cors") is None:
        pytest.skip("the whole of mlflow is not installed, only mlflow-skinny or nothing")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", mlflow_store, "--port", str(port)]
    command += ["--artifacts-destination", str(tmp_path / "artifacts"), "--workers", "1"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as server:
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield address
        finally:
            os.killpg(server.pid, 15)


@pytest.mark.parametrize("place", ["mlflow_store", "mlflow_server"])
def test_mlflow_has_every_point_once(
    place: str, run: RunDirectory, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow")
    address = request.getfixturevalue(place)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.chdir(tmp_path)  # a store without a server keeps files in the working directory
    send_twice(run, "mlflow")
    client = mlflow.MlflowClient(address)
    experiment = client.get_experiment_by_name("raylora")
    runs = {found.data.tags["raylora.key"]: found for found in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"search", "trial-0000", "trial-0001"}

    def points(key: str, name: str) -> Points:
        return sorted((found.step, found.value) for found in client.get_metric_history(runs[key].info.run_id, name))

    check(points)
    assert points("search", "heldout/adapter/bleu") == [(2, 50.0)]
    assert {key: found.info.status for key, found in runs.items()} == {
        "search": "FINISHED",
        "trial-0000": "FINISHED",
        "trial-0001": "FAILED",
    }
    failed = runs["trial-0001"]
    assert (failed.data.tags["reason"], failed.data.params["r"]) == ("diverged", "8")
    assert failed.data.tags["mlflow.parentRunId"] == runs["search"].info.run_id
    assert [file.path for file in client.list_artifacts(runs["search"].info.run_id)] == ["report.md"]


def wandb_records(file: Path) -> Iterator[Any]:
    """Yield the records of a W&B run's file: blocks of 32 KiB in LevelDB's log format behind a header of 7 bytes."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = pb.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_wandb_offline_has_every_point_once_and_nothing_of_this_machine(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("wandb", reason="wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DATA_DIR": str(tmp_path / "staging")}.items():
        monkeypatch.setenv(name, value)
    moved = send_twice(run, "wandb")
    files = list((moved.path / "wandb").glob("offline-run-*/run-*.wandb"))
    records = {file.stem.split("-", 2)[2]: list(wandb_records(file)) for file in files}
    assert len(files) == len(records) == 3

    def points(key: str, name: str) -> Points:
        found = []
        for record in records[key]:
            values = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            found += [(record.history.step.num, float(values[name]))] if name in values else []
        return found

    check(points)
    summary = [item for record in records["trial-0001"] for item in record.summary.update]
    assert {'"failed"', '"diverged"'} <= {item.value_json for item in summary}
    assert {record.run.host for found in records.values() for record in found if record.HasField("run")} == {"-"}
    raw = b"".join(file.read_bytes() for file in files)
    for private in (str(Path.cwd()), sys.argv[0], "secret"):
        assert private.encode() not in raw


def test_trackio_has_every_point_once(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    send_twice(run, "trackio")
    # Trackio takes its folder from the environment when it is imported
    script = (
        "import json, trackio; from trackio.sqlite_storage import SQLiteStorage as storage; "
        "print(json.dumps({run: storage.get_logs('raylora', run) for run in storage.get_runs('raylora')}))"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    logs = {name.split("-", 1)[1]: rows for name, rows in json.loads(printed).items()}

    def points(key: str, name: str) -> Points:
        return [(row["step"], row[name]) for row in logs[key] if name in row]

    check(points)
    assert [(row["step"], row["state"], row["reason"]) for row in logs["trial-0001"] if "state" in row] == [
        (3, "failed", "diverged")
    ]
    assert [row["heldout/adapter/bleu"] for row in logs["search-scores"]] == [50.0]
