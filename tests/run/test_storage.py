"""Objects on real servers, and one sentence for whatever goes wrong there."""

import asyncio
import json
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from raylora.errors import RunDirectoryError
from raylora.run.events import EventLog, Paused, read_events
from raylora.run.parts import pull_events
from raylora.run.storage import Storage
from tests.helpers import SESSION
from tests.storage_servers import AZURE, AZURITE_KEY, GCS, S3, Gate, Provider, azure_environment, each_provider, server

__all__ = ["each_provider"]  # the fixture

AFTER_LISTING = {"s3": "_lsdir", "gs": "_do_list_objects", "abfs": "_details"}
"""Scheme -> method that the package calls before it looks again for what it has not found in a listing."""


def test_an_object_is_created_once_and_the_same_bytes_count_as_ours(bucket: str) -> None:
    storage = Storage(f"{bucket}/run")
    assert storage.create("events/00000000.jsonl", b"one")
    assert storage.create("events/00000000.jsonl", b"one")  # a try whose answer was lost
    assert not storage.create("events/00000000.jsonl", b"two")
    assert storage.read("events/00000000.jsonl") == b"one"


def test_of_many_who_create_one_object_at_once_one_wins(bucket: str) -> None:
    storage = Storage(f"{bucket}/run")
    for number in range(3):
        with ThreadPoolExecutor(8) as threads:
            won = list(threads.map(lambda i, n=number: storage.create(f"events/{n}", b"%d" % i), range(8)))
        assert won.count(True) == 1
        assert storage.read(f"events/{number}") == b"%d" % won.index(True)


def test_objects_are_listed_moved_and_removed(bucket: str, tmp_path: Path) -> None:
    storage = Storage(f"{bucket}/run")
    assert storage.list() == {}
    (tmp_path / "file").write_bytes(b"abc")
    storage.upload_all({"a": tmp_path / "file", "folder/b": tmp_path / "file"})
    Storage(f"{bucket}/run2").write("c", b"")  # a neighbour whose name begins alike
    assert storage.list().keys() == {"a", "folder/b"}
    assert storage.list(below=False).keys() == {"a"}
    storage.upload(tmp_path / "file", "folder/deeper/d")
    assert storage.list("folder", below=False).keys() == {"folder/b"}
    assert Storage(bucket).list("run/folder").keys() == {"run/folder/b", "run/folder/deeper/d"}
    assert storage.list("folder")["folder/b"].size == 3
    assert abs(storage.list()["a"].modified - time.time()) < 60
    storage.download("folder/b", tmp_path / "new" / "b")
    assert (tmp_path / "new" / "b").read_bytes() == b"abc"
    storage.remove(["a", "folder/b", "folder/deeper/d", "none"])
    assert storage.list() == {}
    with pytest.raises(FileNotFoundError):
        storage.read("a")


def test_an_object_of_many_parts_comes_back_as_it_was(bucket: str, tmp_path: Path) -> None:
    storage, content = Storage(f"{bucket}/run"), bytes(range(256)) * 40_000  # 10 MB: past the parts of s3fs and gcsfs
    (tmp_path / "file").write_bytes(content)
    storage.upload(tmp_path / "file", "a")
    storage.download("a", tmp_path / "back")
    assert storage.read("a") == (tmp_path / "back").read_bytes() == content
    assert storage.list()["a"].size == len(content)


def test_a_folder_that_a_console_made_is_no_object(bucket: str, provider: Provider) -> None:
    storage, fs = Storage(f"{bucket}/run"), fsspec.filesystem(provider.scheme)
    storage.write("folder/a", b"")
    for folder in ("run", "run/folder", "run/empty"):
        if provider is AZURE:
            client = fs.service_client.get_blob_client(bucket.partition("://")[2], folder)
            fsspec.asyn.sync(fs.loop, client.upload_blob, b"", metadata={"hdi_isfolder": "true"})
        else:
            fs.pipe_file(f"{bucket}/{folder}/", b"")
    assert storage.list().keys() == {"folder/a"}
    assert storage.list("folder").keys() == {"folder/a"}
    assert storage.list("empty") == storage.list(below=False) == {}


