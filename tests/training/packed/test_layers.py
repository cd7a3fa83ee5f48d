"""Norms and rotary embeddings of a pack by fewer kernels: against the model's own, on many architectures."""

import copy
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from transformers import CohereConfig, Gemma3TextConfig, GPTNeoXConfig, Phi3Config, PretrainedConfig, PreTrainedModel

from raylora.training.packed import layers
from raylora.training.packed.layers import ROTARY, _fused_norm, _fused_rotary, _RmsNorm, _Rotary, replace_layers
from raylora.training.packed.layout import MicroBatch
from tests.training.packed.test_forward import CONFIGS, SIZES, adapter, gradients, pack_of, rows, tiny

SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
MORE_CONFIGS: dict[str, PretrainedConfig] = CONFIGS | {
    "gemma3": Gemma3TextConfig(**SIZES, **SLIDING, query_pre_attn_scalar=16),
    "phi3, half of each head": Phi3Config(**SIZES, partial_rotary_factor=0.5),
    "gpt_neox, a quarter of each head": GPTNeoXConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, rotary_pct=0.25
    ),
    "cohere": CohereConfig(**SIZES),
}
N_NORMS = {"llama": 5, "qwen2": 5, "qwen3": 9, "mistral, window of 4": 5, "gemma": 5, "phi3": 5, "gemma3": 13} | {
    "phi3, half of each head": 5
}
"""Norms of two layers and the last one; others are layer norms, which torch takes in one kernel."""

OTHER_ROTARY = {"gpt2", "cohere"}
"""GPT-2 has none; Cohere turns neighbours and not halves."""


def uneven(name: str) -> PreTrainedModel:
    """A model whose norms have other weights than ones."""
    model = tiny(MORE_CONFIGS[name])
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def file_of(model: PreTrainedModel) -> ModuleType:
    return sys.modules[type(model).__module__]


def replaced(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "forward" in vars(module)]


@pytest.fixture(autouse=True)
def _restores_what_it_replaces() -> Iterator[None]:
    before = {name: getattr(file, ROTARY, None) for name, file in sys.modules.items() if ".modeling_" in name}
    yield
    assert all(getattr(sys.modules[name], ROTARY, None) is own for name, own in before.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MORE_CONFIGS)
def test_a_pack_gives_the_same_losses_and_gradients_as_with_the_models_own_layers(
    name: str, dtype: torch.dtype
) -> None:
    found = []
    for fused_layers in (False, True):
        pack = pack_of(uneven(name).to(dtype), fused_layers=fused_layers)
        ids, labels = rows()
        adapters = [adapter(pack, seed=0, dropout=0.2), adapter(pack, seed=1, r=3)]
        batches = [
            MicroBatch(adapters[0], ids[:2], labels[:2], 0.1, key=0),
            MicroBatch(adapters[1], ids[2:], labels[2:], 0.2),
        ]
        found.append((pack.backward(batches), *map(gradients, adapters)))
        pack.close()
    for own, ours in zip(*found, strict=True):
        assert own.abs().max() > 1e-3
        # models round to float32 in their norms, even in float64
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5 * float(own.abs().max()))


@pytest.mark.parametrize("name", MORE_CONFIGS)
def test_known_layers_are_replaced_while_a_pack_is_open(name: str) -> None:
    model = uneven(name)
    own = getattr(file_of(model), ROTARY, None)
    undo = replace_layers(model)
    assert len(replaced(model)) == N_NORMS.get(name, 0)
    assert (getattr(file_of(model), ROTARY, None) is own) == (name in OTHER_ROTARY)
    undo.close()
    assert not replaced(model) and getattr(file_of(model), ROTARY, None) is own


def test_a_pack_that_cannot_open_leaves_the_base_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = uneven("llama")
    attention = model.config._attn_implementation
    set_attention = type(model).set_attn_implementation

    def refuses(self: PreTrainedModel, name: str) -> None:
        if "within-rows" in name:
            raise ValueError("no such attention")
        set_attention(self, name)

    monkeypatch.setattr(type(model), "set_attn_implementation", refuses)
    with pytest.raises(ValueError, match="no such attention"):
        pack_of(model, fused_layers=True)
    assert not replaced(model) and not model.get_input_embeddings()._forward_hooks
    assert model.config._attn_implementation == attention


def test_layers_can_be_given_back_while_a_pack_is_open() -> None:
    model = uneven("llama")
    pack = pack_of(model, fused_layers=True)
    assert pack.fused_layers and len(replaced(model)) == 14 + 5  # linear layers, norms
    pack.fused_layers = False
    assert not pack.fused_layers and len(replaced(model)) == 14
    pack.close()


