"""How a lane serves its pack, without Ray: joins, decisions, failures, and packs too large for the memory."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from raylora.config.schema import SearchConfig
from raylora.run.directory import RunDirectory
from raylora.run.metrics import RungMetrics
from raylora.search.ray.broker import Job, Order
from raylora.search.ray.lane import serve_pack
from raylora.training.packed.engine import PackedEngine
from raylora.training.trl import TrlEngine
from tests.training.packed.test_engine import packed
from tests.training.test_trl import assignment, load_engine

RUNGS = [1, 3]


@pytest.fixture
def trl(make_config: Callable[..., SearchConfig], tmp_path: Path) -> TrlEngine:
    return load_engine(make_config(), tmp_path)


@pytest.fixture
def engine(trl: TrlEngine) -> Iterator[PackedEngine]:
    engine = packed(trl, tokens_per_pass=1)
    yield engine
    engine.close()


def start(number: int, resume_from: str | None = None, **changes: object) -> Order:
    values = assignment(**{"seed": number, **changes}).model_dump()
    return Order("start", number, Job(number, values, RUNGS, resume_from))


class Script:
    """A link that gives the orders of a script, one list a call, and notes what the lane says."""

    def __init__(self, *orders: list[Order]) -> None:
        self._orders = list(orders)
        self.reports: list[tuple[int, int]] = []
        self.failures: dict[int, str] = {}
        self.given_back: dict[int, str | None] = {}

    def orders(self, *, wait: bool) -> list[Order] | None:
        return self._orders.pop(0) if self._orders else None

    def report(self, number: int, report: RungMetrics, *, final: bool) -> None:
        assert final == (report.step == RUNGS[-1])
        self.reports.append((number, report.step))

    def fail(self, number: int, error: Exception, directory: Path) -> None:
        self.failures[number] = str(error)

    def give_back(self, checkpoints: dict[int, str | None]) -> None:
        self.given_back.update(checkpoints)


def serve(engine: PackedEngine, tmp_path: Path, *orders: list[Order]) -> Script:
    link = Script(*orders)
    serve_pack(engine, link, RunDirectory(tmp_path / "run"))  # type: ignore[arg-type]
    return link


def test_trials_join_wait_at_rungs_go_on_and_leave(engine: PackedEngine, tmp_path: Path) -> None:
    link = serve(
        engine,
        tmp_path,
        [start(0), start(1)],  # both report at step 1 and wait
        [Order("leave", 0), start(2)],  # the place of 0 is taken at once: 2 reports at step 1
        [Order("go_on", 1), Order("go_on", 2)],
        [],
    )
    assert link.reports == [(0, 1), (1, 1), (2, 1), (1, 3), (2, 3)]
    assert not engine.trials


def test_a_trial_that_cannot_start_fails_alone(engine: PackedEngine, tmp_path: Path) -> None:
    link = serve(engine, tmp_path, [start(0, target_modules="nowhere"), start(1)])
    assert "no module is named nowhere" in link.failures[0]
    assert link.reports == [(1, 1)]


def test_a_diverged_trial_fails_alone(engine: PackedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validate = engine._validate
    monkeypatch.setattr(engine, "_validate", lambda numbers: {**validate(numbers), 0: float("inf")})
    link = serve(engine, tmp_path, [start(0), start(1)])
    assert link.failures == {0: "diverged: eval_loss is inf at step 1"}
    assert link.reports == [(1, 1)]
    assert list(engine.trials) == [1]


def limited(engine: PackedEngine, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for more than n trials."""
    backward = engine.pack.backward

    def checked(batches: list) -> torch.Tensor:
        if len(engine.trials) > n:
            raise torch.OutOfMemoryError("made up")
        return backward(batches)

    monkeypatch.setattr(engine.pack, "backward", checked)


def test_a_pack_too_large_gives_its_younger_half_back(
    engine: PackedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(engine, 1, monkeypatch)
    link = serve(engine, tmp_path, [start(number) for number in range(4)], [], [])
    assert link.given_back == {2: None, 3: None, 1: None}
    assert link.reports == [(0, 1)]
    assert link.failures == {}


def test_a_trial_that_does_not_fit_alone_fails(
    engine: PackedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(engine, 0, monkeypatch)
    link = serve(engine, tmp_path, [start(0)])
    assert link.failures == {0: "made up"}
    assert not engine.trials


def test_a_newcomer_for_which_there_is_no_memory_waits(
    engine: PackedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = engine.add

    def checked(number: int, *arguments: object, **options: object) -> None:
        if number == 1:
            raise torch.OutOfMemoryError("made up")
        add(number, *arguments, **options)

    monkeypatch.setattr(engine, "add", checked)
    link = serve(engine, tmp_path, [start(0), start(1, resume_from="checkpoint-1")])
    assert link.given_back == {1: "checkpoint-1"}
    assert link.failures == {}
    alone = serve(engine, tmp_path, [Order("leave", 0), start(1)])
    assert alone.failures == {1: "made up"}