def test_a_folder_that_comes_to_be_while_it_is_listed_is_no_object(
    bucket: str, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(f"{bucket}/run")
    fs, method = fsspec.filesystem(provider.scheme), AFTER_LISTING[provider.scheme]
    listing, seen = getattr(type(fs), method), []

    async def written_after_the_first(self: object, *args: object, **kwargs: object) -> object:
        found = await listing(self, *args, **kwargs)
        if not seen:
            seen.append(method)
            await self._pipe_file(f"{bucket}/run/events/00000000.jsonl", b"first")  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(type(fs), method, written_after_the_first)
    assert storage.list("events").keys() <= {"events/00000000.jsonl"}
    assert seen and storage.list("events").keys() == {"events/00000000.jsonl"}


def test_a_missing_bucket_is_named(bucket: str, provider: Provider, tmp_path: Path) -> None:
    storage = Storage(f"{provider.scheme}://nowhere/run", patience=60.0)
    (tmp_path / "file").touch()
    for action in (
        lambda: storage.list(),
        lambda: storage.list("events", below=False),
        lambda: storage.write("a", b""),
        lambda: storage.create("a", b""),
        lambda: storage.upload(tmp_path / "file", "a"),
    ):
        with pytest.raises(RunDirectoryError, match="://nowhere/run: its bucket does not exist; make it first"):
            action()


@pytest.mark.parametrize("provider", [S3, AZURE], ids=["S3", "Azure"], indirect=True)
def test_missing_credentials_are_named(bucket: str, provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in provider.credentials:
        monkeypatch.delenv(name)
    fsspec.get_filesystem_class(provider.scheme).clear_instance_cache()
    with pytest.raises(RunDirectoryError, match=r"no credentials for it \(.*credentials.*\); set those"):
        Storage(f"{bucket}/run", patience=60.0).list()


def refuses(storage: Storage, message: str) -> None:
    """Check that each action ends with a message, and without patience for what no time mends."""
    began = time.monotonic()
    for action in (
        lambda: storage.list(),
        lambda: storage.list(below=False),
        lambda: storage.write("a", b""),
        lambda: storage.create("a", b""),
    ):
        with pytest.raises(RunDirectoryError, match=message):
            action()
    assert time.monotonic() - began < 30


def test_refused_access_is_told_at_once_by_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(S3, tmp_path / "server.log") as port:
        for name, value in S3.environment(port).items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        fsspec.filesystem("s3").mkdir("bucket")
        # from the next request on, the server asks for a user that it knows
        url = f"http://127.0.0.1:{port}/moto-api/reset-auth"
        urllib.request.urlopen(urllib.request.Request(url, b"0", {"Content-Type": "text/plain"})).close()
        refuses(
            Storage("s3://bucket/run", patience=60.0), r"access is refused \(The AWS Access Key Id .* must allow to"
        )


@pytest.mark.parametrize("provider", [AZURE], ids=["Azure"], indirect=True)
def test_refused_access_is_told_at_once_by_azure(
    bucket: str, server_port: Callable[[Provider], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = AZURITE_KEY[::-1].strip("=") + "=="
    monkeypatch.setenv(*azure_environment(server_port(AZURE), wrong).popitem())
    fsspec.get_filesystem_class("abfs").clear_instance_cache()
    refuses(
        Storage(f"{bucket}/run", patience=60.0), r"access is refused \(Server failed to authenticate .* must allow to"
    )


@pytest.mark.parametrize(
    ("status", "reason", "message"),
    [
        (
            401,
            "Anonymous caller does not have storage.objects.list access",
            r"no credentials for it \(Anonymous caller",
        ),
        (403, "someone does not have storage.objects.list access", r"access is refused \(Forbidden: .* must allow to"),
    ],
)
def test_refused_access_is_told_at_once_by_google(
    status: int, reason: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing := GCS.missing():  # without an import, at which gcsfs reads its settings
        pytest.skip(f"{missing} is not installed")

    class Refusal(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.end_headers()
            # as the JSON API does: cloud.google.com/storage/docs/json_api/v1/status-codes
            self.wfile.write(json.dumps({"error": {"code": status, "message": reason}}).encode())

        do_GET = do_POST = answer  # noqa: N815

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as refusing:
        threading.Thread(target=refusing.serve_forever).start()
        try:
            for name, value in GCS.environment(refusing.server_port).items():
                monkeypatch.setenv(name, value)
            fsspec.get_filesystem_class("gs").clear_instance_cache()
            refuses(Storage("gs://bucket/run", patience=60.0), message)
        finally:
            refusing.shutdown()


def test_a_scheme_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    # fsspec remembers the class of each scheme, so this one must be no other test's
    with pytest.raises(RunDirectoryError, match=r"gcs://bucket/run needs a package: pip install 'raylora\[gcs\]'"):
        Storage("gcs://bucket/run").list()


def test_an_unknown_scheme_names_the_known_ones() -> None:
    with pytest.raises(RunDirectoryError, match=r"a run directory is a folder or a URL of s3, .*, found ftp://"):
        Storage("ftp://host/run").list()


@pytest.fixture
def gate(
    provider: Provider, bucket: str, server_port: Callable[[Provider], int], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Gate]:
    """An open gate before the server. The packages' own new tries, which take up to minutes, follow at once."""
    gate = Gate(server_port(provider))
    for name, value in provider.environment(gate.port).items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class(provider.scheme).clear_instance_cache()
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds, *args: sleep(min(seconds, 0.01), *args))
    gate.open()
    yield gate
    gate.shut()


def test_an_outage_is_waited_out_and_no_event_is_lost_or_doubled(gate: Gate, bucket: str, tmp_path: Path) -> None:
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        gate.open()

    storage = Storage(f"{bucket}/run").patient(120.0, note)
    log = EventLog(tmp_path / "events.jsonl", parts=pull_events(storage, tmp_path / "events.jsonl"))
    log.append(SESSION)
    log.flush()
    gate.shut()
    log.append(Paused(0))
    log.flush()  # the server is back as soon as the user has been told that it is away
    assert len(notes) == 1
    assert "cannot be reached" in notes[0] and "trying again for 120 s" in notes[0]
    pull_events(storage, tmp_path / "there.jsonl")
    there = [type(event).__name__ for event in read_events(tmp_path / "there.jsonl")]
    assert there == ["SessionStarted", "Paused"]


def test_a_long_outage_ends_with_the_reason(gate: Gate, bucket: str, tmp_path: Path) -> None:
    storage = Storage(f"{bucket}/run", patience=1.0)
    log = EventLog(tmp_path / "events.jsonl", parts=pull_events(storage, tmp_path / "events.jsonl"))
    gate.shut()
    log.append(SESSION)
    with pytest.raises(RunDirectoryError, match=r"/run cannot be reached \(.*check network, endpoint"):
        log.flush()
    assert list(read_events(tmp_path / "events.jsonl")) == []  # a tracker beside it has not seen the event either
    gate.open()
    assert Storage(f"{bucket}/run").list() == {}
