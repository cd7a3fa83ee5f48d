"""The owner of all trials, on simulated lanes: awkward orders of events, kills after each event, machine faults."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylora.config.schema import SearchConfig
from raylora.run.directory import RunDirectory
from raylora.run.events import Finished, Started, read_events
from raylora.run.state import SearchState
from raylora.search.messages import Ready, Report
from tests.helpers import metrics
from tests.search.simulation import RUNGS, Simulation

RATES = [1e-4, 2e-4, 3e-4, 5e-3, 1e-3, 1.5e-4, 4e-3, 9e-3, 2.5e-4]
SPACE = {
    "r": {"int": [1, 100]},
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "learning_rate": {"loguniform": [1e-5, 1e-2]},
}

Start = Callable[..., Simulation]


@pytest.fixture
def make_search(make_config: Callable[..., SearchConfig]) -> Callable[..., SearchConfig]:
    def make(rates: list[float] = RATES, n_trials: int | None = None, **search: object) -> SearchConfig:
        return make_config(
            space=SPACE,
            starting_points=[{"r": 8, "learning_rate": rate} for rate in rates],
            search={"n_trials": n_trials or len(rates), **search},
        )

    return make


@pytest.fixture
def start(make_search: Callable[..., SearchConfig], tmp_path: Path) -> Start:
    def simulate(rates: list[float] = RATES, n_lanes: int = 1, slots: int = 3, **search: object) -> Simulation:
        return Simulation(make_search(rates, **search), tmp_path / "run", n_lanes=n_lanes, slots=slots)

    return simulate


def test_in_step_the_best_third_goes_on_and_the_others_are_stopped(start: Start) -> None:
    simulation = start(scheduler="halving", finalists=1).finish()
    # nine reach step 3; rates 9e-3, 5e-3 and 4e-3 step 9; 9e-3 the end
    finished = [row.learning_rate for row in simulation.controller.state.finished()]
    assert finished == [9e-3]
    steps = {row.learning_rate: row.step for row in simulation.controller.state.trials.values()}
    assert [steps[rate] for rate in (9e-3, 5e-3, 4e-3, 1e-3)] == [27, 9, 9, 3]
    assert simulation.states.count("stopped") == 8
    reasons = {row.reason for row in simulation.controller.state.trials.values() if row.state == "stopped"}
    assert reasons == {"not promoted from step 3", "not promoted from step 9"}
    simulation.check()


def test_asynchronously_trials_are_promoted_before_all_have_come(start: Start) -> None:
    simulation = start(finalists=1).finish()
    order = [row.step for row in simulation.controller.state.history]
    assert any(step > RUNGS[0] for step in order[: len(RATES)])
    simulation.check()


@pytest.mark.parametrize("scheduler", ["asha", "halving", "none"])
def test_a_search_cut_off_after_any_event_ends_as_if_it_had_not_been(
    scheduler: str, make_search: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    rungs = RUNGS if scheduler != "none" else RUNGS[-1:]
    config = make_search(scheduler=scheduler, repeat_best=1, repeats=1)
    whole = Simulation(config, tmp_path / "whole", rungs=rungs).finish()
    lines = whole.run.events_file.read_bytes().splitlines(keepends=True)
    finished = {row.number for row in whole.controller.state.finished()}
    assert len(finished) >= 4  # three finalists and a repetition
    for n_events in range(len(lines)):
        folder = tmp_path / str(n_events)
        folder.mkdir()
        (folder / "events.jsonl").write_bytes(b"".join(lines[:n_events]) + lines[n_events][:7])
        resumed = Simulation(config, folder, rungs=rungs).finish()
        resumed.check()
        assert resumed.controller.error is None
        assert resumed.controller.state.n_proposed() == len(RATES)
        if scheduler != "asha":  # whose promotions depend on the order in which trials report
            assert {row.number for row in resumed.controller.state.finished()} == finished


def test_a_finished_search_has_nothing_left_to_do(start: Start) -> None:
    simulation = start().finish()
    before = simulation.states
    simulation.kill()
    simulation.begin()
    assert simulation.controller.done
    assert simulation.states == before


def test_a_total_that_grows_adds_trials_and_keeps_what_ended(
    make_search: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    first = Simulation(make_search(RATES[:4], scheduler="halving"), tmp_path / "run").finish()
    before = dict(first.controller.state.trials)
    first.kill()
    second = Simulation(make_search(RATES, scheduler="halving"), tmp_path / "run").finish()
    after = second.controller.state.trials
    assert len(after) == 9
    assert {number: after[number] for number in before} == before


def test_one_lane_and_one_seed_give_one_search(make_search: Callable[..., SearchConfig], tmp_path: Path) -> None:
    def search(name: str) -> list[tuple]:
        simulation = Simulation(make_search(RATES[:2], n_trials=12), tmp_path / name).finish()
        return [
            (row.number, row.learning_rate, row.step, row.eval_loss)
            for row in simulation.controller.state.trials.values()
        ]

    assert search("one") == search("other")


def test_reports_of_one_step_are_decided_in_the_order_of_numbers(start: Start) -> None:
    simulation = start(n_trials=3, rates=RATES[:3])
    lane = simulation.lanes["0"]
    losses = {0: 1.0, 1: 2.0, 2: 3.0}
    news = [Report(number, 1, metrics(RUNGS[0], loss)) for number, loss in reversed(losses.items())]
    simulation.say(lane, news)
    events = [type(event).__name__ for event in read_events(simulation.run.events_file)]
    assert events[-6:] == ["Reported", "Reported", "Reported", "Promoted", "Paused", "Paused"]
    assert list(lane.trials) == [0]


def test_a_batch_that_comes_twice_counts_once(start: Start) -> None:
    simulation = start()
    lane = simulation.lanes["0"]
    for _ in range(RUNGS[0]):
        simulation.step(lane)
    n_events = len(list(read_events(simulation.run.events_file)))
    assert lane.last is not None
    assert simulation.controller.handle(lane.last) == {}
    assert len(list(read_events(simulation.run.events_file))) == n_events


def test_a_report_of_an_ended_segment_is_dropped(start: Start) -> None:
    simulation = start(n_lanes=2, slots=1)
    old = simulation.lanes["0"]
    (training,) = old.trials.values()
    simulation.restart(old)
    number, segment = training.start.number, training.start.segment
    assert old.trials[number].start.segment == segment + 1
    simulation.say(simulation.lanes["1"], [Report(number, segment, metrics(RUNGS[0], 0.1))])  # a lane that was cut off
    assert simulation.controller.state.history == []


def test_starting_points_and_a_grid_outlive_a_kill(make_config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    space = {"r": {"choice": [1, 2, 4, 8]}, "lora_alpha": 8, "lora_dropout": 0.0, "learning_rate": 1e-3}
    config = make_config(space=space, search={"sampler": "grid", "n_trials": 9, "scheduler": "none"})
    simulation = Simulation(config, tmp_path / "run", slots=1, rungs=[27])
    for _ in range(3):  # killed with one point proposed after the other
        simulation.kill()
        simulation.begin()
        for _ in range(27):
            simulation.step(simulation.lanes["0"])
    simulation.finish()
    # each point once, in order, and no random ones though nine trials were asked for
    assert [row.r for row in simulation.controller.state.trials.values()] == [1, 2, 4, 8]


def test_a_trial_given_back_paused_and_promoted_is_on_one_lane_only(start: Start) -> None:
    simulation = start(n_lanes=2, slots=3, scheduler="halving", finalists=1)
    lane = simulation.lanes["0"]
    simulation.step(lane)
    simulation.give_back(lane, list(lane.trials)[1:], slots=1)
    simulation.finish()  # `obey` asserts that no trial is on two lanes
    simulation.check()


def test_a_pack_that_shrank_takes_no_more_than_it_can(start: Start) -> None:
    simulation = start(slots=3)
    lane = simulation.lanes["0"]
    simulation.give_back(lane, [2], slots=2)
    assert list(lane.trials) == [0, 1]
    simulation.finish()
    assert simulation.states.count("failed") == 0


def test_failing_beside_others_that_train_well_does_not_end_the_search(start: Start) -> None:
    simulation = start(slots=8)
    lane = simulation.lanes["0"]
    for number in (0, 1, 2):
        simulation.fail(lane, number)
    assert not simulation.controller.over
    simulation.finish()
    assert simulation.controller.error is None
    assert len(simulation.controller.state.finished()) >= 1
    assert simulation.controller.state.n_proposed() == len(RATES)


def test_the_search_gives_up_when_the_first_trials_all_fail(start: Start) -> None:
    simulation = start(slots=2)
    lane = simulation.lanes["0"]
    while not simulation.controller.over:
        simulation.fail(lane, min(lane.trials))
    assert simulation.controller.gave_up()
    assert simulation.states == ["failed"] * 4  # three, and the one beside the third


@pytest.mark.parametrize("n_failing", [1, 2])
def test_a_finalist_that_fails_is_replaced(start: Start, n_failing: int) -> None:
    simulation = start(scheduler="halving", finalists=2, slots=9)
    lane = simulation.lanes["0"]
    failed = 0
    while not simulation.controller.over:
        late = [number for number, training in lane.trials.items() if training.step > RUNGS[-2]]
        if late and failed < n_failing:
            simulation.fail(lane, late[0])
            failed += 1
        simulation.step(lane)
    assert len(simulation.controller.state.finished()) == (2 if n_failing == 1 else 1)  # three came to the last rung
    simulation.check()


def test_faults_of_the_machine_blame_no_trial_and_end_the_search_if_they_go_on(start: Start) -> None:
    simulation = start(slots=1)
    lane = simulation.lanes["0"]
    simulation.give_back(lane, [0], machine_fault=True)
    assert list(lane.trials) == [0]  # tried again
    for _ in range(RUNGS[0]):
        simulation.step(lane)
    for _ in range(3):
        assert simulation.controller.error is None
        simulation.give_back(lane, list(lane.trials), machine_fault=True)
    assert simulation.controller.error == "made up; mend it and go on with --resume"
    assert simulation.states.count("failed") == 0
    simulation.kill()
    simulation.begin()
    assert simulation.finish().controller.error is None


def test_victims_of_a_dead_process_train_alone_until_the_culprit_is_known(start: Start) -> None:
    simulation = start(slots=3)
    lane = simulation.lanes["0"]
    simulation.restart(lane)
    assert list(lane.trials) == [0]
    for _ in range(RUNGS[0]):
        simulation.step(lane)  # 0 has shown that it was not the culprit
    assert list(lane.trials) == [1]
    for _ in range(2):
        assert list(lane.trials) == [1]
        simulation.restart(lane)
    state = simulation.controller.state
    assert (state.trials[1].state, state.trials[1].reason) == (
        "failed",
        "the process of its lane died 3 times while training it",
    )
    assert list(lane.trials) == [2]
    for _ in range(RUNGS[0]):
        simulation.step(lane)
    assert len(lane.trials) == 3
    simulation.finish()
    simulation.check()


def test_a_cleared_trial_makes_room_for_the_next_suspect(start: Start) -> None:
    simulation = start(slots=3, rates=[9e-3, 1e-4, 2e-4])
    lane = simulation.lanes["0"]
    for _ in range(RUNGS[0] - 1):
        simulation.step(lane)
    simulation.restart(lane)
    for _ in range(3 * RUNGS[0]):
        simulation.step(lane)
    assert simulation.controller.state.lanes["0"].suspects == set()
    simulation.finish()
    simulation.check()


def test_a_process_that_comes_back_on_another_node_blames_nobody(start: Start) -> None:
    simulation = start(slots=3)
    lane = simulation.lanes["0"]
    for index in range(5):
        simulation.restart(lane, node=f"node {index}")
        assert len(lane.trials) == 3
    assert simulation.controller.state.deaths == {}


def test_trials_of_a_lost_node_go_on_elsewhere_before_their_lane_is_back(start: Start) -> None:
    simulation = start(n_lanes=2, slots=4)
    gone, other = simulation.lanes["0"], simulation.lanes["1"]
    numbers = set(gone.trials)
    simulation.end(gone, node_lost=True)
    for _ in range(RUNGS[0]):
        simulation.step(other)
    assert set(other.trials) & numbers
    assert simulation.controller.state.deaths == {}
    simulation.restart(gone)
    assert gone.trials
    simulation.finish()
    simulation.check()


def test_suspects_of_a_lane_that_finds_no_room_are_trained_by_an_idle_one(start: Start) -> None:
    simulation = start(n_lanes=2, slots=2)
    gone = simulation.lanes["0"]
    suspects = set(gone.trials)
    simulation.end(gone, node_lost=False)
    assert simulation.controller.state.lanes["0"].suspects == suspects
    assert not set(simulation.lanes["1"].trials) & suspects
    simulation.finish()
    assert simulation.controller.done
    simulation.check()


def test_a_lost_lanes_trials_go_to_another(start: Start) -> None:
    simulation = start(n_lanes=2, slots=2)
    lost = simulation.lanes["0"]
    numbers = set(lost.trials)
    simulation.lose(lost)
    assert not simulation.controller.over
    simulation.finish()
    assert simulation.controller.done
    later = [event for event in read_events(simulation.run.events_file) if isinstance(event, Started)]
    assert {event.number for event in later if event.segment == 2 and event.lane == "1"} >= numbers


def test_the_last_lost_lane_ends_the_search_and_blames_no_trial(start: Start) -> None:
    simulation = start(n_lanes=2)
    for lane in list(simulation.lanes.values()):
        simulation.lose(lane)
    assert simulation.controller.error == "no lane is left: node died; mend it and go on with --resume"
    assert set(simulation.states) <= {"queued", "running"}


def test_the_best_assignments_are_repeated_with_other_seeds(start: Start) -> None:
    simulation = start(rates=RATES[:4], repeat_best=2, repeats=2).finish()
    trials = simulation.controller.state.trials.values()
    repeats = [row for row in trials if row.repeat_of is not None]
    best = sorted(range(4), key=lambda number: -RATES[number])[:2]
    assert sorted(row.repeat_of or 0 for row in repeats) == sorted(best * 2)
    assert all(row.state == "finished" and row.seed in (1, 2) for row in repeats)
    # a repetition trains to the end without a stop
    assert [row.step for row in simulation.controller.state.history if row.number == repeats[0].number] == [27]


def test_after_the_time_budget_nothing_new_is_proposed(
    make_search: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    simulation = Simulation(make_search(time_budget_minutes=1.0), tmp_path / "run")
    simulation.controller._clock = lambda: 61.0
    simulation.finish()
    assert simulation.controller.state.n_proposed() == 3
    assert len(simulation.controller.state.finished()) >= 1


def test_every_lane_gets_work_before_one_is_full(start: Start) -> None:
    simulation = start(rates=RATES[:2], n_lanes=2, slots=3)
    simulation.restart(simulation.lanes["1"])
    assert [len(lane.trials) for lane in simulation.lanes.values()] == [2, 0]  # the first was up first
    simulation.kill()
    simulation.begin()
    later = [event.lane for event in read_events(simulation.run.events_file) if isinstance(event, Started)]
    assert set(later) == {"0"}


def test_a_lane_that_comes_up_later_takes_part(start: Start) -> None:
    simulation = start(n_lanes=1, slots=2)
    simulation.controller._n_lanes = 2
    new = type(simulation.lanes["0"])("1")
    simulation.lanes["1"] = new
    simulation.say(new, [Ready(2, {})])
    assert len(new.trials) == 2


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *["step"] * 4,
                "restart",
                "move",
                "die",
                "node lost",
                "lose",
                "fail",
                "give back",
                "fault",
                "again",
                "kill",
            ]
        ),
        st.integers(0, 5),
    ),
    max_size=60,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS, scheduler=st.sampled_from(["asha", "halving"]), n_lanes=st.integers(1, 3))
def test_whatever_happens_no_trial_is_lost_doubled_or_trained_for_ever(
    actions: list[tuple[str, int]],
    scheduler: str,
    n_lanes: int,
    make_search: Callable[..., SearchConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    config = make_search(RATES[:6], scheduler=scheduler, max_initial_failures=99)
    simulation = Simulation(config, tmp_path_factory.mktemp("run"), n_lanes=n_lanes, slots=2)
    for what, which in actions:
        if simulation.controller.over or what == "kill":
            simulation.kill()
            simulation.begin()
            continue
        lane = list(simulation.lanes.values())[which % len(simulation.lanes)]
        numbers = sorted(lane.trials)
        if what == "step":
            simulation.step(lane)
        elif what == "restart":
            simulation.restart(lane)
        elif what == "move":
            simulation.restart(lane, node=f"node {which}")
        elif what in ("die", "cut"):
            simulation.end(lane, node_lost=what == "cut")
        elif what == "lose":
            simulation.lose(lane)
        elif what == "again" and lane.last is not None:
            assert simulation.controller.handle(lane.last) == {}
        elif numbers and what == "fail":
            simulation.fail(lane, numbers[which % len(numbers)])
        elif numbers and what in ("return", "fault"):
            simulation.give_back(lane, numbers[which % len(numbers) :], machine_fault=what == "fault")
        simulation.check()
    if simulation.controller.over:
        simulation.kill()
        simulation.begin()
    simulation.restart(next(iter(simulation.lanes.values())))  # one lane that is up is enough
    simulation.finish()
    simulation.check()
    assert simulation.controller.error is None
    # the log alone gives the same state
    assert SearchState.load(RunDirectory(simulation.run.path)).trials == simulation.controller.state.trials
    ended = [event for event in read_events(simulation.run.events_file) if isinstance(event, Finished)]
    assert len(ended) == len({event.number for event in ended})


def test_idle_lanes_do_not_each_ask_what_is_next(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = start(rates=RATES[:3], n_lanes=20)
    asked, ask = [], simulation.controller._next

    def counted(queued: set[int]) -> int | None:
        asked.append(queued)
        return ask(queued)

    monkeypatch.setattr(simulation.controller, "_next", counted)
    lane = next(lane for lane in simulation.lanes.values() if lane.trials)
    while not asked:
        simulation.step(lane)
    assert len(asked) == 1  # nothing is next, though 17 lanes have free slots
