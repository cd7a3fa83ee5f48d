"""The search around made-up trials, with Ray: lanes that die, fail to load or work side by side."""

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console

from raylora.config.load import dump_config
from raylora.config.schema import SearchConfig
from raylora.errors import SearchError
from raylora.report.progress import Progress
from raylora.run.atomic import read_json
from raylora.run.directory import RunDirectory
from raylora.run.events import EventLog, read_events
from raylora.run.state import SearchState
from raylora.search.controller import SearchController
from raylora.search.mirror import STUDY
from raylora.search.plan import Devices
from raylora.search.ray.cluster import local_ray
from raylora.search.ray.lane import LaneSettings
from raylora.search.ray.run import run_search, start_broker
from raylora.search.views import Views
from raylora.training.memory import MemoryEstimate
from tests.fake_engine import FakeEngine

pytestmark = pytest.mark.ray

NO_MEMORY = MemoryEstimate(0, 0, 0, 0, 0, 0)
RUNGS = [3, 9, 27]
RATES = [1e-4, 2e-4, 3e-4, 5e-3, 1e-3, 1.5e-4, 4e-3, 9e-3]


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with local_ray(Devices(n_gpus=0, n_cpus=4, where="this test", node_cpus=4)):
        yield


@pytest.fixture
def search(make_config: Callable[..., SearchConfig], tmp_path: Path) -> Callable[..., SearchState]:
    """Runs a search over ranks and rates, given in order, in `tmp_path / run`."""

    def start(
        points: list[tuple[int, float]],
        load_engine: Callable = FakeEngine.load,
        n_lanes: int = 1,
        n_trials: int | None = None,
        **section: object,
    ) -> SearchState:
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
        run.config_file.write_text(dump_config(config))  # by which a lane sees that the run directory is shared
        (tmp_path / "tokens").mkdir(exist_ok=True)
        events = list(read_events(run.events_file))
        log = EventLog(run.events_file)
        rungs = RUNGS[-1:] if config.search.scheduler == "none" else RUNGS
        controller = SearchController(config, rungs, log, events=events, n_lanes=n_lanes)
        broker = start_broker()
        settings = [
            LaneSettings(str(lane), broker, config, run.path, tmp_path / "tokens", 1, NO_MEMORY, False, 1, load_engine)
            for lane in range(n_lanes)
        ]
        output.truncate(0)
        with Progress(controller.state, config, rungs, Console(file=output, width=200)) as progress:
            views = Views(run, config, controller.state, events, progress.note)
            controller.listen(progress.show)
            controller.listen(views.add)
            run_search(run, settings, broker, controller, views, progress.note, progress.beat)
        return controller.state

    output = io.StringIO()
    start.output = output
    return start


def states(state: SearchState) -> list[str]:
    return [state.trials[number].state for number in sorted(state.trials)]


def study_of(tmp_path: Path) -> optuna.Study:
    return optuna.load_study(study_name=STUDY, storage=f"sqlite:///{tmp_path / 'run' / 'study.db'}")


def test_weak_trials_stop_early_and_the_search_goes_on(search: Callable[..., SearchState], tmp_path: Path) -> None:
    # six reach step 3, the best two of them step 9, the better one of those the end, though it came last
    points = [(8, 9e-3), (8, 1e-4), (8, 2e-4), (8, 5e-4), (8, 9.5e-3), (8, 3e-4)]
    state = search(points, scheduler="halving", finalists=1)
    assert states(state) == ["stopped", "stopped", "stopped", "stopped", "finished", "stopped"]
    assert [state.trials[number].step for number in range(6)] == [9, 3, 3, 3, 27, 3]
    order = [(row.number, row.step) for row in state.history]
    assert [step for _, step in order] == [3] * 6 + [9] * 2 + [27]
    best = state.best()
    assert best is not None
    assert best.number == 4
    told = study_of(tmp_path).trials
    assert [trial.state for trial in told] == [*[TrialState.PRUNED] * 4, TrialState.COMPLETE, TrialState.PRUNED]
    assert list(told[1].intermediate_values) == [3]
    assert list(told[0].intermediate_values) == [3, 9]
    assert list(told[4].intermediate_values) == RUNGS
    lanes = read_json(tmp_path / "run" / "lanes.json")
    assert lanes["lanes"]["0"]["engine"] == "FakeEngine"
    assert lanes["driver"]["peak_memory_mib"] > 0
    # a stopped trial never stands as finished, neither for Optuna nor in the table
    assert study_of(tmp_path).best_trial.number == 4
    assert "trial 1: stopped (not promoted from step 3)" in search.output.getvalue()


def test_failing_trials_are_recorded_with_their_reason_and_the_search_goes_on(
    search: Callable[..., SearchState], tmp_path: Path
) -> None:
    state = search([(32, 1e-3), (99, 1e-3), (8, 1e-3), (8, 5e-3)], scheduler="none")
    assert states(state) == ["failed", "failed", "finished", "finished"]
    assert state.trials[0].reason == "out of memory: CUDA out of memory. Tried to allocate 2 GiB"
    assert state.trials[1].reason == "ValueError: always fails"
    assert "second line" in (tmp_path / "run" / "trials" / "0001" / "error.txt").read_text()
    told = study_of(tmp_path).trials
    assert [trial.state for trial in told[:2]] == [TrialState.PRUNED] * 2
    assert all(trial.constraints for trial in told[:2])


def test_a_killed_lane_comes_back_and_its_trial_goes_on_from_its_checkpoint(
    search: Callable[..., SearchState], tmp_path: Path
) -> None:
    state = search([(8, 1e-3), (13, 2e-3)])
    assert states(state) == ["stopped", "finished"]
    assert [row.step for row in state.history if row.number == 1] == RUNGS  # no rung twice, none left out
    assert (tmp_path / "cache" / "killed").exists()


def test_a_base_that_cannot_load_ends_the_search_at_once_with_the_reason(
    search: Callable[..., SearchState], tmp_path: Path
) -> None:
    began = time.monotonic()
    with pytest.raises(
        SearchError, match=r"no lane is left: OSError: no weights here; mend it and go on with --resume"
    ):
        search([(8, 1e-3)] * 4, load_engine=FakeEngine.load_broken)
    assert time.monotonic() - began < 60
    assert states(SearchState.load(RunDirectory(tmp_path / "run"))) == ["queued"]  # no trial is blamed for it


def test_lanes_work_side_by_side_and_take_the_next_trial_at_once(search: Callable[..., SearchState]) -> None:
    state = search([(8, rate) for rate in RATES], n_lanes=2, scheduler="none", load_engine=FakeEngine.load_slow)
    assert states(state) == ["finished"] * 8
    trials = sorted(state.trials.values(), key=lambda trial: trial.started_at)
    assert {trial.lane for trial in trials} == {"0", "1"}
    # each lane trains for 4 x 27 x 0.05 s = 5.4 s; what it waits between trials stays under a second each
    first_start = min(row.reported_at for row in state.history) - 27 * 0.05
    last_end = max(row.reported_at for row in state.history)
    assert last_end - first_start < 5.4 + 3 * 1.0
