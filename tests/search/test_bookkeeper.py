"""Events in an awkward order: a search that was killed goes on as if it had not been, and none waits for ever."""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from raylora.config.schema import SearchConfig
from raylora.run.directory import RunDirectory
from raylora.run.tables import Records
from raylora.search.ray.searcher import Bookkeeper, reconcile
from raylora.search.sampler import Study
from tests.run.test_tables import REPORT

RUNGS = [3, 9]


@pytest.fixture
def config(make_config: Callable[..., SearchConfig]) -> SearchConfig:
    return make_config(search={"n_trials": 3, "reduction_factor": 3, "scheduler": "halving", "finalists": 1})


@pytest.fixture
def killed(config: SearchConfig, tmp_path: Path) -> tuple[Study, Records]:
    """Three trials have reported at the first rung, and nothing came of it yet."""
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    study, records = Study(config, file=run.study_file), Records(run)
    for loss in (2.0, 1.0, 3.0):
        number, assignment = study.ask(set())
        records.started(number, assignment, RUNGS[-1])
        report(study, records, number, RUNGS[0], loss)
    return study, records


def report(study: Study, records: Records, number: int, step: int, loss: float) -> None:
    study.report(number, step, loss)
    records.reported(number, {**REPORT, "step": step, "eval_loss": loss})


def resume(config: SearchConfig, study: Study, records: Records) -> int | None:
    """The trial that a resumed search trains next."""
    reconcile(study, records)
    return Bookkeeper(config, RUNGS, 1, study, records, Mock(), Mock())._next()


def states(records: Records) -> list[str]:
    return [records.trials[number].state for number in sorted(records.trials)]


def test_trials_killed_at_a_rung_are_compared_there(config: SearchConfig, killed: tuple[Study, Records]) -> None:
    study, records = killed
    assert resume(config, study, records) == 1
    assert states(records) == ["stopped", "running", "stopped"]


def test_a_trial_killed_at_the_end_is_finished(config: SearchConfig, killed: tuple[Study, Records]) -> None:
    study, records = killed
    report(study, records, 1, RUNGS[-1], 0.5)
    assert resume(config, study, records) is None
    assert states(records) == ["stopped", "finished", "stopped"]
    assert study.running() == {}


def test_a_repetition_that_the_table_does_not_know_stays_one(
    config: SearchConfig, killed: tuple[Study, Records]
) -> None:
    study, records = killed
    report(study, records, 1, RUNGS[-1], 0.5)
    reconcile(study, records)
    number, _ = study.repeat(1, seed=7)
    assert resume(config, study, records) == number
    assert records.trials[number].repeat_of == 1


def test_a_trial_is_promoted_only_when_its_leg_has_ended(config: SearchConfig, tmp_path: Path) -> None:
    # Tune saves a trial before it ends its leg, and may ask for the next one meanwhile
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    study, records = Study(config, file=run.study_file), Records(run)
    bookkeeper = Bookkeeper(config, RUNGS, 3, study, records, Mock(), Mock())
    reports = {leg: {**REPORT, "step": RUNGS[0], "eval_loss": loss} for leg, loss in {"a": 2, "b": 1, "c": 3}.items()}
    for leg in reports:
        number = bookkeeper._next()
        assert number is not None
        bookkeeper._legs[leg] = number
    assert not any(bookkeeper.goes_on(leg, found) for leg, found in reports.items())
    assert bookkeeper._next() is None
    for leg, found in reports.items():
        bookkeeper.on_trial_complete(leg, found)
    assert bookkeeper._next() == 1
    assert states(records) == ["stopped", "running", "stopped"]
