"""Holds the low-rank factors of one trial, as two vectors with a view for each layer."""

import math

import torch
from torch import Tensor, nn

Shapes = dict[str, tuple[int, int]]
"""Name of an adapted layer -> (in_features, out_features), in the model's order."""


class Adapter:
    """Low-rank factors of one trial: views into two vectors, which are the parameters of the optimizer.

    Args:
        shapes: shapes of the layers to adapt.
        r: adapter rank, >= 1.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA (arXiv:2312.03732).
        dropout: drop probability on the input of A, in [0, 1).
        seed: seed of A's initial values and of the dropout masks.
        device: where the factors are.
        dtype: dtype of the factors; the base may have another.
        rank_multiple: the rank is padded with zeros to a multiple of this. They stay zero: the gradient of A's added
            rows is a product with B's added columns, and the gradient of these a product with A's added rows.
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
        self.padded_r = rows = rank_multiple * math.ceil(r / rank_multiple)
        """Rank in memory."""

        self.sizes = (
            {name: (rows, in_features) for name, (in_features, _) in shapes.items()},
            {name: (out_features, rows) for name, (_, out_features) in shapes.items()},
        )
        """Padded shapes of A and of B: layer -> (padded r, in_features), and layer -> (out_features, padded r)."""

        self.shape = tuple(self.sizes[0].items())
        """Key that is equal for adapters whose matrix products can be grouped in one call."""

        self.parameters = [_zeros(sizes, device, dtype) for sizes in self.sizes]
        """A of all layers and B of all layers, as two flat vectors that have gradients from the start."""

        views_A, views_B = (views(*pair) for pair in zip(self.parameters, self.sizes, strict=True))
        self.lora_A = {name: view.data[:r] for name, view in views_A.items()}
        """Layer -> (r, in_features), without padding."""

        self.lora_B = {name: view.data[:, :r] for name, view in views_B.items()}
        """Layer -> (out_features, r), without padding."""

        self._addresses: Tensor | None = None
        self._draw_A()

    def _draw_A(self) -> None:
        """Draw the initial A as peft does. B starts at zero.

        Source: peft 0.21, `LoraLayer.reset_lora_parameters`.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for view in self.lora_A.values():
                view.copy_(nn.init.kaiming_uniform_(torch.empty(view.shape), a=math.sqrt(5)))

    @property
    def n_parameters(self) -> int:
        """Number of trained parameters, without padding."""
        return sum(view.numel() for views in (self.lora_A, self.lora_B) for view in views.values())

    def addresses(self, layers: list[str]) -> Tensor:
        """Return where the factors and gradients of layers are on the device.

        Args:
            layers: the same names in every call.

        Returns:
            Addresses of A, B, and the gradients of these, (n_layers, 4), int64; 0 for layers that are not adapted.
        """
        if self._addresses is None:
            vectors = [*self.parameters, *(parameter.grad for parameter in self.parameters)]
            found = [views(vector.data, sizes) for vector, sizes in zip(vectors, 2 * self.sizes, strict=True)]
            self._addresses = torch.tensor(
                [[of[name].data_ptr() if name in of else 0 for of in found] for name in layers], dtype=torch.int64
            )
        return self._addresses

    def zero_grad(self) -> None:
        """Set the gradients to zero in place, since other tensors are views of them."""
        for parameter in self.parameters:
            parameter.grad.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the factors under peft's names, as views."""
        return self.factors([parameter.data for parameter in self.parameters])

    def factors(self, vectors: list[Tensor]) -> dict[str, Tensor]:
        """Return a view for each factor of each layer, without padding, under peft's names.

        Args:
            vectors: two vectors laid out like `parameters`, such as one of Adam's moments.
        """
        views_A, views_B = (views(vector, sizes) for vector, sizes in zip(vectors, self.sizes, strict=True))
        cut = {"A": {name: view[: self.r] for name, view in views_A.items()}}
        cut["B"] = {name: view[:, : self.r] for name, view in views_B.items()}
        return {
            f"base_model.model.{name}.lora_{factor}.weight": view
            for factor, layers in cut.items()
            for name, view in layers.items()
        }


def _zeros(sizes: dict[str, tuple[int, int]], device: str | torch.device, dtype: torch.dtype) -> nn.Parameter:
    """Return a flat parameter of zeros for all layers, with a gradient of zeros."""
    vector = nn.Parameter(torch.zeros(sum(a * b for a, b in sizes.values()), device=device, dtype=dtype))
    vector.grad = torch.zeros_like(vector)
    return vector


def views(vectors: Tensor, sizes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Split flat vectors into one matrix per layer.

    Args:
        vectors: (..., n), n being the sum of all a * b.
        sizes: layer -> (a, b).

    Returns:
        Layer -> (..., a, b), as views.
    """
    parts = vectors.split([a * b for a, b in sizes.values()], dim=-1)
    return {name: part.unflatten(-1, size) for (name, size), part in zip(sizes.items(), parts, strict=True)}
