"""Reads and writes bitsandbytes' NF4 weights as values on a grid: levels times block scales.

A block of 64 weights, in row-major order, shares one scale; the scales are themselves in 8 bit where double
quantization is on. Whoever keeps the scales and moves weights between levels only, gets a weight that is stored without
any further rounding.

Source: Dettmers et al. 2023, "QLoRA", section 3 (arXiv:2305.14314); layout as in bitsandbytes' `functional.py`.
"""

import copy
import functools

import torch
from bitsandbytes.functional import dequantize_blockwise, get_4bit_type, quantize_4bit
from bitsandbytes.nn import Params4bit

from raylora.errors import MergeError

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Stands in for the scale of a block of zeros."""


@functools.cache
def levels(device: torch.device) -> torch.Tensor:
    """The 16 values that a weight over its scale can take: (16,), float32, ascending from -1 to 1."""
    return get_4bit_type("nf4", device=device)


@functools.cache
def _boundaries(device: torch.device) -> torch.Tensor:
    """Halfway between neighbouring levels."""
    grid = levels(device)
    return (grid[1:] + grid[:-1]) / 2


def scale_of(weight: Params4bit) -> torch.Tensor:
    """The scale of each element of a layer's weight: (out_features, in_features), float32."""
    state = weight.quant_state
    blocks = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    elements = blocks.float().repeat_interleave(state.blocksize)[: state.shape.numel()]
    return elements.view(state.shape).clamp_min(SMALLEST_SCALE)


def dequantize(weight: Params4bit) -> torch.Tensor:
    """The weight of a layer: (out_features, in_features), float32."""
    packed = weight.data.flatten().view(torch.uint8)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: weight.quant_state.shape.numel()]
    return levels(weight.device)[codes.long()].view(weight.quant_state.shape) * scale_of(weight)


def quantize(values: torch.Tensor, like: Params4bit) -> Params4bit:
    """Rounds as bitsandbytes does, with new scales: each block's largest absolute value.

    Args:
        values: (out_features, in_features), float32.
        like: gives block size, double quantization and compute type.
    """
    state = like.quant_state
    packed, new = quantize_4bit(
        values.contiguous(), blocksize=state.blocksize, compress_statistics=state.nested, quant_type="nf4"
    )
    new.dtype = state.dtype
    return _parameter(packed, new)


def store(values: torch.Tensor, like: Params4bit) -> Params4bit:
    """Stores values that lie on the grid of `like`, to the last bit, with its scales.

    Args:
        values: (out_features, in_features), float32; others are rounded to the nearest level.
        like: gives the scales.
    """
    codes = nearest_code(values, scale_of(like)).flatten()
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    packed = (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)  # the first of two stands in the high half
    return _parameter(packed.view(-1, 1), copy.deepcopy(like.quant_state))


def nearest_code(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Index of the level nearest to each value over its scale: int64, of the shape of `values`."""
    return torch.bucketize(values / scale, _boundaries(values.device))


def nearest(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The value on the grid that is nearest to each value."""
    return levels(values.device)[nearest_code(values, scale)] * scale


def to_tensors(name: str, weight: Params4bit) -> dict[str, torch.Tensor]:
    """A layer's weight as the tensors of a checkpoint, e.g. `NAME.weight` and `NAME.weight.absmax`."""
    tensors = {f"{name}.weight": weight.data}
    return tensors | {f"{name}.weight.{key}": value for key, value in weight.quant_state.as_dict(packed=True).items()}


def from_tensors(name: str, tensors: dict[str, torch.Tensor], device: str) -> Params4bit:
    """The reverse of `to_tensors`.

    Raises:
        MergeError: the weight is quantized otherwise than in NF4.
    """
    prefix = f"{name}.weight"
    state = {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key != prefix}
    if "quant_state.bitsandbytes__nf4" not in state:
        raise MergeError(f"{prefix} must be in bitsandbytes' nf4, found {', '.join(state) or 'no quantization state'}")
    return Params4bit.from_prequantized(data=tensors[prefix], quantized_stats=state, device=device)


def _parameter(packed: torch.Tensor, state: object) -> Params4bit:
    return Params4bit(packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True)
