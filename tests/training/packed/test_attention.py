"""Attention without padding: a stand-in for torch's kernel, which runs on a GPU alone, checks what it is given."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3TextConfig

from raylora.training.packed import attention
from raylora.training.packed.layout import Layout, MicroBatch
from tests.training.packed.test_forward import CONFIGS, LENGTHS, SIZES, adapter, gradients, pack_of, rows, tiny

SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {name: CONFIGS[name] for name in ("llama", "mistral, window of 4", "phi3", "gpt2")} | {
    # scores times 1 / sqrt(16), where heads of 8 would have 1 / sqrt(8)
    "gemma3": Gemma3TextConfig(**SIZES, **SLIDING, query_pre_attn_scalar=16)
}


class Flash:
    """Stands for `_flash_attention_forward` and its gradient, by a loop over rows. It notes the windows."""

    def __init__(self) -> None:
        self.windows: list[int | None] = []
        self.n_backward = 0

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        borders: Tensor | None,
        key_borders: Tensor | None,
        longest: int,
        key_longest: int,
        dropout: float,
        is_causal: bool,
        return_mask: bool,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        assert borders is not None and key_borders is not None and torch.equal(borders, key_borders)
        assert borders.dtype == key_borders.dtype == torch.int32
        assert borders[0] == 0 and borders[-1] == len(query) == len(key) == len(value)
        assert longest == key_longest == int(borders.diff().max())
        assert dropout == 0 and is_causal and not return_mask
        assert query.dtype == key.dtype == value.dtype and query.dim() == 3 and query.stride(-1) == 1
        assert window_size_right == (None if window_size_left is None else 0)
        self.windows.append(window_size_left)
        out = torch.empty_like(query)
        for start, stop in pairwise(borders.tolist()):
            p = probabilities(query[start:stop], key[start:stop], scale, window_size_left)
            out[start:stop] = torch.einsum("hqk,khd->qhd", p, grouped(query, value)[start:stop])
        logsumexp = query.new_zeros(query.shape[1], len(query), dtype=torch.float32)
        state = torch.zeros(2, dtype=torch.uint64)
        return out, logsumexp, state, torch.zeros(0), torch.zeros(0)

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        borders: Tensor,
        key_borders: Tensor,
        longest: int,
        key_longest: int,
        dropout: float,
        is_causal: bool,
        *_: Tensor,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.n_backward += 1
        grads = [torch.empty_like(part) for part in (query, key, value)]
        factor = scale if scale is not None else query.shape[-1] ** -0.5
        for start, stop in pairwise(borders.tolist()):
            q, k, v, g = (part[start:stop] for part in (query, grouped(query, key), grouped(query, value), grad))
            p = probabilities(q, key[start:stop], scale, window_size_left)
            grad_p = torch.einsum("qhd,khd->hqk", g, v)
            grad_scores = factor * p * (grad_p - (grad_p * p).sum(-1, keepdim=True))
            found = (
                torch.einsum("hqk,khd->qhd", grad_scores, k),
                torch.einsum("hqk,qhd->khd", grad_scores, q).unflatten(1, (key.shape[1], -1)).sum(2),
                torch.einsum("hqk,qhd->khd", p, g).unflatten(1, (key.shape[1], -1)).sum(2),
            )
            for whole, part in zip(grads, found, strict=True):
                whole[start:stop] = part
        return grads[0], grads[1], grads[2]


def grouped(query: Tensor, part: Tensor) -> Tensor:
    """Keys or values, one for each head of the queries."""
    return part.repeat_interleave(query.shape[1] // part.shape[1], dim=1)


def probabilities(query: Tensor, key: Tensor, scale: float | None, window: int | None) -> Tensor:
    """Weights of a row's tokens, (heads, n, n). A window of w to the left shows w tokens and the token itself."""
    factor = scale if scale is not None else query.shape[-1] ** -0.5
    scores = torch.einsum("qhd,khd->hqk", query, grouped(query, key)) * factor
    ages = torch.arange(len(query))[:, None] - torch.arange(len(query))
    hidden = (ages < 0) | (ages > (len(query) if window is None else window))
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


@pytest.fixture
def flash() -> Iterator[Flash]:
    stand_in = Flash()
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", stand_in.forward, "CPU")
        library.impl("_flash_attention_backward", stand_in.backward, "CPU")
        yield stand_in


