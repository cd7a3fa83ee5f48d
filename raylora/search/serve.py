"""Turns the controller's orders into training steps on an engine, and their outcome into news. Knows nothing of Ray."""

import os
import time
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
from raylora.run.outage import is_of_the_disk
from raylora.search.messages import Failure, Leave, News, Order, Pulse, Ready, Report, Return, Start
from raylora.training.memory import OUT_OF_MEMORY, peak_memory_mib
from raylora.training.packed.engine import PackedEngine

PULSE_SECONDS = 1.0
"""Least time between two pulses."""


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
        stepped: Callable[[int, int], None],
    ) -> None: ...


class Link(Protocol):
    """A lane's line to the controller; `raylora.search.ray.lane.BrokerLink` is one."""

    def exchange(self, news: list[News]) -> list[Order] | None:
        """Send news and wait for the answer: orders, or None once the search is over."""

    def poll(self, *, wait: bool) -> list[Order] | None:
        """Return orders that came without being asked for; empty if there are none and `wait` is false."""

    def beat(self, pulse: Pulse) -> None:
        """Send a pulse, and do not wait for it."""


class Heart:
    """Sends pulses of a lane: at most one a second, and one where a trial is validated next.

    Args:
        link: takes them.
        clock: gives seconds.
    """

    def __init__(self, link: Link, clock: Callable[[], float] = time.monotonic) -> None:
        self._link, self._clock = link, clock
        self._sent_at, self._n_tokens = clock(), 0

    def beat(self, steps: dict[int, int], n_tokens: int, *, at_rung: bool = False) -> None:
        """Take note of a step of the engine, and send a pulse if one is due.

        Args:
            steps: trial -> its step.
            n_tokens: tokens of this step, of all trials together.
            at_rung: a trial has reached a rung, and is validated next.
        """
        self._n_tokens += n_tokens
        seconds = self._clock() - self._sent_at
        if seconds >= PULSE_SECONDS or (at_rung and seconds > 0):
            self._link.beat(Pulse(steps, self._n_tokens / seconds, peak_memory_mib()))
            self._sent_at, self._n_tokens = self._clock(), 0


def serve_pack(engine: PackedEngine, link: Link, run: RunDirectory, ready: Ready) -> None:
    """Train the trials that the controller sends, together, until the search is over."""
    pack = _Pack(engine, run, Heart(link))
    orders = link.exchange([ready])
    while orders is not None:
        news = [news for order in orders for news in pack.obey(order)] + pack.step()
        orders = link.exchange(news) if news else link.poll(wait=not engine.trials)


