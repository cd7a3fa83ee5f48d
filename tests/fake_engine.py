"""An engine whose losses are made up in milliseconds, to test the search around it."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raylora.config.assignment import Assignment
from raylora.config.schema import SearchConfig
from raylora.run.metrics import RungMetrics


@dataclass(frozen=True)
class FakeEngine:
    """Loss falls with the learning rate and the step; some ranks misbehave.

    r = 32 runs out of memory, r = 13 kills its process once at the second rung, r = 99 fails always.
    """

    directory: Path
    step_seconds: float = 0.0
    reason: str | None = None

    @classmethod
    def load(cls, config: SearchConfig, **kwargs: Any) -> "FakeEngine":
        return cls(kwargs["cache_dir"])

    @classmethod
    def load_slow(cls, config: SearchConfig, **kwargs: Any) -> "FakeEngine":
        return cls(kwargs["cache_dir"], step_seconds=0.05)

    @classmethod
    def load_broken(cls, config: SearchConfig, **kwargs: Any) -> "FakeEngine":
        raise OSError("no weights here")

    def fit(
        self,
        assignment: Assignment,
        *,
        rungs: list[int],
        directory: Path,
        report: Callable[[RungMetrics], bool],
        resume_from: str | None,
        stepped: Callable[[int, int], None],
    ) -> None:
        if assignment.r == 99:
            raise ValueError("always fails\nsecond line")
        done = int(resume_from.rsplit("-", 1)[1]) if resume_from else 0
        for step in range(done + 1, rungs[-1] + 1):
            time.sleep(self.step_seconds)
            stepped(step, 100)
            if step not in rungs:
                continue
            if assignment.r == 32:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            checkpoint = directory / f"checkpoint-{step}"
            checkpoint.mkdir(parents=True, exist_ok=True)
            if report(self._report(assignment, step, str(checkpoint))):
                return
            if assignment.r == 13 and step == rungs[1] and not (self.directory / "killed").exists():
                self.directory.mkdir(parents=True, exist_ok=True)
                (self.directory / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)

    def _report(self, assignment: Assignment, step: int, checkpoint: str) -> RungMetrics:
        return RungMetrics(
            step=step,
            epoch=step / 10,
            eval_loss=1 / (1 + 1000 * assignment.learning_rate) + 1 / step,
            train_loss=1.0,
            tokens_seen=10 * step,
            train_seconds=0.1,
            eval_seconds=0.0,
            other_seconds=0.0,
            peak_memory_mib=1.0,
            trainable_parameters=assignment.r,
            checkpoint=checkpoint,
        )