@pytest.mark.parametrize("name", MODELS)
def test_rows_without_padding_attend_as_padded_rows_do(
    name: str, flash: Flash, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, labels = rows()
    found, lengths, sdpa = [], list[int](), attention._sdpa

    def noted(module: nn.Module, query: Tensor, *others: Tensor, **options: Any) -> Tensor:
        lengths.append(query.shape[1])
        return sdpa(module, query, *others, **options)

    monkeypatch.setattr(attention, "_sdpa", noted)
    for has_flash, row_call in ((False, max(LENGTHS)), (True, 0), (False, 0)):
        monkeypatch.setattr(attention, "has_flash", lambda *_, has_flash=has_flash: has_flash)
        monkeypatch.setattr(attention, "ROW_CALL", row_call)
        pack = pack_of(tiny(MODELS[name]), fused_layers=True)
        adapters = [adapter(pack, seed=0, dropout=0.2), adapter(pack, seed=1, r=3)]
        batches = [
            MicroBatch(adapters[0], ids[:2], labels[:2], 0.1, key=0),
            MicroBatch(adapters[1], ids[2:], labels[2:], 0.2),
        ]
        found.append((pack.backward(batches), *map(gradients, adapters), pack.nll(batches)))
        pack.close()
    windows = {"mistral, window of 4": [3, 3], "gemma3": [3, None]}.get(name, [None, None])
    assert flash.windows == 2 * windows and flash.n_backward == 2
    assert lengths == 4 * [max(LENGTHS)] + 4 * list(LENGTHS)  # two layers, with a gradient and without
    for padded, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(other, padded, rtol=1e-7, atol=1e-10)  # float64, in another order


def test_rows_of_one_length_are_not_copied_and_attend_as_each_does_alone() -> None:
    pack = pack_of(tiny(MODELS["mistral, window of 4"]))
    ids = [row[:5] for row in rows()[0]]
    one = adapter(pack)
    layout = Layout([MicroBatch(one, ids, ids)], torch.device("cpu"), None, grouped=False)
    sequence = torch.arange(60.0).view(20, 3)
    assert layout.pad(sequence).shape == (4, 5, 3)
    assert layout.pad(sequence).data_ptr() == layout.unpad(layout.pad(sequence)).data_ptr() == sequence.data_ptr()
    together = pack.nll([MicroBatch(one, ids, ids)])
    alone = torch.cat([pack.nll([MicroBatch(one, [row], [row])]) for row in ids])
    beside_a_longer_one = pack.nll([MicroBatch(one, ids, ids), MicroBatch(one, [rows()[0][1]], [rows()[1][1]])])
    pack.close()
    torch.testing.assert_close(together[0], alone.sum(), rtol=1e-10, atol=0)  # float64, in other shapes
    torch.testing.assert_close(together[0], beside_a_longer_one[0], rtol=1e-10, atol=0)


def test_a_window_that_no_row_reaches_sets_no_limit(flash: Flash, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_flash", lambda *_: True)
    pack = pack_of(tiny(MODELS["mistral, window of 4"]), fused_layers=True)
    ids, labels = rows()
    short = [row[:4] for row in ids], [row[:4] for row in labels]
    pack.nll([MicroBatch(adapter(pack), *short)])
    pack.close()
    assert flash.windows == [None, None] and max(LENGTHS) > 4


@pytest.mark.parametrize("fused_layers", [False, True])
def test_the_kernel_is_called_in_16_bit_where_a_device_has_it(
    fused_layers: bool, flash: Flash, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_has_kernel", lambda device: True)
    ids, labels = rows()
    for autocast, n_calls in ((None, 0), (torch.bfloat16, 2 if fused_layers else 0)):
        flash.windows.clear()
        pack = pack_of(
            tiny(MODELS["llama"]).to(autocast or torch.float32), autocast=autocast, fused_layers=fused_layers
        )
        pack.nll([MicroBatch(adapter(pack), ids, labels)])
        pack.close()
        assert len(flash.windows) == n_calls


def test_heads_and_dtypes_without_a_kernel_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_has_kernel", lambda device: True)

    def query(head_dim: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(1, 2, 3, head_dim, dtype=dtype)

    for dtype, head_dim, expected in (
        (torch.bfloat16, 64, True),
        (torch.float16, 256, True),
        (torch.bfloat16, 264, False),
        (torch.bfloat16, 12, False),
        (torch.float32, 64, False),
    ):
        assert attention.has_flash(*3 * [query(head_dim, dtype)]) == expected
    one = query(64, torch.bfloat16)
    assert not attention.has_flash(one, one, query(32, torch.bfloat16))
    assert not attention.has_flash(one.float(), one, one) and not attention.has_flash(one, one, one.half())


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)])
def test_the_kernel_needs_compute_capability_8(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    has_kernel = attention._has_kernel.__wrapped__
    assert has_kernel(torch.device("cuda:0")) == expected and not has_kernel(torch.device("cpu"))


@pytest.mark.parametrize("name", ["llama", "mistral, window of 4"])
def test_heads_are_repeated_where_only_the_plainest_kernel_takes_groups(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as on a T4: neither a GPU with flash attention nor a CPU
    ids, labels = rows()
    found, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def noted(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        assert key.shape[1] == value.shape[1] == query.shape[1]
        assert not options.get("enable_gqa", False)
        return sdpa(query, key, value, **options)

    for takes_groups in (True, False):
        monkeypatch.setattr(attention, "_takes_groups", lambda *_, answer=takes_groups: answer)
        pack = pack_of(tiny(MODELS[name]))
        assert pack.model.config.num_key_value_heads < pack.model.config.num_attention_heads
        one = adapter(pack)
        with monkeypatch.context() as patched:
            if not takes_groups:
                patched.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
            found.append((pack.backward([MicroBatch(one, ids, labels, 0.1)]), gradients(one)))
        pack.close()
    for grouped_heads, repeated in zip(*found, strict=True):
        torch.testing.assert_close(repeated, grouped_heads, rtol=1e-7, atol=1e-10)  # float64, in another order
