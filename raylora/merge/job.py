"""Describes the merge of one adapter: base, adapter, settings, rows and output folders."""

from dataclasses import dataclass
from pathlib import Path

from raylora.config.schema import BaseModelSection, MergeSection


@dataclass(frozen=True)
class MergeJob:
    """Inputs and outputs of the merge of one adapter."""

    base: BaseModelSection
    adapter: Path
    """Directory that peft wrote."""

    outputs: dict[str, Path]
    """Format (`nf4`, `bf16`, `residual`) -> directory to write."""

    folder: Path
    """Folder for rounded weights while strategies are compared."""

    settings: MergeSection
    cache_dir: Path
    """Folder of converted and quantized bases."""

    device: str
    """`cpu` or `cuda:0`."""

    tokens_dir: Path | None
    """Token cache of train, validation and held-out rows; None measures nothing."""

    batch_size: int
    """Rows per forward pass of a measurement."""

    measures_heldout: bool = False
    """Measure the held-out rows too. After a search, the held-out check does it."""
