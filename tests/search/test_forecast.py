"""The forecast of a search: steps that are left, by hand, and the seconds that they take."""

import pytest

from raylora.config.load import build_config
from raylora.config.schema import SearchConfig
from raylora.run.events import Event, LaneUp, Paused
from raylora.run.state import SearchState
from raylora.search.forecast import Forecaster
from tests.helpers import SESSION, history_of

RUNGS = [4, 8, 16]


def config(**search: object) -> SearchConfig:
    space = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "learning_rate": {"loguniform": [1e-4, 1e-2]}}
    sections = {"base_model": {"name": "x"}, "data": {"train": "y"}, "space": space}
    section = {"n_trials": 8, "reduction_factor": 2, "finalists": 3, **search}
    return build_config({**sections, "search": section}, source="test")


def state_of(*events: Event) -> SearchState:
    state = SearchState()
    for event in (SESSION, LaneUp("0", 1, 8, {}), *events):
        state.apply(event)
    return state


def test_steps_of_a_whole_search_are_those_of_halving() -> None:
    forecast = Forecaster(config(), RUNGS).forecast(state_of(), 0.0)
    # 8 trials of 4 steps, 4 of them of 4 more, and 3 finalists of 8 more
    assert (forecast.steps_done, forecast.steps_left) == (0, 32 + 16 + 24)
    assert forecast.seconds_left is None


def test_repetitions_are_steps_too() -> None:
    forecast = Forecaster(config(repeat_best=2, repeats=3), RUNGS).forecast(state_of(), 0.0)
    assert forecast.steps_left == 72 + 6 * 16


def test_a_trial_that_waits_leaves_its_next_steps_to_whoever_is_promoted() -> None:
    state = state_of(*history_of(0, {4: 1.0}), Paused(0), *history_of(1, {}))
    forecast = Forecaster(config(), RUNGS).forecast(state, 0.0, {1: 3})
    assert (forecast.steps_done, forecast.steps_left) == (4 + 3, 72 - 7)


def test_before_the_first_report_the_clock_gives_the_speed() -> None:
    forecaster, state = Forecaster(config(), RUNGS), state_of(*history_of(0, {}))
    forecaster.forecast(state, 100.0)
    # 2 steps in 10 seconds; 70 are left
    assert forecaster.forecast(state, 110.0, {0: 2}).seconds_left == pytest.approx(350)


def test_validation_is_counted_by_report_and_training_by_step() -> None:
    # a report of `history_of` tells of 3 s of training, 1 of validation and .5 of the rest
    state = state_of(*history_of(0, {4: 1.0}), Paused(0))
    forecast = Forecaster(config(), RUNGS).forecast(state, 0.0)
    n_reports = 7 + 4 + 3
    row = state.trials[0]
    seconds = 68 * row.train_seconds / 4 + n_reports * (row.eval_seconds + row.other_seconds)
    assert forecast.seconds_left == pytest.approx(seconds)