class Norm(nn.Module):
    """A norm of one of several forms."""

    def __init__(self, form: str, n: int = 16) -> None:
        super().__init__()
        self.weight, self.eps, self.form = nn.Parameter(torch.linspace(-0.5, 2, n), requires_grad=False), 1e-6, form

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "raises":
            raise ValueError("two rows are not what is expected")
        if self.form == "another shape":
            return x[:, :3]
        if self.form == "eps outside the root":
            return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)
        if self.form == "groups":
            x = x.unflatten(-1, (2, -1))
            return self.weight * (x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()).flatten(-2)
        if self.form == "less its mean":
            x = x - x.mean(-1, keepdim=True)
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()


@pytest.mark.parametrize(
    "form", ["known", "eps outside the root", "groups", "less its mean", "raises", "another shape"]
)
def test_only_a_norm_that_computes_the_formula_is_replaced(form: str) -> None:
    assert (_fused_norm(Norm(form)) is not None) == (form == "known")


def test_a_norm_that_learns_from_its_inputs_is_not_tried() -> None:
    norm = nn.BatchNorm1d(16).train()
    assert _fused_norm(norm) is None
    assert not norm.running_mean.any() and norm.num_batches_tracked == 0


def test_trying_a_norm_draws_no_random_numbers_of_the_process() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert _fused_norm(Norm("known")) is not None
    assert torch.equal(torch.rand(1), expected)


def test_a_norm_leaves_inputs_of_another_dtype_to_the_model() -> None:
    norm = Norm("known")
    fused = _fused_norm(norm)
    assert fused is not None
    x = torch.randn(3, 16).bfloat16()
    assert fused(x).dtype == torch.float32 and torch.equal(fused(x), norm(x))  # float32 weights times bfloat16


def test_a_rotary_embedding_leaves_angles_of_another_dtype_to_the_model() -> None:
    own = file_of(tiny(CONFIGS["llama"])).apply_rotary_pos_emb
    fused = _fused_rotary(own)
    assert fused is not None
    q, k, angles = torch.randn(1, 2, 3, 8).bfloat16(), torch.randn(1, 1, 3, 8).bfloat16(), torch.randn(1, 3, 8)
    for found, expected in zip(fused(q, k, angles, angles), own(q, k, angles, angles), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("r", [8, 4])
def test_gradients_are_those_of_the_formulas(r: int) -> None:
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    x, weight = torch.randn(2, 3, 5, requires_grad=True, **options), torch.randn(5, **options)
    assert gradcheck(lambda x: _RmsNorm.apply(x, weight, 1e-3), x)
    q, k = (torch.randn(1, 3, heads, 8, requires_grad=True, **options) for heads in (2, 1))
    cos, sin = (torch.randn(1, 1, 3, r, **options) for _ in range(2))
    assert gradcheck(lambda q, k: _Rotary.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin), (q, k))


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_gpus_kernel_of_the_norm_gets_one_dtype_and_its_gradient(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = uneven(kind).bfloat16().model.layers[0].input_layernorm
    x, grad = torch.randn(2, 3, 32).bfloat16(), torch.randn(3, 2, 32).bfloat16().transpose(0, 1)
    found = []
    for has_kernel in (False, True):
        monkeypatch.setattr(layers, "_has_kernel", lambda device, has_kernel=has_kernel: has_kernel)
        fused = _fused_norm(norm)
        assert fused is not None
        with torch.library._scoped_library("aten", "IMPL") as library:
            library.impl("_fused_rms_norm_backward", norm_backward, "CPU")
            inputs = x.clone().requires_grad_()
            y = fused(inputs)
            y.backward(grad)
        found.append((y.detach(), inputs.grad))
        assert y.dtype == inputs.grad.dtype == torch.bfloat16
    # the two round to bfloat16 at other places: 8 bits
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(found[1][0], norm(x), rtol=2e-2, atol=2e-2)


def norm_backward(
    grad: Tensor, x: Tensor, size: list[int], rstd: Tensor, weight: Tensor, mask: list[bool]
) -> tuple[Tensor, None]:
    """Stands for torch's kernel, which no CPU has, and demands what it demands."""
    assert grad.dtype == x.dtype == weight.dtype and grad.is_contiguous() and x.is_contiguous()
    assert size == [x.shape[-1]] and rstd.shape == (*x.shape[:-1], 1) and mask == [True, False]
    normed, scaled = x.float() * rstd, grad.float() * weight
    return (rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))).to(x.dtype), None


def test_one_copy_of_a_model_restores_what_another_still_uses() -> None:
    model = tiny(CONFIGS["llama"])
    own = file_of(model).apply_rotary_pos_emb
    first, second = replace_layers(model), replace_layers(copy.deepcopy(model))
    first.close()
    second.close()
    assert file_of(model).apply_rotary_pos_emb is own
