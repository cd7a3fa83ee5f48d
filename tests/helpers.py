"""Values and stand-ins that several tests share."""

from pathlib import Path
from typing import Any

from raylora.config.assignment import Assignment
from raylora.run.events import Event, Failed, Finished, LaneUp, Promoted, Proposed, Reported, SessionStarted, Started
from raylora.run.metrics import RungMetrics

ROOT = Path(__file__).parent.parent

SESSION = SessionStarted(9, "host", 1)
LANE = LaneUp("0", 1, 8, {})


def assignment(**changes: Any) -> Assignment:
    values = {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "learning_rate": 5e-3,
        "target_modules": "all-linear",
        "use_rslora": False,
        "weight_decay": 0.0,
        "warmup_ratio": 0.0,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "seed": 0,
    }
    return Assignment(**{**values, **changes})


def metrics(step: int = 3, eval_loss: float = 2.0, **changes: Any) -> RungMetrics:
    values = {
        "epoch": 0.5,
        "train_loss": 2.5,
        "tokens_seen": 100 * step,
        "train_seconds": 1.0,
        "eval_seconds": 0.5,
        "other_seconds": 0.25,
        "peak_memory_mib": 100.0,
        "trainable_parameters": 1000,
        "checkpoint": f"trials/0000/checkpoint-{step}",
    }
    return RungMetrics(step=step, eval_loss=eval_loss, **{**values, **changes})


def proposed(number: int, repeat_of: int | None = None, max_steps: int = 9, **changes: Any) -> Proposed:
    return Proposed(number, assignment(**changes).model_dump(), {}, max_steps, repeat_of)


def reported(number: int, step: int, loss: float, segment: int = 1, **changes: Any) -> Reported:
    return Reported(number, segment, vars(metrics(step, loss, **changes)))


def history_of(number: int, losses: dict[int, float], end: str = "", **changes: Any) -> list[Event]:
    """Events of a trial that reports these losses, step -> loss, and then ends."""
    events: list[Event] = [proposed(number, **changes), Started(number, 1, "0", None)]
    for rung, (step, loss) in enumerate(losses.items(), 1):
        events += [reported(number, step, loss), Promoted(number, rung)]
    if losses:
        events.pop()  # nothing is above the last rung
    return events + {"finished": [Finished(number)], "failed": [Failed(number, "why")], "": []}[end]
