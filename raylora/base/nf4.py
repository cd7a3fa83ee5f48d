"""Reads and writes bitsandbytes' NF4 weights as values on a grid: levels times block scales.

A block of 64 weights, in row-major order, shares one scale. With double quantization, the scales are themselves stored
in 8 bit. A weight that keeps its scales and only moves between levels is stored without any further rounding.

Source: Dettmers et al. 2023, "QLoRA", section 3 (arXiv:2305.14314); memory layout as in bitsandbytes' `functional.py`.
"""

import copy
import functools

import torch
from bitsandbytes.functional import dequantize_blockwise, get_4bit_type, quantize_4bit
from bitsandbytes.nn import Params4bit

from raylora.errors import MergeError

CELLS = 64
"""Equal cells of [-1, 1], by which levels are looked up: so narrow that at most one boundary lies in a cell."""

LARGE = 4096
"""Values from which a CPU looks levels up by cells. `bucketize` branches, and takes twice as long."""

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Scale of a block of zeros, so that no division by zero occurs: the smallest normal float32."""


@functools.cache
def levels(device: torch.device) -> torch.Tensor:
    """Return the 16 levels of NF4: (16,), float32, ascending from -1 to 1."""
    return get_4bit_type("nf4", device=device)


@functools.cache
def _boundaries(device: torch.device) -> torch.Tensor:
    """Return the midpoints between neighbouring levels: (15,), float32."""
    grid = levels(device)
    return (grid[1:] + grid[:-1]) / 2


@functools.cache
def rooms(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how far a value may lie below and above each level and still be nearest to it.

    Returns:
        Values <= 0 and >= 0, (16,) each, float32. There is no limit below -1 and above 1.
    """
    endless = torch.full((1,), torch.inf, device=device)
    boundaries = _boundaries(device)
    return torch.cat([-endless, boundaries]) - levels(device), torch.cat([boundaries, endless]) - levels(device)


@functools.cache
def _cells() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the level at the lower end of each cell, (CELLS,), int32, and the boundary above each level, (16,)."""
    boundaries = _boundaries(torch.device("cpu"))
    edges = torch.linspace(-1, 1, CELLS + 1)[:-1]
    above = torch.cat([boundaries, torch.full((1,), torch.inf)])
    return torch.bucketize(edges, boundaries, out_int32=True), above


def scale_of(weight: Params4bit) -> torch.Tensor:
    """Return the scale of each element of a weight: (out_features, in_features), float32, > 0."""
    state = weight.quant_state
    blocks = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    elements = blocks.float().repeat_interleave(state.blocksize)[: state.shape.numel()]
    return elements.view(state.shape).clamp_min(SMALLEST_SCALE)


def dequantize(weight: Params4bit) -> torch.Tensor:
    """Return the dequantized weight: (out_features, in_features), float32."""
    packed = weight.data.flatten().view(torch.uint8)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: weight.quant_state.shape.numel()]
    return values_of(codes.to(torch.int32).view(weight.quant_state.shape), scale_of(weight))


def quantize(values: torch.Tensor, like: Params4bit) -> Params4bit:
    """Quantize values as bitsandbytes does, with new scales: the largest absolute value of each block.

    Args:
        values: (out_features, in_features), float32.
        like: gives block size, double quantization and compute dtype.
    """
    state = like.quant_state
    packed, new = quantize_4bit(
        values.contiguous(), blocksize=state.blocksize, compress_statistics=state.nested, quant_type="nf4"
    )
    new.dtype = state.dtype
    return _parameter(packed, new)


def store(values: torch.Tensor, like: Params4bit) -> Params4bit:
    """Quantize values with the scales of `like`. Values on its grid are stored exactly.

    Args:
        values: (out_features, in_features), float32. A value off the grid is rounded to the nearest level.
        like: gives the scales.
    """
    codes = nearest_code(values, scale_of(like)).flatten()
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    packed = (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)  # the first code is in the high half
    return _parameter(packed.view(-1, 1), copy.deepcopy(like.quant_state))


def nearest_code(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the index of the level nearest to each value.

    Args:
        values: any shape, float32.
        scale: scale of each value, > 0, of a shape that broadcasts to that of `values`.

    Returns:
        The shape of `values`, int32, in [0, 15].
    """
    position = values / scale
    if position.device.type != "cpu" or position.numel() < LARGE:
        return torch.bucketize(position, _boundaries(values.device), out_int32=True)
    lowest, above = _cells()
    cells = (position.flatten() * (CELLS / 2)).add_(CELLS / 2).to(torch.int32).clamp_(0, CELLS - 1)
    codes = lowest.index_select(0, cells)
    return codes.add_(position.flatten() > above.index_select(0, codes)).view(position.shape)


def nearest(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round each value to the nearest point of the grid. Arguments are those of `nearest_code`."""
    return values_of(nearest_code(values, scale), scale)


def values_of(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the values of levels: any shape, float32.

    Args:
        codes: indexes of levels, int32 or int64.
        scale: scale of each value, of a shape that broadcasts to that of `codes`.
    """
    return look_up(levels(codes.device), codes) * scale


def look_up(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return table[codes], on a CPU in a quarter of the time. The table has an entry for each level."""
    return table.index_select(0, codes.flatten()).view(codes.shape)


def to_tensors(name: str, weight: Params4bit) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint that store a layer's weight, e.g. `NAME.weight` and `NAME.weight.absmax`."""
    tensors = {f"{name}.weight": weight.data}
    return tensors | {f"{name}.weight.{key}": value for key, value in weight.quant_state.as_dict(packed=True).items()}


def from_tensors(name: str, tensors: dict[str, torch.Tensor], device: str) -> Params4bit:
    """Return a layer's weight from the tensors of a checkpoint, the reverse of `to_tensors`.

    Args:
        name: name of the layer.
        tensors: stored name -> tensor.
        device: `cpu` or `cuda:0`.

    Raises:
        MergeError: the weight is not quantized to NF4.
    """
    prefix = f"{name}.weight"
    state = {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key != prefix}
    if "quant_state.bitsandbytes__nf4" not in state:
        raise MergeError(f"{prefix} must be in bitsandbytes' nf4, found {', '.join(state) or 'no quantization state'}")
    return Params4bit.from_prequantized(data=tensors[prefix], quantized_stats=state, device=device)


def _parameter(packed: torch.Tensor, state: object) -> Params4bit:
    """Return a frozen NF4 parameter from packed codes and their quantization state."""
    return Params4bit(packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True)
