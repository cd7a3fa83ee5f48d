"""A lane: one Ray Train worker on one GPU that keeps the base in memory and trains the trials it is sent."""

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

from raylora.config.assignment import Assignment
from raylora.config.schema import SearchConfig
from raylora.errors import RunDirectoryError
from raylora.quiet import quiet_libraries
from raylora.run.atomic import write_text
from raylora.run.directory import RunDirectory
from raylora.run.metrics import RungMetrics
from raylora.search.ray.broker import Job, Order
from raylora.training.choose import load_engine
from raylora.training.memory import MemoryEstimate
from raylora.training.packed.engine import PackedEngine

MAX_RESTARTS = 20
"""How often Ray Train brings a lane's process back before the lane counts as lost."""


class Engine(Protocol):
    """What trains one trial at a time. `raylora.training.TrlEngine` is one."""

    def fit(
        self,
        assignment: Assignment,
        *,
        rungs: list[int],
        directory: Path,
        report: Callable[[RungMetrics], bool],
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
    slots: int
    """Trials at once, at most."""

    memory: MemoryEstimate
    on_gpu: bool
    threads: int
    """CPU threads for torch; unset, lanes on one machine would fight for all cores."""

    load_engine: Callable[..., Engine | PackedEngine] = load_engine


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
            slots=settings.slots,
            memory=settings.memory,
        )
    except Exception as error:  # whatever keeps the base from loading would do so again: no restart
        ray.get(broker.lane_lost.remote(settings.name, describe_failure(error)))
        return
    # all that lives now lives for ever; without it a collection between trials takes 0.4 s to walk the libraries
    gc.freeze()
    facts = _facts(settings, engine, time.perf_counter() - began)
    link = Link(settings, ray.get(broker.lane_ready.remote(settings.name, facts)))
    if isinstance(engine, PackedEngine):
        serve_pack(engine, link, run)
    else:
        serve_one(engine, link, run)


def _check_shared(tokens_dir: Path) -> None:
    if not tokens_dir.is_dir():
        raise RunDirectoryError(
            f"node {socket.gethostname()} does not see {tokens_dir}; the run directory must lie on storage that all "
            "nodes share"
        )


class Link:
    """A lane's line to the broker. Orders are asked for ahead, so that a lane in training need not wait for them."""

    def __init__(self, settings: LaneSettings, life: int) -> None:
        self._broker, self._name, self._life = settings.broker, settings.name, life
        self._orders: list[Order] = []
        self._asked = self._ask()

    def orders(self, *, wait: bool) -> list[Order] | None:
        """What to do now; empty where there is nothing and `wait` is false. None: the search is over."""
        if not wait and not ray.wait([self._asked], timeout=0)[0]:
            return []
        orders = ray.get(self._asked)
        if orders is not None:
            self._asked = self._ask()
        return orders

    def next_order(self) -> Order | None:
        """Waits for one order. None: the search is over."""
        if not self._orders:
            self._orders = self.orders(wait=True) or []
        return self._orders.pop(0) if self._orders else None

    def report(self, number: int, report: RungMetrics, *, final: bool) -> None:
        """Hands a report to Tune, by way of the broker."""
        ray.get(self._broker.report.remote(number, {**asdict(report), "lane": self._name}, final=final))

    def fail(self, number: int, error: Exception, directory: Path) -> None:
        """Whatever a trial raises is recorded as its failure, and the lane lives on."""
        write_text(directory / "error.txt", "".join(traceback.format_exception(error)))
        ray.get(self._broker.fail.remote(number, describe_failure(error)))
        if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
            raise RuntimeError(f"the GPU cannot be used by this process any more after: {describe_failure(error)}")

    def give_back(self, checkpoints: dict[int, str | None]) -> None:
        """Sends trials back to the queue, for which there is no memory."""
        ray.get(self._broker.give_back.remote(self._name, checkpoints))

    def _ask(self) -> ray.ObjectRef:
        return self._broker.orders.remote(self._name, self._life)


def serve_one(engine: Engine, link: Link, run: RunDirectory) -> None:
    """Trains one trial after another until the broker closes."""
    while order := link.next_order():
        if order.job is not None:  # else it is of a trial that has failed meanwhile
            _fit(engine, link, run, order.job)


def _fit(engine: Engine, link: Link, run: RunDirectory, job: Job) -> None:
    def report(report: RungMetrics) -> bool:
        final = report.step >= job.rungs[-1]
        link.report(job.number, report, final=final)
        order = None if final else link.next_order()
        while order is not None and order.number != job.number:
            order = link.next_order()
        return order is None or order.what == "leave"

    directory = run.trial(job.number)
    try:
        engine.fit(
            Assignment(**job.assignment),
            rungs=job.rungs,
            directory=directory,
            report=report,
            resume_from=job.resume_from,
        )
    except Exception as error:
        link.fail(job.number, error, directory)


def serve_pack(engine: PackedEngine, link: Link, run: RunDirectory) -> None:
    """Trains whatever trials the broker sends, together, until it closes."""
    while (orders := link.orders(wait=not engine.training)) is not None:
        for order in orders:
            if order.job is not None:
                _join(engine, link, run, order.job)
            elif order.what == "go_on":
                engine.go_on(order.number)
            elif order.number in engine.trials:
                engine.remove(order.number)
        if engine.training:
            _step(engine, link, run)


def _join(engine: PackedEngine, link: Link, run: RunDirectory, job: Job) -> None:
    try:
        engine.add(
            job.number,
            Assignment(**job.assignment),
            rungs=job.rungs,
            directory=run.trial(job.number),
            resume_from=job.resume_from,
        )
    except torch.OutOfMemoryError as error:
        if engine.trials:
            link.give_back({job.number: job.resume_from})
        else:
            link.fail(job.number, error, run.trial(job.number))
    except Exception as error:
        link.fail(job.number, error, run.trial(job.number))


def _step(engine: PackedEngine, link: Link, run: RunDirectory) -> None:
    try:
        reports = engine.step()
    except torch.OutOfMemoryError as error:
        if len(engine.trials) > 1:
            link.give_back(engine.shrink())
            return
        reports = dict.fromkeys(engine.trials, error)
    for number, report in reports.items():
        if isinstance(report, RungMetrics):
            final = report.step >= engine.trials[number].rungs[-1]
            link.report(number, report, final=final)
        else:
            final = True
            link.fail(number, report, run.trial(number))
        if final:
            engine.remove(number)


def describe_failure(error: Exception) -> str:
    """One line that a table can hold."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"out of memory: {_first_line(error)}"
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


def _facts(settings: LaneSettings, engine: Engine | PackedEngine, seconds: float) -> dict[str, Any]:
    return {
        "engine": type(engine).__name__,
        "reason": getattr(engine, "reason", None),
        "slots": engine.slots if isinstance(engine, PackedEngine) else 1,
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
