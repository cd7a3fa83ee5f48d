"""A stage shows how far it is: a bar on a terminal, a line every ten seconds elsewhere."""

import io
import time

import pytest
from rich.console import Console

from raylora.report.stage import Stage
from raylora.run.activity import Activity, heard, track


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_bar_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Stage("reading base and data", console) as stage, heard(stage.show):
        for _ in track(range(7), "tokenizing rows of train"):
            pass
    assert "tokenizing rows of train" in shown(console)
    assert "0/7" in shown(console)


def test_lines_elsewhere_at_most_one_in_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console = Console(file=io.StringIO(), width=100)
    with Stage("merging into the base", console) as stage:
        for second in range(25):
            now = 100.0 + second
            stage.show(Activity("rounding layers", second, 25))
        stage.show(None)  # nobody has said anything
    assert shown(console).splitlines() == [
        "merging into the base ...",
        "rounding layers: 10 of 25",
        "rounding layers: 20 of 25",
    ]
