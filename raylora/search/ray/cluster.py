"""Starts a Ray instance of our own or connects to a cluster, and says what devices there are."""

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
import torch
import yaml
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylora.errors import DeviceError
from raylora.machine import NO_GPU, memory_limit, n_cpus
from raylora.run.activity import watched
from raylora.run.directory import RunDirectory
from raylora.run.holding import borrowed
from raylora.run.transfer import pull_files
from raylora.search.plan import Devices

QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}

ANSWER_SECONDS = 10.0
"""Time within which a cluster must answer."""

NODE_SECONDS = 30.0
"""Time within which its nodes should say which raylora they have; each starts a process for it."""

LOCAL_ENVIRONMENT = {"RAY_worker_niceness": "0"}
"""Environment of a local Ray instance's processes, unless the user has set another. At Ray's own niceness of 15, lanes
starve beside any other program (benchmarks/priority.json)."""


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to a Ray cluster that is already there.

    Raises:
        DeviceError: none answers there, its Ray or Python is of another version, or a node lacks raylora.
    """
    try:
        host, separator, port = address.rpartition(":")
        if separator and port.isdigit() and "/" not in host:  # Ray itself would try for two minutes
            socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
        ray.init(address=address, **QUIET)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if not reason.startswith("Version mismatch"):
            reason += "; start one by `ray up` or `ray start --head`, or leave --address out to use this machine alone"
        raise DeviceError(f"no Ray cluster can be used at {address}: {reason}") from error
    try:
        _check_nodes()
        yield
    finally:
        ray.shutdown()


def _check_nodes() -> None:
    """Check that each node that is up has this version of raylora; one that is slow to answer is passed over.

    Raises:
        DeviceError: a node lacks it, or has another version.
    """

    def installed() -> str | None:  # a function in a function travels by value, to nodes without raylora too
        try:
            return metadata.version("raylora")
        except metadata.PackageNotFoundError:
            return None

    answers = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            remote = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(installed)
            answers[remote.remote()] = node["NodeManagerHostname"]
    for answer in ray.wait([*answers], num_returns=len(answers), timeout=NODE_SECONDS)[0]:
        with suppress(RayError):  # a node that dies meanwhile
            if (found := ray.get(answer)) != installed():
                here, there = f"raylora {installed()}", "no raylora" if found is None else f"raylora {found}"
                raise DeviceError(
                    f"node {answers[answer]} has {there}, and this one has {here}; install the same on every node, "
                    "as clusters/setup.sh does"
                )


@contextmanager
def local_ray(devices: Devices, logs: Path | None = None) -> Iterator[None]:
    """Start a Ray instance of our own on this machine, of which nothing is left afterwards but its output.

    Args:
        devices: devices of this machine.
        logs: folder that receives what Ray's processes have written to standard error; None keeps nothing.
    """
    # a short private directory: Ray's sockets lie in it, and a socket's path may have 107 characters
    directory = tempfile.mkdtemp(prefix="raylora-")
    for name, value in LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        ray.init(
            address="local",
            num_cpus=devices.n_cpus,
            num_gpus=devices.n_gpus,
            include_dashboard=False,
            _temp_dir=directory,
            **QUIET,
        )
        yield
    finally:
        ray.shutdown()
        if logs is not None:
            _keep_output(Path(directory), logs)
        shutil.rmtree(directory, ignore_errors=True)


def _keep_output(directory: Path, logs: Path) -> None:
    """Copy what the processes of a Ray instance have written to standard error, under the names of their actors."""
    for file in directory.glob("session_*/logs/*.err"):
        if file.parent.parent.is_symlink():
            continue
        lines = file.read_text(errors="replace").splitlines()
        # Ray opens each file by lines such as `:actor_name:RayTrainWorker`
        headers = dict(line[1:].split(":", 1) for line in lines if line.startswith(":") and line.count(":") > 1)
        if len(headers) < len(lines):
            logs.mkdir(parents=True, exist_ok=True)
            name = headers.get("actor_name") or headers.get("task_name") or file.stem.split("-")[0]
            shutil.copy(file, logs / f"{name.replace('/', '_')}-{file.stem.split('-')[-1]}.err")


def call_on_device(
    function: Callable[[RunDirectory], Any],
    run: RunDirectory,
    *,
    on_gpu: bool,
    n_cpus: int,
    waiting: Callable[[], None],
    provide: Callable[[], None] | None = None,
) -> Any:
    """Call a function in a process of its own, where a lane could be, and return its result.

    Args:
        function: called with the run directory, whose `activity.json` says how far it is.
        run: the run directory. If it lies in object storage, all that the function reads is there.
        on_gpu: reserve a GPU.
        n_cpus: reserve so many CPUs without a GPU; Ray gives the process as many threads.
        waiting: called again and again meanwhile.
        provide: from `share_files`; called in that process first.
    """
    wanted = {"num_cpus": 1, "num_gpus": 1} if on_gpu else {"num_cpus": n_cpus, "runtime_env": {"env_vars": NO_GPU}}
    answer = ray.remote(**wanted)(_call_watched).remote(function, run, provide)
    while not ray.wait([answer], timeout=0.5)[0]:
        waiting()
    result, is_elsewhere = ray.get(answer)
    if run.storage is not None and is_elsewhere:
        pull_files(run.storage.patient(), run.path)
    return result


def _call_watched(
    function: Callable[[RunDirectory], Any], run: RunDirectory, provide: Callable[[], None] | None
) -> tuple[Any, bool]:
    """Call a function, and let its loops say how far they are.

    Returns:
        Its result, and True if what it has written is in object storage and not yet on the driver's node.
    """
    with borrowed(run) as (here, is_elsewhere), watched(here.activity_file):
        if provide is not None:
            provide()
        return function(here), is_elsewhere


def actor_here(kind: type, *arguments: Any, max_concurrency: int) -> ActorHandle:
    """Start an actor on the driver's node, which no spot node's end takes away, without a CPU of its own.

    Args:
        kind: class of the actor.
        arguments: those of its constructor.
        max_concurrency: calls that it answers at once.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, max_concurrency=max_concurrency, scheduling_strategy=here)(kind).remote(*arguments)


