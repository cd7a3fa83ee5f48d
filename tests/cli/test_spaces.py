"""Search space files are found by path, or by name where they ship with raylora."""

from pathlib import Path

import pytest

from raylora.cli import spaces
from raylora.cli.spaces import find_space
from tests.helpers import ROOT


def test_the_default_and_shipped_files_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_space(None) == ROOT / "search_spaces" / "qlora.yaml"
    assert find_space(Path("demo.yaml")) == ROOT / "search_spaces" / "demo.yaml"
    (tmp_path / "demo.yaml").touch()
    assert find_space(Path("demo.yaml")) == Path("demo.yaml")  # the user's own comes first
    assert find_space(Path("none.yaml")) == Path("none.yaml")  # which is then said not to exist
    assert find_space(Path("search_spaces/smoke.yaml")) == ROOT / "search_spaces" / "smoke.yaml"
    assert find_space(Path("experiments/demo.yaml")) == Path("experiments/demo.yaml")  # not ours of that name


def test_an_installed_wheel_finds_them_beside_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "share" / "raylora" / "search_spaces" / "qlora.yaml"
    shipped.parent.mkdir(parents=True)
    shipped.touch()
    monkeypatch.setattr(spaces, "__file__", str(tmp_path / "site-packages" / "raylora" / "cli" / "spaces.py"))
    monkeypatch.setattr(spaces.sysconfig, "get_path", lambda name: str(tmp_path))
    assert find_space(None) == shipped
