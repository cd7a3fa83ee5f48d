"""Gives each row of a pass to causal attention by itself."""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from raylora.errors import PackingError
from raylora.training.packed.layout import Layout

ROW_CALL = 16
"""Tokens of padding a row, on average, from which a call for each row is faster than one for all, on a CPU.

A call of its own takes as long as 17 tokens of 9 heads of 64, or as 5 tokens of 32 heads: benchmarks/packed.md.
"""

LARGEST_HEAD = 256
"""Largest head dimension of flash attention."""


def attend_within_rows(
    layout: Layout,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    flash: bool,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> Tensor:
    """Apply causal attention to each row by itself.

    Args:
        layout: gives the rows.
        module: the attention module.
        query: (1, heads, n_tokens, head_dim).
        key: (1, key_value_heads, n_tokens, head_dim).
        value: (1, key_value_heads, n_tokens, head_dim).
        flash: True to take rows without padding where `has_flash`.
        scaling: factor of the scores; None is transformers' default.
        sliding_window: number of tokens that a token sees, itself included; None sets no limit.
        softcap: must be None.

    Returns:
        (1, n_tokens, heads, head_dim).

    Raises:
        PackingError: the model caps its attention scores.
    """
    if softcap is not None:  # transformers' sdpa ignores it before 5.23
        raise PackingError("the model caps its attention scores (softcap), which packed attention does not")
    # a squeezed view costs nothing on its way back; an index costs zeros and a copy
    sequences = [part.squeeze(0).transpose(0, 1) for part in (query, key, value)]
    if flash and has_flash(query, key, value):
        window = sliding_window if sliding_window is not None and layout.longest > sliding_window else None
        return _flash(layout, *sequences, scaling=scaling, window=window)[None]
    attend = partial(_sdpa, module, scaling=scaling, sliding_window=sliding_window)
    if query.device.type == "cpu" and layout.padding > ROW_CALL * len(layout.lengths):
        alone = zip(*(sequence.split(layout.lengths) for sequence in sequences), strict=True)
        return torch.cat([attend(*(part[None] for part in row)) for row in alone], dim=1)
    return layout.unpad(attend(*map(layout.pad, sequences)))[None]


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Apply transformers' causal SDPA to rows of one length; what is padded on the right is not seen.

    Args:
        module: the attention module.
        query: (rows, length, heads, head_dim).
        key: (rows, length, key_value_heads, head_dim).
        value: (rows, length, key_value_heads, head_dim).
        scaling: as for `attend_within_rows`.
        sliding_window: as for `attend_within_rows`.

    Returns:
        (rows, length, heads, head_dim).
    """
    mask, length = None, query.shape[1]
    if sliding_window is not None and length > sliding_window:
        ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
        mask = ones.tril() & ones.triu(1 - sliding_window)
    rows = [part.transpose(1, 2) for part in (query, key, value)]
    if not _takes_groups(*rows):
        rows[1:] = (repeat_kv(part, query.shape[2] // part.shape[1]) for part in rows[1:])
        module = nn.Identity()  # by the number of groups in the module, transformers would repeat them too
    attended, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, *rows, mask, dropout=0.0, scaling=scaling, is_causal=mask is None
    )
    return attended


def has_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return True if torch's flash attention takes these.

    It takes bfloat16 and float16 on compute capability 8 and later, and heads of one size, a multiple of 8.
    """
    size, dtype = query.shape[-1], query.dtype
    return (
        dtype in (torch.bfloat16, torch.float16)
        and key.dtype == value.dtype == dtype
        and value.shape[-1] == size <= LARGEST_HEAD
        and size % 8 == 0
        and _has_kernel(query.device)
    )


def _takes_groups(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return True if several query heads may share a key head in SDPA, all of (rows, heads, length, head_dim).

    On a GPU without flash attention, such as a T4, torch 2.13 would compute them by its plainest kernel, which keeps
    all scores in float32.
    """
    return query.device.type != "cuda" or has_flash(query, key, value)


@cache
def _has_kernel(device: torch.device) -> bool:
    """Return True if a device has the kernels of flash attention."""
    if device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device)[0] >= 8


def _flash(
    layout: Layout, query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, window: int | None
) -> Tensor:
    """Apply flash attention to rows that lie end to end.

    torch's public function for it, `varlen_attn`, makes a table of zeros and takes longer to call.

    Args:
        layout: gives the borders of rows.
        query: (n_tokens, heads, head_dim).
        key: (n_tokens, key_value_heads, head_dim).
        value: (n_tokens, key_value_heads, head_dim).
        scaling: factor of the scores; None is 1 / sqrt(head_dim).
        window: number of tokens that a token sees, itself included; None sets no limit.

    Returns:
        (n_tokens, heads, head_dim).
    """
    longest = layout.longest
    return torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        layout.borders,
        layout.borders,
        longest,
        longest,
        0.0,  # dropout
        True,  # causal
        False,  # without the mask of dropout
        scale=scaling,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[0]
