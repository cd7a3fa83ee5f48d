"""What Optuna is told, and what it makes of it."""

from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from raylora.config.schema import SearchConfig
from raylora.search.sampler import FAILED, Study

SPACE = {"r": {"choice": [2, 4]}, "lora_alpha": 8, "lora_dropout": 0.0, "learning_rate": {"loguniform": [1e-5, 1e-1]}}


@pytest.fixture
def config(make_config: Callable[..., SearchConfig]) -> SearchConfig:
    return make_config(space=SPACE, search={"n_trials": 40})


def stored(file: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="raylora", storage=f"sqlite:///{file}").trials


def test_states_are_told_as_they_are(config: SearchConfig, tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    study = Study(config, file=file)
    for _ in range(4):
        number, _ = study.ask()
        study.report(number, 3, 2.0 + number)
    study.finish(0, 1.5)
    study.stop(1)
    study.fail(2, "out of memory: made up")
    finished, stopped, failed, running = stored(file)
    assert (finished.state, finished.value) == (TrialState.COMPLETE, 1.5)
    assert (stopped.state, stopped.intermediate_values) == (TrialState.PRUNED, {3: 3.0})
    assert failed.state == TrialState.PRUNED
    assert failed.constraints == {FAILED: 1.0}
    assert failed.user_attrs["failed"] == "out of memory: made up"
    assert running.state == TrialState.RUNNING
    assert list(Study(config, file=file).running()) == [3]  # a later run sees what was under way


def test_the_sampler_keeps_away_from_where_trials_failed(config: SearchConfig) -> None:
    def high_rates(fails: bool) -> int:
        study = Study(config)
        high = []
        for _ in range(40):
            number, assignment = study.ask()
            high.append(assignment.learning_rate > 1e-3)  # half of the space
            if high[-1] and fails:
                study.fail(number, "diverged")
            else:
                study.finish(number, 1.0)  # every rate is as good, so that failing alone makes the difference
        return sum(high[10:])  # the first ten are drawn at random

    assert high_rates(fails=True) < high_rates(fails=False) / 2


def test_the_same_seed_proposes_the_same_assignments(config: SearchConfig) -> None:
    def proposals() -> list:
        study = Study(config)
        drawn = []
        for index in range(15):
            number, assignment = study.ask()
            study.finish(number, float(index))
            drawn.append(assignment)
        return drawn

    assert proposals() == proposals()


def test_a_resumed_study_does_not_draw_the_same_points_again(config: SearchConfig, tmp_path: Path) -> None:
    drawn = []
    for _ in range(3):
        study = Study(config, file=tmp_path / "study.db")
        number, assignment = study.ask()
        study.finish(number, 1.0)
        drawn.append(assignment.learning_rate)
    assert len(set(drawn)) == 3


def test_starting_points_come_first_and_fixed_values_stay(make_config: Callable[..., SearchConfig]) -> None:
    config = make_config(
        space=SPACE,
        starting_points=[{"r": 4, "learning_rate": 2e-4}, {"r": 2, "learning_rate": 1e-3}],
        training={"weight_decay": 0.25, "target_modules": ["q_proj", "v_proj"]},
    )
    study = Study(config)
    (_, first), (_, second) = study.ask(), study.ask()
    assert (first.r, first.learning_rate, first.lora_alpha) == (4, 2e-4, 8)
    assert (second.r, second.learning_rate) == (2, 1e-3)
    assert first.weight_decay == 0.25
    assert first.target_modules == "q_proj,v_proj"


def test_a_grid_is_asked_point_by_point(make_config: Callable[..., SearchConfig]) -> None:
    space = {
        "r": {"choice": [1, 2]},
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "learning_rate": 1e-3,
        "seed": {"choice": [0, 1]},
    }
    config = make_config(space=space, search={"sampler": "grid", "n_trials": None})
    study = Study(config)
    asked = [study.ask()[1] for _ in range(config.n_trials())]
    assert [(one.r, one.seed) for one in asked] == [(1, 0), (1, 1), (2, 0), (2, 1)]


def test_the_sampler_learns_from_paused_trials_as_if_they_were_pruned(config: SearchConfig) -> None:
    def high_rates(seen: bool) -> int:
        study, high = Study(config), 0
        for index in range(40):
            number, assignment = study.ask(set(range(index)) if seen else frozenset())
            study.report(number, 3, 1.0 + (assignment.learning_rate > 1e-3))
            high += index >= 10 and assignment.learning_rate > 1e-3
        return high

    assert high_rates(seen=True) < high_rates(seen=False) / 2


def test_a_repetition_has_a_number_of_its_own_and_is_no_proposal(config: SearchConfig, tmp_path: Path) -> None:
    study = Study(config, file=tmp_path / "study.db")
    number, first = study.ask()
    study.finish(number, 1.0)
    again, repeated = study.repeat(number, seed=7)
    assert again == 1
    assert repeated == first.model_copy(update={"seed": 7})
    assert study.n_asked() == 1
    study.finish(again, 1.1)
    assert stored(tmp_path / "study.db")[1].user_attrs["repeat_of"] == 0
