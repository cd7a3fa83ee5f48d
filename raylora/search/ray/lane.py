"""A lane: one Ray Train worker on one GPU that keeps the base in memory and trains the trials it is sent."""

import gc
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer

from raylora.base.load import free_unused
from raylora.config.schema import SearchConfig
from raylora.errors import RunDirectoryError
from raylora.machine import NO_GPU
from raylora.quiet import quiet_libraries
from raylora.run.activity import Activity, heard, tell
from raylora.run.directory import RunDirectory, run_at
from raylora.search.messages import Batch, Gone, Lost, News, Order, Pulse, Ready
from raylora.search.plan import Plan, forwarded
from raylora.search.serve import Engine, describe_failure, serve_one, serve_pack
from raylora.training.choose import load_engine
from raylora.training.memory import MemoryEstimate
from raylora.training.packed.engine import PackedEngine

MAX_RESTARTS = 20
"""Times that Ray Train starts a lane's process again before the lane counts as lost."""

SPIN_COUNT = "2000"
"""Rounds for which libgomp's threads spin on a CPU lane. By default they spin 300,000 rounds, in which they take cores
from each other as soon as another program runs (benchmarks/priority.json)."""


@dataclass(frozen=True)
class LaneSettings:
    """All that a lane needs to come up by itself, wherever Ray places it."""

    name: str
    broker: ActorHandle
    config: SearchConfig
    run_path: Path
    tokens_dir: Path
    slots: int
    """Trials at once, at most."""

    memory: MemoryEstimate
    on_gpu: bool
    threads: int
    """CPU threads for torch; unset, lanes on one machine would fight for all cores."""

    load_engine: Callable[..., Engine | PackedEngine] = load_engine

    provide: Callable[[], None] | None = None
    """Copies what only the driver's node has to the lane's; None where there is one node."""

    environment: dict[str, str] = field(default_factory=dict, repr=False)
    """Variables of the user's environment that `search.forward_env` names. They may be secrets, so they travel in this
    object alone: not in Ray's runtime environments, which its logs and dashboard show."""

    remote: str | None = None
    """URL of a run directory in object storage, of which each node has a working copy."""


def lane_settings(
    run: RunDirectory, plan: Plan, broker: ActorHandle, provide: Callable[[], None] | None = None
) -> list[LaneSettings]:
    """Return the settings of each lane of a plan.

    Args:
        run: the run directory.
        plan: the plan.
        broker: from `start_broker`.
        provide: from `share_files`, on a cluster.
    """
    first = LaneSettings(
        name="0",
        broker=broker,
        config=plan.config,
        run_path=run.path,
        tokens_dir=plan.data.tokens_dir,
        slots=plan.slots,
        memory=plan.memory,
        on_gpu=plan.on_gpu,
        threads=plan.threads,
        provide=provide,
        environment=forwarded(plan.config.search.forward_env),
        remote=run.remote,
    )
    return [replace(first, name=str(index)) for index in range(plan.n_lanes)]


def lane_trainer(settings: LaneSettings) -> TorchTrainer:
    """Return the Ray Train run that is the lane; its `fit` returns when the broker closes.

    One run per lane, since a run restarts all its workers when one dies.
    """
    return TorchTrainer(
        run_lane,
        # by reference: Ray Train's controller unpickles this dictionary, and would import torch and TRL to do so
        train_loop_config={"settings": ray.put(settings)},
        scaling_config=ScalingConfig(
            num_workers=1,
            use_gpu=settings.on_gpu,
            resources_per_worker={"CPU": 1, "GPU": 1} if settings.on_gpu else {"CPU": 1},
        ),
        run_config=RunConfig(
            name=f"lane-{settings.name}-{time.time_ns()}",
            storage_path=str(settings.run_path / "logs" / "train"),
            failure_config=FailureConfig(max_failures=MAX_RESTARTS),
            callbacks=[_Obituary(settings.name, settings.broker)],
            worker_runtime_env={} if settings.on_gpu else {"env_vars": _openmp() | NO_GPU},
        ),
    )


class _Obituary(UserCallback):
    """Tells the broker that a lane's process has ended, before Ray Train looks for room for another.

    Args:
        lane: name of the lane.
        broker: from `start_broker`.
    """

    def __init__(self, lane: str, broker: ActorHandle) -> None:
        self._lane, self._broker = lane, broker

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        error = next(iter(worker_exceptions.values()))
        failure = getattr(error, "health_check_failure", error)  # what Ray Train has wrapped
        # an actor that cannot be reached is on a node that has died, or that Ray has yet to find dead
        lost = isinstance(failure, RayActorError) and "worker process has died" not in str(failure)
        reason = "its node was lost" if lost else f"its process ended ({describe_failure(failure)})"
        ray.get(self._broker.end.remote(self._lane, Gone(reason, node_lost=lost)))


