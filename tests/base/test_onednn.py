"""Float32 products on a CPU, whichever library computes them."""

import pytest
import torch

from raylora.base.onednn import fast_products


def test_fast_products_are_float32() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 256), torch.randn(96, 256)
    expected = x.double() @ weight.double().t()
    with fast_products(torch.device("cpu")):
        found = x @ weight.t()
    # float32 has 24 significant bits: about 5e-7 for sums of 256; products of bfloat16 would be 3e-3 off
    assert float((found.double() - expected).norm() / expected.norm()) < 5e-6


def test_the_setting_is_as_before_even_after_an_error() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), fast_products(torch.device("cpu")):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
