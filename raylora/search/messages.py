"""Defines what lanes and the controller tell each other. All of it pickles small."""

from dataclasses import dataclass, field
from typing import Any

from raylora.run.metrics import RungMetrics


@dataclass(frozen=True)
class Start:
    """Order to train a trial, from its start or from a checkpoint."""

    number: int
    segment: int
    assignment: dict[str, Any]
    rungs: list[int]
    """Optimizer steps at which to validate, save and report, ascending; the last is the full budget."""

    resume_from: str | None = None
    """Checkpoint, relative to the run directory."""


@dataclass(frozen=True)
class Leave:
    """Order to take a trial out of the lane. A trial that has reported and is not told to leave goes on."""

    number: int


Order = Start | Leave


@dataclass(frozen=True)
class Ready:
    """News that the lane's process has loaded the base."""

    slots: int
    facts: dict[str, Any]
    """Entry of the lane in `lanes.json`; `node` is Ray's id of its node."""


@dataclass(frozen=True)
class Report:
    """News that a trial has reached a rung, and waits for the answer."""

    number: int
    segment: int
    metrics: RungMetrics


@dataclass(frozen=True)
class Failure:
    """News that a trial has failed and left the lane."""

    number: int
    segment: int
    reason: str


@dataclass(frozen=True)
class Return:
    """News that trials have left the lane unfinished, to go on later or elsewhere."""

    checkpoints: dict[int, str | None]
    """Number -> checkpoint saved now, relative to the run directory; None leaves the newest one as it was."""

    segments: dict[int, int]
    reason: str
    slots: int | None = None
    """Slots that the lane has from now on, where memory ran short."""

    machine_fault: bool = False
    """True if disk, files or device failed, for which no hyperparameter is to blame."""


@dataclass(frozen=True)
class Gone:
    """News that the lane's process has ended. Another one follows, as soon as there is room for it."""

    reason: str
    node_lost: bool
    """True if its node is gone too, so that no trial may have killed it."""


@dataclass(frozen=True)
class Lost:
    """News that the lane is gone for good."""

    reason: str


@dataclass(frozen=True)
class Pulse:
    """State of a lane between two reports. It is for the view alone, and may be lost."""

    steps: dict[int, int]
    """Trial -> optimizer steps that it has taken."""

    tokens_per_second: float
    """Tokens of all its trials since the last pulse."""

    memory_mib: float
    """Peak memory of the process, or of its GPU."""

    busy: str | None = None
    """Work of the lane while it does not train, in words: it loads the base, or waits for a disk."""


News = Ready | Report | Failure | Return | Gone | Lost


@dataclass(frozen=True)
class Batch:
    """News of one process of a lane, sent together; the process waits for the answer."""

    lane: str
    process: int
    """Counts the lane's processes from 1."""

    round: int
    """Counts the batches of this process from 1."""

    news: list[News] = field(default_factory=list)
