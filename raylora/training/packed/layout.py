"""Lays the rows of many trials end to end as one sequence of tokens, and maps its tokens to trials."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from raylora.data.rows import IGNORE
from raylora.training.packed.adapter import Adapter, views


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


@dataclass(frozen=True)
class Share:
    """Tokens of one micro-batch within the sequence."""

    adapter: Adapter
    tokens: slice
    """Positions in the sequence."""

    key: int | None
    """Key of the micro-batch, as in `MicroBatch`."""

    @property
    def has_dropout(self) -> bool:
        """True if dropout is active."""
        return self.key is not None and self.adapter.dropout > 0

    def dropout_mask(self, layer: int, x: Tensor) -> Tensor:
        """Draw the dropout mask of one layer's input.

        The mask is a function of the trial's seed, the micro-batch's key and the layer. So it is the same after a
        pause, in another pack, and when gradient checkpointing draws it again.

        The mask takes 16 bits per entry from int64 draws, which is four times as fast as `bernoulli_` on a CPU. The
        drop probability p is rounded to 1 / 65536. Products with uint8 are twice as fast as with bool.

        Args:
            layer: index of the layer.
            x: input of the layer, (n_tokens, in_features).

        Returns:
            The shape of x, uint8: 1 to keep an entry, 0 to drop it. The factor 1 / (1 - p) is in `scaling`.
        """
        generator = torch.Generator(x.device).manual_seed(hash((self.adapter.seed, self.key, layer)))
        bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64, device=x.device)
        draws = bits.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()].view(x.shape)
        mask = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        return torch.ge(draws, round(self.adapter.dropout * 2**16) - 2**15, out=mask)

    @property
    def scaling(self) -> float:
        """LoRA scaling, times 1 / (1 - p) while dropout is active."""
        return self.adapter.scaling / (1 - self.adapter.dropout if self.has_dropout else 1.0)


class Group:
    """Neighbouring shares whose adapters have the same shapes, so that each of their products is one call.

    A single share works on its adapter's own memory. The factors of several shares are stacked for one pass.

    Args:
        shares: shares that follow one another in the sequence.
        autocast: dtype of activations and factors; None is the dtype of the adapters.
    """

    def __init__(self, shares: list[Share], autocast: torch.dtype | None) -> None:
        self.shares = shares
        self.tokens = slice(shares[0].tokens.start, shares[-1].tokens.stop)
        self._lengths = [share.tokens.stop - share.tokens.start for share in shares]
        self._adapters = [share.adapter for share in shares]
        parameters = [[adapter.parameters[factor] for adapter in self._adapters] for factor in (0, 1)]
        device, self.dtype = parameters[0][0].device, autocast or parameters[0][0].dtype
        sizes = self._adapters[0].sizes
        if len(shares) == 1:
            stacks = [one.detach()[None] for (one,) in parameters]
            self._gradients = [one.grad[None] for (one,) in parameters]
            self.scaling: float | Tensor = shares[0].scaling
        else:
            stacks = [torch.stack([one.detach() for one in several]) for several in parameters]
            self._gradients = [torch.zeros_like(stack) for stack in stacks]
            lengths = torch.tensor(self._lengths)
            self._ends = lengths.cumsum(0).to(device, torch.int32)
            scalings = torch.tensor([share.scaling for share in shares], dtype=self.dtype)
            self.scaling = scalings.repeat_interleave(lengths)[:, None].to(device)
        # layer -> (n_shares, padded r, in_features) and layer -> (n_shares, out_features, padded r)
        self.lora_A, self.lora_B = (
            views(stack.to(self.dtype), size) for stack, size in zip(stacks, sizes, strict=True)
        )
        self.grad_A, self.grad_B = (
            views(gradient, size) for gradient, size in zip(self._gradients, sizes, strict=True)
        )

    def multiply(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Multiply the tokens of each share by the matrix of its own adapter.

        Args:
            x: (n_tokens, n).
            matrices: (n_shares, n, m).

        Returns:
            (n_tokens, m).
        """
        return x @ matrices[0] if len(matrices) == 1 else grouped_mm(x, matrices, offs=self._ends)

    def add_product(self, total: Tensor, x: Tensor, matrices: Tensor) -> None:
        """Add the result of `multiply` to `total`, (n_tokens, m), in place."""
        if len(matrices) == 1 and total.dtype == x.dtype:
            total.addmm_(x, matrices[0])
        else:
            total.add_(self.multiply(x, matrices))

    def add_outer_product(self, gradients: Tensor, left: Tensor, right: Tensor) -> None:
        """Add left^T @ right over the tokens of each share to the share's gradient, in place.

        Args:
            gradients: (n_shares, n, m).
            left: (n_tokens, n).
            right: (n_tokens, m).
        """
        if len(gradients) == 1 and gradients.dtype == left.dtype:
            gradients[0].addmm_(left.t(), right)
        elif len(gradients) == 1:
            gradients[0].add_(left.t() @ right)
        else:
            gradients.add_(grouped_mm(left.t(), right, offs=self._ends))

    def dropout_mask(self, layer: int, x: Tensor) -> Tensor | None:
        """Draw the dropout masks of all shares. Arguments and result are those of `Share.dropout_mask`.

        Returns:
            The shape of x, uint8; None if no share has dropout.
        """
        if not any(share.has_dropout for share in self.shares):
            return None
        parts = zip(self.shares, x.split(self._lengths), strict=True)
        masks = [share.dropout_mask(layer, part) for share, part in parts]
        return masks[0] if len(masks) == 1 else torch.cat(masks)

    def add_gradients_to_adapters(self) -> None:
        """Add the stacked gradients of several shares to those of their adapters. A single share needs no copy."""
        if len(self.shares) > 1:
            for index, adapter in enumerate(self._adapters):
                for parameter, gradients in zip(adapter.parameters, self._gradients, strict=True):
                    parameter.grad += gradients[index]


