"""Draws the dropout masks of a pass from a hash of trial, micro-batch, layer, token and column.

The mask of a token is a function of these alone. So it is the same on every device, in every pack, after a pause, and
when gradient checkpointing draws it again; and `kernels` draws the same bits without ever storing a mask.

    state(token)      = SplitMix64's state of the micro-batch, advanced by the token's place in it
    row(layer, token) = mix64(state + layer * LAYER)
    bits(column)      = xorshift(MULTIPLIER * xorshift(row + column // 4 * GAMMA)), 16 of 64 bits for each column

Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators" (`GAMMA` and `mix64`). A row is a
well mixed number, so that one multiplication is enough for its columns.
"""

import math

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
LAYER = 0xD1342543DE82EF95
"""Odd factor that parts the layers. Source: Steele and Vigna 2021, "Computationally easy, spectrally good
multipliers"."""

LEVELS = 2**16
"""Steps of the drop probability: each entry takes 16 bits."""

ROWS = 512
"""Tokens whose bits are drawn at once on a CPU, so that they stay in its cache."""


def states(seed: int, key: int, n_tokens: int) -> Tensor:
    """Return the state of each token of a micro-batch, (n_tokens,), int64.

    Args:
        seed: seed of the trial.
        key: number of the micro-batch within the trial.
        n_tokens: tokens of the micro-batch.
    """
    return torch.arange(n_tokens).mul_(_signed(GAMMA)).add_(_signed(hash((seed, key)) * LAYER))


def threshold(p: float) -> int:
    """Return the number of 65,536 below which 16 bits drop an entry."""
    return round(p * LEVELS)


def draw_mask(states: Tensor, thresholds: Tensor, layer: int, n_features: int) -> Tensor:
    """Draw the dropout mask of one layer's input.

    Args:
        states: from `states`, (n_tokens,), int64.
        thresholds: from `threshold`, (n_tokens, 1), int32; 0 keeps a token whole.
        layer: index of the layer.
        n_features: size of the input.

    Returns:
        (n_tokens, n_features), uint8: 1 to keep an entry, 0 to drop it. Products with uint8 are twice as fast on a CPU
        as with bool.
    """
    mask = torch.empty(len(states), n_features, dtype=torch.uint8, device=states.device)
    columns = torch.arange(math.ceil(n_features / 4), device=states.device).mul_(_signed(GAMMA))
    rows = _mix64(states + _signed(layer * LAYER))
    # the bits as signed numbers, which torch compares with a threshold of the same type
    least = (thresholds - LEVELS // 2).to(torch.int16)
    size = ROWS if states.device.type == "cpu" else max(1, len(states))
    for some, least_of_row, kept in zip(*(part.split(size) for part in (rows, least, mask)), strict=True):
        bits = _xorshift(some[:, None] + columns, 32).mul_(_signed(MULTIPLIERS[0]))
        torch.ge(_xorshift(bits, 32).view(torch.int16)[:, :n_features], least_of_row, out=kept)
    return mask


def _mix64(x: Tensor) -> Tensor:
    """Mix the bits of each number, in place."""
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS, strict=False):
        _xorshift(x, shift).mul_(_signed(multiplier))
    return _xorshift(x, SHIFTS[2])


def _xorshift(x: Tensor, shift: int) -> Tensor:
    """Combine each number with itself, shifted to the right by some bits without its sign, in place."""
    return x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (64 - shift) - 1))


def _signed(x: int) -> int:
    """Return the low 64 bits of a number as torch's int64 has them."""
    return (x + 2**63) % 2**64 - 2**63
