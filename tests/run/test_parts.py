"""The event log in object storage: nothing is acted on before it is there, and a second writer is kept out."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from raylora.config.schema import SearchConfig
from raylora.errors import RunDirectoryError
from raylora.run import parts
from raylora.run.events import Event, EventLog, Finished, Paused, Started, read_events
from raylora.run.parts import pull_events, read_parts
from raylora.run.storage import Storage
from raylora.search.messages import Order, Start
from tests.helpers import LANE, SESSION
from tests.search.simulation import Simulation


@pytest.fixture
def url(tmp_path: Path) -> str:
    """URL of a run in fsspec's memory, which knows exclusive creation as S3 does."""
    return f"memory:/{tmp_path}"


def events_of(storage: Storage, folder: Path) -> list[Event]:
    pull_events(storage, folder / "read.jsonl")
    return list(read_events(folder / "read.jsonl"))


def test_each_flush_is_one_object(url: str, tmp_path: Path) -> None:
    storage = Storage(url)
    log = EventLog(tmp_path / "events.jsonl", parts=pull_events(storage, tmp_path / "events.jsonl"))
    for several in ([SESSION, LANE], [Paused(0)]):
        for event in several:
            log.append(event)
        log.flush()
    log.flush()  # nothing new
    assert sorted(storage.list()) == ["events/00000000.jsonl", "events/00000001.jsonl"]
    assert events_of(storage, tmp_path) == list(read_events(tmp_path / "events.jsonl"))
    assert len(events_of(storage, tmp_path)) == 3


def test_a_second_writer_is_told_who_the_first_is_and_writes_nothing(url: str, tmp_path: Path) -> None:
    storage = Storage(url)
    one, two = (
        EventLog(tmp_path / name / "log.jsonl", parts=pull_events(storage, tmp_path / name / "log.jsonl"))
        for name in ("one", "two")
    )
    one.append(SESSION)
    one.flush()
    two.append(Paused(7))
    with pytest.raises(RunDirectoryError, match="is written by process 1 on host too, which came first"):
        two.flush()
    assert list(read_events(tmp_path / "two" / "log.jsonl")) == []
    assert [type(event).__name__ for event in events_of(storage, tmp_path)] == ["SessionStarted"]


def test_a_folded_log_reads_the_same_in_fewer_requests(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "FOLD_EVERY", 3)
    storage = Storage(url)
    log = EventLog(tmp_path / "events.jsonl", parts=pull_events(storage, tmp_path / "events.jsonl"))
    for number in range(8):
        log.append(Paused(number))
        log.flush()
    names: list[str] = []
    monkeypatch.setattr(Storage, "read", lambda self, name, read=Storage.read: names.append(name) or read(self, name))
    content, n_parts = read_parts(storage)
    assert (content, n_parts) == ((tmp_path / "events.jsonl").read_bytes(), 8)
    assert sorted(names) == ["events/00000006.jsonl", "events/00000007.jsonl", "events/folded-00000006.jsonl"]


def test_a_log_with_a_hole_is_refused(url: str, tmp_path: Path) -> None:
    storage = Storage(url)
    for number in (0, 2):
        storage.write(f"events/{number:08d}.jsonl", b"")
    with pytest.raises(RunDirectoryError, match=r"lacks events/00000001\.jsonl, so its event log cannot be read"):
        pull_events(storage, tmp_path / "events.jsonl")


@dataclass(frozen=True)
class FailingStorage(Storage):
    """Storage that goes down at one flush, before or after it has written the object."""

    fails_at: int = -1
    has_written: bool = False
    flushes: list[str] = field(default_factory=list)

    def create(self, name: str, content: bytes) -> bool:
        self.flushes.append(name)
        if len(self.flushes) - 1 != self.fails_at:
            return super().create(name, content)
        if self.has_written:
            super().create(name, content)
        raise RunDirectoryError("storage is down")


class Checked(Simulation):
    """Simulation that acts on nothing that storage does not have."""

    def obey(self, orders: dict[str, list[Order]]) -> None:
        assert self.storage is not None
        events = events_of(Storage(self.storage.url), self.run.path)
        started = {(event.number, event.segment) for event in events if isinstance(event, Started)}
        for order in (order for several in orders.values() for order in several):
            assert not isinstance(order, Start) or (order.number, order.segment) in started
        there = [event for event in events if event.time]
        assert there == list(read_events(self.run.events_file))
        super().obey(orders)


@pytest.mark.parametrize("has_written", [False, True])
def test_a_search_cut_off_at_every_flush_goes_on_from_storage_alone(
    has_written: bool, make_config: Callable[..., SearchConfig], tmp_path: Path, url: str
) -> None:
    config = make_config(search={"n_trials": 4, "scheduler": "asha"})
    whole = FailingStorage(f"{url}/whole")
    reference = Checked(config, tmp_path / "whole", storage=whole).finish().states
    assert len(whole.flushes) > 5 and "finished" in reference
    for fails_at in range(len(whole.flushes)):
        place = f"{url}/{fails_at}"
        with pytest.raises(RunDirectoryError, match="storage is down"):
            Checked(
                config,
                tmp_path / f"one-{fails_at}",
                storage=FailingStorage(place, fails_at=fails_at, has_written=has_written),
            ).finish()
        # another machine, which has nothing but the storage
        finished = [event for event in events_of(Storage(place), tmp_path) if isinstance(event, Finished)]
        resumed = Checked(config, tmp_path / f"two-{fails_at}", storage=Storage(place)).finish()
        resumed.check()
        assert sorted(resumed.states) == sorted(reference)
        events = events_of(Storage(place), tmp_path)
        assert [event for event in events if isinstance(event, Finished)][: len(finished)] == finished
        ended = [event.number for event in events if isinstance(event, Finished)]
        assert len(ended) == len(set(ended))  # no trial is trained to its end twice
