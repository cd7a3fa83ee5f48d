"""Lays the rows of many trials end to end as one sequence of tokens, and says whose tokens are whose."""

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
    """Rows of one trial that go through the base together."""

    adapter: Adapter
    input_ids: list[Tensor]
    """One (length,) int64 tensor per row."""

    labels: list[Tensor]
    """Like `input_ids`; IGNORE where a token bears no loss."""

    weight: float = 1.0
    """Factor of each token's loss: one over the tokens of the whole optimizer step that bear loss."""

    key: int | None = None
    """Counts the trial's micro-batches; with the adapter's seed, it decides the dropout masks. None: no dropout."""

    @property
    def n_tokens(self) -> int:
        return sum(len(row) for row in self.input_ids)


@dataclass(frozen=True)
class Share:
    """The tokens of one micro-batch within the sequence."""

    adapter: Adapter
    tokens: slice
    key: int | None

    @property
    def drops(self) -> bool:
        return self.key is not None and self.adapter.dropout > 0

    def kept(self, layer: int, x: Tensor) -> Tensor:
        """1 for each entry of one layer's input that dropout keeps, else 0; its factor 1 / (1 - p) is in `scaling`.

        They follow from the trial's seed, the micro-batch's key and the layer alone, so that they are the same after a
        pause, in another pack, or when gradient checkpointing draws them again. The bits of int64 draws are four times
        as fast as `bernoulli_` on a CPU; p is rounded to 1 / 65536. Products with uint8 are twice as fast as with bool.
        """
        generator = torch.Generator(x.device).manual_seed(hash((self.adapter.seed, self.key, layer)))
        bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64, device=x.device)
        draws = bits.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()].view(x.shape)
        kept = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        return torch.ge(draws, round(self.adapter.dropout * 2**16) - 2**15, out=kept)

    @property
    def scaling(self) -> float:
        """Of the update, with dropout's factor."""
        return self.adapter.scaling / (1 - self.adapter.dropout if self.drops else 1.0)


class Group:
    """Shares of adapters of one shape that lie one behind the other, so that each product of theirs is one call.

    A share that is alone works on its adapter's own memory; the factors of several are stacked for this pass.
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
        # (adapters, r, in_features) and (adapters, out_features, r) of each layer
        self.lora_A, self.lora_B = (
            views(stack.to(self.dtype), size) for stack, size in zip(stacks, sizes, strict=True)
        )
        self.grad_A, self.grad_B = (
            views(gradient, size) for gradient, size in zip(self._gradients, sizes, strict=True)
        )

    def times(self, x: Tensor, matrices: Tensor) -> Tensor:
        """(tokens, n) @ (adapters, n, m): the tokens of each share times the matrix of its own adapter."""
        return x @ matrices[0] if len(matrices) == 1 else grouped_mm(x, matrices, offs=self._ends)

    def add_times(self, total: Tensor, x: Tensor, matrices: Tensor) -> None:
        """Adds `times`."""
        if len(matrices) == 1 and total.dtype == x.dtype:
            total.addmm_(x, matrices[0])
        else:
            total.add_(self.times(x, matrices))

    def add_outer(self, gradients: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds (n, tokens) @ (tokens, m) of each share to its own of (adapters, n, m)."""
        if len(gradients) == 1 and gradients.dtype == left.dtype:
            gradients[0].addmm_(left.t(), right)
        elif len(gradients) == 1:
            gradients[0].add_(left.t() @ right)
        else:
            gradients.add_(grouped_mm(left.t(), right, offs=self._ends))

    def kept(self, layer: int, x: Tensor) -> Tensor | None:
        """As `Share.kept`, one share after the other; None where all is kept."""
        if not any(share.drops for share in self.shares):
            return None
        parts = zip(self.shares, x.split(self._lengths), strict=True)
        masks = [share.kept(layer, part) for share, part in parts]
        return masks[0] if len(masks) == 1 else torch.cat(masks)

    def hand_out_gradients(self) -> None:
        """Where they were gathered for several adapters: adds them to the adapters' own."""
        if len(self.shares) > 1:
            for index, adapter in enumerate(self._adapters):
                for parameter, gradients in zip(adapter.parameters, self._gradients, strict=True):
                    parameter.grad += gradients[index]


class Layout:
    """Where each row of each micro-batch lies in the sequence."""

    def __init__(
        self, micro_batches: list[MicroBatch], device: torch.device, autocast: torch.dtype | None, *, grouped: bool
    ) -> None:
        # adapters of one shape side by side
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
        # a position predicts the next token of its row; a row's first token is predicted by none
        bears_loss = labels != IGNORE
        bears_loss[starts] = False
        predicted = bears_loss.nonzero()[:, 0]
        positions = torch.arange(int(ends[-1])) - starts.repeat_interleave(lengths)
        weights = torch.tensor([batch.weight for batch in micro_batches], dtype=torch.float64)

        self.input_ids = torch.cat(rows).to(device)
        self.position_ids = positions.to(device)
        self.predicting = (predicted - 1).to(device)
        self.targets = labels[predicted].to(device)
        self._owner = owner[predicted].to(device)
        self.weights = weights.to(device)
        self.token_weights = weights[owner[predicted]].to(device)
        # where the tokens of (rows, longest) stand that are inside their row
        inside = torch.arange(self.longest) < lengths[:, None]
        self._inside = inside.flatten().nonzero()[:, 0].to(device)
        self._n_rows = len(rows)

    def pad(self, sequence: Tensor) -> Tensor:
        """(tokens, ...) -> (rows, longest, ...). What stands behind a row's end, no causal attention sees."""
        padded = sequence.new_zeros(self._n_rows * self.longest, *sequence.shape[1:])
        return padded.index_copy(0, self._inside, sequence).unflatten(0, (self._n_rows, self.longest))

    def unpad(self, padded: Tensor) -> Tensor:
        """(rows, longest, ...) -> (tokens, ...)."""
        return padded.flatten(0, 1).index_select(0, self._inside)

    def sums(self, values: Tensor) -> Tensor:
        """(n,) values of predicting positions -> their sum for each micro-batch."""
        total = torch.zeros(len(self.weights), dtype=torch.float64, device=values.device)
        return total.index_add_(0, self._owner, values.double())
