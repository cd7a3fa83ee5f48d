"""Defines the hyperparameters that one trial may vary, and their bounds."""

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

Value = bool | int | float | str


class Assignment(BaseModel):
    """The values one trial is allowed to vary. Names follow peft and transformers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    r: Annotated[int, Field(ge=1, strict=True)]
    """Adapter rank, >= 1."""

    lora_alpha: Annotated[float, Field(gt=0)]
    """Numerator of the adapter's scaling, > 0."""

    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    """Drop probability on the adapter input, in [0, 1)."""

    learning_rate: Annotated[float, Field(gt=0, le=1)]
    """Peak learning rate of AdamW, in (0, 1]."""

    target_modules: str
    """`all-linear`, `attention`, `mlp`, or module names joined by commas."""

    use_rslora: bool
    """Scale by alpha/sqrt(r) instead of alpha/r."""

    weight_decay: Annotated[float, Field(ge=0)]
    """AdamW's decoupled weight decay."""

    warmup_ratio: Annotated[float, Field(ge=0, lt=1)]
    """Share of the budget spent raising the learning rate from 0."""

    lr_scheduler_type: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"
    ]
    """Schedule by its name in transformers."""

    per_device_train_batch_size: PositiveInt
    """Rows per forward pass."""

    gradient_accumulation_steps: PositiveInt
    """Forward passes per optimizer step."""

    seed: Annotated[int, Field(ge=0)]
    """Seed of adapter initialisation, dropout and row order."""


REQUIRED = ("r", "lora_alpha", "lora_dropout", "learning_rate")
"""Parameters that every space names."""


def hint(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