def local_devices() -> Devices:
    """Return the devices of this machine, of which this process may use no more than its control groups allow."""
    n_gpus, cpus = torch.cuda.device_count(), n_cpus()
    # not by `mem_get_info`, which makes a context of some hundred MiB on each GPU
    memory = [torch.cuda.get_device_properties(gpu).total_memory for gpu in range(n_gpus)]
    return Devices(
        n_gpus,
        cpus,
        "this machine",
        node_cpus=cpus,
        memory_mib=memory_limit().amount / 2**20,
        gpu_memory_mib=min(memory) / 2**20 if memory else None,
    )


def cluster_devices() -> Devices:
    """Return the devices of the connected cluster, with GPU nodes that its autoscaler may still add."""
    resources = ray.cluster_resources()
    n_gpus = max(int(resources.get("GPU", 0)), _autoscaled_gpus(Path("~/ray_bootstrap_config.yaml").expanduser()))
    node_cpus = max(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"])
    return Devices(n_gpus, int(resources.get("CPU", 1)), "the cluster", node_cpus=node_cpus, may_grow=True)


def _autoscaled_gpus(bootstrap_file: Path) -> int:
    """Return the GPUs at full size, from the file that `ray up` leaves on the head node; 0 without the file."""
    if not bootstrap_file.is_file():
        return 0
    types = yaml.safe_load(bootstrap_file.read_text(encoding="utf-8")).get("available_node_types", {})
    return sum(int(node.get("resources", {}).get("GPU", 0)) * node.get("max_workers", 0) for node in types.values())
