"""Progress of a search on a terminal: a line for each event that matters."""

import io

from rich.console import Console

from raylora.report.progress import Progress
from raylora.run.events import Event, LaneLost, LaneUp, Paused, Stopped
from raylora.run.state import SearchState
from tests.helpers import SESSION, history_of


def shown(*events: Event) -> list[str]:
    state, output = SearchState(), io.StringIO()
    with Progress(state, 3, Console(file=output, width=200)) as progress:
        for event in events:
            state.apply(event)
            progress.show(event)
    return output.getvalue().splitlines()


def test_reports_and_ends_are_lines() -> None:
    lines = shown(
        SESSION,
        LaneUp("0", 1, 8, {"reason": None}),
        *history_of(0, {3: 4.0, 9: 1.0}, "finished"),
        *history_of(1, {3: 5.0}),
        Paused(1),
        Stopped(1, "not promoted from step 3"),
        *history_of(2, {}, "failed"),
    )
    assert lines[:2] == ["trial 0: step 3/9, eval_loss 4.0000", "trial 0: step 9/9, eval_loss 1.0000"]
    assert lines[2].startswith("trial 0: finished (r 4, alpha 8, dropout 0.100, lr 5.00e-03); 1/3 trials: 1 finished;")
    assert "best 1.0000 (trial 0)" in lines[2]
    assert lines[4].startswith("trial 1: stopped (not promoted from step 3)")
    assert lines[5].startswith("trial 2: failed (why)")
    assert "3/3 trials: 1 failed, 1 stopped, 1 finished" in lines[5]


def test_a_lane_that_cannot_pack_says_why() -> None:
    (line,) = shown(SESSION, LaneUp("0", 1, 1, {"reason": "made up"}))
    assert line == "lane 0 trains one trial at a time, with TRL: made up"


def test_a_lost_lane_is_named() -> None:
    lane = LaneUp("0", 1, 1, {})
    assert shown(SESSION, lane, LaneLost("0", "its process ended", for_good=False, blames_trials=True)) == [
        "lane 0: its process ended; it is up again"
    ]
    assert shown(SESSION, lane, LaneLost("0", "node died", for_good=True, blames_trials=False)) == ["lane 0: node died"]
