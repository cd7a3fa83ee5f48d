"""Defines the hyperparameters that a trial may vary, and their bounds."""

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

Value = bool | int | float | str
"""Value of one hyperparameter. Optuna's categorical choices allow no lists."""


Schedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"
]
"""Learning rate schedule, by its name in transformers."""


class Assignment(BaseModel):
    """Hyperparameters of one trial. Names follow peft and transformers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    r: Annotated[int, Field(ge=1, strict=True)]
    """Adapter rank, >= 1."""

    lora_alpha: Annotated[float, Field(gt=0)]
    """LoRA alpha, > 0: numerator of the adapter's scaling."""

    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    """Drop probability on the adapter input, in [0, 1)."""

    learning_rate: Annotated[float, Field(gt=0, le=1)]
    """Peak learning rate of AdamW, in (0, 1]."""

    target_modules: str
    """Modules to adapt: `all-linear`, `attention`, `mlp`, or names joined by commas."""

    use_rslora: bool
    """True to scale by alpha/sqrt(r) instead of alpha/r (rsLoRA, arXiv:2312.03732)."""

    weight_decay: Annotated[float, Field(ge=0)]
    """Decoupled weight decay of AdamW, >= 0."""

    warmup_ratio: Annotated[float, Field(ge=0, lt=1)]
    """Share of the full budget in which the learning rate rises from 0, in [0, 1)."""

    lr_scheduler_type: Schedule
    """Learning rate schedule, by its name in transformers."""

    per_device_train_batch_size: PositiveInt
    """Rows per micro-batch, >= 1."""

    gradient_accumulation_steps: PositiveInt
    """Micro-batches per optimizer step, >= 1."""

    seed: Annotated[int, Field(ge=0)]
    """Seed of adapter initialisation, dropout and row order, >= 0."""


REQUIRED = ("r", "lora_alpha", "lora_dropout", "learning_rate")
"""Hyperparameters that every search space must name."""


def hint(name: str, known: Any) -> str:
    """Return the end of an error message for an unknown name: the closest known name, or all known names."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
