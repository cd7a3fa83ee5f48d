"""Rounds all updated weights to NF4 in one forward pass, so that the merged model answers as the unmerged adapter does.

Each row is in the batch twice: one half passes through the layers that are rounded so far, the other through the
unmerged adapter. A hook rounds each layer when the batch reaches it. It picks the levels whose outputs from the merged
model's inputs are nearest to the adapter's outputs from its own inputs. So a layer also corrects the errors of the
layers before it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch import nn
from torch.nn.functional import linear
from torch.nn.functional import pad as lengthen
from transformers import PreTrainedModel

from raylora.base.nf4 import scale_of, store
from raylora.base.onednn import fast_products
from raylora.data.rows import IGNORE
from raylora.errors import MergeError
from raylora.merge.layer_reader import LayerReader
from raylora.merge.rounding import CalibrationInputs, calibrated
from raylora.merge.strategies import SaveWeight
from raylora.run.activity import tell
from raylora.training.losses import pad

SWEEPS, GAIN_SWEEPS = 2, 3
"""Sweeps of coordinate descent without a gain, and with one. More of them improve little (docs/merge.md)."""

PROMPT_WEIGHT = 0.3
"""Weight of a position whose next token has no loss, against 1 for the others. Its outputs matter to attention alone.

Measured on six adapters (docs/merge.md, "Prompts weigh less").
"""


def calibrate(
    adapter: PeftModel,
    rows: datasets.Dataset,
    reader: LayerReader,
    save: SaveWeight,
    *,
    pad_token_id: int,
) -> None:
    """Round all layers.

    Args:
        adapter: base with the unmerged adapter.
        rows: training rows, columns `input_ids` and `labels`.
        reader: reads the layers of the same base and adapter.
        save: takes each layer's name and rounded weight.
        pad_token_id: fills short rows on the right, where causal attention cannot see it.

    Raises:
        MergeError: the inputs of a layer do not have the shape (rows, tokens, features).
    """
    input_ids = pad(list(rows["input_ids"]), pad_token_id).to(adapter.device)
    targets = lengthen(pad(list(rows["labels"]), IGNORE)[:, 1:], (0, 1), value=IGNORE).to(adapter.device)
    lengths = torch.tensor([len(row) for row in rows["input_ids"]], device=adapter.device)
    present = torch.arange(input_ids.shape[1], device=adapter.device) < lengths[:, None]
    weights = torch.where(targets != IGNORE, 1.0, PROMPT_WEIGHT)
    base = adapter.get_base_model()
    layers = {name: base.get_submodule(name) for name in reader.layers}
    hook = _RoundingHook(reader, save, _siblings(base, layers), present, weights)
    with _hooks(layers, before=hook.before, after=hook.after), torch.inference_mode(), fast_products(adapter.device):
        base.get_decoder()(input_ids=input_ids.repeat(2, 1), use_cache=False)


@contextmanager
def _hooks(layers: dict[str, nn.Module], **functions: Callable[..., Any]) -> Iterator[None]:
    """Call functions with each layer's name `before` and `after` its forward pass, inside the block."""
    handles = []
    for name, layer in layers.items():
        if "before" in functions:
            handles.append(layer.register_forward_pre_hook(partial(functions["before"], name)))
        if "after" in functions:
            handles.append(layer.register_forward_hook(partial(functions["after"], name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _siblings(base: PreTrainedModel, layers: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Return the layers that have the same inputs as each layer, itself included, in the order of the forward pass.

    Queries, keys and values share their inputs, and so do gates and ups. One token passes through the model to show it.
    """
    groups: list[list[str]] = []
    inputs: list[torch.Tensor] = []

    def note(name: str, _: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        if not inputs or arguments[0] is not inputs[-1]:
            groups.append([])
            inputs.append(arguments[0])
        groups[-1].append(name)

    with _hooks(layers, before=note), torch.inference_mode():
        base.get_decoder()(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=base.device), use_cache=False)
    return {name: group for group in groups for name in group}


class _RoundingHook:
    """Forward hooks that round each layer. The first half of the batch is the merged model's, the second the adapter's.

    Args:
        reader: reads the layers.
        save: takes each layer's name and rounded weight.
        siblings: layer -> all layers of the same inputs, which are rounded together.
        present: True for tokens, False for padding, (rows, tokens), bool.
        weights: weight of each position, (rows, tokens).
    """

    def __init__(
        self,
        reader: LayerReader,
        save: SaveWeight,
        siblings: dict[str, list[str]],
        present: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        self._reader, self._save, self._siblings, self._present = reader, save, siblings, present
        self._root_weights = weights[present].sqrt()[:, None]
        self._n_rounded = 0
        self._batch: torch.Tensor | None = None
        self._inputs: CalibrationInputs | None = None
        self._rounded: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
        """Rounded weight and bias of layers that are not reached yet, but a sibling is."""

    def before(self, name: str, _: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Compute statistics of the layer's inputs, and return the adapter's half as the layer's input."""
        (batch,) = inputs
        rows, length = self._present.shape
        if batch.shape[:-1] not in ((2 * rows, length), (2 * rows * length,)):
            raise MergeError(
                f"calibration needs inputs of shape (rows, tokens, features), found {tuple(batch.shape)} in {name}"
            )
        if batch is not self._batch:  # queries, keys and values share their inputs, and so do gates and ups
            merged, target = batch.view(2 * rows, length, -1).chunk(2)
            self._batch, self._inputs = (
                batch,
                CalibrationInputs(
                    merged[self._present] * self._root_weights, target[self._present] * self._root_weights
                ),
            )
        return batch.chunk(2)[1]

    def after(self, name: str, _: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Round the layer, and put the merged model's outputs before the adapter's."""
        assert self._batch is not None
        if name not in self._rounded:
            self._round(self._siblings.get(name, [name]))
        rounded, bias = self._rounded.pop(name)
        merged = self._batch.chunk(2)[0]
        bias = None if bias is None else bias.to(merged.dtype)
        return torch.cat([linear(merged, rounded.to(merged.dtype), bias), output])

    def _round(self, names: list[str]) -> None:
        """Round layers of the same inputs, which takes as many steps as to round one of them."""
        assert self._inputs is not None
        grids = [self._reader.nf4_weight(name) for name in names]
        base_weights = [self._reader.base_weight(name) for name in names]
        targets = [self._reader.target(*pair) for pair in zip(names, base_weights, strict=True)]
        rounded = calibrated(
            torch.cat(base_weights),
            torch.cat([weight for weight, _ in targets]),
            torch.cat([scale_of(grid) for grid in grids]),
            self._inputs,
            sweeps=SWEEPS,
            gain_sweeps=GAIN_SWEEPS,
        )
        weights = rounded.split([len(weight) for weight in base_weights])
        for name, grid, weight, (_, bias) in zip(names, grids, weights, targets, strict=True):
            self._save(name, store(weight, grid))
            self._rounded[name] = weight, bias
        self._n_rounded += len(names)
        tell("rounding layers by calibration", self._n_rounded, len(self._reader.layers))
