"""Budgets of a packed step on a GPU, counted on the CPU: calls into torch, and none that waits for the device."""

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from raylora.base.architecture import Architecture
from raylora.training.packed import attention, dropout, layers
from raylora.training.packed import fused as fused_module
from raylora.training.packed.adapter import Adapter
from raylora.training.packed.forward import Pack
from raylora.training.packed.layout import MicroBatch

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    tie_word_embeddings=False,
)
WITHOUT_KERNEL = {
    "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh",
    "new_empty", "new_empty_strided", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip
"""Operators of torch that make a view or take memory."""

WAITING = {"_local_scalar_dense", "nonzero", "item", "masked_select", "unique2", "_assert_async"}
"""Operators whose result the host must have before it goes on."""


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


class NoKernel:
    """Stands for the kernels, which do not run here; a launch is counted as an operator."""

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts

    def __getitem__(self, grid: tuple[int, ...]) -> "NoKernel":
        return self

    def __call__(self, *args: object, **options: object) -> None:
        self._counts["kernel"] += 1


def norm_forward(x: Tensor, size: list[int], weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Stands for the kernel of a norm, which no CPU has. It is right, so that norms are recognised by it."""
    rstd = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x * rstd * weight).to(x.dtype), rstd


def norm_backward(grad: Tensor, x: Tensor, *_: object) -> tuple[Tensor, None]:
    """Stands for the kernel of a norm's gradient, which no CPU has."""
    return torch.empty_like(x), None


def flash_forward(query: Tensor, *_: object, **options: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Stands for the kernel of attention, which no CPU has."""
    return query.new_empty(query.shape), torch.empty(0), torch.empty(0), torch.empty(0), torch.empty(0)


def flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object, **options: object) -> tuple[Tensor, ...]:
    """Stands for the kernel of attention's gradient."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@pytest.fixture
def layer_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has the operators called that a GPU has kernels for. One is counted as one, whatever runs in its place."""
    monkeypatch.setattr(layers, "_has_kernel", lambda device: True)
    monkeypatch.setattr(attention, "_has_kernel", lambda device: True)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_fused_rms_norm", norm_forward, "CPU")
        library.impl("_fused_rms_norm_backward", norm_backward, "CPU")
        library.impl("_flash_attention_forward", flash_forward, "CPU")
        library.impl("_flash_attention_backward", flash_backward, "CPU")
        yield


def nf4_model(n_layers: int) -> PreTrainedModel:
    """A model whose linear layers are NF4, in bfloat16."""
    config = copy.deepcopy(CONFIG)
    config.num_hidden_layers = n_layers
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, nn.Linear):
            options = {"bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4"}
            quantized = bnb.nn.Linear4bit(layer.in_features, layer.out_features, **options)
            quantized.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
            model.model.set_submodule(name, quantized)
    return model


def operators(
    n_layers: int,
    ranks: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
    *,
    fused: bool,
    fused_layers: bool = False,
    dropout: float = 0.05,
    dense: bool = False,
) -> Counter[str]:
    """Count the operators of a pass that start a kernel."""
    model = nf4_model(n_layers)
    names = list(Architecture.of(model).shapes)
    options = {"grouped": not fused, "fused": fused, "dense": dense, "fused_layers": fused_layers}
    pack = Pack(model, names, autocast=torch.bfloat16, **options)
    made = [
        Adapter(pack.shapes, r=r, scaling=1.0, dropout=dropout, seed=n, rank_multiple=8) for n, r in enumerate(ranks)
    ]
    rows = [torch.arange(1, 9), torch.arange(2, 11)]  # of two lengths, else attention needs no padding
    counting = Operators()
    for name in ("project", "add_expanded", "add_outer"):
        monkeypatch.setattr(fused_module.kernels, name, NoKernel(counting.counts))
    with counting:
        pack.backward([MicroBatch(one, rows, rows, 0.1, key=0) for one in made])
    pack.close()
    return Counter({name: n for name, n in counting.counts.items() if name not in WITHOUT_KERNEL})


def of_a_layer(ranks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    """Count the operators of a decoder layer: those of two layers, less those of one."""
    two, one = (operators(n, ranks, monkeypatch, **options) for n in (2, 1))
    return sum((two - one).values())


MANY = (16,) * 8
MIXED = (8, 16, 32, 64) * 2


def test_a_decoder_layer_takes_as_many_launches_for_eight_adapters_of_four_ranks_as_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 42 kernels for seven linear layers, 56 operators to multiply by the base and dequantize it, 96 for the rest
    counts = [of_a_layer(ranks, monkeypatch, fused=True) for ranks in ((16,), MANY, MIXED)]
    assert counts == [194, 194, 194]


def test_fused_layers_take_sixty_six_launches_less(monkeypatch: pytest.MonkeyPatch, layer_kernels: None) -> None:
    # of the 96, 30 are left: norms 4, rotary embeddings 12, attention 2, SwiGLU 5, 7 sums of residuals and gradients
    counts = [of_a_layer(ranks, monkeypatch, fused=True, fused_layers=True) for ranks in ((16,), MANY, MIXED)]
    assert counts == [128, 128, 128]
    assert of_a_layer(MIXED, monkeypatch, fused=True, fused_layers=True, dense=True) == 128 - 7 * 2 * 3 == 86


def test_a_dense_base_takes_no_launches_to_dequantize(monkeypatch: pytest.MonkeyPatch) -> None:
    # each product with the base, forward and backward, dequantizes scales, adds their mean, and dequantizes weights
    dense, sparse = (of_a_layer(MIXED, monkeypatch, fused=True, dense=dense) for dense in (True, False))
    assert dense == sparse - 7 * 2 * 3


def test_the_products_of_torch_stay_within_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_a_layer((16,), monkeypatch, fused=False, dropout=0.0) <= 240
    assert of_a_layer(MANY, monkeypatch, fused=False, dropout=0.0) <= 240
    assert of_a_layer(MANY, monkeypatch, fused=False) <= 440


def test_a_mask_takes_as_many_launches_for_many_tokens_as_for_few() -> None:
    # on a CPU it takes more: rows are drawn in pieces that stay in its cache
    counts = []
    for n_tokens in (8, 4 * dropout.ROWS):
        states = torch.empty(n_tokens, dtype=torch.int64, device="meta")
        thresholds = torch.empty(n_tokens, 1, dtype=torch.int32, device="meta")
        with Operators() as operators:
            dropout.draw_mask(states, thresholds, layer=0, n_features=64)
        counts.append(operators.counts)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("fused", [False, True])
def test_no_layer_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, layer_kernels: None, fused: bool) -> None:
    counts = [operators(n, MIXED, monkeypatch, fused=fused, fused_layers=fused) for n in (1, 2)]
    for name in WAITING:  # the tables of a pass are made on the host, once
        assert counts[0][name] == counts[1][name], name
