"""Lays the rows of many trials end to end as one sequence of tokens, and maps its tokens to trials."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raylora.data.rows import IGNORE
from raylora.training.packed.adapter import Adapter
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
        self.longest = int(lengths.max())
        owner = torch.tensor(order).repeat_interleave(torch.tensor(n_tokens))
        # a position predicts the next token of its row, so a row's first token has no loss
        loss_mask = labels != IGNORE
        loss_mask[starts] = False
        predicted = loss_mask.nonzero()[:, 0]
        weights = torch.tensor([batch.weight for batch in micro_batches], dtype=torch.float64)
        inside = torch.arange(self.longest) < lengths[:, None]
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
                **{f"ends {index}": _ends(group) for index, group in enumerate(groups)},
                **{f"scaling {index}": _scaling(group, precise) for index, group in enumerate(groups)},
            },
            device,
        )
        self.input_ids = tables["input_ids"]
        """Token ids of the sequence, (n_tokens,), int64."""

        self.position_ids = tables["position_ids"]
        """Position of each token in its row, (n_tokens,), int64."""

        self.predicting = tables["predicting"]
        """Positions whose next token has a loss, (n,), int64."""

        self.targets = tables["targets"]
        """Tokens to predict at these positions, (n,), int64."""

        self.weights = tables["weights"]
        """Weight of each micro-batch, (n_micro_batches,), float64."""

        self.token_weights = tables["token_weights"]
        """Weight of the loss of each token to predict, (n,), floating point."""

        self.groups = [
            Group(
                group,
                autocast,
                ends=tables[f"ends {index}"],
                scaling=tables[f"scaling {index}"],
                with_gradient=with_gradient,
            )
            for index, group in enumerate(groups)
        ]
        self._owner = tables["owner"]
        self._inside = tables["inside"]  # flat indexes of the positions of (rows, longest) that are not padding
        self._n_rows = len(rows)

    def pad(self, sequence: Tensor) -> Tensor:
        """Return the sequence as padded rows.

        Args:
            sequence: (n_tokens, ...).

        Returns:
            (rows, longest, ...), padded by zeros on the right, where causal attention cannot see them.
        """
        padded = sequence.new_zeros(self._n_rows * self.longest, *sequence.shape[1:])
        return padded.index_copy(0, self._inside, sequence).unflatten(0, (self._n_rows, self.longest))

    def unpad(self, padded: Tensor) -> Tensor:
        """Return padded rows, (rows, longest, ...), as a sequence, (n_tokens, ...): the reverse of `pad`."""
        return padded.flatten(0, 1).index_select(0, self._inside)

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


def _scaling(shares: list[Share], dtype: torch.dtype) -> Tensor:
    """Return the LoRA scaling of each token of a group, (n_tokens, 1)."""
    scalings = torch.tensor([share.scaling for share in shares], dtype=dtype)
    return scalings.repeat_interleave(torch.tensor([share.n_tokens for share in shares]))[:, None]


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
