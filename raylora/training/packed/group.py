"""Multiplies the tokens of several adapters by the factors of each, in one call where their shapes are alike."""

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

    def adapts(self, name: str) -> bool:
        """Return True if the adapters adapt a layer."""
        return name in self.lora_A

    def add_update(self, name: str, layer: int, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """Add scaling * B A dropout(x) to y, in place.

        Args:
            name: name of the layer.
            layer: index of the layer.
            x: input of all tokens of the pass, (n_tokens, in_features).
            y: output, (n_tokens, out_features).
            mask: dropout mask, (n_tokens, in_features); None without dropout.

        Returns:
            scaling * A dropout(x), for the backward pass.
        """
        h = self._multiply(self._dropped(x, mask), self.lora_A[name].mT).mul_(self.scaling)
        self._add_product(y[self.tokens], h, self.lora_B[name].mT)
        return h

    def add_gradients(
        self, name: str, layer: int, x: Tensor, mask: Tensor | None, h: Tensor, grad_y: Tensor, grad_x: Tensor
    ) -> None:
        """Add the gradients of A and B to the adapters', and that of x to `grad_x`, in place.

        Args:
            name: as in `add_update`.
            layer: as in `add_update`.
            x: as in `add_update`.
            mask: as in `add_update`.
            h: result of `add_update`.
            grad_y: gradient of y.
            grad_x: gradient of x, (n_tokens, in_features).
        """
        g = grad_y[self.tokens].to(self.dtype)
        grad_h = self._multiply(g, self.lora_B[name]).mul_(self.scaling)
        self._add_outer_product(self.grad_A[name], grad_h, self._dropped(x, mask))
        self._add_outer_product(self.grad_B[name], g, h)
        update = self._multiply(grad_h, self.lora_A[name])
        grad_x[self.tokens].add_(update if mask is None else update * mask[self.tokens])

    def _dropped(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the group's part of x, with dropped entries set to zero."""
        inputs = x[self.tokens].to(self.dtype)
        return inputs if mask is None else inputs * mask[self.tokens]

    def _multiply(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Multiply the tokens of each adapter by its own matrix.

        Args:
            x: (n_tokens, n).
            matrices: (n_adapters, n, m).

        Returns:
            (n_tokens, m).
        """
        return x @ matrices[0] if len(matrices) == 1 else grouped_mm(x, matrices, offs=self._ends)

    def _add_product(self, total: Tensor, x: Tensor, matrices: Tensor) -> None:
        """Add the result of `_multiply` to `total`, (n_tokens, m), in place."""
        if len(matrices) == 1 and total.dtype == x.dtype:
            total.addmm_(x, matrices[0])
        else:
            total.add_(self._multiply(x, matrices))

    def _add_outer_product(self, gradients: Tensor, left: Tensor, right: Tensor) -> None:
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

    def add_gradients_to_adapters(self) -> None:
        """Add the stacked gradients of several adapters to their own. A single adapter needs no copy."""
        if len(self._owners) > 1:
            for index, (adapter, weight) in enumerate(self._owners):
                for parameter, gradients in zip(adapter.parameters, self._gradients, strict=True):
                    parameter.grad.add_(gradients[index], alpha=weight)
