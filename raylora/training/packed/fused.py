"""Gives all tokens of a pass the updates of their adapters, of any ranks, by the kernels of `kernels`."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from raylora.training.packed.adapter import Adapter

if HAS_TRITON := find_spec("triton") is not None:  # torch brings it where it brings CUDA
    from raylora.training.packed import kernels

MAX_RANK = 128
"""Largest rank whose factors fit into the registers of a program, with those of its tokens."""

MIN_RANK = 16
"""Smallest side of the tensor cores' products."""

COLUMNS = {16: 128, 32: 128, 64: 64, 128: 32}
"""Padded rank -> columns of one program. With more, the compiler spills registers to memory on compute capability 9."""


def has_fused_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if a device has kernels for all adapters of a pass at once.

    Below compute capability 8 (T4, V100), Triton's products do not use tensor cores.
    """
    on_gpu = HAS_TRITON and device.type == "cuda"
    return on_gpu and dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability(device)[0] >= 8


@dataclass(frozen=True)
class Owner:
    """An adapter, and where its tokens are."""

    adapter: Adapter
    tokens: slice
    weight: float
    """Factor of the gradients."""


def kernel_tables(owners: list[Owner], layers: list[str]) -> dict[str, Tensor]:
    """Return what the kernels read of each adapter and each tile, to be moved to the device.

    Args:
        owners: adapters of the pass, in the order of their tokens.
        layers: names of all layers that a pack can adapt.
    """
    lengths = [owner.tokens.stop - owner.tokens.start for owner in owners]
    tiles = [(index, first) for index, n in enumerate(lengths) for first in range(0, n, kernels.TILE)]
    return {
        "starts": torch.tensor([owner.tokens.start for owner in owners], dtype=torch.int32),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "ranks": torch.tensor([owner.adapter.padded_r for owner in owners], dtype=torch.int32),
        "owner_weights": torch.tensor([owner.weight for owner in owners], dtype=torch.float32),
        "addresses": torch.stack([owner.adapter.addresses(layers) for owner in owners]),
        "tile_owners": torch.tensor([index for index, _ in tiles], dtype=torch.int32),
        "tile_firsts": torch.tensor([first for _, first in tiles], dtype=torch.int32),
    }


class FusedGroup:
    """All adapters of a pass. Its products are those of `Group`, and add to the adapters' own gradients.

    Args:
        owners: adapters, and where their tokens are; no adapter twice.
        tables: those of `kernel_tables` on the device, with `scaling`, (n_tokens, 1), float32, and the `states` and
            `thresholds` of `dropout`.
        has_dropout: True if any token has dropout.
    """

    def __init__(self, owners: list[Owner], tables: dict[str, Tensor], *, has_dropout: bool) -> None:
        assert len({owner.adapter for owner in owners}) == len(owners)  # two programs would add to one gradient
        self._tables, self._has_dropout = tables, has_dropout
        self._n_owners, self._n_layers, _ = tables["addresses"].shape
        self._layers = {name for owner in owners for name in owner.adapter.lora_A}
        largest = max(owner.adapter.padded_r for owner in owners)
        self._r = next(r for r in COLUMNS if r >= largest)

    def adapts(self, name: str) -> bool:
        """Return True if any adapter adapts a layer."""
        return name in self._layers

    def add_update(self, name: str, layer: int, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """Add scaling * B A dropout(x) to y in place. Arguments and result are those of `Group.add_update`."""
        h = self._project(x, layer, "A", dropout=True)
        self._add_expanded(h, y, layer, "B", dropout=False)
        return h

    def add_gradients(
        self, name: str, layer: int, x: Tensor, mask: Tensor | None, h: Tensor, grad_y: Tensor, grad_x: Tensor
    ) -> None:
        """Add the gradients of factors and input in place. The arguments are those of `Group.add_gradients`."""
        grad_h = self._project(grad_y, layer, "B", dropout=False)
        self._add_outer(grad_h, x, layer, "A", dropout=True)
        self._add_outer(h, grad_y, layer, "B", dropout=False)
        self._add_expanded(grad_h, grad_x, layer, "A", dropout=True)

    def add_gradients_to_adapters(self) -> None:
        """Do nothing: the kernels have added them."""

    def _project(self, x: Tensor, layer: int, factor: str, *, dropout: bool) -> Tensor:
        h = x.new_empty(len(x), self._r)
        tables = self._named("scaling", "states", "thresholds", "starts", "lengths", "ranks", "addresses")
        tiles = self._named("tile_owners", "tile_firsts")
        kernels.project[(len(tiles[0]),)](
            x, h, *tables, *tiles, x.shape[1], self._n_layers, layer, **self._options(factor, dropout=dropout)
        )
        return h

    def _add_expanded(self, h: Tensor, y: Tensor, layer: int, factor: str, *, dropout: bool) -> None:
        tables = self._named("states", "thresholds", "starts", "lengths", "ranks", "addresses")
        tiles = self._named("tile_owners", "tile_firsts")
        grid = (len(tiles[0]), -(-y.shape[1] // COLUMNS[self._r]))
        kernels.add_expanded[grid](
            h, y, *tables, *tiles, y.shape[1], self._n_layers, layer, **self._options(factor, dropout=dropout)
        )

    def _add_outer(self, h: Tensor, x: Tensor, layer: int, factor: str, *, dropout: bool) -> None:
        tables = self._named("owner_weights", "states", "thresholds", "starts", "lengths", "ranks", "addresses")
        grid = (self._n_owners, -(-x.shape[1] // COLUMNS[self._r]))
        options = self._options(factor, dropout=dropout, is_gradient=True)
        kernels.add_outer[grid](h, x, *tables, x.shape[1], self._n_layers, layer, **options)

    def _named(self, *names: str) -> list[Tensor]:
        return [self._tables[name] for name in names]

    def _options(self, factor: str, *, dropout: bool, is_gradient: bool = False) -> dict[str, Any]:
        """Return the compile-time arguments of a kernel."""
        return {
            "WHICH": "AB".index(factor) + (2 if is_gradient else 0),
            "IS_B": factor == "B",
            "DROPOUT": dropout and self._has_dropout,
            "R": self._r,
            "T": kernels.TILE,
            "N": COLUMNS[self._r],
        }
