"""Multiplies the tokens of several adapters by the factors of each, in one call where their shapes are alike."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from raylora.training.packed.adapter import Adapter, views


def has_grouped_products(device: torch.device) -> bool:
    """Return True if a device takes the products of several adapters in one call.

    `grouped_mm` has a kernel for bfloat16 on compute capability 9 and 10 (H100, H200, B200). Elsewhere it copies sizes
    to the host in every call, and waits for them (torch 2.11 to 2.13, `GroupedMMUtils.h`).
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


@dataclass(frozen=True)
class Share:
    """Tokens of one micro-batch within the sequence."""

    adapter: Adapter
    tokens: slice
    """Positions in the sequence."""

    key: int | None
    """Key of the micro-batch, as in `MicroBatch`."""

    weight: float
    """Factor of the gradients: 1 if the loss has the weight of the micro-batch."""

    @property
    def owner(self) -> tuple[Adapter, float]:
        """Adapter and weight. The shares that have both in common are multiplied as one."""
        return self.adapter, self.weight

    @property
    def n_tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.tokens.stop - self.tokens.start

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

    A single adapter works on its own memory. The factors of several adapters are stacked for one pass.

    Args:
        shares: shares that follow one another in the sequence, those of one adapter together.
        autocast: dtype of activations and factors; None is the dtype of the adapters.
        ends: position after the tokens of each adapter, from the start of the group, (n_adapters,), int32.
        scaling: LoRA scaling of each token, (n_tokens, 1), float32 or float64. In bfloat16 a scaling of 2.105 would act
            as 2.109.
        with_gradient: True to collect gradients.
    """

    def __init__(
        self,
        shares: list[Share],
        autocast: torch.dtype | None,
        *,
        ends: Tensor,
        scaling: Tensor,
        with_gradient: bool,
    ) -> None:
        self.shares, self._ends = shares, ends
        self.tokens = slice(shares[0].tokens.start, shares[-1].tokens.stop)
        self._owners = list(dict.fromkeys(share.owner for share in shares))
        factors = [[adapter.parameters[factor] for adapter, _ in self._owners] for factor in (0, 1)]
        self.dtype, sizes = autocast or factors[0][0].dtype, shares[0].adapter.sizes
        self.scaling = scaling if len({share.scaling for share in shares}) > 1 else shares[0].scaling
        stacks = [
            one[0].detach()[None] if len(one) == 1 else torch.stack([vector.detach() for vector in one])
            for one in factors
        ]
        # layer -> (n_adapters, padded r, in_features) and layer -> (n_adapters, out_features, padded r)
        self.lora_A, self.lora_B = (
            views(stack.to(self.dtype), size) for stack, size in zip(stacks, sizes, strict=True)
        )
        if not with_gradient:
            return
        self._gradients = [
            one[0].grad[None] if len(one) == 1 else torch.zeros_like(stack)
            for one, stack in zip(factors, stacks, strict=True)
        ]
        self.grad_A, self.grad_B = (
            views(gradient, size) for gradient, size in zip(self._gradients, sizes, strict=True)
        )

    def multiply(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Multiply the tokens of each adapter by its own matrix.

        Args:
            x: (n_tokens, n).
            matrices: (n_adapters, n, m).

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
        """Add left^T @ right over the tokens of each adapter to the adapter's gradient, times its weight, in place.

        Stacked gradients get the weight in `add_gradients_to_adapters`.

        Args:
            gradients: (n_adapters, n, m).
            left: (n_tokens, n).
            right: (n_tokens, m).
        """
        if len(gradients) == 1 and gradients.dtype == left.dtype:
            gradients[0].addmm_(left.t(), right, alpha=self._owners[0][1])
        elif len(gradients) == 1:
            gradients[0].add_(left.t() @ right, alpha=self._owners[0][1])
        else:
            gradients.add_(grouped_mm(left.t(), right, offs=self._ends))

    def dropout_mask(self, layer: int, x: Tensor) -> Tensor | None:
        """Draw the dropout masks of all shares. Arguments and result are those of `Share.dropout_mask`.

        Returns:
            The shape of x, uint8; None if no share has dropout.
        """
        if not any(share.has_dropout for share in self.shares):
            return None
        parts = zip(self.shares, x.split([share.n_tokens for share in self.shares]), strict=True)
        masks = [share.dropout_mask(layer, part) for share, part in parts]
        return masks[0] if len(masks) == 1 else torch.cat(masks)

    def add_gradients_to_adapters(self) -> None:
        """Add the stacked gradients of several adapters to their own. A single adapter needs no copy."""
        if len(self._owners) > 1:
            for index, (adapter, weight) in enumerate(self._owners):
                for parameter, gradients in zip(adapter.parameters, self._gradients, strict=True):
                    parameter.grad.add_(gradients[index], alpha=weight)
