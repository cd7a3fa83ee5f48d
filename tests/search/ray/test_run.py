"""The search around made-up trials: early stopping, failures, killed lanes, resuming, states."""

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console

from raylora.config.schema import SearchConfig
from raylora.errors import SearchError
from raylora.report.progress import Progress
from raylora.run.directory import RunDirectory
from raylora.run.tables import Records
from raylora.search.plan import Devices
from raylora.search.ray.cluster import local_ray
from raylora.search.ray.lane import LaneSettings
from raylora.search.ray.run import run_search, start_broker
from raylora.search.ray.searcher import reconcile
from raylora.search.sampler import Study
from raylora.training.memory import MemoryEstimate
from tests.fake_engine import FakeEngine

pytestmark = pytest.mark.ray

NO_MEMORY = MemoryEstimate(0, 0, 0, 0, 0)
RUNGS = [3, 9, 27]
RATES = [1e-4, 2e-4, 3e-4, 5e-3, 1e-3, 1.5e-4, 4e-3, 9e-3]


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with local_ray(Devices(n_gpus=0, n_cpus=4, where="this test", node_cpus=4)):
        yield


@pytest.fixture
def search(make_config: Callable[..., SearchConfig], tmp_path: Path) -> Callable[..., Records]:
    """Runs a search over ranks and rates, given in order, in `tmp_path / run`."""

    def start(
        points: list[tuple[int, float]],
        load_engine: Callable = FakeEngine.load,
        n_lanes: int = 1,
        n_trials: int | None = None,
        **section: object,
    ) -> Records:
        config = make_config(
            space={
                "r": {"int": [1, 100]},
                "lora_alpha": 8,
                "lora_dropout": 0.0,
                "learning_rate": {"loguniform": [1e-5, 1e-2]},
            },
            starting_points=[{"r": r, "learning_rate": rate} for r, rate in points],
            search={"n_trials": n_trials or len(points), **section},
        )
        run = RunDirectory(tmp_path / "run")
        run.logs.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tokens").mkdir(exist_ok=True)
        records = Records.load(run)
        study = Study(config, file=run.study_file)
        reconcile(study, records)
        broker = start_broker(n_lanes)
        settings = [
            LaneSettings(str(lane), broker, config, run.path, tmp_path / "tokens", 1, NO_MEMORY, False, 1, load_engine)
            for lane in range(n_lanes)
        ]
        output.truncate(0)
        with Progress(records, config.n_trials(), RUNGS, Console(file=output, width=200)) as progress:
            run_search(run, settings, RUNGS, broker, progress, records, study)
        return records

    output = io.StringIO()
    start.output = output
    return start


def states(records: Records) -> list[str]:
    return [records.trials[number].state for number in sorted(records.trials)]


def study_of(tmp_path: Path) -> optuna.Study:
    return optuna.load_study(study_name="raylora", storage=f"sqlite:///{tmp_path / 'run' / 'study.db'}")


def test_weak_trials_stop_early_and_the_search_goes_on(search: Callable[..., Records], tmp_path: Path) -> None:
    # six reach step 3, the best two of them step 9, the better one of those the end, though it came last
    points = [(8, 9e-3), (8, 1e-4), (8, 2e-4), (8, 5e-4), (8, 9.5e-3), (8, 3e-4)]
    records = search(points, scheduler="halving", finalists=1)
    assert states(records) == ["stopped", "stopped", "stopped", "stopped", "finished", "stopped"]
    assert [records.trials[number].step for number in range(6)] == [9, 3, 3, 3, 27, 3]
    order = [(row.number, row.step) for row in records.history]
    assert [step for _, step in order] == [3] * 6 + [9] * 2 + [27]
    best = records.best()
    assert best is not None
    assert best.number == 4
    told = study_of(tmp_path).trials
    assert [trial.state for trial in told] == [*[TrialState.PRUNED] * 4, TrialState.COMPLETE, TrialState.PRUNED]
    assert list(told[1].intermediate_values) == [3]
    assert list(told[0].intermediate_values) == [3, 9]
    assert list(told[4].intermediate_values) == RUNGS
    # a stopped trial never stands as finished, neither for Optuna nor in the table
    assert study_of(tmp_path).best_trial.number == 4
    assert "trial 1: stopped (not promoted from step 3)" in search.output.getvalue()


