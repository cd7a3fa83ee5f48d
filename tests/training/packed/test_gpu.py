"""On an NVIDIA GPU: the same search, in bfloat16, with the GPU's own figures."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from raylora.config.schema import SearchConfig
from tests.helpers import assignment
from tests.training.packed.test_engine import losses, packed, run
from tests.training.test_trl import RUNGS, load_engine, train

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")


def test_a_trial_trains_on_the_gpu_in_bfloat16(make_config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    engine = load_engine(make_config(), tmp_path, device="cuda:0")
    assert engine.model.dtype == torch.bfloat16
    reports = train(engine, tmp_path / "a")
    assert reports[-1].eval_loss < reports[0].eval_loss
    assert 0 < reports[-1].peak_memory_mib < 2000  # the GPU's, of a model of half a megabyte


def test_a_trial_out_of_memory_leaves_the_lane_usable(make_config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    engine = load_engine(make_config(), tmp_path, device="cuda:0")
    torch.cuda.empty_cache()  # else what is cached decides whether memory runs out
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_allocated() / torch.cuda.mem_get_info()[1] + 1e-4)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            train(engine, tmp_path / "a", per_device_train_batch_size=48, r=64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(train(engine, tmp_path / "b")) == 3


@pytest.mark.parametrize("fused", [False, True])
def test_a_pack_on_the_gpu_learns_what_its_trials_learn_alone(
    make_config: Callable[..., SearchConfig], tmp_path: Path, fused: bool
) -> None:
    engine = load_engine(make_config(), tmp_path, device="cuda:0")
    trials = {number: assignment(r=r, seed=number, lora_dropout=0.0) for number, r in enumerate((4, 8, 64))}
    expected = [train(engine, tmp_path / f"trl-{number}", **one.model_dump()) for number, one in trials.items()]
    pack = packed(engine, autocast=torch.bfloat16, grouped=True, fused=fused, dense=fused)
    together = run(pack, trials, tmp_path, rungs=RUNGS)
    pack.close()
    for number, alone in enumerate(expected):
        # bfloat16's rounding, and A drawn on the GPU by peft
        assert losses(together[number]) == pytest.approx(losses(alone), rel=2e-2)


def test_a_pack_out_of_memory_shrinks_and_goes_on(make_config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    engine = load_engine(make_config(), tmp_path, device="cuda:0")
    pack = packed(engine, autocast=torch.bfloat16, grouped=True)
    for number in range(8):
        pack.add(number, assignment(r=64, seed=number), rungs=[5], directory=tmp_path / str(number))
    torch.cuda.empty_cache()
    fraction = torch.cuda.memory_reserved() / torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(fraction)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            for _ in range(4):
                pack.step()
        assert set(pack.shrink()) == {4, 5, 6, 7}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    pack.step()
    assert list(pack.trials) == [0, 1, 2, 3]
