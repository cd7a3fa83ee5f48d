"""Turns the controller's orders into training steps on an engine, and their outcome into news. Knows nothing of Ray."""

import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from raylora.config.assignment import Assignment
from raylora.errors import first_line
from raylora.run.atomic import write_text
from raylora.run.directory import RunDirectory
from raylora.run.metrics import RungMetrics
from raylora.search.messages import Failure, Leave, News, Order, Ready, Report, Return, Start
from raylora.training.memory import OUT_OF_MEMORY
from raylora.training.packed.engine import PackedEngine


class Engine(Protocol):
    """An engine that trains one trial at a time; `raylora.training.trl.TrlEngine` is one."""

    def fit(
        self,
        assignment: Assignment,
        *,
        rungs: list[int],
        directory: Path,
        report: Callable[[RungMetrics], bool],
        resume_from: str | None,
    ) -> None: ...


class Link(Protocol):
    """A lane's line to the controller; `raylora.search.ray.lane.BrokerLink` is one."""

    def exchange(self, news: list[News]) -> list[Order] | None:
        """Send news and wait for the answer: orders, or None once the search is over."""

    def poll(self, *, wait: bool) -> list[Order] | None:
        """Return orders that came without being asked for; empty if there are none and `wait` is false."""


def serve_pack(engine: PackedEngine, link: Link, run: RunDirectory, ready: Ready) -> None:
    """Train the trials that the controller sends, together, until the search is over."""
    pack = _Pack(engine, run)
    orders = link.exchange([ready])
    while orders is not None:
        news = [news for order in orders for news in pack.obey(order)] + pack.step()
        orders = link.exchange(news) if news else link.poll(wait=not engine.trials)


class _Pack:
    """Turns orders and steps into news."""

    def __init__(self, engine: PackedEngine, run: RunDirectory) -> None:
        self._engine, self._run = engine, run
        self._starts: dict[int, Start] = {}
        """Order that each trial on the lane was started by."""

    def obey(self, order: Order) -> list[News]:
        """Take a trial in or out."""
        if isinstance(order, Leave):
            self._remove(order.number)
            return []
        self._starts[order.number] = order
        try:
            self._engine.add(
                order.number,
                Assignment(**order.assignment),
                rungs=order.rungs,
                directory=self._run.trial(order.number),
                resume_from=absolute(self._run, order.resume_from),
            )
        except Exception as error:
            return [self._drop(order.number, error)]
        return []

    def step(self) -> list[News]:
        """Train all trials for one step; validate those that have reached a rung."""
        engine = self._engine
        if not engine.trials:
            return []
        try:
            found = engine.step()
        except OUT_OF_MEMORY as error:
            if len(engine.trials) == 1:
                return [self._drop(next(iter(engine.trials)), error)]
            return [self._shrink(describe_failure(error))]
        except torch.AcceleratorError:
            raise  # nothing more can be asked of this process
        except Exception as error:
            alone = len(engine.trials) == 1
            faults = dict.fromkeys(engine.trials, error) if alone else engine.faults()
            if not faults:  # the trials fail only together, as where memory is short
                return [self._shrink(describe_failure(error))]
            return [self._drop(number, fault) for number, fault in faults.items()]
        return [self._tell(number, metrics) for number, metrics in found.items()]

    def _tell(self, number: int, found: RungMetrics | Exception) -> News:
        if isinstance(found, RungMetrics):
            return Report(number, self._starts[number].segment, relative_to(self._run, found))
        return self._drop(number, found)

    def _drop(self, number: int, error: Exception) -> News:
        start = self._starts[number]
        alone = not (self._engine.trials.keys() - {number})
        self._remove(number)
        return what_failed(start, error, self._run, alone=alone, slots=max(1, len(self._engine.trials)))

    def _shrink(self, reason: str) -> Return:
        checkpoints = self._engine.shrink()
        segments = {number: self._starts.pop(number).segment for number in checkpoints}
        relative = {number: relative_path(self._run, checkpoint) for number, checkpoint in checkpoints.items()}
        return Return(relative, segments, reason, slots=self._engine.slots)

    def _remove(self, number: int) -> None:
        self._starts.pop(number, None)
        if number in self._engine.trials:
            self._engine.remove(number)


def serve_one(engine: Engine, link: Link, run: RunDirectory, ready: Ready) -> None:
    """Train one trial after another until the search is over."""
    orders = link.exchange([ready])
    while orders is not None:
        start = next((order for order in orders if isinstance(order, Start)), None)
        orders = _fit(engine, link, run, start) if start is not None else link.poll(wait=True)


def _fit(engine: Engine, link: Link, run: RunDirectory, start: Start) -> list[Order] | None:
    """Return the orders that ended the trial's stay; None once the search is over."""
    orders: list[Order] | None = []

    def report(metrics: RungMetrics) -> bool:
        nonlocal orders
        orders = link.exchange([Report(start.number, start.segment, relative_to(run, metrics))])
        return orders is None or Leave(start.number) in orders

    try:
        engine.fit(
            Assignment(**start.assignment),
            rungs=start.rungs,
            directory=run.trial(start.number),
            report=report,
            resume_from=absolute(run, start.resume_from),
        )
    except Exception as error:
        return link.exchange([what_failed(start, error, run, alone=True, slots=1)])
    return orders


def what_failed(start: Start, error: Exception, run: RunDirectory, *, alone: bool, slots: int) -> News:
    """Return the news of an error that took one trial out of its lane.

    A trial that lacks memory beside others goes back to the queue, and one whose files or disk failed too. Any other
    error is the trial's own: its traceback is kept in `error.txt`.

    Args:
        start: the order that started the trial.
        error: what it raised.
        run: the run directory.
        alone: True if no other trial was on the lane.
        slots: trials that are left on the lane, at least 1.

    Raises:
        RuntimeError: the GPU cannot be used by this process any more; Ray Train starts another.
    """
    reason = describe_failure(error)
    with suppress(OSError):
        write_text(run.trial(start.number) / "error.txt", "".join(traceback.format_exception(error)))
    if isinstance(error, OUT_OF_MEMORY) and not alone:
        return Return({start.number: None}, {start.number: start.segment}, reason, slots=slots)
    if isinstance(error, OSError):
        reason = f"trial {start.number}: {reason}"
        return Return({start.number: None}, {start.number: start.segment}, reason, machine_fault=True)
    if isinstance(error, torch.AcceleratorError) and not isinstance(error, OUT_OF_MEMORY):
        raise RuntimeError(f"the GPU cannot be used by this process any more after: {reason}")
    return Failure(start.number, start.segment, reason)


def describe_failure(error: Exception) -> str:
    """Return one line that a table can hold."""
    if isinstance(error, OUT_OF_MEMORY):
        return f"out of memory: {first_line(error)[:300]}"
    return f"{type(error).__name__}: {first_line(error)[:300]}"


def relative_to(run: RunDirectory, metrics: RungMetrics) -> RungMetrics:
    """Return metrics whose checkpoint is named relative to the run directory, which may be moved."""
    return replace(metrics, checkpoint=relative_path(run, metrics.checkpoint) or "")


def relative_path(run: RunDirectory, checkpoint: str | None) -> str | None:
    """Return a checkpoint's path relative to the run directory."""
    return None if checkpoint is None else os.path.relpath(checkpoint, run.path)


def absolute(run: RunDirectory, checkpoint: str | None) -> str | None:
    """Return a checkpoint's path on this machine."""
    return None if checkpoint is None else str(run.path / checkpoint)