class _Pack:
    """Turns orders and steps into news."""

    def __init__(self, engine: PackedEngine, run: RunDirectory, heart: Heart) -> None:
        self._engine, self._run, self._heart = engine, run, heart
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
                resume_from=fetched_path(self._run, order.resume_from),
            )
        except Exception as error:
            return [self._drop(order.number, error)]
        return []

    def step(self) -> list[News]:
        """Train all trials for one step; validate those that have reached a rung."""
        engine = self._engine
        if not engine.trials:
            self._heart.beat({}, 0)
            return []
        try:
            found = engine.step(stepped=self._beat)
        except OUT_OF_MEMORY as error:
            _forget_tensors(error)
            if len(engine.trials) > 1:
                return [self._shrink(describe_failure(error))]
            if engine.pack.is_dense:
                engine.shrink()
                return []  # once more, without the dense copy
            return [self._drop(next(iter(engine.trials)), error)]
        except torch.AcceleratorError:
            raise  # nothing more can be asked of this process
        except Exception as error:
            _forget_tensors(error)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # an AcceleratorError if the device is lost to this process
            alone = len(engine.trials) == 1
            faults = dict.fromkeys(engine.trials, error) if alone else engine.faults()
            if not faults:  # the trials fail only together, as where memory is short
                return [self._shrink(describe_failure(error))]
            return [self._drop(number, fault) for number, fault in faults.items()]
        return [self._tell(number, metrics) for number, metrics in found.items()]

    def _beat(self) -> None:
        trials = self._engine.trials
        at_rung = any(trial.is_due for trial in trials.values())
        steps = {number: trial.step for number, trial in trials.items()}
        self._heart.beat(steps, self._engine.tokens_of_step, at_rung=at_rung)

    def _tell(self, number: int, found: RungMetrics | Exception) -> News:
        if isinstance(found, Exception):
            return self._drop(number, found)
        try:
            return Report(number, self._starts[number].segment, kept(self._run, found))
        except OSError as error:
            return self._drop(number, error)

    def _drop(self, number: int, error: Exception) -> News:
        start = self._starts[number]
        alone = not (self._engine.trials.keys() - {number})
        self._remove(number)
        return what_failed(start, error, self._run, alone=alone, slots=max(1, len(self._engine.trials)))

    def _shrink(self, reason: str) -> Return:
        checkpoints = self._engine.shrink()
        segments = {number: self._starts.pop(number).segment for number in checkpoints}
        relative = {number: self._kept_path(checkpoint) for number, checkpoint in checkpoints.items()}
        return Return(relative, segments, reason, slots=self._engine.slots)

    def _kept_path(self, checkpoint: str | None) -> str | None:
        """Return the name of a checkpoint that can be resumed from; None where there is none."""
        try:
            return None if checkpoint is None else kept_path(self._run, checkpoint)
        except OSError:
            return None  # the one before is still there

    def _remove(self, number: int) -> None:
        self._starts.pop(number, None)
        if number in self._engine.trials:
            self._engine.remove(number)


def _forget_tensors(error: Exception) -> None:
    """Forget the local variables of a failed pass, whose activations would stay for as long as the error is handled."""
    traceback.clear_frames(error.__traceback__)


def serve_one(engine: Engine, link: Link, run: RunDirectory, ready: Ready) -> None:
    """Train one trial after another until the search is over."""
    orders = link.exchange([ready])
    while orders is not None:
        start = next((order for order in orders if isinstance(order, Start)), None)
        orders = _fit(engine, link, run, start) if start is not None else link.poll(wait=True)


def _fit(engine: Engine, link: Link, run: RunDirectory, start: Start) -> list[Order] | None:
    """Return the orders that ended the trial's stay; None once the search is over."""
    orders: list[Order] | None = []
    heart = Heart(link)

    def report(metrics: RungMetrics) -> bool:
        nonlocal orders
        orders = link.exchange([Report(start.number, start.segment, kept(run, metrics))])
        return orders is None or Leave(start.number) in orders

    try:
        engine.fit(
            Assignment(**start.assignment),
            rungs=start.rungs,
            directory=run.trial(start.number),
            report=report,
            resume_from=fetched_path(run, start.resume_from),
            stepped=lambda step, n_tokens: heart.beat({start.number: step}, n_tokens, at_rung=step in start.rungs),
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
    if isinstance(error, OSError) or is_of_the_disk(error):
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


def kept(run: RunDirectory, metrics: RungMetrics) -> RungMetrics:
    """Return metrics with the checkpoint's name as of `kept_path`.

    Raises:
        RunDirectoryError: object storage does not take the checkpoint.
    """
    return replace(metrics, checkpoint=kept_path(run, metrics.checkpoint))


def kept_path(run: RunDirectory, checkpoint: str) -> str:
    """Return a new checkpoint's path relative to the run directory, which may be moved.

    If the run lies in object storage, the checkpoint is there when this returns: any node may be told to go on with it.

    Raises:
        RunDirectoryError: object storage does not take it.
    """
    name = os.path.relpath(checkpoint, run.path)
    run.push_checkpoint(name)
    return name


def fetched_path(run: RunDirectory, checkpoint: str | None) -> str | None:
    """Return a checkpoint's path on this machine, downloaded if the run lies in object storage.

    Raises:
        RunDirectoryError: it is not in object storage, or that cannot be reached.
    """
    if checkpoint is None:
        return None
    run.pull_checkpoint(checkpoint)
    return str(run.path / checkpoint)
