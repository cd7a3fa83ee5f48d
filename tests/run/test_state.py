"""The state is a fold of the events: sums, choices, and what becomes of trials whose lane is lost."""

import pytest

from raylora.run.events import (
    Failed,
    GivenBack,
    LaneLost,
    LaneUp,
    Paused,
    Promoted,
    SessionStarted,
    Started,
    Stopped,
)
from raylora.run.state import SearchState
from tests.helpers import LANE, SESSION, assignment, history_of, proposed, reported


def filled() -> SearchState:
    """r = 4: losses 1.0 and 3.0 at 9 steps, one stopped at 3, one failed. r = 8: one at 2.0."""
    return SearchState(
        [
            SESSION,
            LANE,
            *history_of(0, {3: 4.0, 9: 1.0}, "finished"),
            *history_of(1, {3: 5.0, 9: 3.0}, "finished"),
            *history_of(2, {3: 6.0}),
            Paused(2),
            Stopped(2, "not promoted from step 3"),
            *history_of(3, {}, "failed"),
            *history_of(4, {3: 8.0, 9: 2.0}, "finished", r=8),
        ]
    )


def test_times_add_up_over_reports_and_tokens_per_second_follow() -> None:
    state = filled()
    trial = state.trials[0]
    assert (trial.train_seconds, trial.eval_seconds, trial.other_seconds) == (2.0, 1.0, 0.5)
    assert trial.tokens_per_second == 450.0  # 900 tokens in 2 seconds
    assert [row.train_seconds for row in state.history[:2]] == [1.0, 2.0]


def test_states_are_counted() -> None:
    state = filled()
    assert [state.trials[number].state for number in range(5)] == [
        "finished",
        "finished",
        "stopped",
        "failed",
        "finished",
    ]
    assert (state.count("finished"), state.count("stopped"), state.count("failed")) == (3, 1, 1)
    assert state.numbers("stopped", "failed") == {2, 3}
    assert (state.trials[2].reason, state.trials[3].reason) == ("not promoted from step 3", "why")
    assert state.lanes["0"].trials == set()


def test_best_is_chosen_among_finished_trials() -> None:
    best = filled().best()
    assert best is not None
    assert best.number == 0
    assert SearchState().best() is None


def test_leaders_came_furthest_and_lowest() -> None:
    assert [row.number for row in filled().leaders(4)] == [0, 4, 1, 2]  # 2 stopped at the first rung, 3 failed


def test_with_repetitions_the_choice_is_by_the_mean() -> None:
    state = filled()  # trial 0 ended at 1.0, trial 4 at 2.0
    for number, repeat_of, seed, loss in ((5, 0, 1, 4.0), (6, 4, 1, 2.2), (7, 4, 2, 1.8)):
        for event in history_of(number, {9: loss}, "finished", repeat_of=repeat_of, r=8, seed=seed):
            state.apply(event)
    first, second = state.repetitions()
    assert (first["number"], first["n"], first["eval_loss_mean"]) == (4, 3, 2.0)
    assert (second["number"], second["n"], second["eval_loss_mean"], second["eval_loss_spread"]) == (0, 2, 2.5, 3.0)
    best = state.best()
    assert best is not None
    assert best.number == 7  # the best run of the assignment with the lowest mean, not 0 with its lucky 1.0
    assert state.count("finished") == 3  # repetitions are no trials of their own
    assert state.n_proposed() == 5
    # a later trial that leads, and is not repeated yet, is the best of all
    for event in history_of(8, {9: 0.5}, "finished"):
        state.apply(event)
    leader = state.best()
    assert leader is not None and leader.number == 8


def test_a_paused_trial_waits_until_it_is_promoted_and_started_again() -> None:
    state = SearchState([SESSION, LANE, *history_of(0, {3: 4.0}), Paused(0)])
    assert (state.trials[0].state, state.lanes["0"].trials) == ("paused", set())
    state.apply(Promoted(0, 1))
    assert state.trials[0].state == "queued"
    assert state.resume_from[0] == "trials/0000/checkpoint-3"
    state.apply(Started(0, 2, "0", state.resume_from[0]))
    assert (state.trials[0].state, state.trials[0].segment, state.lanes["0"].trials) == ("running", 2, {0})


def test_a_new_session_queues_what_ran_and_forgets_the_lanes() -> None:
    state = SearchState([SESSION, LANE, *history_of(0, {3: 4.0}), *history_of(1, {})])
    assert state.undecided == {0}
    state.apply(SessionStarted(9, "host", 2))
    assert state.numbers("queued") == {0, 1}
    assert state.lanes == {}
    assert state.undecided == {0}  # what comes of its report is still open


def test_trials_of_a_dead_process_are_suspects_until_they_report_or_leave() -> None:
    state = SearchState([SESSION, LANE, *history_of(0, {}), *history_of(1, {}), *history_of(2, {})])
    state.apply(LaneLost("0", "its process ended", for_good=False, blames_trials=True))
    state.apply(LaneUp("0", 2, 8, {}))
    assert state.numbers("queued") == state.lanes["0"].suspects == {0, 1, 2}
    assert state.deaths == {0: 1, 1: 1, 2: 1}
    state.apply(Started(0, 2, "0", None))
    state.apply(reported(0, 3, 1.0, segment=2))
    state.apply(Failed(1, "why"))
    assert (state.lanes["0"].suspects, state.deaths) == ({2}, {1: 1, 2: 1})


def test_a_lost_node_blames_nobody() -> None:
    state = SearchState([SESSION, LANE, *history_of(0, {})])
    state.apply(LaneLost("0", "its node was lost", for_good=True, blames_trials=False))
    assert (state.deaths, state.lanes["0"].suspects, state.lanes["0"].slots) == ({}, set(), 0)
    assert state.trials[0].state == "queued"


def test_a_trial_given_back_keeps_its_newest_checkpoint() -> None:
    state = SearchState([SESSION, LANE, *history_of(0, {3: 4.0}), Promoted(0, 1)])
    state.apply(GivenBack(0, "no memory", "trials/0000/checkpoint-5", slots=4))
    assert (state.resume_from[0], state.lanes["0"].slots) == ("trials/0000/checkpoint-5", 4)
    assert state.trials[0].checkpoint == "trials/0000/checkpoint-3"  # of the last report
    state.apply(Started(0, 2, "0", None))
    state.apply(GivenBack(0, "disk full", None, machine_fault=True))
    assert (state.resume_from[0], state.machine_faults) == ("trials/0000/checkpoint-5", 1)
    state.apply(Started(0, 3, "0", None))
    state.apply(reported(0, 9, 1.0, segment=3))
    assert state.machine_faults == 0


def test_a_trials_assignment_comes_back() -> None:
    assert SearchState([proposed(0, r=8)]).trials[0].assignment() == assignment(r=8)


@pytest.mark.parametrize("cut", range(20))
def test_folding_in_two_parts_is_folding_at_once(cut: int) -> None:
    events = [SESSION, LANE, *history_of(0, {3: 4.0, 9: 1.0}, "finished"), *history_of(1, {3: 2.0}), Paused(1)]
    state = SearchState(events[:cut])
    for event in events[cut:]:
        state.apply(event)
    assert vars(state) == vars(SearchState(events))
