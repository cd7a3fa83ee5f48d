"""Nothing half-written is taken as whole."""

import errno
from pathlib import Path

import pytest

from raylora.run import atomic
from raylora.run.atomic import OLD, PREFIX, remove_leftovers, replacing, write_text


def test_a_full_disk_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    write_text(tmp_path / "table", "old")
    with pytest.raises(OSError, match="No space left"), replacing(tmp_path / "table") as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (tmp_path / "table").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["table"]


def test_a_real_full_disk(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(OSError, match="No space left"), replacing(tmp_path / "table") as temporary:
        temporary.symlink_to("/dev/full")
        temporary.write_text("x" * 10)
    assert list(tmp_path.iterdir()) == []


def test_directories_are_replaced_whole(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with replacing(tmp_path / "model") as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["two"]


def test_a_file_takes_the_place_of_no_folder(tmp_path: Path) -> None:
    (tmp_path / "results" / "run").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match="results"):
        write_text(tmp_path / "results", "a page")
    assert [path.name for path in tmp_path.rglob("*")] == ["results", "run"]


def test_a_replacement_cut_between_its_two_renames_is_completed(tmp_path: Path) -> None:
    left = tmp_path / f"{PREFIX}model-x"
    for version in (OLD, "model"):
        (left / version).mkdir(parents=True)
        (left / version / version).touch()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model").exists()


def test_what_was_cut_before_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / f"{PREFIX}model-x" / "model").mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_files_are_on_disk_before_the_name_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = atomic.os.fsync, atomic.os.replace
    monkeypatch.setattr(atomic.os, "fsync", lambda file: (order.append("fsync"), fsync(file))[1])
    monkeypatch.setattr(atomic.os, "replace", lambda old, new: (order.append("rename"), replace(old, new))[1])
    with replacing(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("x")
    assert order == ["fsync", "fsync", "rename", "fsync"]  # file, folder; then the folder that holds the name
