"""Matrix products of float32 on CPUs, by the faster of the two libraries that torch has for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Within it, large float32 products on a CPU are oneDNN's where that is the faster one: MKL's code for AMD stops at
    AVX2, and takes twice as long. Small ones, as attention's, are faster without.

    torch 2.13 hands float32 products to oneDNN when they may be rounded to bfloat16, which oneDNN does with AMX alone
    (https://uxlfoundation.github.io/oneDNN, "Floating-point math mode"). So on CPUs without AMX they are float32 still.
    """
    if device.type != "cpu" or not _onednn_is_faster():
        yield
        return
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@cache
def _onednn_is_faster() -> bool:
    cpu = torch.cpu.get_capabilities()
    return bool(torch.backends.mkldnn.is_available() and cpu.get("avx512_f") and not cpu.get("amx_tile"))
