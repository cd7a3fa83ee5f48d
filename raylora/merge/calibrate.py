"""Rounds every updated weight to NF4 in one forward pass, so that the model answers as the unmerged adapter does.

Each row goes through the model twice at once: as the adapter sees it, and as the layers that are rounded already leave
it. Each layer rounds itself as the two pass by: to the levels whose outputs, from the rounded layers' inputs, are
nearest to the adapter's from its own. So a layer also mends what those before it got wrong.
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
from raylora.merge.rounding import Inputs, calibrated
from raylora.merge.strategies import Save
from raylora.training.losses import pad

SWEEPS, GAIN_SWEEPS = 2, 3
"""Rounds of coordinate descent, and of those with a gain; more gain little (docs/merge.md)."""


PROMPT_WEIGHT = 0.3
"""Of a position whose next token bears no loss, against one whose does: what it answers matters only to attention."""


def calibrate(
    adapter: PeftModel,
    rows: datasets.Dataset,
    reader: LayerReader,
    save: Save,
    *,
    pad_token_id: int,
) -> None:
    """Rounds all layers.

    Args:
        adapter: base with the adapter, unmerged.
        rows: of training, columns `input_ids` and `labels`.
        layers: of the same base and adapter.
        save: takes each layer's name and rounded weight.
        pad_token_id: fills short rows on the right, where causal attention cannot see it.

    Raises:
        MergeError: a layer does not see one row of activations per row of tokens.
    """
    input_ids = pad(list(rows["input_ids"]), pad_token_id).to(adapter.device)
    targets = lengthen(pad(list(rows["labels"]), IGNORE)[:, 1:], (0, 1), value=IGNORE).to(adapter.device)
    lengths = torch.tensor([len(row) for row in rows["input_ids"]], device=adapter.device)
    present = torch.arange(input_ids.shape[1], device=adapter.device) < lengths[:, None]
    weights = torch.where(targets != IGNORE, 1.0, PROMPT_WEIGHT)
    base = adapter.get_base_model()
    rounding = _Rounding(reader, save, present, weights)
    hooks = []
    for name in reader.layers:
        layer = base.get_submodule(name)
        hooks.append(layer.register_forward_pre_hook(partial(rounding.before, name)))
        hooks.append(layer.register_forward_hook(partial(rounding.after, name)))
    try:
        with torch.inference_mode(), fast_products(adapter.device):
            base.get_decoder()(input_ids=input_ids.repeat(2, 1), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


class _Rounding:
    """What each layer does as the two passes go by: the first half of the rows is the rounded model's."""

    def __init__(self, reader: LayerReader, save: Save, present: torch.Tensor, weights: torch.Tensor) -> None:
        self._reader, self._save, self._present = reader, save, present
        self._root = weights[present].sqrt()[:, None]
        self._seen: torch.Tensor | None = None
        self._inputs: Inputs | None = None

    def before(self, name: str, _: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Learns from the layer's inputs, and lets it compute the adapter's half only."""
        (both,) = inputs
        rows, length = self._present.shape
        if both.shape[:2] != (2 * rows, length):
            raise MergeError(f"calibration needs inputs of shape (rows, tokens, features), and {name} has others")
        if both is not self._seen:  # queries, keys and values share theirs, and so do gates and ups
            mine, wanted = both.chunk(2)
            self._seen, self._inputs = (
                both,
                Inputs(mine[self._present] * self._root, wanted[self._present] * self._root),
            )
        return both.chunk(2)[1]

    def after(self, name: str, _: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Rounds the layer, and computes the other half with the rounded weight."""
        assert self._seen is not None and self._inputs is not None
        grid, before = self._reader.nf4_weight(name), self._reader.base_weight(name)
        target, bias = self._reader.target(name, before)
        rounded = calibrated(before, target, scale_of(grid), self._inputs, sweeps=SWEEPS, gain_sweeps=GAIN_SWEEPS)
        self._save(name, store(rounded, grid))
        mine = self._seen.chunk(2)[0]
        bias = None if bias is None else bias.to(mine.dtype)
        return torch.cat([linear(mine, rounded.to(mine.dtype), bias), output])
