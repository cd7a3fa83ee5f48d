"""The fused kernels: against the products and masks in torch, in Triton's interpreter where there is no GPU."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from raylora.base.architecture import Architecture
from raylora.errors import PackingError
from raylora.training.packed import dropout, kernels, layout
from raylora.training.packed.adapter import Adapter
from raylora.training.packed.forward import Pack
from raylora.training.packed.fused import FusedGroup
from raylora.training.packed.layout import Layout, MicroBatch
from raylora.training.packed.verify import Reference, check_kernels

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = LlamaConfig(
    vocab_size=60,
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
)
RANKS, DROPOUTS, LENGTHS = (3, 16, 8, 20), (0.1, 0.0, 0.5, 0.25), (5, 37, 2, 33)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(copy.deepcopy(CONFIG)).eval().requires_grad_(False).to(DEVICE)


def adapters(pack: Pack, dropouts: tuple[float, ...] = DROPOUTS) -> list[Adapter]:
    """Adapters whose B is not zero; the second adapts attention alone."""
    made = []
    for seed, (r, p) in enumerate(zip(RANKS, dropouts, strict=True)):
        shapes = {name: shape for name, shape in pack.shapes.items() if seed != 1 or "self_attn" in name}
        one = Adapter(shapes, r=r, scaling=0.5 + seed, dropout=p, seed=seed, device=DEVICE)
        generator = torch.Generator().manual_seed(seed)
        for view in one.lora_B.values():
            view.copy_(0.1 * torch.randn(view.shape, generator=generator))
        made.append(one)
    return made


def micro_batches(made: list[Adapter]) -> list[MicroBatch]:
    """A row for each adapter, and a second micro-batch for the first."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 60, (length,), generator=generator) for length in (*LENGTHS, 6)]
    owners = [*made, made[0]]
    return [MicroBatch(one, [row], [row], 0.1, key=n) for n, (one, row) in enumerate(zip(owners, rows, strict=True))]


def train(
    model: PreTrainedModel, *, fused: bool, dropouts: tuple[float, ...] = DROPOUTS
) -> tuple[Tensor, list[Tensor]]:
    """Losses, and the gradients of each adapter."""
    pack = Pack(model, list(Architecture.of(model).shapes), fused=fused)
    made = adapters(pack, dropouts)
    losses = pack.backward(micro_batches(made))
    pack.close()
    return losses, [torch.cat([parameter.grad for parameter in one.parameters]) for one in made]


@pytest.mark.parametrize("dropouts", [DROPOUTS, (0.0, 0.0, 0.0, 0.0)])
def test_kernels_give_the_losses_and_gradients_of_torch(model: PreTrainedModel, dropouts: tuple[float, ...]) -> None:
    losses, gradients = train(model, fused=True, dropouts=dropouts)
    expected_losses, expected_gradients = train(model, fused=False, dropouts=dropouts)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)  # float32, in another order
    for found, expected in zip(gradients, expected_gradients, strict=True):
        assert float(expected.abs().max()) > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_kernels_draw_the_masks_of_torch_to_the_bit(model: PreTrainedModel) -> None:
    linear = {"layer": (16, 16)}
    made = [Adapter(linear, r=16, scaling=1.0, dropout=p, seed=n, device=DEVICE) for n, p in enumerate((0.3, 0.6))]
    for one in made:
        one.lora_A["layer"].copy_(torch.eye(16))
    rows = [torch.ones(length, dtype=torch.int64) for length in (40, 21)]
    batches = [MicroBatch(one, [row], [row], key=n) for n, (one, row) in enumerate(zip(made, rows, strict=True))]
    fused, plain = (Layout(batches, DEVICE, None, grouped=False, layers=layers) for layers in (["layer"], None))
    (group,) = fused.groups
    assert isinstance(group, FusedGroup) and fused.dropout_mask(0, 16) is None
    x = torch.ones(61, 16, device=DEVICE)
    # with A = 1 and x = 1, h is scaling times the mask, and scaling is 1 / (1 - p)
    h = group.add_update("layer", 0, x, torch.zeros_like(x), None)
    mask = plain.dropout_mask(0, 16)
    assert mask is not None
    assert torch.equal(h[:40] * (1 - 0.3) > 0.5, mask[:40].bool()) and torch.equal(h[40:] > 0, mask[40:].bool())
    assert 0.2 < float(1 - mask[:40].double().mean()) < 0.4  # 640 draws of .3: a standard deviation of .018


@pytest.mark.parametrize("is_right", [True, False])
def test_the_check_of_a_lane_sees_another_mask(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, is_right: bool
) -> None:
    pack = Pack(model, list(Architecture.of(model).shapes), fused=True)
    made = adapters(pack, (0.0, 0.0, 0.0, 0.0))
    rows = [torch.arange(1, 12)] * 5
    reference = Reference(rows, [], has_experts=False, adapters=made, adapted_nll=[], gradients=[])
    if is_right:
        check_kernels(pack, reference, torch.float32)
    else:
        monkeypatch.setattr(layout, "draw_mask", lambda *args: dropout.draw_mask(*args).flip(1))
        with pytest.raises(PackingError, match=r"gradient of rank 3 differs from that of torch's products by \d+"):
            check_kernels(pack, reference, torch.float32)
    pack.close()


