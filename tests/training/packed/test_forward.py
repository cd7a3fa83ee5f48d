"""The pack's arithmetic: against peft on many architectures, and against sums taken by hand."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from raylora.base.architecture import Architecture
from raylora.data.rows import IGNORE
from raylora.errors import PackingError
from raylora.training.packed.adapter import Adapter
from raylora.training.packed.forward import Pack
from raylora.training.packed.layout import Layout, MicroBatch

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, attention_bias=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "mistral, window of 4": MistralConfig(**SIZES, sliding_window=4),
    "gemma": GemmaConfig(**SIZES),
    "phi": PhiConfig(**{**SIZES, "num_key_value_heads": 4}, partial_rotary_factor=0.5),
    "phi3": Phi3Config(**SIZES),
    "gpt2": GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
LENGTHS = (7, 11, 5, 9)


def tiny(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).double().eval().requires_grad_(False)


def rows() -> tuple[list[Tensor], list[Tensor]]:
    """Token ids and labels of four rows; some tokens have no loss."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 60, (n,), generator=generator) for n in LENGTHS]
    labels = [row.clone() for row in ids]
    labels[0][:3] = IGNORE
    labels[3][5] = IGNORE
    return ids, labels


def adapter(pack: Pack, seed: int = 0, r: int = 4, dropout: float = 0.0, **options: object) -> Adapter:
    """An adapter whose B is not zero, so that its A has a gradient."""
    made = Adapter(pack.shapes, r=r, scaling=0.5, dropout=dropout, seed=seed, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(100 + seed)
    for view in made.lora_B.values():
        view.copy_(torch.randn(view.shape, generator=generator, dtype=torch.float64))
    return made


def gradients(one: Adapter) -> Tensor:
    return torch.cat([parameter.grad for parameter in one.parameters])


def pack_of(model: PreTrainedModel, **options: object) -> Pack:
    return Pack(model, list(Architecture.of(model).shapes), **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pack_gives_the_losses_and_gradients_of_peft(name: str) -> None:
    model = tiny(CONFIGS[name])
    ids, labels = rows()
    pack = pack_of(model)
    adapters = [adapter(pack, seed=0), adapter(pack, seed=1, r=3)]
    batches = [MicroBatch(adapters[0], ids[:2], labels[:2], 0.1), MicroBatch(adapters[1], ids[2:], labels[2:], 0.2)]
    losses = pack.backward(batches)
    pack.close()
    for one, batch, loss in zip(adapters, batches, losses, strict=True):
        expected, expected_gradients = by_peft(tiny(CONFIGS[name]), one, batch)
        # norms and rotary angles of some models round to float32, and sums are taken in another order
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradients(one), expected_gradients, rtol=1e-4, atol=1e-7)
        assert expected_gradients.abs().max() > 1e-3


def by_peft(model: PreTrainedModel, one: Adapter, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Loss and gradients, row by row, of the same factors in a peft model."""
    names = list(one.lora_A)
    peft_model = get_peft_model(model, LoraConfig(r=one.r, lora_alpha=one.scaling * one.r, target_modules=names))
    factors = [dict[str, torch.nn.Parameter](), dict[str, torch.nn.Parameter]()]
    for name in names:
        layer = peft_model.base_model.model.get_submodule(name)
        for kind, values, found in zip((layer.lora_A, layer.lora_B), (one.lora_A, one.lora_B), factors, strict=True):
            kind["default"].weight.data = values[name].clone()
            found[name] = kind["default"].weight
    loss = torch.zeros((), dtype=torch.float64)
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        logits = peft_model(input_ids=ids[None]).logits[0, :-1]
        loss = loss + batch.weight * cross_entropy(logits, labels[1:], ignore_index=IGNORE, reduction="sum")
    loss.backward()
    return loss.detach(), torch.cat([parameter.grad.flatten() for found in factors for parameter in found.values()])


def test_a_model_that_caps_its_attention_scores_is_refused() -> None:
    model = tiny(Gemma2Config(**SIZES))
    pack = pack_of(model)
    ids, labels = rows()
    with pytest.raises(PackingError, match="softcap"):
        pack.nll([MicroBatch(adapter(pack), ids, labels)])


@pytest.mark.parametrize("r", [(4, 4, 4), (4, 3, 4), (8, 2, 5)])
def test_grouped_products_are_the_products_one_by_one(r: tuple[int, int, int]) -> None:
    model = tiny(CONFIGS["llama"]).float()
    found = []
    for grouped in (False, True):
        pack = pack_of(model, grouped=grouped)
        options = {"device": "cpu", "rank_multiple": 8 if grouped else 1}
        adapters = [
            Adapter(pack.shapes, r=rank, scaling=0.5 + rank, dropout=0.1 * seed, seed=seed, **options)
            for seed, rank in enumerate(r)
        ]
        for one in adapters:
            for name, view in one.lora_B.items():
                view.copy_(torch.linspace(-0.1, 0.1, view.numel()).view(view.shape).roll(len(name)))
        ids, labels = rows()
        batches = [MicroBatch(one, [ids[n]], [labels[n]], 0.1, key=n) for n, one in enumerate(adapters)]
        batches.append(MicroBatch(adapters[0], [ids[3]], [labels[3]], 0.1, key=3))
        losses = pack.backward(batches)
        pack.close()
        views = [dict(zip(one.lora_A, gradient_views(one), strict=True)) for one in adapters]
        found.append((losses, views))
    (losses, plain), (losses_grouped, grouped_views) = found
    torch.testing.assert_close(losses_grouped, losses, rtol=1e-5, atol=0)  # float32, in another order
    for rank, one, other in zip(r, plain, grouped_views, strict=True):
        for name in one:
            for mine, theirs in zip(one[name], other[name], strict=True):
                filled = theirs[:rank] if mine.shape[0] == rank else theirs[:, :rank]
                torch.testing.assert_close(filled, mine, rtol=1e-3, atol=1e-6)


def test_a_trial_learns_with_the_same_scaling_in_any_company() -> None:
    model = tiny(CONFIGS["llama"]).float()
    ids, labels = rows()

    def train(*scalings: float) -> Tensor:
        """Gradients of the first adapter in bfloat16, beside others of the same rank."""
        pack = pack_of(model, autocast=torch.bfloat16, grouped=True)
        adapters = [
            Adapter(pack.shapes, r=8, scaling=scaling, dropout=0.0, seed=n) for n, scaling in enumerate(scalings)
        ]
        for one in adapters:
            for view in one.lora_B.values():
                view.copy_(torch.linspace(-0.1, 0.1, view.numel()).view(view.shape))
        pack.backward([MicroBatch(one, [ids[n]], [labels[n]], 1.0) for n, one in enumerate(adapters)])
        pack.close()
        return gradients(adapters[0]).double()

    alike = train(2.105, 2.105)  # a plain number then; alone, activations of another shape would be rounded otherwise
    factor = float(train(2.105, 1.37) @ alike / (alike @ alike))
    # a scaling in bfloat16 would act as 2.109, 0.002 more
    assert factor == pytest.approx(1, abs=8e-4)
    # nor is it rounded in all company alike: 2.105 and its neighbour in bfloat16 act as two numbers
    neighbour, one = train(2.109375, 1.37), train(2.105, 1.37)
    assert float(neighbour @ one / (one @ one)) == pytest.approx(2.109375 / 2.105, abs=8e-4)


def test_small_weights_do_not_underflow_in_float16() -> None:
    model = tiny(CONFIGS["llama"]).float()
    ids, labels = rows()
    found = []
    for dtype in (None, torch.float16):
        pack = pack_of(model, autocast=dtype)
        one, other = (adapter_of(pack, seed) for seed in (0, 1))
        # as in a step of 100,000 tokens: a gradient of 1e-5 times a few hundredths is below float16's least number
        batches = [MicroBatch(one, ids[:2], labels[:2], 1e-5), MicroBatch(other, ids[2:], labels[2:], 2e-5)]
        losses = pack.backward(batches)
        pack.close()
        found.append((losses, gradients(one), gradients(other)))
    for expected, half in zip(*found, strict=True):
        torch.testing.assert_close(half.float(), expected.float(), rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_a_dense_base_gives_the_same_gradients_to_the_bit_until_memory_is_short(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval().requires_grad_(False)
    ids, labels = rows()
    found = []
    for dense in (True, False):
        pack = pack_of(model, autocast=torch.bfloat16, dense=dense)
        assert pack.is_dense == dense
        for _ in range(2):
            one = adapter_of(pack, 0)
            pack.backward([MicroBatch(one, ids, labels, 0.1)])
            found.append(gradients(one))
            pack.forget_dense()
        pack.close()
    assert all(torch.equal(found[0], other) for other in found[1:])


def adapter_of(pack: Pack, seed: int) -> Adapter:
    """An adapter in float32 whose B is not zero."""
    made = Adapter(pack.shapes, r=4, scaling=0.5, dropout=0.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for view in made.lora_B.values():
        view.copy_(0.1 * torch.randn(view.shape, generator=generator))
    return made


@pytest.mark.parametrize("grouped", [False, True])
def test_micro_batches_of_one_adapter_share_its_products(grouped: bool) -> None:
    pack = pack_of(tiny(CONFIGS["llama"]).float(), grouped=grouped)
    ids, labels = rows()
    one, other = adapter_of(pack, 0), adapter_of(pack, 1)
    batches = [MicroBatch(one if n % 2 else other, [ids[n]], [labels[n]], 0.1, key=n) for n in range(4)]
    layout = Layout(batches, torch.device("cpu"), None, grouped=grouped)
    stacked = [len(group.lora_A["model.layers.0.mlp.up_proj"]) for group in layout.groups]
    assert stacked == ([2] if grouped else [1, 1])
    pack.close()


def test_a_layout_without_gradients_takes_no_memory_for_them() -> None:
    pack = pack_of(tiny(CONFIGS["llama"]).float())
    ids, labels = rows()
    batches = [MicroBatch(adapter_of(pack, n), [ids[n]], [labels[n]]) for n in range(2)]
    (group,) = Layout(batches, torch.device("cpu"), None, grouped=True, with_gradient=False).groups
    assert not hasattr(group, "grad_A")
    pack.close()


def test_all_tables_of_a_pass_reach_the_device_by_one_copy() -> None:
    pack = pack_of(tiny(CONFIGS["llama"]).float())
    ids, labels = rows()
    meta = [Adapter(pack.shapes, r=4, scaling=1.0 + n, dropout=0.0, seed=n, device="meta") for n in range(3)]
    batches = [MicroBatch(one, [row], [label]) for one, row, label in zip(meta, ids, labels, strict=False)]
    with Copies() as copies:
        layout = Layout(batches, torch.device("meta"), torch.bfloat16, grouped=True)
    assert copies.n == 1
    assert layout.targets.device.type == "meta" and layout.targets.shape == (7 - 3 + 11 - 1 + 5 - 1,)
    pack.close()


class Copies(TorchDispatchMode):
    """Counts copies from the host to the device."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sources = [one for one in args if isinstance(one, Tensor)]
        self.n += isinstance(out, Tensor) and out.is_meta and any(not one.is_meta for one in sources)
        return out


def gradient_views(one: Adapter) -> list[tuple[Tensor, Tensor]]:
    """Gradients of A and B, layer by layer."""
    split = [
        [part.view(size) for part, size in zip(p.grad.split([a * b for a, b in s.values()]), s.values(), strict=True)]
        for p, s in zip(one.parameters, one.sizes, strict=True)
    ]
    return list(zip(*split, strict=True))


def test_a_trials_gradient_does_not_depend_on_its_pack_even_with_dropout() -> None:
    model = tiny(CONFIGS["llama"])
    pack = pack_of(model)
    ids, labels = rows()

    def train(*others: int) -> Tensor:
        one = adapter(pack, seed=5, dropout=0.3)
        batches = [MicroBatch(adapter(pack, seed=n, dropout=0.2), [ids[n]], [labels[n]], 1.0, key=n) for n in others]
        batches.insert(len(others) // 2, MicroBatch(one, ids[:2], labels[:2], 0.1, key=3))
        pack.backward(batches)
        return gradients(one)

    alone = train()
    torch.testing.assert_close(train(2, 3), alone, rtol=1e-7, atol=1e-12)  # sums over other shapes of matrices
    assert not torch.allclose(alone, gradients(trained_with_key(pack, 4)))


def trained_with_key(pack: Pack, key: int) -> Adapter:
    one = adapter(pack, seed=5, dropout=0.3)
    ids, labels = rows()
    pack.backward([MicroBatch(one, ids[:2], labels[:2], 0.1, key=key)])
    return one


def test_dropout_drops_the_share_it_is_told_to() -> None:
    pack = pack_of(tiny(CONFIGS["llama"]))
    seen: list[Tensor] = []
    one = adapter(pack, dropout=0.25)
    ids, labels = rows()
    layout = Layout([MicroBatch(one, ids, labels, 1.0, key=7)], torch.device("cpu"), None, grouped=False)
    for layer in range(20):
        mask = layout.dropout_mask(layer, 1000)
        assert mask is not None
        seen.append(mask.double().mean())
    # 640,000 draws: a standard deviation of 0.0005
    assert float(torch.stack(seen).mean()) == pytest.approx(0.75, abs=0.003)
    assert torch.equal(layout.dropout_mask(3, 1000), layout.dropout_mask(3, 1000))
    assert not torch.equal(layout.dropout_mask(3, 1000), layout.dropout_mask(4, 1000))


def test_a_diverged_trial_leaves_its_neighbours_alone() -> None:
    pack = pack_of(tiny(CONFIGS["llama"]))
    ids, labels = rows()

    def train(broken: bool) -> Tensor:
        one, other = adapter(pack, seed=0), adapter(pack, seed=1)
        if broken:
            for view in other.lora_B.values():
                view.fill_(float("nan"))
        batches = [MicroBatch(one, ids[:2], labels[:2], 0.1), MicroBatch(other, ids[2:], labels[2:], 0.1)]
        losses = pack.backward(batches)
        assert bool(losses[1].isnan()) == broken
        return gradients(one)

    assert torch.equal(train(broken=True), train(broken=False))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny(CONFIGS["llama"])
        pack = pack_of(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        one = adapter(pack, dropout=0.3)
        ids, labels = rows()
        pack.backward([MicroBatch(one, ids, labels, 0.1, key=0)])
        found.append(gradients(one))
    assert torch.equal(found[0], found[1])


def test_cross_entropy_in_chunks_is_cross_entropy_at_once() -> None:
    model = tiny(CONFIGS["llama"])
    ids, labels = rows()
    found = []
    for chunk in (1000, 3):
        pack = pack_of(model, chunk=chunk)
        one = adapter(pack)
        found.append((pack.backward([MicroBatch(one, ids, labels, 0.1)]), gradients(one)))
        pack.close()
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-15)  # float64, in other shapes


def test_only_tokens_with_a_label_have_a_loss_and_a_rows_first_has_none() -> None:
    model = tiny(CONFIGS["llama"])
    pack = pack_of(model)
    one = Adapter(pack.shapes, r=1, scaling=1.0, dropout=0.0, seed=0, dtype=torch.float64)
    ids = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
    labels = [torch.tensor([5, IGNORE, 7]), torch.tensor([8, IGNORE])]
    nll = pack.nll([MicroBatch(one, ids, labels)])
    pack.close()
    # B is zero, so this is the base: one token has a loss, the third, predicted at the second
    expected = -model(input_ids=torch.tensor([[5, 6]])).logits[0, 1].log_softmax(-1)[7]
    torch.testing.assert_close(nll[0], expected, rtol=1e-6, atol=0)


def test_a_closed_pack_leaves_the_base_as_it_was(request: pytest.FixtureRequest) -> None:
    model = tiny(CONFIGS["llama"])
    ids, labels = rows()
    before, attention = model(input_ids=ids[0][None]).logits, model.config._attn_implementation
    pack = pack_of(model)
    pack.backward([MicroBatch(adapter(pack), ids, labels, key=0)])
    pack.close()
    model.eval()
    assert torch.equal(model(input_ids=ids[0][None]).logits, before)
    assert model.config._attn_implementation == attention
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


def test_filled_up_ranks_stay_zero() -> None:
    pack = pack_of(tiny(CONFIGS["llama"]))
    one = adapter(pack, r=3, rank_multiple=8)
    ids, labels = rows()
    pack.backward([MicroBatch(one, ids, labels, 0.1)])
    assert one.n_parameters == sum(3 * (a + b) for a, b in pack.shapes.values())
    for vectors in ([p.grad for p in one.parameters], [p.detach() for p in one.parameters]):
        (flat_a, flat_b), (sizes_a, sizes_b) = vectors, one.sizes
        for part, size in zip(flat_a.split([a * b for a, b in sizes_a.values()]), sizes_a.values(), strict=True):
            assert not part.view(size)[3:].any()
        for part, size in zip(flat_b.split([a * b for a, b in sizes_b.values()]), sizes_b.values(), strict=True):
            assert not part.view(size)[:, 3:].any()
