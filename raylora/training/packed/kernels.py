"""Adds the low-rank updates of all adapters of a pass by three Triton kernels, which draw dropout inside.

    project        h = scaling * dropout(x) A^T            (forward)      scaling * g B      (backward)
    add_expanded   y += h B^T                              (forward)      grad_x += mask * (h A)
    add_outer      grad_A += h^T dropout(x)                               grad_B += (h^T g)^T

One launch serves any number of adapters of any ranks. The kernels read each adapter's own factors and add to its own
gradients, by address. `group` has the same products in torch, and `dropout` the same masks.

An adapter's tokens are neighbours. Its programs each take a tile of `TILE` of them; `add_outer` takes some columns, and
goes through all its tokens, so that sums need no atomic additions and are the same in every run.
"""

import triton
import triton.language as tl

from raylora.training.packed import dropout

TILE = 32
"""Tokens of one program."""

N_ADDRESSES = 4
"""Addresses of a layer's factors in the table: A, B, and the gradients of these."""

LAYERS = ("n_layers", "layer")
"""Arguments for whose values no kernel is compiled anew; Triton would take each multiple of 16 for another kind."""

_GAMMA, _LAYER = tl.constexpr(dropout.GAMMA), tl.constexpr(dropout.LAYER)
_MULTIPLIER_0, _MULTIPLIER_1 = (tl.constexpr(multiplier) for multiplier in dropout.MULTIPLIERS)
_SHIFT_0, _SHIFT_1, _SHIFT_2 = (tl.constexpr(shift) for shift in dropout.SHIFTS)


