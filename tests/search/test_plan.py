"""Lanes, slots and threads of a search, and the commits that it pins at the start."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from raylora.config.schema import SearchConfig
from raylora.errors import ConfigError, DataError, DeviceError
from raylora.run.directory import RunDirectory
from raylora.search.plan import (
    Devices,
    Plan,
    forwarded,
    make_plan,
    max_steps,
    pinned,
    plan_lanes,
    plan_slots,
    plan_threads,
)


def test_a_lane_takes_as_many_trials_as_fill_a_pass_and_one_more(
    make_config: Callable[..., SearchConfig],
) -> None:
    summary = SimpleNamespace(rows=100, tokens=6400)  # 64 tokens a row, 128 a micro-batch of two
    data = SimpleNamespace(summaries={"train": summary})

    def slots(on_gpu: bool = False, n_lanes: int = 1, **search: object) -> int:
        config = make_config(search={"n_trials": 27, **search})
        return plan_slots(config, data, on_gpu=on_gpu, n_lanes=n_lanes)  # type: ignore[arg-type]

    assert slots() == 512 // 128 + 1
    assert slots(tokens_per_pass=1024) == 1024 // 128 + 1
    assert slots(on_gpu=True) == 27  # 4096 / 128 = 32, but there are 27 trials
    assert slots(on_gpu=True, n_lanes=4) == 7  # a share each
    assert slots(on_gpu=True, n_trials=100) == 33  # whatever the CPUs of the head
    assert slots(trials_per_gpu=1) == 1
    assert slots(trials_per_gpu=50) == 27
    assert slots(engine="trl") == 1


def test_epochs_are_those_of_the_batches_that_the_space_names(make_config: Callable[..., SearchConfig]) -> None:
    data = SimpleNamespace(summaries={"train": SimpleNamespace(rows=96)})
    space = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "learning_rate": 1e-3}
    for changes, expected in (
        ({}, 48),  # two rows a step, by the training section
        ({"per_device_train_batch_size": 16}, 6),
        ({"per_device_train_batch_size": 16, "gradient_accumulation_steps": 3}, 2),
        ({"per_device_train_batch_size": {"choice": [4, 16]}}, 6),  # no trial sees a row twice
    ):
        config = make_config(space={**space, **changes}, training={"max_steps": None})
        assert max_steps(config, data) == expected  # type: ignore[arg-type]


def test_rows_longer_than_the_positions_of_a_base_are_refused(
    make_config: Callable[..., SearchConfig], tiny_model: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    folder = shutil.copytree(tiny_model, tmp_path / "gpt2", ignore=shutil.ignore_patterns("*.safetensors", "*.json"))
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    config = GPT2Config(vocab_size=300, n_positions=8, n_embd=64, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    search = make_config(base_model={"name": str(folder)})
    with pytest.raises(DataError, match=r"tokens, and the base has positions for 8; set data\.max_length to 8"):
        make_plan(search, RunDirectory(tmp_path / "run"), Devices(n_gpus=0, n_cpus=2, node_cpus=2, where="here"))


def test_lanes_are_as_many_as_devices_and_never_more(make_config) -> None:
    four = Devices(n_gpus=4, n_cpus=8, where="the cluster", node_cpus=8)
    assert plan_lanes(make_config(search={"n_trials": 16}), four) == (True, 4)
    assert plan_lanes(make_config(search={"n_trials": 2}), four) == (True, 2)  # no lane without a trial
    assert plan_lanes(make_config(device="cpu"), four) == (False, 1)
    assert plan_lanes(make_config(search={"lanes": 3, "n_trials": 16}), four) == (True, 3)
    with pytest.raises(DeviceError, match=r"search\.lanes must be at most the 4 GPUs of the cluster, found 5"):
        plan_lanes(make_config(search={"lanes": 5}), four)
    none = Devices(n_gpus=0, n_cpus=2, where="this machine", node_cpus=2)
    with pytest.raises(DeviceError, match="device is cuda, and this machine has no GPU"):
        plan_lanes(make_config(device="cuda"), none)


def test_lanes_on_a_cluster_wait_for_devices_only_if_both_are_named(make_config: Callable[..., SearchConfig]) -> None:
    growing = Devices(n_gpus=0, n_cpus=4, where="the cluster", node_cpus=4, may_grow=True)
    assert plan_lanes(make_config(device="cuda", search={"lanes": 3, "n_trials": 16}), growing) == (True, 3)
    assert plan_lanes(make_config(device="cpu", search={"lanes": 8, "n_trials": 16}), growing) == (False, 8)
    for config in (make_config(), make_config(device="cuda"), make_config(search={"lanes": 2})):
        # never on CPUs because no GPU is up yet
        with pytest.raises(DeviceError, match=r"no GPU now; `--device cuda --search\.lanes N` waits for N of them"):
            plan_lanes(config, growing)


def test_only_named_variables_are_forwarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("OTHER", "value")
    monkeypatch.delenv("MISSING", raising=False)
    assert forwarded([]) == {}
    assert forwarded(["HF_TOKEN"]) == {"HF_TOKEN": "secret"}
    with pytest.raises(ConfigError, match="names MISSING, which is not set here"):
        forwarded(["HF_TOKEN", "MISSING"])


def test_a_base_must_fit_into_the_memory_that_lanes_use(
    make_config: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    def plan(device: str, **memory: float) -> Plan:
        devices = Devices(n_gpus=1, n_cpus=2, where="this machine", node_cpus=2, **memory)
        return make_plan(make_config(device=device), RunDirectory(tmp_path / "run"), devices)

    assert plan("cuda", memory_mib=0.1, gpu_memory_mib=1000.0).on_gpu
    assert not plan("cpu", memory_mib=1000.0, gpu_memory_mib=0.1).on_gpu
    for device, memory in (("cuda", (1000.0, 0.1)), ("cpu", (0.1, 1000.0))):
        with pytest.raises(DeviceError, match="the base needs about"):
            plan(device, memory_mib=memory[0], gpu_memory_mib=memory[1])


def test_a_lane_has_no_more_threads_than_a_node() -> None:
    two_nodes = Devices(n_gpus=0, n_cpus=16, where="the cluster", node_cpus=8)
    assert [plan_threads(two_nodes, n_lanes) for n_lanes in (1, 2, 4, 32)] == [8, 8, 4, 1]


def test_hub_commits_are_pinned(make_config: Callable[..., SearchConfig]) -> None:
    config = make_config(base_model={"name": "owner/model", "revision": "main"})
    found = pinned(config, base_commit="abc", data_commit="def")
    assert (found.base_model.revision, found.data.revision) == ("abc", "def")
    # a base that does not come from the Hub has no commit
    local = pinned(make_config(), base_commit=None, data_commit=None)
    assert (local.base_model.revision, local.data.revision) == (None, None)
