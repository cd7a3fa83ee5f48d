"""Rounds all updated weights to NF4 in one forward pass, so that the merged model answers as the unmerged adapter does.

Each row is in the batch twice: one half passes through the layers that are rounded so far, the other through the
unmerged adapter. A hook rounds each layer when the batch reaches it. It picks the levels whose outputs from the merged
model's inputs are nearest to the adapter's outputs from its own inputs. So a layer also corrects the errors of the
layers before it.
"""

from functools import partial
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch.nn.functional import linear
from torch.nn.functional import pad as lengthen

from raylora.base.nf4 import scale_of, store
from raylora.base.onednn import fast_products
from raylora.data.rows import IGNORE
from raylora.errors import MergeError
from raylora.merge.layer_reader import LayerReader
from raylora.merge.rounding import CalibrationInputs, calibrated
from raylora.merge.strategies import SaveWeight
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
    hook = _RoundingHook(reader, save, present, weights)
    handles = []
    for name in reader.layers:
        layer = base.get_submodule(name)
        handles.append(layer.register_forward_pre_hook(partial(hook.before, name)))
        handles.append(layer.register_forward_hook(partial(hook.after, name)))
    try:
        with torch.inference_mode(), fast_products(adapter.device):
            base.get_decoder()(input_ids=input_ids.repeat(2, 1), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


class _RoundingHook:
    """Forward hooks that round each layer. The first half of the batch is the merged model's, the second the adapter's.

    Args:
        reader: reads the layers.
        save: takes each layer's name and rounded weight.
        present: True for tokens, False for padding, (rows, tokens), bool.
        weights: weight of each position, (rows, tokens).
    """

    def __init__(self, reader: LayerReader, save: SaveWeight, present: torch.Tensor, weights: torch.Tensor) -> None:
        self._reader, self._save, self._present = reader, save, present
        self._root_weights = weights[present].sqrt()[:, None]
        self._batch: torch.Tensor | None = None
        self._inputs: CalibrationInputs | None = None

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
        assert self._batch is not None and self._inputs is not None
        grid, base_weight = self._reader.nf4_weight(name), self._reader.base_weight(name)
        target, bias = self._reader.target(name, base_weight)
        rounded = calibrated(base_weight, target, scale_of(grid), self._inputs, sweeps=SWEEPS, gain_sweeps=GAIN_SWEEPS)
        self._save(name, store(rounded, grid))
        merged = self._batch.chunk(2)[0]
        bias = None if bias is None else bias.to(merged.dtype)
        return torch.cat([linear(merged, rounded.to(merged.dtype), bias), output])