class Layout:
    """Sequence of tokens that holds the rows of all micro-batches.

    Args:
        micro_batches: at least one.
        device: where the base is.
        autocast: dtype of activations; None is the dtype of the adapters.
        grouped: True to place adapters of the same shapes side by side, for grouped products.
    """

    def __init__(
        self, micro_batches: list[MicroBatch], device: torch.device, autocast: torch.dtype | None, *, grouped: bool
    ) -> None:
        order = list(range(len(micro_batches)))
        if grouped:
            order.sort(key=lambda index: micro_batches[index].adapter.shape)
        placed = [micro_batches[index] for index in order]
        rows = [row for batch in placed for row in batch.input_ids]
        labels = torch.cat([row for batch in placed for row in batch.labels])
        lengths = torch.tensor([len(row) for row in rows])
        ends = lengths.cumsum(0)
        starts = ends - lengths
        n_tokens = [batch.n_tokens for batch in placed]
        stops = list(itertools.accumulate(n_tokens))
        shares = [
            Share(batch.adapter, slice(stop - n, stop), batch.key)
            for batch, stop, n in zip(placed, stops, n_tokens, strict=True)
        ]
        alike = itertools.groupby(shares, key=lambda share: share.adapter.shape if grouped else share.tokens.start)
        self.groups = [Group(list(group), autocast) for _, group in alike]
        self.longest = int(lengths.max())
        owner = torch.tensor(order).repeat_interleave(torch.tensor(n_tokens))
        # a position predicts the next token of its row, so a row's first token has no loss
        loss_mask = labels != IGNORE
        loss_mask[starts] = False
        predicted = loss_mask.nonzero()[:, 0]
        positions = torch.arange(int(ends[-1])) - starts.repeat_interleave(lengths)
        weights = torch.tensor([batch.weight for batch in micro_batches], dtype=torch.float64)

        self.input_ids = torch.cat(rows).to(device)
        """Token ids of the sequence, (n_tokens,), int64."""

        self.position_ids = positions.to(device)
        """Position of each token in its row, (n_tokens,), int64."""

        self.predicting = (predicted - 1).to(device)
        """Positions whose next token has a loss, (n,), int64."""

        self.targets = labels[predicted].to(device)
        """Tokens to predict at these positions, (n,), int64."""

        self._owner = owner[predicted].to(device)
        self.weights = weights.to(device)
        """Weight of each micro-batch, (n_micro_batches,), float64."""

        self.token_weights = weights[owner[predicted]].to(device)
        """Weight of each token to predict, (n,), float64."""

        # flat indexes of the positions of (rows, longest) that are not padding
        inside = torch.arange(self.longest) < lengths[:, None]
        self._inside = inside.flatten().nonzero()[:, 0].to(device)
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
