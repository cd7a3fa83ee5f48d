"""Rows of the two tables of a search: one trial as it stands, and one report of one trial."""

import math
from dataclasses import dataclass

from raylora.config.assignment import Assignment
from raylora.run.metrics import RungMetrics


@dataclass(frozen=True)
class HistoryRow(RungMetrics):
    """One report of one trial; times are summed from the trial's start."""

    number: int
    reported_at: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class TrialRow:
    """One trial as it stands; columns of `trials.parquet`, see results/README.md."""

    number: int
    state: str
    reason: str | None
    r: int
    lora_alpha: float
    lora_dropout: float
    learning_rate: float
    target_modules: str
    use_rslora: bool
    weight_decay: float
    warmup_ratio: float
    lr_scheduler_type: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    seed: int
    step: int
    max_steps: int
    eval_loss: float | None
    train_loss: float | None
    trainable_parameters: int | None
    peak_memory_mib: float | None
    tokens_per_second: float | None
    train_seconds: float | None
    eval_seconds: float | None
    other_seconds: float | None
    wall_seconds: float | None
    lane: str | None
    checkpoint: str | None
    started_at: float
    ended_at: float | None
    repeat_of: int | None = None
    """Trial whose assignment this one trains again with another seed."""

    segment: int = 0
    """Stays on lanes so far."""

    def assignment(self) -> Assignment:
        """Return the trial's hyperparameters."""
        return Assignment(**{name: getattr(self, name) for name in Assignment.model_fields})

    @property
    def final_loss(self) -> float:
        """Validation loss at the full budget, nats per token; infinite for a trial that did not get there."""
        return self.eval_loss if self.state == "finished" and self.eval_loss is not None else math.inf
