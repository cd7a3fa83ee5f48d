"""Holds the low-rank factors of one trial, as two vectors with a view for each layer."""

import math

import torch
from torch import Tensor, nn

Shapes = dict[str, tuple[int, int]]
"""Name of an adapted layer -> (in_features, out_features), in the model's order."""


class Adapter:
    """One trial's low-rank factors: views into two vectors, which are all that an optimizer has to know.

    Args:
        shapes: layers to adapt.
        r: rank.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA (arXiv:2312.03732).
        dropout: drop probability on the input of A, in [0, 1).
        seed: of A's first values and of the dropout masks.
        device: where it lives.
        dtype: its own precision, whatever the base's.
        rank_multiple: the rank is filled up to a multiple of this with zeros, which stay zero: A's new rows get their
            gradient through B's new columns, and the other way round.
    """

    def __init__(
        self,
        shapes: Shapes,
        *,
        r: int,
        scaling: float,
        dropout: float,
        seed: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        rank_multiple: int = 1,
    ) -> None:
        self.r, self.scaling, self.dropout, self.seed = r, scaling, dropout, seed
        rows = rank_multiple * math.ceil(r / rank_multiple)
        self.sizes = (
            {name: (rows, in_features) for name, (in_features, _) in shapes.items()},
            {name: (out_features, rows) for name, (_, out_features) in shapes.items()},
        )
        """Of A and of B in each layer."""

        self.shape = tuple(self.sizes[0].items())
        """Alike for adapters whose products can be taken in one call."""

        self.parameters = [_zeros(sizes, device, dtype) for sizes in self.sizes]
        """A of all layers, and B of all layers, as two vectors."""

        views_A, views_B = (views(*pair) for pair in zip(self.parameters, self.sizes, strict=True))
        self.lora_A = {name: view.data[:r] for name, view in views_A.items()}
        self.lora_B = {name: view.data[:, :r] for name, view in views_B.items()}
        self._draw_A()

    def _draw_A(self) -> None:
        """A's first values as peft draws them (peft 0.21, LoraLayer.reset_lora_parameters); B starts at zero."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for view in self.lora_A.values():
                view.copy_(nn.init.kaiming_uniform_(torch.empty(view.shape), a=math.sqrt(5)))

    @property
    def n_parameters(self) -> int:
        """Trained ones."""
        return sum(view.numel() for views in (self.lora_A, self.lora_B) for view in views.values())

    def zero_grad(self) -> None:
        """Clears the gradients in place, since the views must go on pointing at them."""
        for parameter in self.parameters:
            parameter.grad.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """The factors under peft's names."""
        return {
            f"base_model.model.{name}.lora_{factor}.weight": view
            for factor, views in (("A", self.lora_A), ("B", self.lora_B))
            for name, view in views.items()
        }


def _zeros(sizes: dict[str, tuple[int, int]], device: str | torch.device, dtype: torch.dtype) -> nn.Parameter:
    vector = nn.Parameter(torch.zeros(sum(a * b for a, b in sizes.values()), device=device, dtype=dtype))
    vector.grad = torch.zeros_like(vector)
    return vector


def views(vectors: Tensor, sizes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """(..., n) cut into one (..., a, b) for each layer."""
    parts = vectors.split([a * b for a, b in sizes.values()], dim=-1)
    return {name: part.unflatten(-1, size) for (name, size), part in zip(sizes.items(), parts, strict=True)}
