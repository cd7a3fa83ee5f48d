"""Defines the strategies that merge an update into NF4 weights. Each turns a layer into its rounded weight.

| name | adds the update to | rounds | needs |
|---|---|---|---|
| peft | the dequantized weight | to the nearest level, with new scales; this erases small updates | nothing |
| requantize | the original weight | to the nearest level, with new scales | the original |
| stochastic | the dequantized weight | up or down at random, correct on average | nothing |
| calibrated | the dequantized weight | so that the outputs of each layer stay near | training rows |
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
from raylora.run.activity import track

Strategy = Callable[[LayerReader, str], Params4bit]
"""Function of a layer reader and a layer's name that returns the layer's merged weight."""


def peft(reader: LayerReader, name: str) -> Params4bit:
    """Merge as peft's `merge_and_unload` does on a 4-bit base, for comparison."""
    return nf4.quantize(reader.target(name)[0], reader.nf4_weight(name))


def requantize(reader: LayerReader, name: str) -> Params4bit:
    """Quantize the original weight plus the update.

    The original weight lies off the grid, so that rounding to the nearest level keeps the update on average.
    """
    return nf4.quantize(reader.original_target(name), reader.nf4_weight(name))


def round_stochastically(reader: LayerReader, name: str, *, seed: int) -> Params4bit:
    """Round the dequantized weight plus the update up or down at random. One seed gives one model."""
    generator = torch.Generator().manual_seed(seed * len(reader.layers) + reader.layers.index(name))
    grid = reader.nf4_weight(name)
    return nf4.store(stochastic(reader.target(name)[0], nf4.scale_of(grid), generator), grid)


DRAWS = 3
"""Number of models that `stochastic` draws if the config names it. The best on validation rows is kept. Our choice."""

LAYER_BY_LAYER: dict[str, list[Strategy]] = {
    "peft": [peft],
    "requantize": [requantize],
    "stochastic": [partial(round_stochastically, seed=seed) for seed in range(DRAWS)],
}
"""Strategies that work on one layer at a time, and the draws of each. Only `stochastic` has several."""

SaveWeight = Callable[[str, Params4bit], None]
"""Function that takes a layer's name and merged weight."""


def round_layers(strategy: Strategy, reader: LayerReader, save: SaveWeight) -> None:
    """Merge all layers, with one layer in memory at a time."""
    for name in track(reader.layers, "rounding layers"):
        save(name, strategy(reader, name))


class RoundedWeights:
    """Merged weights of all layers on disk, until a model is chosen.

    Args:
        directory: an empty folder.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save(self, name: str, weight: Params4bit) -> None:
        """Store a layer's weight."""
        tensors = {key: tensor.cpu().contiguous() for key, tensor in nf4.to_tensors(name, weight).items()}
        save_file(tensors, self._directory / f"{name}.safetensors")

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Read a layer's weight as the tensors of a checkpoint: stored name -> tensor, on the CPU."""
        return load_file(self._directory / f"{name}.safetensors")

    def discard(self) -> None:
        """Delete the weights."""
        shutil.rmtree(self._directory)


def update_kept(reader: LayerReader, rounded: RoundedWeights, device: str) -> dict[str, float]:
    """Return the share of each layer's update that is in its merged weight: the projection on the update.

    Args:
        reader: gives base and target.
        rounded: merged weights of all layers.
        device: `cpu` or `cuda:0`.

    Returns:
        Layer -> share; 1 is the whole update.
    """
    shares = {}
    for name in reader.layers:
        base_weight = nf4.dequantize(reader.nf4_weight(name))
        update = reader.target(name)[0] - base_weight
        change = nf4.dequantize(nf4.from_tensors(name, rounded.tensors(name), device)) - base_weight
        shares[name] = float((change * update).sum() / (update * update).sum().clamp_min(1e-30))
    return shares
