"""On an NVIDIA GPU: the same search, in the GPU's 16-bit type, with its own figures."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from raylora.base.load import compute_dtype
from raylora.config.schema import BaseModelSection, SearchConfig
from raylora.training import trl as training
from raylora.training.packed import attention
from raylora.training.packed.adapter import Adapter
from raylora.training.packed.fused import has_fused_products
from raylora.training.packed.layout import MicroBatch
from tests.helpers import assignment
from tests.training.packed.test_engine import draw_as_packed, losses, packed, run
from tests.training.packed.test_forward import pack_of
from tests.training.packed.test_layers import MORE_CONFIGS, uneven
from tests.training.test_trl import RUNGS, load_engine, train

pytestmark = pytest.mark.gpu

HALF = compute_dtype(BaseModelSection(name=""), "cuda:0")


@pytest.fixture(autouse=True)
def _needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")


def test_a_trial_trains_on_the_gpu_in_16_bit(make_config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    engine = load_engine(make_config(), tmp_path, device="cuda:0")
    assert engine.model.dtype == HALF
    reports = train(engine, tmp_path / "a")
    assert reports[-1].eval_loss < reports[0].eval_loss
    assert 0 < reports[-1].peak_memory_mib < 2000  # the GPU's, of a model of half a megabyte


def test_a_trial_out_of_memory_leaves_the_lane_usable(make_config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    engine = load_engine(make_config(), tmp_path, device="cuda:0")
    torch.cuda.empty_cache()  # else what is cached decides whether memory runs out
    limit = torch.cuda.memory_reserved() + 2 * 2**20
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    try:
        with pytest.raises(torch.OutOfMemoryError):
            train(engine, tmp_path / "a", per_device_train_batch_size=48, r=64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(train(engine, tmp_path / "b")) == 3


@pytest.mark.parametrize("fused", [False, True])
def test_a_pack_on_the_gpu_learns_what_its_trials_learn_alone(
    make_config: Callable[..., SearchConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    if fused and not has_fused_products(torch.device("cuda:0"), HALF):
        pytest.skip("no kernels for this GPU")
    # peft would draw A on the GPU
    monkeypatch.setattr(training, "_keep_adapter_in_float32", partial(draw_as_packed, dtype=torch.float32))
    engine = load_engine(make_config(), tmp_path, device="cuda:0")
    trials = {number: assignment(r=r, seed=number, lora_dropout=0.0) for number, r in enumerate((4, 8, 64))}
    expected = [train(engine, tmp_path / f"trl-{number}", **one.model_dump()) for number, one in trials.items()]
    pack = packed(engine, autocast=HALF, grouped=torch.bfloat16 == HALF, fused=fused, dense=fused)
    together = run(pack, trials, tmp_path, rungs=RUNGS)
    pack.close()
    for number, alone in enumerate(expected):
        # 16-bit rounding
        assert losses(together[number]) == pytest.approx(losses(alone), rel=2e-2)


def test_a_pack_out_of_memory_shrinks_and_goes_on(make_config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    engine = load_engine(make_config(), tmp_path, device="cuda:0")
    pack = packed(engine, autocast=HALF, grouped=torch.bfloat16 == HALF)
    for number in range(8):
        pack.add(number, assignment(r=64, seed=number), rungs=[5], directory=tmp_path / str(number))
    torch.cuda.empty_cache()
    fraction = torch.cuda.memory_reserved() / torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(fraction)
    fillers: list[torch.Tensor] = []
    with suppress(torch.OutOfMemoryError):  # what the allocator holds in reserve could be enough
        while True:
            fillers.append(torch.empty(2**16, device="cuda:0"))
    try:
        with pytest.raises(torch.OutOfMemoryError):
            for _ in range(4):
                pack.step()
        assert set(pack.shrink()) == {4, 5, 6, 7}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    pack.step()
    assert list(pack.trials) == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MORE_CONFIGS)
def test_fused_layers_on_the_gpu_give_the_losses_and_gradients_of_the_models_own(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    has_flash = attention.has_flash
    monkeypatch.setattr(attention, "has_flash", lambda *parts: calls.append(has_flash(*parts)) or calls[-1])
    model = uneven(name).to("cuda:0", dtype)
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(1, 60, (n,), generator=generator) for n in (7, 33, 2, 60)]  # a window of 4 shows
    found = []
    for fused_layers in (False, True):
        pack = pack_of(model, autocast=dtype, fused_layers=fused_layers)
        adapters = [
            Adapter(pack.shapes, r=r, scaling=0.5, dropout=0.0, seed=r, device="cuda:0", rank_multiple=8)
            for r in (8, 16)
        ]
        for one in adapters:
            draws = torch.Generator().manual_seed(one.seed)
            for view in one.lora_B.values():
                view.copy_(0.1 * torch.randn(view.shape, generator=draws))
        batches = [MicroBatch(adapters[n // 2], [row], [row], 1 / len(row)) for n, row in enumerate(ids)]
        losses_of_rows = pack.backward(batches)
        pack.close()
        gradients = [torch.cat([parameter.grad for parameter in one.parameters]) for one in adapters]
        found.append((losses_of_rows, *gradients))
    assert calls == 2 * [torch.cuda.get_device_capability()[0] >= 8]
    for own, ours in zip(*found, strict=True):
        # rounding alone: 8 bits in bfloat16, of which the gradients of two layers lose some
        assert float((ours - own).norm() / own.norm()) < 0.05
