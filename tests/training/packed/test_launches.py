"""Budgets of a packed step on a GPU, counted on the CPU: calls into torch, and none that waits for the device."""

import copy
from collections import Counter
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from raylora.base.architecture import Architecture
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
    dropout: float = 0.05,
    dense: bool = False,
) -> Counter[str]:
    """Count the operators of a pass that start a kernel."""
    model = nf4_model(n_layers)
    names = list(Architecture.of(model).shapes)
    pack = Pack(model, names, autocast=torch.bfloat16, grouped=not fused, fused=fused, dense=dense)
    made = [
        Adapter(pack.shapes, r=r, scaling=1.0, dropout=dropout, seed=n, rank_multiple=8) for n, r in enumerate(ranks)
    ]
    rows = [torch.arange(1, 9), torch.arange(2, 10)]
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
    # 42 kernels for seven linear layers, 56 operators to multiply by the base and dequantize it, 100 for the rest
    counts = [of_a_layer(ranks, monkeypatch, fused=True) for ranks in ((16,), MANY, MIXED)]
    assert counts == [198, 198, 198]


def test_a_dense_base_takes_no_launches_to_dequantize(monkeypatch: pytest.MonkeyPatch) -> None:
    # each product with the base, forward and backward, dequantizes scales, adds their mean, and dequantizes weights
    dense, sparse = (of_a_layer(MIXED, monkeypatch, fused=True, dense=dense) for dense in (True, False))
    assert dense == sparse - 7 * 2 * 3


def test_the_products_of_torch_stay_within_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_a_layer((16,), monkeypatch, fused=False, dropout=0.0) <= 240
    assert of_a_layer(MANY, monkeypatch, fused=False, dropout=0.0) <= 240
    assert of_a_layer(MANY, monkeypatch, fused=False) <= 440


@pytest.mark.parametrize("fused", [False, True])
def test_no_layer_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    counts = [operators(n, MIXED, monkeypatch, fused=fused) for n in (1, 2)]
    for name in WAITING:  # the tables of a pass are made on the host, once
        assert counts[0][name] == counts[1][name], name
