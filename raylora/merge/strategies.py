"""Ways to merge an update into NF4 weights, by name: each turns a layers into one rounded weight per layer.

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

from raylora.base import nf4
from raylora.merge.layer_reader import LayerReader
from raylora.merge.rounding import stochastic

Strategy = Callable[[LayerReader, str], Params4bit]
"""LayerReader and layer name -> the layer's merged weight."""


def peft(reader: LayerReader, name: str) -> Params4bit:
    """What peft's `merge_and_unload` does on a 4-bit base; here for comparison."""
    return nf4.quantize(reader.target(name)[0], reader.nf4_weight(name))


def requantize(reader: LayerReader, name: str) -> Params4bit:
    """Quantizes the original weight plus the update; its distance from the grid keeps the update on average."""
    return nf4.quantize(reader.original_target(name), reader.nf4_weight(name))


def stochastically(reader: LayerReader, name: str, *, seed: int) -> Params4bit:
    """Rounds up or down at random, as likely as the target is near; one seed gives one model."""
    generator = torch.Generator().manual_seed(seed * len(reader.layers) + reader.layers.index(name))
    grid = reader.nf4_weight(name)
    return nf4.store(stochastic(reader.target(name)[0], nf4.scale_of(grid), generator), grid)


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


def round_layers(strategy: Strategy, reader: LayerReader, save: Save) -> None:
    """Merges all layers, one in memory at a time."""
    for name in reader.layers:
        save(name, strategy(reader, name))


class RoundedWeights:
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


def update_kept(reader: LayerReader, rounded: RoundedWeights, device: str) -> dict[str, float]:
    """Share of each layer's update that its merged weight holds: its projection on the update, 1 being all of it."""
    shares = {}
    for name in reader.layers:
        before = nf4.dequantize(reader.nf4_weight(name))
        wanted = reader.target(name)[0] - before
        moved = nf4.dequantize(nf4.from_tensors(name, rounded.tensors(name), device)) - before
        shares[name] = float((moved * wanted).sum() / (wanted * wanted).sum().clamp_min(1e-30))
    return shares
