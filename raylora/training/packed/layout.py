"""Lays the rows of many trials end to end as one sequence of tokens, and maps its tokens to trials."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raylora.data.rows import IGNORE
from raylora.training.packed.adapter import Adapter
from raylora.training.packed.dropout import draw_mask, states, threshold
from raylora.training.packed.fused import MAX_RANK, FusedGroup, Owner, kernel_tables
from raylora.training.packed.group import Group, Share

ALIGNMENT = 16
"""Bytes to which tables in one buffer are aligned: `grouped_mm` demands it of its offsets."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one trial that pass through the base together."""

    adapter: Adapter
    input_ids: list[Tensor]
    """Token ids of each row, (length,), int64."""

    labels: list[Tensor]
    """Labels of each row, (length,), int64; IGNORE for a token without loss."""

    weight: float = 1.0
    """Factor of each token's loss: 1 / (tokens with loss of the whole optimizer step)."""

    key: int | None = None
    """Number of the trial's micro-batch, which seeds the dropout masks together with the adapter's seed; None turns
    dropout off."""

    @property
    def n_tokens(self) -> int:
        """Tokens of all rows, with and without loss."""
        return sum(len(row) for row in self.input_ids)


class Layout:
    """Sequence of tokens that holds the rows of all micro-batches.

    Args:
        micro_batches: at least one.
        device: where the base is.
        autocast: dtype of activations; None is the dtype of the adapters.
        grouped: True to place adapters of the same shapes side by side, for grouped products.
        layers: names of all layers that can be adapted, for the fused products of all adapters; None leaves them out.
        with_gradient: True to collect gradients.
        weigh_gradients: True to apply the weights of micro-batches to the gradients of adapters, and not to the loss.
            In float16, gradients of a loss that is divided by the number of tokens would underflow.
    """

    def __init__(
        self,
        micro_batches: list[MicroBatch],
        device: torch.device,
        autocast: torch.dtype | None,
        *,
        grouped: bool,
        layers: list[str] | None = None,
        with_gradient: bool = True,
        weigh_gradients: bool = False,
    ) -> None:
        order = _placed(micro_batches, grouped)
        placed = [micro_batches[index] for index in order]
        rows = [row for batch in placed for row in batch.input_ids]
        labels = torch.cat([row for batch in placed for row in batch.labels])
        lengths = torch.tensor([len(row) for row in rows])
        ends = lengths.cumsum(0)
        starts = ends - lengths
        n_tokens = [batch.n_tokens for batch in placed]
        stops = list(itertools.accumulate(n_tokens))
        shares = [
            Share(batch.adapter, slice(stop - n, stop), batch.key, batch.weight if weigh_gradients else 1.0)
            for batch, stop, n in zip(placed, stops, n_tokens, strict=True)
        ]
        alike = itertools.groupby(shares, key=lambda share: share.adapter.shape if grouped else share.owner)
        groups = [list(group) for _, group in alike]
        self.lengths: list[int] = lengths.tolist()
        """Tokens of each row."""

        self.longest = max(self.lengths)
        self.padding = len(rows) * self.longest - int(ends[-1])
        """Tokens that `pad` adds."""

        owner = torch.tensor(order).repeat_interleave(torch.tensor(n_tokens))
        # a position predicts the next token of its row, so a row's first token has no loss
        loss_mask = labels != IGNORE
        loss_mask[starts] = False
        predicted = loss_mask.nonzero()[:, 0]
        weights = torch.tensor([batch.weight for batch in micro_batches], dtype=torch.float64)
        inside = torch.arange(self.longest) < lengths[:, None]
        self._has_dropout = any(share.has_dropout for share in shares)
        owners = _owners(shares)
        # one adapter without dropout takes eight products of torch, and six kernels that take longer to launch
        is_worth_it = len(owners) > 1 or self._has_dropout
        self._is_fused = bool(layers) and is_worth_it and all(owner.adapter.padded_r <= MAX_RANK for owner in owners)
        precise = torch.promote_types(autocast or shares[0].adapter.parameters[0].dtype, torch.float32)
        tables = _moved(
            {
                "input_ids": torch.cat(rows),
                "position_ids": torch.arange(int(ends[-1])) - starts.repeat_interleave(lengths),
                "predicting": predicted - 1,
                "targets": labels[predicted],
                "owner": owner[predicted],
                "weights": weights,
                "token_weights": torch.ones(len(predicted)) if weigh_gradients else weights[owner[predicted]],
                "inside": inside.flatten().nonzero()[:, 0],
                "borders": torch.cat([starts, ends[-1:]]).to(torch.int32),
                "scaling": _of_tokens(shares, [share.scaling for share in shares], precise),
                **{f"ends {index}": _ends(group) for index, group in enumerate(groups)},
                **(_dropout_tables(shares) if self._has_dropout or self._is_fused else {}),
                **(kernel_tables(owners, layers) if self._is_fused and layers else {}),
            },
            device,
        )
        self.input_ids = tables["input_ids"]
        """Token ids of the sequence, (n_tokens,), int64."""

        self.position_ids = tables["position_ids"]
        """Position of each token in its row, (n_tokens,), int64."""

        self.borders = tables["borders"]
        """Position of each row's first token, and the number of tokens, (n_rows + 1,), int32."""

        self.predicting = tables["predicting"]
        """Positions whose next token has a loss, (n,), int64."""

        self.targets = tables["targets"]
        """Tokens to predict at these positions, (n,), int64."""

        self.weights = tables["weights"]
        """Weight of each micro-batch, (n_micro_batches,), float64."""

        self.token_weights = tables["token_weights"]
        """Weight of the loss of each token to predict, (n,), floating point."""

        self._tables, scaling = tables, tables["scaling"]
        self.groups: list[Group] | list[FusedGroup]
        """Adapters with the tokens of each, whose products are taken together."""

        if self._is_fused:
            self.groups = [FusedGroup(owners, tables, has_dropout=self._has_dropout)]
        else:
            self.groups = [
                Group(
                    group,
                    autocast,
                    ends=tables[f"ends {index}"],
                    scaling=scaling[group[0].tokens.start : group[-1].tokens.stop],
                    with_gradient=with_gradient,
                )
                for index, group in enumerate(groups)
            ]
        self._owner = tables["owner"]
        self._inside = tables["inside"]  # flat indexes of the positions of (rows, longest) that are not padding

    def dropout_mask(self, layer: int, n_features: int) -> Tensor | None:
        """Draw the dropout mask of one layer's input, (n_tokens, n_features), uint8.

        Returns:
            None if no token has dropout, or if the fused products draw it by themselves.
        """
        if self._is_fused or not self._has_dropout:
            return None
        return draw_mask(self._tables["states"], self._tables["thresholds"], layer, n_features)

    def pad(self, sequence: Tensor) -> Tensor:
        """Return the sequence as padded rows.

        Args:
            sequence: (n_tokens, ...).

        Returns:
            (rows, longest, ...), padded by zeros on the right, where causal attention cannot see them.
        """
        shape = (len(self.lengths), self.longest)
        if not self.padding:
            return sequence.unflatten(0, shape)
        padded = sequence.new_zeros(math.prod(shape), *sequence.shape[1:])
        return padded.index_copy(0, self._inside, sequence).unflatten(0, shape)

    def unpad(self, padded: Tensor) -> Tensor:
        """Return padded rows, (rows, longest, ...), as a sequence, (n_tokens, ...): the reverse of `pad`."""
        whole = padded.flatten(0, 1)
        return whole.index_select(0, self._inside) if self.padding else whole

    def sums(self, values: Tensor) -> Tensor:
        """Sum the values of each micro-batch's tokens with loss.

        Args:
            values: (n,), one for each of `targets`.

        Returns:
            (n_micro_batches,), float64, in the order in which the micro-batches were given.
        """
        total = torch.zeros(len(self.weights), dtype=torch.float64, device=values.device)
        return total.index_add_(0, self._owner, values.double())