@triton.jit
def _kept(states, thresholds, rows, inside, columns, layer):
    """Draw the dropout mask of some tokens and columns, as `dropout.draw_mask` does.

    Returns:
        (tokens, columns), bool.
    """
    bits = tl.load(states + rows, mask=inside, other=0).to(tl.uint64, bitcast=True)
    bits += layer.to(tl.uint64) * _LAYER
    bits = (bits ^ (bits >> _SHIFT_0)) * _MULTIPLIER_0
    bits = (bits ^ (bits >> _SHIFT_1)) * _MULTIPLIER_1
    bits ^= bits >> _SHIFT_2
    bits = bits[:, None] + ((columns // 4).to(tl.uint64) * _GAMMA)[None, :]
    bits = (bits ^ (bits >> 32)) * _MULTIPLIER_0
    bits ^= bits >> 32
    # 16 bits of each column; flipping the highest orders them as signed numbers
    draws = ((bits >> ((columns % 4) * 16).to(tl.uint64)[None, :]) & 0xFFFF).to(tl.int32) ^ 0x8000
    return draws >= tl.load(thresholds + rows, mask=inside, other=0)[:, None]


@triton.jit
def _factor(addresses, adapter, n_layers, layer, ranks, WHICH: tl.constexpr):
    """Return pointer and rank of an adapter's factor in a layer; rank 0 if the adapter does not adapt the layer."""
    address = tl.load(addresses + (adapter * n_layers + layer) * 4 + WHICH)
    return address.to(tl.pointer_type(tl.float32)), tl.where(address == 0, 0, tl.load(ranks + adapter))


@triton.jit
def _offsets(rank, n, r, columns, IS_B: tl.constexpr):
    """Return the offset of each entry in A, (rank, n), or in B, (n, rank), as (r, columns)."""
    if IS_B:
        return columns[None, :] * rank + r[:, None]
    return r[:, None] * n + columns[None, :]


@triton.jit(do_not_specialize=LAYERS)
def project(
    x, h, scaling, states, thresholds, starts, lengths, ranks, addresses, owners, firsts, n, n_layers, layer,
    WHICH: tl.constexpr, IS_B: tl.constexpr, DROPOUT: tl.constexpr, R: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Write h = scaling * dropout(x) W^T for the tokens of one tile, W being A or, transposed, B.

    Args:
        x: (n_tokens, n).
        h: (n_tokens, R), written up to R with zeros after an adapter's rank.
    """
    tile = tl.program_id(0)
    adapter = tl.load(owners + tile)
    token = tl.load(firsts + tile) + tl.arange(0, T)
    inside = token < tl.load(lengths + adapter)
    rows = (tl.load(starts + adapter) + token).to(tl.int64)
    r = tl.arange(0, R)
    weights, rank = _factor(addresses, adapter, n_layers, layer, ranks, WHICH)
    total = tl.zeros((T, R), tl.float32)
    for first in range(0, n, N):
        columns = first + tl.arange(0, N)
        valid = columns < n
        inputs = tl.load(x + rows[:, None] * n + columns[None, :], mask=inside[:, None] & valid[None, :], other=0.0)
        if DROPOUT:
            inputs = tl.where(_kept(states, thresholds, rows, inside, columns, layer), inputs, 0.0)
        where = weights + _offsets(rank, n, r, columns, IS_B)
        w = tl.load(where, mask=(r < rank)[:, None] & valid[None, :], other=0.0).to(inputs.dtype)
        total += tl.dot(inputs, tl.trans(w), input_precision="ieee")
    total *= tl.load(scaling + rows, mask=inside, other=0.0)[:, None]
    tl.store(h + rows[:, None] * R + r[None, :], total.to(h.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=LAYERS)
def add_expanded(
    h, y, states, thresholds, starts, lengths, ranks, addresses, owners, firsts, n, n_layers, layer,
    WHICH: tl.constexpr, IS_B: tl.constexpr, DROPOUT: tl.constexpr, R: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Add mask * (h W) to some columns of y for the tokens of one tile, W being A or, transposed, B.

    Args:
        h: (n_tokens, R).
        y: (n_tokens, n).
    """
    tile = tl.program_id(0)
    adapter = tl.load(owners + tile)
    token = tl.load(firsts + tile) + tl.arange(0, T)
    inside = token < tl.load(lengths + adapter)
    rows = (tl.load(starts + adapter) + token).to(tl.int64)
    r, columns = tl.arange(0, R), tl.program_id(1) * N + tl.arange(0, N)
    valid = columns < n
    weights, rank = _factor(addresses, adapter, n_layers, layer, ranks, WHICH)
    low = tl.load(h + rows[:, None] * R + r[None, :], mask=inside[:, None], other=0.0)
    where = weights + _offsets(rank, n, r, columns, IS_B)
    w = tl.load(where, mask=(r < rank)[:, None] & valid[None, :], other=0.0).to(low.dtype)
    update = tl.dot(low, w, input_precision="ieee")
    if DROPOUT:
        update = tl.where(_kept(states, thresholds, rows, inside, columns, layer), update, 0.0)
    target, bounds = y + rows[:, None] * n + columns[None, :], inside[:, None] & valid[None, :]
    total = tl.load(target, mask=bounds, other=0.0).to(tl.float32) + update
    tl.store(target, total.to(y.dtype.element_ty), mask=bounds)


@triton.jit(do_not_specialize=LAYERS)
def add_outer(
    h, x, weights, states, thresholds, starts, lengths, ranks, addresses, n, n_layers, layer,
    WHICH: tl.constexpr, IS_B: tl.constexpr, DROPOUT: tl.constexpr, R: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Add weight * h^T dropout(x) to some columns of the gradient of A or, transposed, of B.

    Args:
        h: (n_tokens, R).
        x: (n_tokens, n).
        weights: factor of each adapter's gradients, (n_adapters,).
    """
    adapter = tl.program_id(0)
    r, columns = tl.arange(0, R), tl.program_id(1) * N + tl.arange(0, N)
    valid = columns < n
    gradient, rank = _factor(addresses, adapter, n_layers, layer, ranks, WHICH)
    n_tokens, start = tl.load(lengths + adapter), tl.load(starts + adapter)
    total = tl.zeros((R, N), tl.float32)
    for first in range(0, n_tokens, T):
        token = first + tl.arange(0, T)
        inside = token < n_tokens
        rows = (start + token).to(tl.int64)
        low = tl.load(h + rows[:, None] * R + r[None, :], mask=inside[:, None], other=0.0)
        inputs = tl.load(x + rows[:, None] * n + columns[None, :], mask=inside[:, None] & valid[None, :], other=0.0)
        if DROPOUT:
            inputs = tl.where(_kept(states, thresholds, rows, inside, columns, layer), inputs, 0.0)
        total += tl.dot(tl.trans(low), inputs, input_precision="ieee")
    target, bounds = gradient + _offsets(rank, n, r, columns, IS_B), (r < rank)[:, None] & valid[None, :]
    tl.store(target, tl.load(target, mask=bounds, other=0.0) + total * tl.load(weights + adapter), mask=bounds)
