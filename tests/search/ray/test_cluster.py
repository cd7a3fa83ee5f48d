"""Cluster files pass Ray's own schema and preparation; lanes may count on GPUs that are still to come."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.cluster_utils import Cluster

from raylora.errors import DeviceError
from raylora.search.ray import cluster
from raylora.search.ray.cluster import _autoscaled_gpus, connected

ROOT = Path(__file__).parent.parent.parent.parent
FILES = (ROOT / "cluster.yaml", *sorted({*(ROOT / "clusters").glob("*.yaml")} - {ROOT / "clusters" / "kuberay.yaml"}))
CLOUDS = {
    "aws": ROOT / "cluster.yaml",
    "gcp": ROOT / "clusters" / "gcp.yaml",
    "azure": ROOT / "clusters" / "azure.yaml",
}


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_cluster_file_is_valid_for_ray_up(path: Path) -> None:
    validate_config(prepare_config(read(path)))  # as `ray up` does


@pytest.mark.parametrize(
    ("cloud", "spot"),
    [
        ("aws", lambda node: node["InstanceMarketOptions"] == {"MarketType": "spot"}),
        ("gcp", lambda node: node["scheduling"]["provisioningModel"] == "SPOT"),
        ("azure", lambda node: node["azure_arm_parameters"]["priority"] == "Spot"),
    ],
)
def test_in_a_cloud_the_head_has_no_gpu_and_workers_are_spot_instances(
    cloud: str, spot: Callable[[dict[str, Any]], bool]
) -> None:
    prepared = prepare_config(read(CLOUDS[cloud]))
    assert prepared["provider"]["type"] == cloud
    assert prepared["provider"]["cache_stopped_nodes"] is False
    types = prepared["available_node_types"]
    assert types[prepared["head_node_type"]]["resources"]["GPU"] == 0
    worker = types["gpu_worker"]
    assert (worker["min_workers"], worker["max_workers"], worker["resources"]["GPU"]) == (0, 4, 1)
    assert spot(worker["node_config"])


@pytest.mark.parametrize(
    ("cloud", "package"), [("aws", "boto3"), ("gcp", "google-api-python-client"), ("azure", "azure-mgmt-compute")]
)
def test_the_head_gets_the_clouds_client_package_from_rays_defaults_after_our_python(cloud: str, package: str) -> None:
    commands = prepare_config(read(CLOUDS[cloud]))["head_setup_commands"]
    (ours,) = [n for n, command in enumerate(commands) if "clusters/setup.sh" in command]
    (theirs,) = [n for n, command in enumerate(commands) if package in command]
    assert ours < theirs


def test_on_azure_each_parameter_is_one_of_rays_template() -> None:
    template = json.loads((Path(ray.autoscaler.__file__).parent / "_private/_azure/azure-vm-template.json").read_text())
    for node in read(CLOUDS["azure"])["available_node_types"].values():
        assert node["node_config"].keys() == {"azure_arm_parameters"}
        assert node["node_config"]["azure_arm_parameters"].keys() <= template["parameters"].keys()


def test_on_gcp_disks_lie_in_the_zone_of_the_nodes() -> None:
    settings = read(CLOUDS["gcp"])
    zone = settings["provider"]["availability_zone"]
    for node in settings["available_node_types"].values():
        (disk,) = node["node_config"]["disks"]
        assert disk["initializeParams"]["diskType"].startswith(f"zones/{zone}/diskTypes/")


def test_a_misspelled_key_would_not_be_valid() -> None:
    with pytest.raises(Exception, match="max_wokers"):
        validate_config({**read(ROOT / "cluster.yaml"), "max_wokers": 4})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_node_is_set_up_alike_has_the_token_and_shows_its_dashboard_to_itself_alone(path: Path) -> None:
    settings = read(path)
    assert any("~/raylora/clusters/setup.sh" in command for command in settings["setup_commands"])
    assert settings["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    (start,) = [command for command in settings["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start


def test_the_set_up_is_done_in_a_moment_where_nothing_has_changed_and_asks_for_tokens(tmp_path: Path) -> None:
    project, home = tmp_path / "raylora", tmp_path / "home"
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / "clusters").mkdir()
    home.mkdir()
    shutil.copy(ROOT / "clusters" / "setup.sh", project / "clusters")
    for name in ("pyproject.toml", "constraints.txt"):
        (project / name).touch()
    for name in (".venv/bin/ray", ".venv/ready"):
        (project / name).touch(mode=0o755)
    python = tmp_path / "bin" / "python3.11"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nexit 1\n")  # nothing may be installed
    python.chmod(0o755)
    for _ in range(2):
        subprocess.run(
            ["bash", project / "clusters" / "setup.sh"],
            check=True,
            env={"HOME": str(home), "PATH": f"{python.parent}:/usr/bin:/bin"},
        )
    (line,) = (home / ".bashrc").read_text().splitlines()
    assert line.startswith(f"export RAY_AUTH_MODE=token PATH={project}/.venv/bin:$PATH HF_HOME={home}")


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nonsense"])
def test_an_address_where_no_cluster_is_is_named_at_once(address: str) -> None:
    with (
        pytest.raises(DeviceError, match=f"no Ray cluster can be used at {address}: .* leave --address out"),
        connected(address),
    ):
        pass


@pytest.mark.ray
def test_a_node_without_the_package_is_named(tmp_path: Path) -> None:
    # Python runs this file whenever a process of the node starts
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "import importlib.metadata as metadata\n"
        "sys.modules['raylora'] = None\n"
        "version = metadata.version\n"
        "def hidden(name):\n"
        "    if name == 'raylora':\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "metadata.version = hidden\n"
    )
    local = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        with connected(local.address):
            pass  # the head has it
        local.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(tmp_path)})
        message = r"node \S+ has no raylora, and this one has raylora \S+; install the same on every node"
        with pytest.raises(DeviceError, match=message), connected(local.address):
            pass
    finally:
        local.shutdown()


def test_a_cluster_of_another_version_is_refused_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.61.0\n    Python: 3.12.1\n")

    monkeypatch.setattr(cluster.ray, "init", init)
    with pytest.raises(DeviceError, match=r"started with: Ray: 2\.61\.0 Python: 3\.12\.1$"), connected("auto"):
        pass


def test_lanes_count_gpus_that_the_autoscaler_may_add(tmp_path: Path) -> None:
    assert _autoscaled_gpus(tmp_path / "none.yaml") == 0
    shutil.copy(ROOT / "cluster.yaml", tmp_path / "ray_bootstrap_config.yaml")
    assert _autoscaled_gpus(tmp_path / "ray_bootstrap_config.yaml") == 4