def test_an_adapter_of_nan_leaves_the_others_alone(model: PreTrainedModel) -> None:
    found = []
    for broken in (False, True):
        pack = Pack(model, list(Architecture.of(model).shapes), fused=True)
        made = adapters(pack)
        if broken:
            for view in made[2].lora_B.values():
                view.fill_(float("nan"))
        losses = pack.backward(micro_batches(made))
        pack.close()
        assert bool(losses[2].isnan()) == broken
        found.append([parameter.grad for one in (made[0], made[1], made[3]) for parameter in one.parameters])
    for alone, beside in zip(*found, strict=True):
        assert torch.equal(alone, beside)


def test_masks_are_those_of_the_documented_hash() -> None:
    states = dropout.states(seed=5, key=3, n_tokens=3)
    mask = dropout.draw_mask(
        states, torch.full((3, 1), dropout.threshold(0.4), dtype=torch.int32), layer=7, n_features=9
    )
    for token in range(3):
        for column in range(9):
            assert int(mask[token, column]) == (bits(token, column) >= round(0.4 * 65536))


def bits(token: int, column: int) -> int:
    """The 16 bits of an entry, in Python's integers, ordered as signed numbers are."""
    low = 2**64 - 1
    x = (hash((5, 3)) * dropout.LAYER + token * dropout.GAMMA + 7 * dropout.LAYER) & low
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & low
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & low
    x ^= x >> 31
    x = (x + column // 4 * dropout.GAMMA) & low
    x = ((x ^ (x >> 32)) * 0xBF58476D1CE4E5B9) & low
    x ^= x >> 32
    return ((x >> (column % 4 * 16)) & 0xFFFF) ^ 0x8000


def test_masks_of_seeds_tokens_and_columns_are_independent() -> None:
    drawn = []
    for seed, layer in ((0, 0), (1, 0), (0, 1)):
        states = dropout.states(seed, 0, 2000)
        thresholds = torch.full((2000, 1), dropout.threshold(0.05), dtype=torch.int32)
        drawn.append(dropout.draw_mask(states, thresholds, layer, 1000).double())
    one, other_seed, other_layer = drawn
    pairs = [(one, other_seed), (one, other_layer), (one[1:], one[:-1])]
    pairs += [(one[:, step:], one[:, :-step]) for step in (1, 2, 3, 4)]
    for left, right in pairs:
        correlation = torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.004  # 2,000,000 draws: a standard deviation of .0007
    # means of columns and of tokens scatter as those of independent draws do
    assert float(one.mean(0).std()) == pytest.approx((0.05 * 0.95 / 2000) ** 0.5, rel=0.15)
    assert float(one.mean(1).std()) == pytest.approx((0.05 * 0.95 / 1000) ** 0.5, rel=0.15)


def test_a_rank_that_does_not_fit_takes_the_products_of_torch(model: PreTrainedModel) -> None:
    made = [Adapter({"layer": (8, 8)}, r=r, scaling=1.0, dropout=0.0, seed=0, device=DEVICE) for r in (4, 200)]
    batches = [MicroBatch(one, [torch.ones(3, dtype=torch.int64)], [torch.ones(3, dtype=torch.int64)]) for one in made]
    groups = Layout(batches, DEVICE, None, grouped=False, layers=["layer"]).groups
    assert not any(isinstance(group, FusedGroup) for group in groups)


def test_a_layer_takes_six_launches_whatever_the_number_of_adapters_and_ranks(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    for name in ("project", "add_expanded", "add_outer"):
        monkeypatch.setattr(kernels, name, Recorder(name, launched))
    for n_adapters in (1, 2, 4):
        pack = Pack(model, list(Architecture.of(model).shapes), fused=True)
        launched.clear()
        pack.backward(micro_batches(adapters(pack))[:n_adapters])
        pack.close()
        assert launched == 7 * ["project", "add_expanded"] + 7 * ["project", "add_outer", "add_outer", "add_expanded"]


class Recorder:
    """Stands for a kernel, and notes each launch."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self._name, self._launched = name, launched

    def __getitem__(self, grid: tuple[int, ...]) -> "Recorder":
        return self

    def __call__(self, *args: object, **options: object) -> None:
        self._launched.append(self._name)


def test_kernels_compile_for_a_gpu_without_spills_and_with_its_tensor_cores() -> None:
    script = Path(__file__).with_name("compile_kernels.py")
    compiler = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, script, "90", "16", "128"]
    printed = subprocess.run(command, env=compiler, capture_output=True, text=True, check=True).stdout
    compiled = [json.loads(line) for line in printed.splitlines()]
    assert [(one["kernel"], one["r"]) for one in compiled] == [
        (kernel, r) for r in (16, 128) for kernel in ("project", "add_expanded", "add_outer")
    ]
    for one in compiled:
        assert one["spills"] == 0 and one["tensor_core_products"] > 0, one
        # numbers of layers of two bases share a kernel
        assert one["unspecialized"] == ["n_layers", "layer"]
