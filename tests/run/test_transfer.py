"""A working copy and object storage tell each other what has changed, and nothing else."""

import os
import time
from pathlib import Path

import pytest

from raylora.errors import RunDirectoryError
from raylora.run.storage import Storage
from raylora.run.transfer import Uploads, pull_files, pull_folder, push_checkpoint
from tests.storage_servers import each_provider

__all__ = ["each_provider"]  # the fixture


class Counted:
    """Names that storage was asked to move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.up: list[str] = []
        self.down: list[str] = []
        upload, download = Storage.upload, Storage.download
        monkeypatch.setattr(Storage, "upload", lambda s, file, name: self.up.append(name) or upload(s, file, name))
        monkeypatch.setattr(
            Storage, "download", lambda s, name, file: self.down.append(name) or download(s, name, file)
        )


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@pytest.fixture
def storage(bucket: str) -> Storage:
    return Storage(f"{bucket}/there")


def write(folder: Path, *names: str, text: str = "x", at: int = 1_000_000_000) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        os.utime(folder / name, (at, at))


def test_only_what_has_changed_is_uploaded_and_folders_go_first(
    storage: Storage, tmp_path: Path, counted: Counted
) -> None:
    one = tmp_path / "one"
    write(one, "merge.json", "best_adapter/a", "merged_nf4/m", "study.db", "logs/ray.log", "logs/tune/junk")
    write(one, "events.jsonl", "trials/0000/checkpoint-3/a", ".lock", ".tmp-x/y", "owner.json")
    uploads = Uploads(storage, one)
    uploads.push()
    assert sorted(counted.up) == ["best_adapter/a", "merge.json", "merged_nf4/m"]
    assert counted.up[-1] == "merge.json"  # where it is, the model that it describes is too
    uploads.push()
    assert len(counted.up) == 3
    write(one, "merge.json", text="y", at=1_000_000_001)
    uploads.push()
    assert counted.up[3:] == ["merge.json"]
    uploads.push(late=True)
    assert sorted(counted.up[4:]) == ["logs/ray.log", "study.db"]


def test_another_process_does_not_upload_the_same_again(storage: Storage, tmp_path: Path, counted: Counted) -> None:
    one = tmp_path / "one"
    write(one, "merge.json", "merged_nf4/m")
    Uploads(storage, one).push()
    Uploads(storage, one).push()
    assert len(counted.up) == 2


def test_what_is_gone_here_is_removed_there(storage: Storage, tmp_path: Path) -> None:
    one = tmp_path / "one"
    write(one, "activity.json", "merged_nf4/shard-1", "merged_nf4/shard-2", "best_adapter/a")
    uploads = Uploads(storage, one)
    uploads.push()
    storage.write("merged_bf16/m", b"")  # a folder that this machine does not have
    (one / "activity.json").unlink()
    (one / "merged_nf4" / "shard-2").unlink()
    write(one, "merged_nf4/shard-1", text="new", at=1_000_000_001)
    uploads.push()
    assert storage.list().keys() == {"merged_nf4/shard-1", "merged_bf16/m", "best_adapter/a"}


def test_another_machine_downloads_what_it_lacks_once(storage: Storage, tmp_path: Path, counted: Counted) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write(one, "config.yaml", "merge.json", "merged_nf4/m", "study.db")
    storage.write("owner.json", b"{}")
    Uploads(storage, one).push(late=True)
    pull_files(storage, two)
    assert sorted(counted.down) == ["config.yaml", "merge.json"]
    pull_files(storage, two, folders=True)
    pull_files(storage, two, folders=True)
    assert counted.down[2:] == ["merged_nf4/m"]
    assert (two / "merged_nf4" / "m").read_text() == "x"


def test_a_result_that_could_not_be_uploaded_is_not_overwritten(storage: Storage, tmp_path: Path) -> None:
    storage.write("merge.json", b"old")
    later = storage.list()["merge.json"].modified + 60
    write(tmp_path / "one", "merge.json", text="new", at=later)
    pull_files(storage, tmp_path / "one")
    assert (tmp_path / "one" / "merge.json").read_text() == "new"
    Uploads(storage, tmp_path / "one").push()
    assert storage.read("merge.json") == b"new"


def test_checkpoints_that_are_gone_here_are_removed_there(storage: Storage, tmp_path: Path) -> None:
    one = tmp_path / "one"
    write(one, "trials/0001/checkpoint-3/a", "trials/0001/checkpoint-9/a")
    for step in (3, 9):
        push_checkpoint(storage, one, f"trials/0001/checkpoint-{step}")
    storage.write("trials/0001/error.txt", b"")
    storage.write("trials/0002/checkpoint-3/a", b"")  # another trial's
    write(one, "trials/0001/checkpoint-27/a")
    (one / "trials/0001/checkpoint-3/a").unlink()
    (one / "trials/0001/checkpoint-3").rmdir()
    push_checkpoint(storage, one, "trials/0001/checkpoint-27")
    assert storage.list("trials").keys() == {
        "trials/0001/checkpoint-9/a",
        "trials/0001/checkpoint-27/a",
        "trials/0001/error.txt",
        "trials/0002/checkpoint-3/a",
    }


def test_a_node_that_has_another_checkpoint_of_that_name_gets_the_right_one(
    storage: Storage, tmp_path: Path, counted: Counted
) -> None:
    one, two, name = tmp_path / "one", tmp_path / "two", "trials/0001/checkpoint-3"
    write(one, f"{name}/a", f"{name}/b")
    push_checkpoint(storage, one, name)
    write(two, f"{name}/a", f"{name}/stray", text="z")  # of an earlier search at this URL
    pull_folder(storage, two, name)
    assert {file.name: file.read_text() for file in (two / name).iterdir()} == {"a": "x", "b": "x"}
    pull_folder(storage, two, name)
    pull_folder(storage, one, name)  # the machine that wrote it
    assert len(counted.down) == 2
    with pytest.raises(RunDirectoryError, match=r"there holds no trials/0001/checkpoint-27"):
        pull_folder(storage, one, "trials/0001/checkpoint-27")


def test_a_failed_upload_is_noted_once_and_made_up_for(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    write(tmp_path / "one", "merge.json")
    monkeypatch.setattr("raylora.run.transfer.ROUND_SECONDS", 0.01)
    upload, tries = Storage.upload, []

    def fail(self: Storage, file: Path, name: str) -> None:
        tries.append(name)
        if len(tries) < 4:
            raise RunDirectoryError("storage is down")
        upload(self, file, name)

    monkeypatch.setattr(Storage, "upload", fail)
    with Uploads(storage, tmp_path / "one", notes.append):
        deadline = time.monotonic() + 30
        while len(tries) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert notes == ["tables and results are not uploaded now: storage is down; trying again until the end"]
    assert storage.read("merge.json") == b"x"


def test_a_process_that_lost_the_run_uploads_nothing_more(storage: Storage, tmp_path: Path) -> None:
    write(tmp_path / "one", "merge.json")
    with Uploads(storage, tmp_path / "one", allowed=lambda: False):
        pass
    assert storage.list() == {}
