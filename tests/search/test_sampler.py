"""Proposals: a function of the log and the seed, which learns from what became of earlier ones."""

import copy
from collections.abc import Callable

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from raylora.config.assignment import Assignment
from raylora.config.schema import SearchConfig
from raylora.run.events import Event, Failed, Finished, Paused, Promoted, Proposed, Started, Stopped
from raylora.run.state import SearchState
from raylora.search import sampler as sampler_module
from raylora.search.sampler import FAILED, Sampler, distributions
from tests.helpers import LANE, SESSION, reported

SPACE = {"r": {"choice": [2, 4]}, "lora_alpha": 8, "lora_dropout": 0.0, "learning_rate": {"loguniform": [1e-5, 1e-1]}}


@pytest.fixture
def config(make_config: Callable[..., SearchConfig]) -> SearchConfig:
    return make_config(space=SPACE, search={"n_trials": 40})


class Searching:
    """A state and its sampler; `next` proposes a trial and lets these events happen to it."""

    def __init__(self, config: SearchConfig) -> None:
        self.state = SearchState([SESSION, LANE])
        self.sampler = Sampler(config, self.state)

    def next(self, *events: Callable[[int], Event]) -> Assignment:
        number = len(self.state.trials)
        assignment, params = self.sampler.propose(number)
        self.apply(Proposed(number, assignment.model_dump(), params, 9), Started(number, 1, "0", None))
        self.apply(*(event(number) for event in events))
        return assignment

    def apply(self, *events: Event) -> None:
        for event in events:
            self.state.apply(event)


def with_seed(config: SearchConfig, seed: int) -> SearchConfig:
    return config.model_copy(update={"search": config.search.model_copy(update={"seed": seed})})


def at_rung(loss: float) -> Callable[[int], Event]:
    return lambda number: reported(number, 3, loss)


def fail(number: int) -> Event:
    return Failed(number, "diverged")


def test_states_are_told_as_they_are(config: SearchConfig) -> None:
    searching = Searching(config)
    searching.next(at_rung(2.0), lambda number: reported(number, 9, 1.5), Finished)
    searching.next(at_rung(3.0), Paused, lambda number: Stopped(number, "not promoted"))
    searching.next(at_rung(4.0), fail)
    searching.next(at_rung(5.0), Paused)
    searching.next(at_rung(6.0))
    finished, stopped, failed, paused, running = searching.sampler._shown()
    assert (finished.state, finished.value, finished.intermediate_values) == (
        TrialState.COMPLETE,
        1.5,
        {3: 2.0, 9: 1.5},
    )
    assert (stopped.state, stopped.intermediate_values) == (TrialState.PRUNED, {3: 3.0})
    assert (failed.state, failed.constraints) == (TrialState.PRUNED, {FAILED: 1.0})
    assert (paused.state, paused.intermediate_values) == (TrialState.PRUNED, {3: 5.0})
    assert running.state == TrialState.RUNNING
    searching.apply(Promoted(3, 1))
    assert searching.sampler._shown()[3].state == TrialState.RUNNING


def test_the_sampler_keeps_away_from_where_trials_failed(config: SearchConfig) -> None:
    def high_rates(fails: bool) -> int:
        searching, high = Searching(config), []
        for _ in range(40):
            assignment = searching.next(lambda number: reported(number, 9, 1.0))
            high.append(assignment.learning_rate > 1e-3)  # half of the space
            number = len(searching.state.trials) - 1
            # every rate is as good, so that failing alone makes the difference
            searching.apply(fail(number) if high[-1] and fails else Finished(number))
        return sum(high[10:])  # the first ten are drawn at random

    assert high_rates(fails=True) < high_rates(fails=False) / 2


