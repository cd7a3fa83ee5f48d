"""Fixtures: a tiny random model, rows, and configs that use them."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before raylora imports Triton: its kernels run in NumPy

from raylora.config.load import build_config
from raylora.config.schema import SearchConfig
from raylora.quiet import quiet_libraries
from raylora.testing import make_rows, make_tiny_model
from tests.storage_servers import S3, Provider, server

SPACE = {"r": {"choice": [2, 4]}, "lora_alpha": 8, "lora_dropout": 0.0, "learning_rate": {"loguniform": [1e-4, 1e-2]}}


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    quiet_libraries()
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture
def make_config(tiny_model: Path, rows_file: Path, tmp_path: Path) -> Callable[..., SearchConfig]:
    """Builds a config on the tiny model; sections given as keywords are merged over the defaults."""

    def make(**sections: Any) -> SearchConfig:
        values: dict[str, Any] = {
            "base_model": {"name": str(tiny_model)},
            "data": {"train": str(rows_file), "validation_size": 8, "heldout_size": 8},
            "training": {"max_steps": 9, "per_device_train_batch_size": 2},
            "space": SPACE,
            "search": {"n_trials": 3},
            "cache_dir": str(tmp_path / "cache"),
        }
        for name, section in sections.items():
            merge = isinstance(section, dict) and name != "space"
            values[name] = {**values.get(name, {}), **section} if merge else section
        return build_config(values, source="test")

    return make


@pytest.fixture(scope="session")
def server_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Provider], int]]:
    """Gives the port of a provider's server, which is started when it is first asked for."""
    ports: dict[str, int] = {}
    with ExitStack() as servers:

        def port(provider: Provider) -> int:
            if provider.name not in ports:
                log = tmp_path_factory.mktemp(provider.name) / "server.log"
                ports[provider.name] = servers.enter_context(server(provider, log))
            return ports[provider.name]

        yield port


@pytest.fixture
def provider() -> Provider:
    """Object storage of a test; modules that import `each_provider` run on others too."""
    return S3


@pytest.fixture
def bucket(
    provider: Provider, server_port: Callable[[Provider], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """URL of a new bucket on a server, which this process and those that it starts find."""
    for name, value in provider.environment(server_port(provider)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))
    fsspec.filesystem(provider.scheme).clear_instance_cache()  # those of another test's server
    name = f"bucket-{fsspec.utils.tokenize(str(tmp_path))[:12]}"
    fsspec.filesystem(provider.scheme).mkdir(name)
    return f"{provider.scheme}://{name}"
