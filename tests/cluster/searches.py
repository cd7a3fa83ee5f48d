"""Asks a search's event log what the cluster tests want to know."""

import time
from collections.abc import Callable

from raylora.run.directory import RunDirectory
from raylora.run.events import Event, Finished, LaneLost, LaneUp, Reported, Started, read_events
from raylora.run.state import SearchState


def wait_for(run: RunDirectory, what: str, found: Callable[[list[Event]], object], seconds: float = 240) -> list[Event]:
    """Return the events of a search, once a condition holds for them."""
    deadline = time.monotonic() + seconds
    while True:
        events = list(read_events(run.events_file))
        if found(events):
            return events
        assert time.monotonic() < deadline, f"no {what} after {seconds} s: {events[-3:]}"
        time.sleep(0.5)


def lanes_on(events: list[Event], *hosts: str) -> list[tuple[str, str]]:
    """Return lane and host of each lane that came up on one of the hosts."""
    up = [event for event in events if isinstance(event, LaneUp)]
    return [(event.lane, event.facts["host"]) for event in up if event.facts["host"] in hosts]


def reports(events: list[Event]) -> int:
    """Return how many rungs were reached."""
    return sum(isinstance(event, Reported) for event in events)


def lost_lanes(events: list[Event]) -> list[LaneLost]:
    """Return the lanes that were lost, in order."""
    return [event for event in events if isinstance(event, LaneLost)]


def check_that_nothing_is_lost(events: list[Event]) -> None:
    """Check that every trial has ended once, and that none trained again what a checkpoint had."""
    state = SearchState(events)
    assert not state.numbers("queued", "running", "paused", "failed")
    finished = [event.number for event in events if isinstance(event, Finished)]
    assert len(finished) == len(set(finished)) == state.count("finished") > 0
    step: dict[int, int] = {}
    for event in events:
        if isinstance(event, Reported):
            assert event.metrics["step"] > step.get(event.number, 0)
            step[event.number] = event.metrics["step"]
        elif isinstance(event, Started) and event.number in step:
            assert event.resume_from is not None
            assert event.resume_from.endswith(f"-{step[event.number]}")
