"""cluster.yaml passes Ray's own schema and preparation, and lanes may count on GPUs that are still to come."""

import shutil
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

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
