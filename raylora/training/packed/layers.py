"""Replaces the norms and rotary embeddings of a base by others that take fewer kernels and compute the same.

transformers writes both as chains of small operators: a norm takes 8 of them forward and 13 backward. Here a norm takes
one kernel each way on a GPU, and the rotary embedding of queries and keys takes six operators each way.

A layer is recognised by what it computes, and not by its name: it is tried once, on random numbers, against the formula
that replaces it. What computes anything else is left alone.
"""

import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

ROTARY = "apply_rotary_pos_emb"
"""Name of the function in the modeling files of transformers that turns queries and keys."""

OTHER_NORMS = (nn.RMSNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
"""Norms of torch's own, which are not tried: one kernel each, or other formulas, some of which learn from a trial."""

TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}
"""Largest difference in float32 between a layer and what replaces it: another order of sums makes 1e-6."""


def replace_layers(model: nn.Module) -> ExitStack:
    """Replace the norms and rotary embeddings of a model that are known.

    The rotary embedding is a function of the model's file. Other models of the same file in this process use the
    replacement too.

    Args:
        model: its parameters are frozen.

    Returns:
        A stack whose `close` restores the model.
    """
    with ExitStack() as undo:  # an error restores what has been replaced
        for module in list(model.modules()):
            if (norm := _fused_norm(module)) is not None:
                module.forward = norm
                undo.callback(delattr, module, "forward")  # uncovers the method of the class
        for file in {sys.modules.get(type(module).__module__) for module in model.modules()}:
            own = getattr(file, ROTARY, None)
            if own is None or own.__module__ == __name__:  # another pack has replaced it, and restores it
                continue
            if (rotary := _fused_rotary(own)) is not None:
                setattr(file, ROTARY, rotary)
                undo.callback(setattr, file, ROTARY, own)
        return undo.pop_all()


def _fused_norm(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return the forward function that replaces that of a root-mean-square norm; None for other modules."""
    own, parameter = module.forward, getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(parameter, nn.Parameter) or parameter.dim() != 1 or not isinstance(eps, float):
        return None
    if isinstance(module, OTHER_NORMS) or len(inspect.signature(own).parameters) != 1:
        return None
    weight, one_more = parameter.detach(), 1 + parameter.detach().float()
    x = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
    x[1] *= eps**0.5  # here eps shows
    if _agree(own, lambda x: _RmsNorm.apply(x, weight.float(), eps), x):  # Llama
        return lambda x: _RmsNorm.apply(x, weight, eps) if x.dtype == weight.dtype else own(x)
    if _agree(own, lambda x: _RmsNorm.apply(x, one_more, eps), x):  # Gemma, which computes in float32
        return lambda x: _RmsNorm.apply(x, one_more, eps)
    return None


@torch.no_grad()
def _agree(own: Callable[..., Any], ours: Callable[..., Any], *inputs: Tensor) -> bool:
    """Return True if two functions compute the same, up to rounding. What raises computes something else."""
    try:
        found, expected = ours(*inputs), own(*inputs)
        pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
        return all(torch.allclose(one.float(), other.float(), **TOLERANCE) for one, other in pairs)
    except Exception:  # whatever a model's own code raises for numbers that it did not expect
        return False


class _RmsNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * weight, with a frozen weight.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv:1910.07467).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Compute the norm.

        Args:
            x: (..., n).
            weight: (n,), of the dtype to compute in. 16-bit types are summed in float32.
            eps: added to the mean of squares.

        Returns:
            (..., n), of the dtype of x.
        """
        if _has_kernel(x.device):
            y, rstd = torch.ops.aten._fused_rms_norm(x.to(weight.dtype), [len(weight)], weight, eps)
        else:
            wide = x.to(torch.promote_types(weight.dtype, torch.float32))
            rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(len(weight)).add_(eps).rsqrt_()
            y = (wide * rstd).mul_(weight)
        ctx.save_for_backward(x, weight, rstd)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient with respect to x."""
        x, weight, rstd = ctx.saved_tensors
        if _has_kernel(x.device):
            grad_y, wide = (one.to(weight.dtype).contiguous() for one in (grad_y, x))
            size, mask = [len(weight)], [True, False]
            grad_x = torch.ops.aten._fused_rms_norm_backward(grad_y, wide, size, rstd, weight, mask)[0]
        else:
            wide = x.to(rstd.dtype)
            grad_x = grad_y.to(rstd.dtype) * weight
            along = (grad_x * wide).sum(-1, keepdim=True).mul_(rstd.pow(3)).div_(len(weight))
            grad_x = grad_x.mul_(rstd).addcmul_(wide, along, value=-1)
        return grad_x.to(x.dtype), None, None


def _has_kernel(device: torch.device) -> bool:
    """Return True if torch has a kernel for the norm. On a CPU, its `rms_norm` takes twice as long as `_RmsNorm`."""
    return device.type == "cuda"


def _fused_rotary(own: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return the function that replaces a rotary embedding; None for a function of another form."""
    parameters = inspect.signature(own).parameters
    if list(parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"] or parameters["unsqueeze_dim"].default != 1:
        return None

    def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        return _Rotary.apply(q, k, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim))

    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 8, generator=generator) for heads in (2, 1))
    cos, sin = (torch.randn(1, 3, 8, generator=generator) for _ in range(2))
    if not _agree(own, ours, q, k, cos, sin):
        return None
    turns_parts = _agree(own, ours, q, k, cos[..., :4], sin[..., :4])

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        is_known = q.dtype == k.dtype == cos.dtype == sin.dtype and (turns_parts or cos.shape[-1] == q.shape[-1])
        return (ours if is_known else own)(q, k, cos, sin, unsqueeze_dim)

    return rotary


class _Rotary(torch.autograd.Function):
    """Turns pairs of entries by an angle: x * cos + rotate_half(x) * sin, on the first entries of each head.

    Source: Su et al. 2021, "RoFormer", section 3.4.2 (arXiv:2104.09864), in the order of `transformers`.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Turn queries and keys.

        Args:
            q: (batch, heads, n_tokens, head_dim).
            k: (batch, key_value_heads, n_tokens, head_dim).
            cos: (batch, 1, n_tokens, r), r <= head_dim.
            sin: (batch, 1, n_tokens, r).

        Returns:
            The turned q and k.
        """
        ctx.save_for_backward(cos, sin)
        return _turned(q, cos, *sin.chunk(2, -1), sign=1), _turned(k, cos, *sin.chunk(2, -1), sign=1)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to q and k: the turn the other way."""
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, -1)
        return *(_turned(grad, cos, second, first, sign=-1) for grad in (grad_q, grad_k)), None, None


def _turned(x: Tensor, cos: Tensor, sin_first: Tensor, sin_second: Tensor, *, sign: int) -> Tensor:
    """Return x * cos, less sign * second half * sin_first in the first half, and the reverse in the second."""
    r = cos.shape[-1]
    if r == x.shape[-1]:
        y = x * cos
    else:
        y = x.clone()
        y[..., :r] *= cos
    (x_first, x_second), (y_first, y_second) = (one[..., :r].chunk(2, -1) for one in (x, y))
    y_first.addcmul_(x_second, sin_first, value=-sign)
    y_second.addcmul_(x_first, sin_second, value=sign)
    return y
