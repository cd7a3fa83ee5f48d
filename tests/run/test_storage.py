"""Objects on a real S3 server, and one sentence for whatever goes wrong there."""

import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from raylora.errors import RunDirectoryError
from raylora.run.events import EventLog, Paused, read_events
from raylora.run.parts import pull_events
from raylora.run.storage import Storage
from tests.helpers import SESSION
from tests.s3_server import environment, free_port, s3_server


def test_an_object_is_created_once_and_the_same_bytes_count_as_ours(bucket: str) -> None:
    storage = Storage(f"{bucket}/run")
    assert storage.create("events/00000000.jsonl", b"one")
    assert storage.create("events/00000000.jsonl", b"one")  # a try whose answer was lost
    assert not storage.create("events/00000000.jsonl", b"two")
    assert storage.read("events/00000000.jsonl") == b"one"


def test_objects_are_listed_moved_and_removed(bucket: str, tmp_path: Path) -> None:
    storage = Storage(f"{bucket}/run")
    assert storage.list() == {}
    (tmp_path / "file").write_bytes(b"abc")
    storage.upload_all({"a": tmp_path / "file", "folder/b": tmp_path / "file"})
    Storage(f"{bucket}/run2").write("c", b"")  # a neighbour whose name begins alike
    assert storage.list().keys() == {"a", "folder/b"}
    assert storage.list(below=False).keys() == {"a"}
    assert storage.list("folder")["folder/b"].size == 3
    assert abs(storage.list()["a"].modified - time.time()) < 60
    storage.download("folder/b", tmp_path / "new" / "b")
    assert (tmp_path / "new" / "b").read_bytes() == b"abc"
    storage.remove(["a", "folder/b", "none"])
    assert storage.list() == {}
    with pytest.raises(FileNotFoundError):
        storage.read("a")


def test_a_folder_that_comes_to_be_while_it_is_listed_is_no_object(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(f"{bucket}/run")
    fs = fsspec.core.url_to_fs(bucket)[0]
    lists, seen = type(fs)._lsdir, []

    async def written_after_the_first(self: object, path: str, **kwargs: object) -> object:
        found = await lists(self, path, **kwargs)
        if not seen:
            seen.append(path)
            await self._pipe_file(f"{path}/00000000.jsonl", b"first")  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(type(fs), "_lsdir", written_after_the_first)
    assert storage.list("events") == {}
    assert seen and storage.list("events").keys() == {"events/00000000.jsonl"}


def test_a_missing_bucket_is_named(bucket: str, tmp_path: Path) -> None:
    storage = Storage("s3://nowhere/run", patience=60.0)
    (tmp_path / "file").touch()
    for action in (
        lambda: storage.list(),
        lambda: storage.write("a", b""),
        lambda: storage.create("a", b""),
        lambda: storage.upload(tmp_path / "file", "a"),
    ):
        with pytest.raises(RunDirectoryError, match="s3://nowhere/run: its bucket does not exist; make it first"):
            action()


def test_missing_credentials_are_named(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(RunDirectoryError, match=r"no credentials for it \(Unable to locate credentials\); set those"):
        Storage(f"{bucket}/run", patience=60.0).list()


def test_refused_access_is_told_at_once(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(tmp_path / "server.log") as port:
        for name, value in environment(port).items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        fsspec.filesystem("s3").mkdir("bucket")
        storage = Storage("s3://bucket/run", patience=60.0)
        # from the next request on, the server asks for a user that it knows
        url = f"http://127.0.0.1:{port}/moto-api/reset-auth"
        urllib.request.urlopen(urllib.request.Request(url, b"0", {"Content-Type": "text/plain"})).close()
        began = time.monotonic()
        for action in (storage.list, lambda: storage.write("a", b""), lambda: storage.create("a", b"")):
            with pytest.raises(RunDirectoryError, match=r"access is refused \(The AWS Access Key Id .* must allow to"):
                action()
        assert time.monotonic() - began < 30  # no patience for what no time mends


def test_a_scheme_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(RunDirectoryError, match=r"gs://bucket/run needs a package: pip install 'raylora\[gcs\]'"):
        Storage("gs://bucket/run").list()


def test_an_unknown_scheme_names_the_known_ones() -> None:
    with pytest.raises(RunDirectoryError, match=r"a run directory is a folder or a URL of s3, .*, found ftp://"):
        Storage("ftp://host/run").list()


@pytest.fixture
def server(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadedMotoServer]:
    """S3 server in this process, which keeps its objects while it is stopped."""
    port = free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    fsspec.filesystem("s3").clear_instance_cache()
    fsspec.filesystem("s3").mkdir(bucket)
    yield server
    server.stop()


def test_an_outage_is_waited_out_and_no_event_is_lost_or_doubled(
    server: ThreadedMotoServer, bucket: str, tmp_path: Path
) -> None:
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        server.start()

    storage = Storage(f"{bucket}/run").patient(120.0, note)
    log = EventLog(tmp_path / "events.jsonl", parts=pull_events(storage, tmp_path / "events.jsonl"))
    log.append(SESSION)
    log.flush()
    server.stop()
    log.append(Paused(0))
    log.flush()  # the server is back as soon as the user has been told that it is away
    assert len(notes) == 1
    assert "cannot be reached" in notes[0] and "trying again for 120 s" in notes[0]
    pull_events(storage, tmp_path / "there.jsonl")
    there = [type(event).__name__ for event in read_events(tmp_path / "there.jsonl")]
    assert there == ["SessionStarted", "Paused"]


def test_a_long_outage_ends_with_the_reason(server: ThreadedMotoServer, bucket: str, tmp_path: Path) -> None:
    storage = Storage(f"{bucket}/run", patience=1.0)
    log = EventLog(tmp_path / "events.jsonl", parts=pull_events(storage, tmp_path / "events.jsonl"))
    server.stop()
    log.append(SESSION)
    with pytest.raises(RunDirectoryError, match=r"/run cannot be reached \(.*check network, endpoint"):
        log.flush()
    assert list(read_events(tmp_path / "events.jsonl")) == []  # a tracker beside it has not seen the event either
    server.start()
    assert Storage(f"{bucket}/run").list() == {}
