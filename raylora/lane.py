"""A lane: one Ray Train worker on one GPU that keeps the base in memory and trains one trial after another."""

import gc
import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.train
import torch
from ray.actor import ActorHandle
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from raylora.config import SearchConfig
from raylora.errors import RunDirectoryError
from raylora.files import write_text
from raylora.noise import quiet_libraries
from raylora.run_directory import RunDirectory
from raylora.space import Assignment
from raylora.training import Report, TrlEngine

MAX_RESTARTS = 20
"""How often Ray Train brings a lane's process back before the lane counts as lost."""


class Engine(Protocol):
    """What trains trials on a lane. `raylora.training.TrlEngine` is one."""

    def fit(
        self,
        assignment: Assignment,
        *,
        rungs: list[int],
        directory: Path,
        report: Callable[[Report], bool],
        resume_from: str | None,
    ) -> None: ...


@dataclass(frozen=True)
class LaneSettings:
    """What a lane needs to come up by itself, wherever Ray places it."""

    name: str
    broker: ActorHandle
    config: SearchConfig
    run_path: Path
    tokens_dir: Path
    rungs: list[int]
    on_gpu: bool
    threads: int
    """CPU threads for torch; unset, lanes on one machine would fight for all cores."""

    load_engine: Callable[..., Engine] = TrlEngine.load


def lane_trainer(settings: LaneSettings) -> TorchTrainer:
    """The Ray Train run that is the lane; its `fit` returns when the broker closes.

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
        ),
    )


def run_lane(train_loop_config: dict[str, Any]) -> None:
    """Ray Train's worker function: loads the base, then trains until the broker closes."""
    settings: LaneSettings = ray.get(train_loop_config["settings"])
    began = time.perf_counter()
    quiet_libraries()
    torch.set_num_threads(settings.threads)
    _forget_process_group()
    run = RunDirectory(settings.run_path)
    broker = settings.broker
    try:
        _check_shared(settings.tokens_dir)
        engine = settings.load_engine(
            settings.config,
            tokens_dir=settings.tokens_dir,
            cache_dir=run.cache(settings.config),
            device="cuda:0" if settings.on_gpu else "cpu",
        )
    except Exception as error:  # whatever keeps the base from loading would do so again: no restart
        ray.get(broker.lane_lost.remote(settings.name, describe_failure(error)))
        return
    # all that lives now lives for ever; without it a collection between trials takes 0.4 s to walk the libraries
    gc.freeze()
    ray.get(broker.lane_ready.remote(settings.name, _facts(settings, time.perf_counter() - began)))
    while job := ray.get(broker.next_job.remote(settings.name)):
        _run_job(settings, engine, run, *job)


def _check_shared(tokens_dir: Path) -> None:
    if not tokens_dir.is_dir():
        raise RunDirectoryError(
            f"node {socket.gethostname()} does not see {tokens_dir}; the run directory must lie on storage that all "
            "nodes share"
        )


def _run_job(
    settings: LaneSettings,
    engine: Engine,
    run: RunDirectory,
    number: int,
    assignment: dict[str, Any],
    resume_from: str | None,
) -> None:
    def report(report: Report) -> bool:
        values = {**asdict(report), "lane": settings.name}
        return ray.get(settings.broker.report.remote(number, values, final=report.step >= settings.rungs[-1]))

    failure, poisoned = None, False
    directory = run.trial(number)
    try:
        engine.fit(
            Assignment(**assignment),
            rungs=settings.rungs,
            directory=directory,
            report=report,
            resume_from=resume_from,
        )
    except Exception as error:  # whatever a trial raises is recorded as its failure, and the lane lives on
        failure = describe_failure(error)
        poisoned = isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)
        write_text(directory / "error.txt", traceback.format_exc())
    ray.get(settings.broker.finish.remote(settings.name, number, failure))
    if poisoned:
        raise RuntimeError(f"the GPU cannot be used by this process any more after: {failure}")


def describe_failure(error: Exception) -> str:
    """One line that a table can hold."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"out of memory: {_first_line(error)}"
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


def _facts(settings: LaneSettings, seconds: float) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": torch.cuda.get_device_name() if settings.on_gpu else "cpu",
        "threads": settings.threads,
        "load_seconds": seconds,
        "ready_at": time.time(),
    }


def _forget_process_group() -> None:
    """Leaves the process group of one that TorchTrainer made: accelerate would wrap each model in DDP for it."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
