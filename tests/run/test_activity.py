"""Activity: written at most once a second, and only where somebody watches."""

from pathlib import Path

import pytest

from raylora.run import activity
from raylora.run.activity import Activity, read_activity, tell, track, watched, write_activity


def test_a_loop_says_how_far_it_is_at_most_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, path, seen = [0.0], tmp_path / "activity.json", []
    monkeypatch.setattr(activity.time, "monotonic", lambda: now[0])
    with watched(path):
        for item in track(["a", "b", "c", "d"], "reading"):
            seen.append((item, read_activity(path)))
            now[0] += 0.6
    assert [(item, found.done) for item, found in seen] == [("a", 0), ("b", 0), ("c", 2), ("d", 2)]
    assert seen[2][1].what == "reading" and seen[2][1].total == 4
    assert not path.exists()


def test_nothing_is_written_where_nobody_watches(tmp_path: Path) -> None:
    assert list(track([1, 2], "reading")) == [1, 2]
    tell("reading", 1, 2)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_missing_or_torn_says_nothing(tmp_path: Path) -> None:
    assert read_activity(tmp_path / "activity.json") is None
    (tmp_path / "activity.json").write_text('{"what": "rea')
    assert read_activity(tmp_path / "activity.json") is None


def test_a_full_disk_costs_the_view_alone(tmp_path: Path) -> None:
    write_activity(tmp_path / "missing" / "activity.json", Activity("reading", 0, 1))
