"""A lane obeys its orders, without Ray: joins, answers, failures, and packs too large for the memory."""

import errno
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from raylora.config.schema import SearchConfig
from raylora.errors import RunDirectoryError
from raylora.run.activity import heard
from raylora.run.directory import RunDirectory, run_at
from raylora.search.messages import Failure, Leave, News, Order, Pulse, Ready, Report, Return, Start
from raylora.search.serve import Heart, serve_one, serve_pack
from raylora.training.packed.engine import PackedEngine
from raylora.training.packed.trial import PackedTrial
from raylora.training.trl import TrlEngine
from tests.fake_engine import FakeEngine
from tests.helpers import assignment
from tests.training.packed.test_engine import packed
from tests.training.test_trl import load_engine

RUNGS = [1, 3]
READY = Ready(1, {})


@pytest.fixture
def trl(make_config: Callable[..., SearchConfig], tmp_path: Path) -> TrlEngine:
    return load_engine(make_config(), tmp_path)


@pytest.fixture
def engine(trl: TrlEngine) -> Iterator[PackedEngine]:
    engine = packed(trl, tokens_per_pass=1)
    yield engine
    engine.close()


def start(number: int, resume_from: str | None = None, segment: int = 1, **changes: object) -> Start:
    values = assignment(**{"seed": number, **changes}).model_dump()
    return Start(number, segment, values, RUNGS, resume_from)


class Script:
    """A link that answers with the orders of a script, one list each time, and notes what the lane says."""

    def __init__(self, *orders: list[Order]) -> None:
        self._orders = list(orders)
        self.news: list[News] = []
        self.waited = 0
        self.pulses: list[Pulse] = []

    def exchange(self, news: list[News]) -> list[Order] | None:
        self.news += news
        return self._orders.pop(0) if self._orders else None

    def poll(self, *, wait: bool) -> list[Order] | None:
        self.waited += wait
        return None if wait else []

    def beat(self, pulse: Pulse) -> None:
        self.pulses.append(pulse)

    @property
    def reports(self) -> list[tuple[int, int]]:
        return [(news.number, news.metrics.step) for news in self.news if isinstance(news, Report)]

    @property
    def failures(self) -> dict[int, str]:
        return {news.number: news.reason for news in self.news if isinstance(news, Failure)}

    @property
    def returns(self) -> list[Return]:
        return [news for news in self.news if isinstance(news, Return)]


def serve(engine: PackedEngine, tmp_path: Path, *orders: list[Order]) -> Script:
    link = Script(*orders)
    serve_pack(engine, link, RunDirectory(tmp_path / "run"), READY)  # type: ignore[arg-type]
    return link


def test_trials_join_report_go_on_and_leave(engine: PackedEngine, tmp_path: Path) -> None:
    link = serve(
        engine,
        tmp_path,
        [start(0), start(1)],  # both report at step 1
        [Leave(0), start(2)],  # the slot of 0 is taken at once: 2 reports at step 1, while 1 trains on
        [],
        [Leave(1)],
    )
    assert link.news[0] == READY
    assert link.reports == [(0, 1), (1, 1), (2, 1), (1, 3), (2, 3)]
    assert list(engine.trials) == [2]


def test_checkpoints_are_named_relative_to_the_run_directory(engine: PackedEngine, tmp_path: Path) -> None:
    link = serve(engine, tmp_path, [start(0)], [Leave(0)])
    (report,) = (news for news in link.news if isinstance(news, Report))
    assert report.metrics.checkpoint == "trials/0000/checkpoint-1"
    again = serve(engine, tmp_path, [start(0, resume_from=report.metrics.checkpoint, segment=2)])
    assert again.reports == [(0, 3)]
    assert [news.segment for news in again.news if isinstance(news, Report)] == [2]


def test_a_trial_that_cannot_start_fails_alone(engine: PackedEngine, tmp_path: Path) -> None:
    link = serve(engine, tmp_path, [start(0, target_modules="nowhere"), start(1)], [])
    assert "no module is named nowhere" in link.failures[0]
    assert "no module is named nowhere" in (tmp_path / "run" / "trials" / "0000" / "error.txt").read_text()
    assert link.reports == [(1, 1), (1, 3)]


