"""Nothing half-written is taken as whole."""

import errno
from pathlib import Path

import pytest

from raylora.run.atomic import replacing, write_text


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
