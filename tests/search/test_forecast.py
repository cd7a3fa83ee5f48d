"""The forecast of a search: steps that are left, by hand, and the seconds that they take."""

import pytest

from raylora.config.load import build_config
from raylora.config.schema import SearchConfig
from raylora.run.events import Event, LaneUp, Paused
from raylora.run.state import SearchState
from raylora.search.forecast import Forecaster, Sizes
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
    # a report of `history_of` tells of 1 s of training, .5 of validation and .25 of the rest
    state = state_of(*history_of(0, {4: 1.0}), Paused(0))
    forecast = Forecaster(config(), RUNGS).forecast(state, 0.0)
    n_reports = 7 + 4 + 3
    row = state.trials[0]
    seconds = 68 * row.train_seconds / 4 + n_reports * (row.eval_seconds + row.other_seconds)
    assert forecast.seconds_left == pytest.approx(seconds)


def test_time_passes_while_trials_are_validated() -> None:
    # two trials in a pack have reported; then both are at the next rung, and each report takes .75 s
    state = state_of(*(event for number in (0, 1) for event in history_of(number, {4: 1.0})))
    forecaster = Forecaster(config(), RUNGS)
    began = forecaster.forecast(state, 100.0, {0: 8, 1: 8}).seconds_left
    assert began is not None
    assert forecaster.forecast(state, 101.0, {0: 8, 1: 8}).seconds_left == pytest.approx(began - 1)
    # a validation that takes longer than thought does not make what follows it shorter
    assert forecaster.forecast(state, 109.0, {0: 8, 1: 8}).seconds_left == pytest.approx(began - 2 * 0.75)


def test_the_first_validation_does_not_slow_the_speed_down() -> None:
    forecaster = Forecaster(config(), RUNGS, Sizes(step=1e9, validation=10**9))
    state = state_of(*history_of(0, {}))
    forecaster.forecast(state, 100.0)
    began = forecaster.forecast(state, 108.0, {0: 4}).seconds_left
    assert began is not None
    # 4 steps in 8 seconds; it takes a third of a step to validate as many tokens as a step trains on
    assert forecaster.forecast(state, 108.4, {0: 4}).seconds_left == pytest.approx(began - 0.4)
    assert forecaster.forecast(state, 118.0, {0: 4}).seconds_left == pytest.approx(began - 2 / 3)


def test_steps_of_late_rungs_take_longer_since_few_trials_share_a_pass() -> None:
    # a pass costs as much as 2 trials: packs of 8, 4 and 3 take 10, 6 and 5 where a trial's step takes 1
    forecaster, state = Forecaster(config(), RUNGS, Sizes(step=20.0, validation=120)), state_of(*history_of(0, {}))
    forecaster.forecast(state, 100.0)
    # 4 steps of one trial, each an eighth of a pass of 10, in 10 seconds
    loads = 10 / 8, 6 / 4, 5 / 3
    left = (32 - 4) * loads[0] + 16 * loads[1] + 24 * loads[2]
    # a report validates 120 tokens, as many as 6 steps train on, or 4 at the first rung; each for a third of a step
    left += (8 * 4 + 4 * 6 + 3 * 6) / 3
    said = forecaster.forecast(state, 110.0, {0: 4}).seconds_left
    assert said == pytest.approx(10 * left / (4 * loads[0]))
    # once trials have reported, their own seconds tell
    state = state_of(*history_of(0, {4: 1.0, 8: 1.0}), Paused(0))
    forecast = forecaster.forecast(state, 200.0)
    done = 4 * loads[0] + 4 * loads[1]
    left = 28 * loads[0] + 12 * loads[1] + 24 * loads[2]
    training = state.trials[0].train_seconds * left / done
    n_reports = 7 + 3 + 3
    assert forecast.seconds_left == pytest.approx(training + n_reports * state.seconds_per_report())
    assert forecast.steps_left == 28 + 12 + 24


def test_a_gpus_pass_weighs_more_tokens_and_each_lane_has_its_own() -> None:
    lanes = [LaneUp(name, 1, 8, {"device": "a GPU"}) for name in "01"]
    state = SearchState([SESSION, *lanes])
    loads = Forecaster(config(), RUNGS, Sizes(step=500.0, validation=0))._loads(state, [8, 4, 3])
    assert loads == [1 + 1 / 4, 1 + 1 / 2, 1 + 1 / 2]