def test_a_diverged_trial_fails_alone(engine: PackedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validate = engine._validate
    monkeypatch.setattr(engine, "_validate", lambda numbers: {**validate(numbers), 0: float("inf")})
    link = serve(engine, tmp_path, [start(0), start(1)])
    assert link.failures == {0: "TrialError: diverged: eval_loss is inf at step 1"}
    assert link.reports == [(1, 1)]
    assert list(engine.trials) == [1]


def limited(engine: PackedEngine, n: int, monkeypatch: pytest.MonkeyPatch, method: str = "backward") -> None:
    """No memory for more than n trials."""
    original = getattr(engine.pack, method)

    def checked(batches: list) -> torch.Tensor:
        if len(engine.trials) > n:
            raise torch.OutOfMemoryError("made up")
        return original(batches)

    monkeypatch.setattr(engine.pack, method, checked)


def test_a_pack_too_large_gives_its_younger_half_back(
    engine: PackedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(engine, 1, monkeypatch)
    link = serve(engine, tmp_path, [start(number) for number in range(4)], [], [])
    assert [(news.checkpoints, news.slots) for news in link.returns] == [({2: None, 3: None}, 2), ({1: None}, 1)]
    assert link.reports == [(0, 1)]
    assert link.failures == {}


def test_out_of_memory_in_validation_loses_no_report(
    engine: PackedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # all four have reached the rung when memory runs short: the older half reports, and the younger half reports first
    # of all when it comes back, without training past its rung
    limited(engine, 2, monkeypatch, method="nll")
    link = serve(engine, tmp_path, [start(number) for number in range(4)], [])
    (shrunk,) = link.returns
    assert shrunk.checkpoints == {2: "trials/0002/checkpoint-1", 3: "trials/0003/checkpoint-1"}
    assert link.reports == [(0, 1), (1, 1)]
    again = serve(engine, tmp_path, [Leave(0), Leave(1), start(2, resume_from=shrunk.checkpoints[2], segment=2)])
    assert again.reports == [(2, 1)]
    assert engine.trials[2].step == 1


def test_validation_takes_fewer_rows_at_once_where_memory_is_short(
    engine: PackedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = serve(engine, tmp_path / "plenty", [start(0)])
    engine.remove(0)
    nll = engine.pack.nll

    def short(batches: list) -> torch.Tensor:
        if max(len(batch.input_ids) for batch in batches) > 2:
            raise torch.OutOfMemoryError("made up")
        return nll(batches)

    monkeypatch.setattr(engine.pack, "nll", short)
    link = serve(engine, tmp_path, [start(0)])
    assert link.returns == [] and link.reports == [(0, 1)]
    losses = [news.metrics.eval_loss for script in (expected, link) for news in script.news if isinstance(news, Report)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # float32, in passes of other shapes


def test_a_trial_that_does_not_fit_alone_fails(
    engine: PackedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(engine, 0, monkeypatch)
    link = serve(engine, tmp_path, [start(0)])
    assert link.failures == {0: "out of memory: made up"}
    assert not engine.trials


def test_a_trial_alone_goes_on_without_the_dense_base(
    engine: PackedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = engine.pack.backward

    def short(batches: list) -> torch.Tensor:
        if engine.pack.is_dense:
            raise torch.OutOfMemoryError("made up")
        return backward(batches)

    engine.pack._dense["a layer"] = torch.zeros(1)
    monkeypatch.setattr(engine.pack, "backward", short)
    link = serve(engine, tmp_path, [start(0)], [])
    assert link.failures == {} and link.returns == []
    assert link.reports == [(0, 1), (0, 3)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("made up"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")])
def test_activations_of_a_failed_pass_are_freed_before_anything_else_takes_memory(
    engine: PackedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    backward, save = engine.pack.backward, PackedTrial.save
    activations: list[weakref.ref] = []
    alive: list[bool] = []

    def short(batches: list) -> torch.Tensor:
        held = torch.zeros(4)
        activations.append(weakref.ref(held))
        if len(batches) > 1:
            raise error
        return backward(batches)

    def saved(trial: PackedTrial, *arguments: object, **options: object) -> Path:
        alive.extend(held() is not None for held in activations)
        return save(trial, *arguments, **options)

    engine.tokens_per_pass = 10_000
    link = serve(engine, tmp_path, [start(0)])  # one trial reaches its first rung
    assert link.reports == [(0, 1)]
    monkeypatch.setattr(engine.pack, "backward", short)
    monkeypatch.setattr(PackedTrial, "save", saved)
    assert len(serve(engine, tmp_path, [start(1), Leave(0), start(0, resume_from="trials/0000/checkpoint-1")]).returns)
    assert alive and not any(alive)


def test_an_error_of_a_step_names_the_trial_that_causes_it(
    engine: PackedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = engine.pack.backward

    def broken(batches: list) -> torch.Tensor:
        if any(batch.adapter.seed == 1 for batch in batches):
            raise IndexError("token 999 of 300")
        return backward(batches)

    monkeypatch.setattr(engine.pack, "backward", broken)
    engine.tokens_per_pass = 10_000  # all trials in one pass
    link = serve(engine, tmp_path, [start(number) for number in range(3)], [])
    assert link.failures == {1: "IndexError: token 999 of 300"}
    assert link.reports == [(0, 1), (2, 1)]
    assert "in broken" in (tmp_path / "run" / "trials" / "0001" / "error.txt").read_text()


def test_an_error_that_no_trial_causes_alone_makes_the_pack_smaller(
    engine: PackedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = engine.pack.backward

    def broken(batches: list) -> torch.Tensor:
        if len(batches) > 1:
            raise RuntimeError("too many")
        return backward(batches)

    monkeypatch.setattr(engine.pack, "backward", broken)
    engine.tokens_per_pass = 10_000
    link = serve(engine, tmp_path, [start(0), start(1)], [])
    assert [(news.checkpoints, news.reason) for news in link.returns] == [({1: None}, "RuntimeError: too many")]
    assert link.reports == [(0, 1)]


def test_a_newcomer_for_which_there_is_no_memory_waits(
    engine: PackedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = engine.add

    def checked(number: int, *arguments: object, **options: object) -> None:
        if number == 1:
            raise torch.OutOfMemoryError("made up")
        add(number, *arguments, **options)

    monkeypatch.setattr(engine, "add", checked)
    link = serve(engine, tmp_path, [start(0), start(1)])
    assert [(news.checkpoints, news.slots) for news in link.returns] == [({1: None}, 1)]
    assert link.failures == {}
    alone = serve(engine, tmp_path, [Leave(0), start(1)])
    assert alone.failures == {1: "out of memory: made up"}


def test_a_full_disk_is_the_machines_fault(
    engine: PackedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def full(self: object, patience: float) -> Path:
        waits.append(patience)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("raylora.training.packed.trial.PackedTrial.save", full)
    link = serve(engine, tmp_path, [start(0), start(1)])
    assert waits == [300.0, 0.0]  # both stand at the rung, and wait once together
    assert [(list(news.checkpoints), news.machine_fault, news.slots) for news in link.returns] == [
        ([0], True, None),
        ([1], True, None),
    ]
    assert link.returns[0].reason == "trial 0: OSError: [Errno 28] No space left on device"
    assert link.failures == {}


def test_a_checkpoint_waits_for_a_disk_that_is_full_for_a_while(
    engine: PackedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    left, write = [2], Path.write_bytes

    def filling(path: Path, content: bytes) -> int:
        if path.name == "trial_state.pt" and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", filling)
    with heard(lambda activity: said.append(activity.what)):
        link = serve(engine, tmp_path, [start(0)])
    assert left == [0]
    assert said == ["waiting up to 300 s: [Errno 28] No space left on device"]
    assert link.reports == [(0, 1)] and not link.returns and not link.failures


def test_a_missing_checkpoint_is_the_machines_fault(engine: PackedEngine, tmp_path: Path) -> None:
    link = serve(engine, tmp_path, [start(0, resume_from="trials/0000/checkpoint-1")])
    assert link.returns[0].machine_fault
    assert link.failures == {}


def test_one_trial_at_a_time_takes_the_next_with_the_answer(tmp_path: Path) -> None:
    link = Script([start(0)], [Leave(0), start(1)], [], [])
    serve_one(FakeEngine(tmp_path), link, RunDirectory(tmp_path / "run"), READY)  # type: ignore[arg-type]
    assert link.reports == [(0, 1), (1, 1), (1, 3)]


def test_one_trial_at_a_time_fails_and_the_next_is_taken(tmp_path: Path) -> None:
    link = Script([start(0, r=99)], [start(1)], [Leave(1)])
    serve_one(FakeEngine(tmp_path), link, RunDirectory(tmp_path / "run"), READY)  # type: ignore[arg-type]
    assert link.waited == 1  # for the trial after the last
    assert link.failures == {0: "ValueError: always fails"}
    assert link.reports == [(1, 1)]


def test_a_lane_beats_once_a_second_with_the_speed_since_its_last_beat() -> None:
    now, link = [0.0], Script()
    heart = Heart(link, clock=lambda: now[0])
    for second, step in ((0.4, 1), (1.2, 2), (1.6, 3), (2.2, 4)):
        now[0] = second
        heart.beat({0: step}, n_tokens=60)
    first, second = link.pulses
    # 120 tokens in 1.2 seconds, and 120 in 1
    assert first.steps == {0: 2} and first.tokens_per_second == pytest.approx(100)
    assert second.steps == {0: 4} and second.tokens_per_second == pytest.approx(120)
    assert first.memory_mib > 0


def test_a_lane_beats_before_it_validates() -> None:
    now, link = [0.0], Script()
    heart = Heart(link, clock=lambda: now[0])
    now[0] = 0.5
    heart.beat({0: 4}, n_tokens=60, at_rung=True)
    (pulse,) = link.pulses
    assert pulse.steps == {0: 4} and pulse.tokens_per_second == pytest.approx(120)


def test_a_pack_beats_between_training_and_validation(
    engine: PackedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Script([start(0)], [], [Leave(0)])
    n_pulses: list[int] = []
    validate = engine._validate

    def watched(numbers: list[int]) -> dict[int, float]:
        nonlocal n_pulses
        n_pulses += [len(told.pulses)] if numbers else []
        return validate(numbers)

    monkeypatch.setattr(engine, "_validate", watched)
    serve_pack(engine, told, RunDirectory(tmp_path / "run"), READY)  # type: ignore[arg-type]
    # rungs are steps 1 and 3
    assert [told.pulses[n - 1].steps for n in n_pulses] == [{0: 1}, {0: 3}]


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """Run in object storage: fsspec's memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one-node"))
    return run_at(f"memory:/{tmp_path}/run")


def test_a_checkpoint_is_in_storage_before_its_report_and_another_node_goes_on_from_it(
    engine: PackedEngine, remote: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert remote.storage is not None
    storage = remote.storage

    class Watching(Script):
        def exchange(self, news: list[News]) -> list[Order] | None:
            for report in (one for one in news if isinstance(one, Report)):
                assert f"{report.metrics.checkpoint}/adapter_model.safetensors" in storage.list("trials")
            return super().exchange(news)

    first = Watching([start(0)], [Leave(0)])
    serve_pack(engine, first, remote, READY)  # type: ignore[arg-type]
    assert first.reports == [(0, 1)]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another-node"))
    there = run_at(remote.remote or "")
    second = Watching([start(0, resume_from="trials/0000/checkpoint-1", segment=2)])
    serve_pack(engine, second, there, READY)  # type: ignore[arg-type]
    assert second.reports == [(0, 3)]
    assert (there.trial(0) / "checkpoint-1").is_dir()


def test_storage_that_takes_no_checkpoint_is_no_fault_of_the_trial(
    engine: PackedEngine, remote: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: RunDirectory, name: str) -> None:
        raise RunDirectoryError("storage is down")

    monkeypatch.setattr(RunDirectory, "push_checkpoint", refuse)
    packed_link, single_link = Script([start(0)]), Script([start(0)])
    serve_pack(engine, packed_link, remote, READY)  # type: ignore[arg-type]
    serve_one(FakeEngine(tmp_path), single_link, remote, READY)  # type: ignore[arg-type]
    for link in (packed_link, single_link):
        assert link.reports == [] and link.failures == {}
        (returned,) = link.returns
        assert returned.machine_fault and returned.checkpoints == {0: None}
        assert "storage is down" in returned.reason
