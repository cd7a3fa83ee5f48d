"""The Kubernetes manifest fits KubeRay's RayJob schema, and its image has the pinned packages.

`kuberay_1.7.0_rayjob.json.xz` is the v1 schema, without descriptions and status, of
https://github.com/ray-project/kuberay/blob/v1.7.0/ray-operator/config/crd/bases/ray.io_rayjobs.yaml (Apache-2.0).
jsonschema cannot run its rules in CEL, which are about three fields that the manifest does not set.
"""

import json
import lzma
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from raylora.config.load import load_config
from raylora.run.directory import open_run
from tests.test_readme import check_raylora

ROOT = Path(__file__).parent.parent.parent
SCHEMA = Path(__file__).with_name("kuberay_1.7.0_rayjob.json.xz")
VOLUME, JOB = yaml.safe_load_all((ROOT / "clusters" / "kuberay.yaml").read_text())
CLUSTER = JOB["spec"]["rayClusterSpec"]
HEAD = CLUSTER["headGroupSpec"]["template"]["spec"]
(GROUP,) = CLUSTER["workerGroupSpecs"]
WORKER = GROUP["template"]["spec"]
PINNED_RAY = re.findall(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def strict(node: Any) -> Any:
    """Return an OpenAPI schema of Kubernetes as a JSON schema in which unknown fields are errors."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: strict(value) for key, value in node.items()}
    if "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
        node.setdefault("additionalProperties", False)
    if node.get("nullable") is True:
        node["type"] = [node["type"], "null"]
    return node


def check(job: dict[str, Any]) -> None:
    Draft202012Validator(strict(json.loads(lzma.decompress(SCHEMA.read_bytes())))).validate(job)


def test_the_job_fits_the_schema_of_kuberay() -> None:
    check(JOB)


def test_the_job_sets_no_field_that_has_rules_of_its_own() -> None:
    schema = json.loads(lzma.decompress(SCHEMA.read_bytes()))
    spec = schema["properties"]["spec"]["properties"]
    cluster = spec["rayClusterSpec"]["properties"]
    ruled = [spec["managedBy"], spec["deletionStrategy"], cluster["managedBy"]]
    ruled += [cluster["gcsFaultToleranceOptions"]["properties"]["backend"]]
    assert all("x-kubernetes-validations" in field for field in ruled)
    condition = 1  # a rule inside deletionStrategy
    assert json.dumps(schema).count("x-kubernetes-validations") == len(ruled) + condition
    assert not {"managedBy", "deletionStrategy"} & JOB["spec"].keys()
    assert not {"managedBy", "gcsFaultToleranceOptions"} & CLUSTER.keys()


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ([], "backofLimit"),
        (["rayClusterSpec", "authOptions"], "tokenMode"),
        (["rayClusterSpec", "workerGroupSpecs", 0], "maxReplica"),
        (["rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "resources"], "limit"),
    ],
)
def test_a_misspelt_field_would_not_fit(path: list[str | int], field: str) -> None:
    job = json.loads(json.dumps(JOB))
    place = job["spec"]
    for step in path:
        place = place[step]
    place[field] = 1
    with pytest.raises(ValidationError, match=f"'{field}' was unexpected"):
        check(job)


def test_a_value_of_a_wrong_type_would_not_fit() -> None:
    with pytest.raises(ValidationError, match="'2' is not of type 'integer'"):
        check({**JOB, "spec": {**JOB["spec"], "backoffLimit": "2"}})


def test_the_head_has_no_gpu_and_up_to_four_pods_have_one() -> None:
    assert CLUSTER["enableInTreeAutoscaling"]
    assert (GROUP["minReplicas"], GROUP["maxReplicas"]) == (0, 4)
    assert "nvidia.com/gpu" not in HEAD["containers"][0]["resources"]["limits"]
    assert WORKER["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_every_pod_mounts_the_volume_and_memory_for_objects_and_asks_for_tokens() -> None:
    assert VOLUME["spec"]["accessModes"] == ["ReadWriteMany"]
    assert CLUSTER["authOptions"] == {"mode": "token"}
    for pod in (HEAD, WORKER):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted["/mnt/shared"]["persistentVolumeClaim"]["claimName"] == VOLUME["metadata"]["name"]
        assert mounted["/dev/shm"]["emptyDir"]["medium"] == "Memory"


def test_the_search_is_a_command_that_starts_or_goes_on(tmp_path: Path) -> None:
    shell, option, script = shlex.split(JOB["spec"]["entrypoint"])
    assert (shell, option) == ("bash", "-c")
    folder, output, search = (shlex.split(command) for command in script.split("&&"))
    assert folder == ["cd", "/home/ray/raylora"]
    assert output[:2] == ["mkdir", "-p"] and search[search.index("--output") + 1] == output[2]
    assert output[2].startswith("/mnt/shared/") and search[-1] == "--resume"
    check_raylora(search[2:])
    # mkdir leaves an empty folder, which `--resume` takes as a new search
    config = load_config(ROOT / "search_spaces" / "qlora.yaml")
    assert open_run(tmp_path, config, resume=True).path == tmp_path.resolve()


def test_manifest_image_and_nodes_have_the_same_ray_and_python() -> None:
    assert [CLUSTER["rayVersion"]] == PINNED_RAY
    dockerfile = (ROOT / "clusters" / "Dockerfile").read_text()
    (python,) = re.findall(r"^version=(.*)$", (ROOT / "clusters" / "setup.sh").read_text(), re.MULTILINE)
    assert f"\nFROM python:{python}-slim\n" in dockerfile
    assert "pip install --no-cache-dir --constraint constraints.txt --editable ." in dockerfile
    image = HEAD["containers"][0]["image"]
    assert WORKER["containers"][0]["image"] == image
    assert f"--tag {image} ." in dockerfile and f"docker push {image}" in dockerfile
    assert f'version = "{image.rpartition(":")[2]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_image_copies_files_that_exist_and_works_where_the_search_starts() -> None:
    dockerfile = (ROOT / "clusters" / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*)$", dockerfile, re.MULTILINE):
        assert all((ROOT / source).exists() for source in line.split()[:-1])
    assert "\nWORKDIR /home/ray/raylora\n" in dockerfile
