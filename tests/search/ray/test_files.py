"""Files that only the driver's node has are copied as they were, once, where there is room for them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raylora.errors import DeviceError
from raylora.run.activity import Activity, heard
from raylora.search.ray import files
from raylora.search.ray.files import Files, copy_missing


class Remote:
    """Answers as an actor's handle does, within this process. The node of `Files` calls its root by another name.

    Args:
        root: folder that stands for the driver's node.
        paths: what it gives away, as the other node names it.
    """

    def __init__(self, root: Path, paths: tuple[Path, ...]) -> None:
        self.n_reads = 0
        served = Files(tuple(self._there(root, path) for path in paths))
        self.list = SimpleNamespace(remote=lambda path: served.list(self._there(root, path)))

        def read(path: Path, name: str, offset: int) -> bytes:
            self.n_reads += 1
            return served.read(self._there(root, path), name, offset)

        self.read = SimpleNamespace(remote=read)

    @staticmethod
    def _there(root: Path, path: Path) -> Path:
        return root / path.relative_to("/")


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.ray, "get", lambda value: value)
    monkeypatch.setattr(files, "CHUNK_BYTES", 4)


@pytest.fixture
def base(tmp_path: Path) -> tuple[Path, Any]:
    """A folder that only the driver's node has, and that node."""
    here = tmp_path / "models" / "base"
    there = tmp_path / "driver" / here.relative_to("/")
    (there / "inside").mkdir(parents=True)
    (there / "config.json").write_text("{}")
    (there / "inside" / "weights").write_bytes(b"0123456789")
    (there / "inside" / "empty").touch()
    return here, Remote(tmp_path / "driver", (here,))


def test_a_folder_is_copied_with_its_times_and_then_left_alone(base: tuple[Path, Any], tmp_path: Path) -> None:
    here, driver = base
    heard_of: list[Activity] = []
    with heard(heard_of.append):
        copy_missing(driver, [here])
    assert (here / "inside" / "weights").read_bytes() == b"0123456789"
    assert (here / "inside" / "empty").read_bytes() == b""
    there = tmp_path / "driver" / here.relative_to("/")
    for name in ("config.json", "inside/weights"):
        assert (here / name).stat().st_mtime_ns == (there / name).stat().st_mtime_ns  # cached bases are named by it
    assert heard_of[0].what.startswith("copying base to ")
    n_reads = driver.n_reads
    copy_missing(driver, [here])
    assert driver.n_reads == n_reads == 4


def test_a_single_file_is_copied_too(tmp_path: Path) -> None:
    here = tmp_path / "model.gguf"
    there = tmp_path / "driver" / here.relative_to("/")
    there.parent.mkdir(parents=True)
    there.write_bytes(b"GGUF and more")
    copy_missing(Remote(tmp_path / "driver", (here,)), [here])
    assert here.read_bytes() == b"GGUF and more"


def test_a_disk_that_is_too_small_says_so_before_anything_is_copied(
    base: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, driver = base
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3))
    with pytest.raises(DeviceError, match=r"has 0\.0 GiB free for .*base, which takes 0\.0; free some"):
        copy_missing(driver, [here])
    assert not here.exists()
    assert driver.n_reads == 0


def test_other_files_of_the_driver_are_not_given_away(base: tuple[Path, Any], tmp_path: Path) -> None:
    _, driver = base
    with pytest.raises(ValueError, match="is not given to other nodes"):
        copy_missing(driver, [tmp_path / "secret"])
