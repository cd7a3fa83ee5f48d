"""cluster.yaml passes Ray's own schema and preparation, and lanes may count on GPUs that are still to come."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from raylora.config.schema import SearchConfig
from raylora.errors import DeviceError
from raylora.search.plan import Devices, plan_lanes, plan_places, plan_threads
from raylora.search.ray.cluster import _autoscaled_gpus

ROOT = Path(__file__).parent.parent.parent.parent
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_the_cluster_file_is_valid_for_ray_up() -> None:
    prepared = prepare_config(CLUSTER)  # as `ray up` does
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert types[prepared["head_node_type"]]["resources"]["GPU"] == 0
    worker = types["gpu_worker"]
    assert (worker["min_workers"], worker["max_workers"], worker["resources"]["GPU"]) == (0, 4, 1)
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_a_misspelled_key_would_not_be() -> None:
    with pytest.raises(Exception, match="max_wokers"):
        validate_config({**CLUSTER, "max_wokers": 4})


def test_every_node_installs_the_project_from_the_constraints() -> None:
    assert any("-c constraints.txt -e ." in command for command in CLUSTER["setup_commands"])
    assert (ROOT / "constraints.txt").is_file()


def test_lanes_count_gpus_that_the_autoscaler_may_add(tmp_path: Path) -> None:
    assert _autoscaled_gpus(tmp_path / "none.yaml") == 0
    shutil.copy(ROOT / "cluster.yaml", tmp_path / "ray_bootstrap_config.yaml")
    assert _autoscaled_gpus(tmp_path / "ray_bootstrap_config.yaml") == 4


def test_a_lane_takes_as_many_trials_as_fill_a_pass_and_one_more(
    make_config: Callable[..., SearchConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    summary = SimpleNamespace(rows=100, tokens=6400)  # 64 tokens a row, 128 a micro-batch of two
    data = SimpleNamespace(summaries={"train": summary})

    def slots(on_gpu: bool = False, n_lanes: int = 1, **search: object) -> int:
        config = make_config(search={"n_trials": 27, **search})
        return plan_places(config, data, on_gpu=on_gpu, n_lanes=n_lanes)  # type: ignore[arg-type]

    assert slots() == 512 // 128 + 1
    assert slots(tokens_per_pass=1024) == 1024 // 128 + 1
    assert slots(on_gpu=True) == 27  # 4096 / 128 = 32, but there are 27 trials
    assert slots(on_gpu=True, n_lanes=4) == 7  # a share each
    assert slots(on_gpu=True, n_trials=100) == 32  # two Tune actors a core
    assert slots(trials_per_gpu=1) == 1
    assert slots(trials_per_gpu=50) == 27
    assert slots(engine="trl") == 1


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


def test_a_lane_has_no_more_threads_than_a_node() -> None:
    two_nodes = Devices(n_gpus=0, n_cpus=16, where="the cluster", node_cpus=8)
    assert [plan_threads(two_nodes, n_lanes) for n_lanes in (1, 2, 4, 32)] == [8, 8, 4, 1]
