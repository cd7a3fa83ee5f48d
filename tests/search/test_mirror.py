"""The study for optuna-dashboard: the same trials in the same states, and never the end of a search."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from raylora.config.schema import SearchConfig
from raylora.run.events import read_events
from raylora.search.mirror import STUDY
from raylora.search.sampler import FAILED
from raylora.search.views import Views
from tests.search.simulation import Simulation


@pytest.fixture
def config(make_config: Callable[..., SearchConfig]) -> SearchConfig:
    return make_config(search={"n_trials": 6, "finalists": 1, "repeat_best": 1, "repeats": 1})


def views_of(simulation: Simulation, notes: list[str]) -> Views:
    events = list(read_events(simulation.run.events_file))
    return Views(simulation.run, simulation.config, simulation.controller.state, events, notes.append)


def test_the_mirror_shows_every_trial_as_it_is(config: SearchConfig, tmp_path: Path) -> None:
    folder = tmp_path / "100%?x=1#a b"
    folder.mkdir()
    simulation = Simulation(config, folder)
    simulation.fail(simulation.lanes["0"], 1)
    simulation.finish()
    notes: list[str] = []
    views_of(simulation, notes).close()
    plain = shutil.copy(simulation.run.study_file, tmp_path / "study.db")
    study = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{plain}")
    states = {
        "finished": TrialState.COMPLETE,
        "stopped": TrialState.PRUNED,
        "failed": TrialState.PRUNED,
    }
    assert [trial.state for trial in study.trials] == [states[state] for state in simulation.states]
    assert study.trials[1].constraints == {FAILED: 1.0}
    assert study.trials[1].user_attrs["failed"] == "made up"
    best = simulation.controller.state.finished()[0]
    assert study.best_trial.number == best.number
    assert study.best_trial.params["learning_rate"] == best.learning_rate
    assert list(study.best_trial.intermediate_values) == [3, 9, 27]
    assert study.trials[-1].user_attrs["repeat_of"] == best.number
    assert notes == []


def test_a_mirror_follows_a_search_event_by_event(config: SearchConfig, tmp_path: Path) -> None:
    simulation = Simulation(config, tmp_path)
    views = views_of(simulation, [])
    simulation.controller.listen(views.add)
    for _ in range(3):
        simulation.step(simulation.lanes["0"])
    views.close()
    study = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{simulation.run.study_file}")
    assert [3 in trial.intermediate_values for trial in study.trials[:3]] == [True] * 3


@contextmanager
def dashboard(file: Path) -> Iterator[str]:
    """Yield the address of an optuna-dashboard that shows a study file."""
    program = Path(sys.executable).with_name("optuna-dashboard")
    if not program.exists():
        pytest.skip("optuna-dashboard is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with subprocess.Popen([program, f"sqlite:///{file}", "--port", port], stderr=subprocess.DEVNULL) as server:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def shown(address: str, *states: str) -> list[str]:
    """Return the states of trials that a dashboard shows, once they are these, or after a minute."""
    found: list[str] = []
    deadline = time.monotonic() + 60
    while found != list(states) and time.monotonic() < deadline:
        time.sleep(0.2)  # it starts, or shows trials that it read a moment ago
        try:
            with urllib.request.urlopen(f"{address}/api/studies/1?after=0", timeout=10) as answer:
                found = [trial["state"] for trial in json.load(answer)["trials"]]
        except OSError:
            continue
    return found


def test_optuna_dashboard_shows_a_search_that_is_still_written(config: SearchConfig, tmp_path: Path) -> None:
    simulation = Simulation(config, tmp_path)
    notes: list[str] = []
    views = views_of(simulation, notes)
    simulation.controller.listen(views.add)
    with dashboard(simulation.run.study_file) as address:
        assert shown(address, *["Running"] * 3) == ["Running"] * 3
        simulation.finish()
        # of six trials one is promoted to the end and repeated, and five are stopped
        states = {"finished": "Complete", "stopped": "Pruned"}
        expected = [states[state] for state in simulation.states]
        assert expected.count("Complete") == 2
        assert shown(address, *expected) == expected
    views.close()
    assert notes == []


def test_a_broken_mirror_is_noted_once_and_left_alone(config: SearchConfig, tmp_path: Path) -> None:
    simulation = Simulation(config, tmp_path)
    simulation.run.study_file.mkdir()  # no file can be written there
    notes: list[str] = []
    views = views_of(simulation, notes)
    simulation.controller.listen(views.add)
    simulation.finish()
    views.close()
    assert len(notes) == 1
    assert "study.db is not kept any more" in notes[0]
    assert simulation.controller.done
    assert simulation.run.trials_file.is_file()
