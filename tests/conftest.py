"""Fixtures: a tiny random model, rows, and configs that use them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before raylora imports Triton: its kernels run in NumPy

from raylora.config.load import build_config
from raylora.config.schema import SearchConfig
from raylora.quiet import quiet_libraries
from raylora.testing import make_rows, make_tiny_model

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