def test_the_sampler_learns_from_paused_trials_as_if_they_were_pruned(config: SearchConfig) -> None:
    def high_rates(paused: bool) -> int:
        return sum(high_rates_of(paused, seed) for seed in range(4))

    def high_rates_of(paused: bool, seed: int) -> int:
        searching, high = Searching(with_seed(config, seed)), 0
        for index in range(40):
            assignment = searching.next()
            loss = 1.0 + (assignment.learning_rate > 1e-3)
            searching.apply(reported(index, 3, loss), *([Paused(index)] if paused else []))
            high += index >= 10 and assignment.learning_rate > 1e-3
        return high

    assert high_rates(paused=True) < high_rates(paused=False) / 2


def test_proposals_are_a_function_of_log_and_seed(config: SearchConfig) -> None:
    def events(searching: Searching) -> list[Assignment]:
        return [searching.next(at_rung(float(index)), Paused) for index in range(15)]

    one = Searching(config)
    drawn = events(one)
    assert events(Searching(config)) == drawn
    assert len({assignment.learning_rate for assignment in drawn}) == 15
    # a sampler made anew from the same state, as after a kill, proposes the same
    again, _ = Sampler(config, one.state).propose(15)
    assert again == one.next()
    assert events(Searching(with_seed(config, 1))) != drawn


def test_starting_points_come_first_and_fixed_values_stay(make_config: Callable[..., SearchConfig]) -> None:
    config = make_config(
        space=SPACE,
        starting_points=[{"r": 4, "learning_rate": 2e-4}, {"learning_rate": 1e-3}],
        training={"weight_decay": 0.25, "target_modules": ["q_proj", "v_proj"]},
    )
    searching = Searching(config)
    first, second, third = (searching.next(at_rung(1.0), Paused) for _ in range(3))
    assert (first.r, first.learning_rate, first.lora_alpha) == (4, 2e-4, 8)
    assert second.learning_rate == 1e-3 and second.r in (2, 4)
    assert third.learning_rate not in (2e-4, 1e-3)
    assert first.weight_decay == 0.25
    assert first.target_modules == "q_proj,v_proj"


def test_a_grid_is_proposed_point_by_point_and_ends(make_config: Callable[..., SearchConfig]) -> None:
    space = {
        "r": {"choice": [1, 2]},
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "learning_rate": 1e-3,
        "seed": {"choice": [0, 1]},
    }
    config = make_config(space=space, search={"sampler": "grid", "n_trials": None})
    searching = Searching(config)
    drawn = []
    while not searching.sampler.exhausted():
        drawn.append(searching.next())
    assert [(one.r, one.seed) for one in drawn] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert config.n_trials() == 4


def test_of_very_many_trials_the_best_and_the_newest_are_shown(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler_module, "MAX_SHOWN", 20)
    searching = Searching(config)
    for index in range(30):
        searching.next(at_rung(float(index)), Paused)
    shown = searching.sampler._shown()
    assert [trial.intermediate_values[3] for trial in shown] == [0.0, 1.0, *map(float, range(12, 30))]


def test_distributions_are_those_that_the_space_suggests_from(config: SearchConfig) -> None:
    trial = optuna.create_study().ask()
    config.search_space().suggest(trial)
    assert distributions(config.search_space(), trial.params) == trial.distributions


def test_a_proposal_copies_no_known_trial(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    # Optuna copies each trial that is added to a study deeply, which took 90 % of a proposal beside 300 trials
    copied: list[int] = []

    def copy_of(trial: FrozenTrial, memo: object) -> FrozenTrial:
        copied.append(trial.number)
        return copy.copy(trial)

    searching = Searching(config)
    for index in range(15):
        searching.next(at_rung(float(index)), Paused)
    monkeypatch.setattr(FrozenTrial, "__deepcopy__", copy_of, raising=False)
    searching.next()
    assert set(copied) <= {0}  # the new one


def test_proposals_are_those_of_a_study_of_all_trials(config: SearchConfig) -> None:
    searching = Searching(config)
    for index in range(15):
        searching.next(at_rung(float(index)), Paused)
    study = optuna.create_study(sampler=searching.sampler._sampler(15))
    study.add_trials(searching.sampler._shown())
    trial = study.ask()
    config.search_space().suggest(trial)
    assert searching.sampler.propose(15)[1] == trial.params
