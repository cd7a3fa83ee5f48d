"""Makes torch compute float32 matrix products on a CPU by oneDNN where it is faster than MKL."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Hand large float32 products on a CPU to oneDNN inside the block, if the CPU has AVX-512 and no AMX.

    On AMD CPUs, MKL uses no more than AVX2 and takes twice as long. Small products, such as those of attention, are
    faster by MKL; keep them outside the block.

    torch 2.13 hands float32 products to oneDNN only if it may round them to bfloat16. oneDNN does so only with AMX, so
    the products remain float32 on a CPU without AMX.

    Args:
        device: where the products run. The block changes nothing on a GPU.

    Source: oneDNN's manual, "Floating-point math mode" (https://uxlfoundation.github.io/oneDNN).
    """
    if device.type != "cpu" or not _onednn_is_faster():
        yield
        return
    matmul = torch.backends.mkldnn.matmul
    precision = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = precision


@cache
def _onednn_is_faster() -> bool:
    """Return True if this CPU has AVX-512, which MKL leaves unused on AMD, and no AMX, which would lose precision."""
    cpu = torch.cpu.get_capabilities()
    return bool(torch.backends.mkldnn.is_available() and cpu.get("avx512_f") and not cpu.get("amx_tile"))
