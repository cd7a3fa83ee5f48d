"""Defines what a trial reports when it reaches a rung, whichever engine trains it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RungMetrics:
    """Metrics of one trial at one rung."""

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

    step_losses: list[float] = field(default_factory=list, kw_only=True)
    """Training loss of each step since the last report, nats per token."""

    step_learning_rates: list[float] = field(default_factory=list, kw_only=True)
    """Learning rate of each step since the last report."""