def _openmp() -> dict[str, str]:
    """Return the environment of a CPU lane; a value that the user has set is kept."""
    return {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", SPIN_COUNT)}


def run_lane(train_loop_config: dict[str, Any]) -> None:
    """Load the base, then train until the broker closes; Ray Train's worker function."""
    settings: LaneSettings = ray.get(train_loop_config["settings"])
    began = time.perf_counter()
    quiet_libraries()
    torch.set_num_threads(settings.threads)
    _forget_process_group()
    os.environ.update(settings.environment)
    run = run_at(settings.remote or settings.run_path)
    with heard(partial(_tell_broker, settings)):
        try:
            engine = _load(settings, run)
        except Exception as error:  # whatever keeps the base from loading would do so again: no restart
            ray.get(settings.broker.end.remote(settings.name, Lost(describe_failure(error))))
            return
        # all that lives now lives for ever; without it a collection between trials takes 0.4 s to walk the libraries
        free_unused()
        gc.freeze()
        link = BrokerLink(settings.broker, settings.name)
        ready = Ready(_slots(engine), _facts(settings, engine, time.perf_counter() - began))
        if isinstance(engine, PackedEngine):
            serve_pack(engine, link, run, ready)
        else:
            serve_one(engine, link, run, ready)


def _load(settings: LaneSettings, run: RunDirectory) -> Engine | PackedEngine:
    """Load the base, once this node has all that is needed."""
    if run.storage is None and not run.config_file.is_file():
        raise RunDirectoryError(
            f"node {socket.gethostname()} does not see {run.path}; the run directory must lie on storage that all "
            "nodes share, or in object storage, as by --output s3://BUCKET/RUN"
        )
    if settings.provide is not None:
        settings.provide()
    tell("loading the base", 0, 1)
    return settings.load_engine(
        settings.config,
        tokens_dir=settings.tokens_dir,
        cache_dir=run.cache(settings.config),
        device="cuda:0" if settings.on_gpu else "cpu",
        slots=settings.slots,
        memory=settings.memory,
    )


def _tell_broker(settings: LaneSettings, activity: Activity) -> None:
    """Send a pulse of a lane that cannot train yet, or cannot write its checkpoint."""
    how_far = f": {activity.done:,} of {activity.total:,}" if activity.total > 1 else ""
    pulse = Pulse({}, 0.0, 0.0, busy=f"{activity.what}{how_far}")
    settings.broker.beat.remote(settings.name, pulse)


class BrokerLink:
    """A lane's line to the controller, by way of the broker.

    Orders are asked for ahead of time, so that a lane that trains need not wait for them.
    """

    def __init__(self, broker: ActorHandle, lane: str) -> None:
        self._broker, self._lane = broker, lane
        self._process: int = ray.get(broker.connect.remote(lane))
        self._round = self._answered = 0
        self._asked = self._ask()

    def exchange(self, news: list[News]) -> list[Order] | None:
        """Send news and wait for the answer: orders, or None once the search is over."""
        self._round += 1
        ray.get(self._broker.post.remote(Batch(self._lane, self._process, self._round, news)))
        orders: list[Order] = []
        while self._answered < self._round:
            new = self._take()
            if new is None:
                return None
            orders += new
        return orders

    def poll(self, *, wait: bool) -> list[Order] | None:
        """Return orders that came without being asked for; empty where there are none and `wait` is false."""
        if not wait and not ray.wait([self._asked], timeout=0)[0]:
            return []
        return self._take()

    def beat(self, pulse: Pulse) -> None:
        """Send a pulse, and do not wait for it."""
        self._broker.beat.remote(self._lane, pulse)

    def _take(self) -> list[Order] | None:
        reply = ray.get(self._asked)
        if reply is None:
            return None
        self._answered, orders = reply
        self._asked = self._ask()
        return orders

    def _ask(self) -> ray.ObjectRef:
        return self._broker.orders.remote(self._lane, self._process, self._answered)


def _slots(engine: Engine | PackedEngine) -> int:
    return engine.slots if isinstance(engine, PackedEngine) else 1


def _facts(settings: LaneSettings, engine: Engine | PackedEngine, seconds: float) -> dict[str, Any]:
    return {
        "engine": type(engine).__name__,
        "reason": getattr(engine, "reason", None),
        "notes": getattr(engine, "notes", []),
        "slots": _slots(engine),
        "host": socket.gethostname(),
        "node": ray.get_runtime_context().get_node_id(),
        "pid": os.getpid(),
        "device": torch.cuda.get_device_name() if settings.on_gpu else "cpu",
        "threads": settings.threads,
        "load_seconds": seconds,
        "ready_at": time.time(),
    }


def _forget_process_group() -> None:
    """Leave the process group of one that TorchTrainer made: accelerate would wrap each model in DDP for it."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
