"""Keeps dense copies of NF4 weights for a while, so that generation does not dequantize the base for every token."""

from collections.abc import Iterator
from contextlib import contextmanager

from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.nn.functional import linear

from raylora.base.architecture import dense_weight
from raylora.training.memory import MIB, free_memory_mib

SHARE = 0.5
"""Largest share of the free memory that dense copies take. Our choice; the rest is for the KV cache."""


@contextmanager
def dense_copies(model: nn.Module) -> Iterator[None]:
    """Give the 4-bit layers of a model dense weights inside the block, as many as fit into the free memory.

    The outputs are those of the 4-bit layers: bitsandbytes multiplies by the same dequantized weight. On a GPU, its
    kernels for few tokens round otherwise.

    Args:
        model: model on one device, with or without an adapter.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    copied: list[Linear4bit] = []
    left = SHARE * MIB * free_memory_mib(str(layers[0].weight.device)) if layers else 0.0
    try:
        for layer in layers:
            dtype = layer.compute_dtype or layer.weight.quant_state.dtype
            left -= layer.weight.quant_state.shape.numel() * dtype.itemsize
            if left < 0:
                break
            layer.forward = _Multiply(dense_weight(layer).to(dtype), layer.bias)
            copied.append(layer)
        yield
    finally:
        for layer in copied:
            del layer.forward  # uncovers the method of the class


class _Multiply:
    """Forward function of a linear layer with a dense weight.

    Args:
        weight: (out_features, in_features).
        bias: (out_features,), or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, None if bias is None else bias.to(weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x.to(self._weight.dtype), self._weight, self._bias).to(x.dtype)