def _placed(micro_batches: list[MicroBatch], grouped: bool) -> list[int]:
    """Return the order of the micro-batches in the sequence: those of an adapter together, and of its shapes too."""
    first: dict[Adapter, int] = {}
    for index, batch in enumerate(micro_batches):
        first.setdefault(batch.adapter, index)

    def place(index: int) -> tuple[Any, int, float]:
        batch = micro_batches[index]
        return batch.adapter.shape if grouped else (), first[batch.adapter], batch.weight

    return sorted(range(len(micro_batches)), key=place)


def _ends(shares: list[Share]) -> Tensor:
    """Return the position after the tokens of each adapter, from the start of its group, (n_adapters,), int32."""
    sizes: dict[tuple[Adapter, float], int] = {}
    for share in shares:
        sizes[share.owner] = sizes.get(share.owner, 0) + share.n_tokens
    return torch.tensor(list(sizes.values())).cumsum(0).to(torch.int32)


def _of_tokens(shares: list[Share], values: list[Any], dtype: torch.dtype) -> Tensor:
    """Return a value of each share for each of its tokens, (n_tokens, 1)."""
    n_tokens = torch.tensor([share.n_tokens for share in shares])
    return torch.tensor(values, dtype=dtype).repeat_interleave(n_tokens)[:, None]


def _dropout_tables(shares: list[Share]) -> dict[str, Tensor]:
    """Return state and threshold of each token, as `draw_mask` takes them."""
    thresholds = [threshold(share.adapter.dropout) if share.has_dropout else 0 for share in shares]
    return {
        "states": torch.cat([states(share.adapter.seed, share.key or 0, share.n_tokens) for share in shares]),
        "thresholds": _of_tokens(shares, thresholds, torch.int32),
    }


def _owners(shares: list[Share]) -> list[Owner]:
    """Return the adapters of the shares, with the tokens of all shares of each."""
    return [
        Owner(adapter, slice(some[0].tokens.start, some[-1].tokens.stop), weight)
        for (adapter, weight), some in (
            (owner, list(group)) for owner, group in itertools.groupby(shares, key=lambda share: share.owner)
        )
    ]


def _moved(tables: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move tables to a device by one copy, for which the host does not wait."""
    if device.type == "cpu":
        return tables
    places, size = {}, 0
    for name, table in tables.items():
        places[name] = size
        size += -(-table.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for name, table in tables.items():
        buffer[places[name] : places[name] + table.nbytes] = table.contiguous().flatten().view(torch.uint8)
    moved = buffer.to(device, non_blocking=True)
    return {
        name: moved[places[name] : places[name] + table.nbytes].view(table.dtype).view(table.shape)
        for name, table in tables.items()
    }