def test_failing_trials_are_recorded_with_their_reason_and_the_search_goes_on(
    search: Callable[..., Records], tmp_path: Path
) -> None:
    records = search([(32, 1e-3), (99, 1e-3), (8, 1e-3), (8, 5e-3)], scheduler="none")
    assert states(records) == ["failed", "failed", "finished", "finished"]
    assert records.trials[0].reason == "out of memory: CUDA out of memory. Tried to allocate 2 GiB"
    assert records.trials[1].reason == "ValueError: always fails"
    assert "second line" in (tmp_path / "run" / "trials" / "0001" / "error.txt").read_text()
    told = study_of(tmp_path).trials
    assert [trial.state for trial in told[:2]] == [TrialState.PRUNED] * 2
    assert all(trial.constraints for trial in told[:2])


def test_a_killed_lane_comes_back_and_its_trial_goes_on_from_its_checkpoint(
    search: Callable[..., Records], tmp_path: Path
) -> None:
    records = search([(8, 1e-3), (13, 2e-3)], scheduler="none")
    assert states(records) == ["finished", "finished"]
    assert [row.step for row in records.history if row.number == 1] == RUNGS  # no rung twice, none left out
    assert (tmp_path / "cache" / "killed").exists()


def test_the_search_stops_when_the_first_trials_all_fail(search: Callable[..., Records]) -> None:
    with pytest.raises(SearchError, match=r"the first trials all failed; trial 0: ValueError: always fails; trial 1"):
        search([(99, 1e-3)] * 3, n_trials=20)


def test_a_base_that_cannot_load_ends_the_search_at_once_with_the_reason(
    search: Callable[..., Records], tmp_path: Path
) -> None:
    began = time.monotonic()
    with pytest.raises(
        SearchError, match=r"no lane is left: OSError: no weights here; mend it and go on with --resume"
    ):
        search([(8, 1e-3)] * 4, load_engine=FakeEngine.load_broken)
    assert time.monotonic() - began < 60
    assert states(Records.load(RunDirectory(tmp_path / "run"))) == ["running"]  # no trial is blamed for it


def test_resuming_keeps_what_finished_and_counts_a_total(search: Callable[..., Records], tmp_path: Path) -> None:
    points = [(8, rate) for rate in RATES]
    first = search(points, n_trials=4, scheduler="halving")
    assert len(first.trials) == 4
    run = RunDirectory(tmp_path / "run")
    records = search(points, n_trials=8, scheduler="halving")
    assert len(records.trials) == 8
    assert [records.trials[number] for number in range(4)] == [first.trials[number] for number in range(4)]
    # the halving remembers: 1.5e-4 is among the worst two thirds of all eight, not of the last four only
    assert records.trials[5].state == "stopped"
    assert run.study_file.is_file()


def test_lanes_work_side_by_side_and_take_the_next_trial_at_once(search: Callable[..., Records]) -> None:
    records = search([(8, rate) for rate in RATES], n_lanes=2, scheduler="none", load_engine=FakeEngine.load_slow)
    assert states(records) == ["finished"] * 8
    trials = sorted(records.trials.values(), key=lambda trial: trial.started_at)
    assert {trial.lane for trial in trials} == {"0", "1"}
    # each lane trains for 4 x 27 x 0.05 s = 5.4 s; what it waits between trials stays under a second each
    first_start = min(row.reported_at for row in records.history) - 3 * 0.05
    last_end = max(row.reported_at for row in records.history)
    assert last_end - first_start < 5.4 + 3 * 1.0


def test_the_best_assignments_are_repeated_with_other_seeds(search: Callable[..., Records], tmp_path: Path) -> None:
    records = search([(8, rate) for rate in RATES[:4]], repeat_best=2, repeats=2)
    repeats = [trial for trial in records.trials.values() if trial.repeat_of is not None]
    best = sorted(range(4), key=lambda number: -records.trials[number].learning_rate)[:2]
    assert sorted(trial.repeat_of for trial in repeats) == sorted(best * 2)
    assert all(trial.state == "finished" and trial.step == RUNGS[-1] for trial in repeats)
    assert all(trial.seed in (1, 2) for trial in repeats)
    assert [row.step for row in records.history if row.number == repeats[0].number] == [RUNGS[-1]]
    assert study_of(tmp_path).trials[repeats[0].number].state == TrialState.COMPLETE


def test_asynchronous_halving_promotes_before_all_have_come(search: Callable[..., Records]) -> None:
    records = search([(8, rate) for rate in RATES])
    order = [(row.number, row.step) for row in records.history]
    assert any(step > RUNGS[0] for _, step in order[: len(RATES)])
    assert records.count("finished") >= 1
    assert records.count("paused") == 0


def test_a_lane_that_cannot_pack_says_so_once(search: Callable[..., Records]) -> None:
    search([(8, 1e-3)] * 2, load_engine=FakeEngine.load_with_reason)
    assert search.output.getvalue().count("lane 0 trains one trial at a time, with TRL: made up") == 1
