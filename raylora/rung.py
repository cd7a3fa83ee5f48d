"""What a trial says of itself when it reaches a rung, whichever engine trains it."""

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from raylora.config import TrainingSection
from raylora.memory import MIB


@dataclass(frozen=True)
class Report:
    """What a trial knows of itself at one rung."""

    step: int
    """Optimizer steps done."""

    epoch: float
    """Passes over the training rows done."""

    eval_loss: float
    """Validation loss in nats per token; before the full budget on `validated_rows`."""

    train_loss: float
    """Mean training loss since the last report, nats per token."""

    tokens_seen: int
    """Training tokens so far, without padding."""

    train_seconds: float
    """Time in training steps since the last report."""

    eval_seconds: float
    """Time in validation since the last report."""

    other_seconds: float
    """All other time since the last report, or since the trial came to the engine: set-up, logging, saving."""

    peak_memory_mib: float
    """Peak of the process that trains it, so far: GPU memory allocated, or resident memory on a CPU."""

    trainable_parameters: int
    checkpoint: str
    """Directory to resume from; holds the adapter in peft's format."""


def validated_rows(lengths: list[int], step: int, rungs: list[int], training: TrainingSection) -> list[int]:
    """Validation rows for a trial at a rung, shorter ones first: all at the full budget, often fewer before it.

    One for each row trained on, at most: training on a row takes as long as three forward passes, so that validation
    takes a third of the time of the training that it judges. Fewer rows are spread evenly over the lengths, and are the
    same for all trials at a rung, whatever their batch sizes.

    Args:
        lengths: tokens of each validation row.
        step: optimizer steps done.
        rungs: of the trial; the last is its full budget.
        training: settings that all trials share.
    """
    rows = sorted(range(len(lengths)), key=lengths.__getitem__)
    n_trained = step * training.per_device_train_batch_size * training.gradient_accumulation_steps
    n = len(rows) if step >= rungs[-1] else min(len(rows), n_trained)
    return [rows[i * len(rows) // n] for i in range(n)]


def reset_peak_memory() -> None:
    """Starts a new measurement of `peak_memory_mib`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # where the kernel does not allow it, the process's peak so far stands
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the present size, proc(5)


def peak_memory_mib() -> float:
    """Peak since the last reset in MiB: GPU memory allocated, or on a CPU this process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MIB
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return math.nan
