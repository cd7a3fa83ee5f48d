"""Progress of a search on a terminal: a line for each event that matters."""

import io
import time

import pytest
from rich.console import Console

from raylora.config.load import build_config
from raylora.config.schema import SearchConfig
from raylora.report.progress import Progress
from raylora.run.events import Event, LaneLost, LaneUp, Paused, Stopped
from raylora.run.state import SearchState
from raylora.search.messages import Pulse
from tests.helpers import SESSION, history_of

RUNGS = [3, 9]


def config() -> SearchConfig:
    space = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "learning_rate": {"loguniform": [1e-4, 1e-2]}}
    sections = {"base_model": {"name": "x"}, "data": {"train": "y"}, "space": space}
    return build_config({**sections, "search": {"n_trials": 3, "finalists": 1}}, source="test")


def shown(*events: Event) -> list[str]:
    state, output = SearchState(), io.StringIO()
    with Progress(state, config(), RUNGS, Console(file=output, width=200)) as progress:
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
        "lane 0: its process ended; its trials wait for a free slot"
    ]
    assert shown(SESSION, lane, LaneLost("0", "node died", for_good=True, blames_trials=False)) == [
        "lane 0: node died; its output is in logs"
    ]


def searching() -> SearchState:
    """A trial that has finished, one on its way to the first rung, and a third to come."""
    state = SearchState()
    lane = LaneUp("0", 1, 8, {"device": "a GPU", "ready_at": 0.0})
    for event in (SESSION, lane, *history_of(0, {3: 4.0, 9: 1.0}, "finished"), *history_of(1, {})):
        state.apply(event)
    return state


def test_pulses_move_the_steps_and_the_view_between_two_reports() -> None:
    output = io.StringIO()
    progress = Progress(searching(), config(), RUNGS, Console(file=output, width=200))
    progress.beat({"0": Pulse({0: 9, 1: 2}, tokens_per_second=1234.5, memory_mib=2048.0)})
    # 9 + 2 steps are taken; 1 is left to the rung, and 3 of the third trial
    assert "step 11 of about 15" in progress.summary()
    Console(file=output, width=200).print(progress.view())
    view = output.getvalue()
    assert "lane 0 (a GPU): 1 of 8 slots, 1,234 tokens/s, peak 2,048 MiB" in view
    assert "2/9" in view and "GPU-hours of about" in view
    assert progress.activity().done == 11 and progress.activity().total == 15


def test_a_lane_that_waits_for_its_disk_says_so_once() -> None:
    output = io.StringIO()
    progress = Progress(searching(), config(), RUNGS, Console(file=output, width=200))
    for _ in range(3):
        progress.beat({"0": Pulse({}, 0.0, 0.0, busy="waiting up to 300 s: No space left on device")})
    assert output.getvalue() == "lane 0: waiting up to 300 s: No space left on device\n"
    assert progress._lanes()[0].endswith(", waiting up to 300 s: No space left on device")
    progress.beat({"0": Pulse({1: 1}, 9.0, 1.0)})
    assert progress._lanes()[0].endswith("9 tokens/s, peak 1 MiB")


def test_many_lanes_share_a_line_and_each_lost_one_has_its_own() -> None:
    state = SearchState([SESSION, *(LaneUp(str(index), 1, 8, {}) for index in range(10)), *history_of(0, {})])
    state.apply(LaneLost("9", "node died", for_good=True, blames_trials=False))
    progress = Progress(state, config(), RUNGS, Console(file=io.StringIO(), width=200))
    progress.beat({"0": Pulse({}, 100.0, 2048.0), "1": Pulse({}, 50.0, 1024.0)})
    assert progress._lanes() == ["9 lanes: 1 of 72 slots, 150 tokens/s, peak 2,048 MiB", "lane 9 is lost: node died"]


def test_a_pulse_of_a_trial_that_has_left_moves_nothing() -> None:
    progress = Progress(searching(), config(), RUNGS, Console(file=io.StringIO()))
    progress.beat({"0": Pulse({0: 4, 7: 5}, 1.0, 1.0), "9": Pulse({1: 2}, 1.0, 1.0)})
    assert "step 9 of about 15" in progress.summary()


def test_plain_lines_come_every_ten_seconds_if_something_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    now, output = [100.0], io.StringIO()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(searching(), config(), RUNGS, Console(file=output, width=200))
    for second, step in ((101, 1), (111, 1), (112, 2), (113, 3), (122.5, 3), (130, 3)):
        now[0] = second
        progress.beat({"0": Pulse({1: step}, 1.0, 1.0)})
    assert [line.split("; ")[2] for line in output.getvalue().splitlines()] == ["step 11 of about 15"]
