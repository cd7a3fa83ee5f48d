"""Ways to merge an update into NF4 weights, by name: each turns a source into one rounded weight per layer.

| name | adds the update to | rounds | needs |
|---|---|---|---|
| peft | the dequantized weight | to the nearest level, with new scales | nothing; it erases small updates |
| requantize | the original weight | to the nearest level, with new scales | the original |
| stochastic | the dequantized weight | up or down at random, right on average | nothing |
| calibrated | the dequantized weight | so that each layer's outputs stay near | training rows |
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from bitsandbytes.nn import Params4bit
from safetensors.torch import load_file, save_file

from raylora import nf4
from raylora.rounding import stochastic
from raylora.source import Source

Strategy = Callable[[Source, str], Params4bit]
"""Source and layer name -> the layer's merged weight."""


def peft(source: Source, name: str) -> Params4bit:
    """What peft's `merge_and_unload` does on a 4-bit base; here for comparison."""
    return nf4.quantize(source.target(name)[0], source.grid(name))


def requantize(source: Source, name: str) -> Params4bit:
    """Quantizes the original weight plus the update; its distance from the grid keeps the update on average."""
    return nf4.quantize(source.original_target(name), source.grid(name))


def stochastically(source: Source, name: str, *, seed: int) -> Params4bit:
    """Rounds up or down at random, as likely as the target is near; one seed gives one model."""
    generator = torch.Generator().manual_seed(seed * len(source.layers) + source.layers.index(name))
    grid = source.grid(name)
    return nf4.store(stochastic(source.target(name)[0], nf4.scale_of(grid), generator), grid)


DRAWS = 3
"""Models that `stochastic` draws where it is asked for by name; the best on validation is kept."""

LAYER_BY_LAYER: dict[str, list[Strategy]] = {
    "peft": [peft],
    "requantize": [requantize],
    "stochastic": [partial(stochastically, seed=seed) for seed in range(DRAWS)],
}
"""Strategies that need no more than one layer at a time."""


Save = Callable[[str, Params4bit], None]
"""Takes a layer's name and merged weight."""


def round_layers(strategy: Strategy, source: Source, save: Save) -> None:
    """Merges all layers, one in memory at a time."""
    for name in source.layers:
        save(name, strategy(source, name))


class Rounded:
    """Merged weights of all layers, kept in an empty directory until a model is chosen."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save(self, name: str, weight: Params4bit) -> None:
        """Keeps a layer's weight."""
        tensors = {key: tensor.cpu().contiguous() for key, tensor in nf4.to_tensors(name, weight).items()}
        save_file(tensors, self._directory / f"{name}.safetensors")

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """A layer's weight as tensors of a checkpoint."""
        return load_file(self._directory / f"{name}.safetensors")

    def discard(self) -> None:
        """Gives the disk back."""
        shutil.rmtree(self._directory)


def update_kept(source: Source, rounded: Rounded, device: str) -> dict[str, float]:
    """Share of each layer's update that its merged weight holds: its projection on the update, 1 being all of it."""
    shares = {}
    for name in source.layers:
        before = nf4.dequantize(source.grid(name))
        wanted = source.target(name)[0] - before
        moved = nf4.dequantize(nf4.from_tensors(name, rounded.tensors(name), device)) - before
        shares[name] = float((moved * wanted).sum() / (wanted * wanted).sum().clamp_min(1e-30))
    return shares
