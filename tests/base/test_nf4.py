"""NF4 weights as a grid agree with bitsandbytes to the last bit."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit

from raylora.base import nf4
from raylora.errors import MergeError


def weight(shape: tuple[int, int], *, double_quant: bool) -> Params4bit:
    torch.manual_seed(0)
    values = torch.randn(shape) * 0.05
    return Params4bit(values, requires_grad=False, quant_type="nf4", compress_statistics=double_quant).to("cpu")


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(8, 64), (5, 24), (33, 130)])
def test_dequantizing_is_bitsandbytes_own(shape: tuple[int, int], double_quant: bool) -> None:
    one = weight(shape, double_quant=double_quant)
    torch.testing.assert_close(nf4.dequantize(one), dequantize_4bit(one.data, one.quant_state), rtol=0, atol=0)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(8, 64), (33, 130)])
def test_values_on_the_grid_are_stored_and_reloaded_to_the_last_bit(shape: tuple[int, int], double_quant: bool) -> None:
    like = weight(shape, double_quant=double_quant)
    levels = torch.randint(0, 16, shape)
    values = nf4.levels(torch.device("cpu"))[levels] * nf4.scale_of(like)
    stored = nf4.store(values, like)
    reloaded = nf4.from_tensors("layer", nf4.to_tensors("layer", stored), "cpu")
    for one in (stored, reloaded):
        torch.testing.assert_close(dequantize_4bit(one.data, one.quant_state), values, rtol=0, atol=0)


def test_a_layer_computes_with_what_was_stored() -> None:
    like = weight((32, 64), double_quant=True)
    values = nf4.levels(torch.device("cpu"))[torch.randint(0, 16, (32, 64))] * nf4.scale_of(like)
    layer = Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = nf4.store(values, like)
    inputs = torch.randn(3, 64)
    torch.testing.assert_close(layer(inputs), inputs @ values.T)  # float32 sums in another order


def test_quantizing_is_bitsandbytes_own() -> None:
    one = weight((33, 130), double_quant=True)
    torch.manual_seed(0)
    again = nf4.quantize(torch.randn(33, 130) * 0.05, one)
    assert torch.equal(again.data.flatten(), one.data.flatten())
    assert torch.equal(nf4.scale_of(again), nf4.scale_of(one))


def test_a_block_of_zeros_stays_zero() -> None:
    values = torch.randn(2, 64)
    values[0] = 0
    one = nf4.quantize(values, weight((2, 64), double_quant=False))
    assert torch.equal(nf4.nearest(values, nf4.scale_of(one))[0], torch.zeros(64))


def test_another_kind_of_quantization_is_named() -> None:
    with pytest.raises(MergeError, match=r"layer.weight must be in bitsandbytes' nf4, found absmax"):
        nf4.from_tensors("layer", {"layer.weight": torch.zeros(4), "layer.weight.absmax": torch.zeros(1)}, "cpu")


def test_a_value_within_a_levels_room_is_nearest_to_it() -> None:
    codes, one = torch.arange(16, dtype=torch.int32), torch.ones(16)
    levels = nf4.values_of(codes, one)
    below, above = nf4.rooms(levels.device)
    assert below[0] == -torch.inf
    assert above[-1] == torch.inf
    for room in (below.clamp_min(-1), above.clamp_max(1)):
        assert torch.equal(nf4.nearest_code(levels + 0.999 * room, one), codes)
    assert torch.equal(nf4.nearest_code(levels[1:] + 1.001 * below[1:], one[1:]), codes[:-1])
    assert torch.equal(nf4.nearest_code(levels[:-1] + 1.001 * above[:-1], one[1:]), codes[1:])


def test_many_values_find_the_level_that_a_search_among_the_boundaries_finds() -> None:
    levels = nf4.levels(torch.device("cpu"))
    boundaries = (levels[1:] + levels[:-1]) / 2
    beside = [torch.nextafter(boundaries, torch.full_like(boundaries, to)) for to in (-9.0, 9.0)]
    edges = torch.linspace(-1, 1, nf4.CELLS + 1)
    torch.manual_seed(0)
    values = torch.cat([boundaries, *beside, edges, torch.tensor([-7.0, 7.0]), torch.randn(nf4.LARGE) * 0.6])
    codes = nf4.nearest_code(values, torch.ones_like(values))
    assert torch.equal(codes, torch.bucketize(values, boundaries, out_int32=True))
    assert torch.equal(codes[None].T, nf4.nearest_code(values[:, None], torch.ones(1)))
