"""One trial on a resident base: reproducible, resumable, and gone without a trace."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raylora.base.locate import load_tokenizer
from raylora.config.schema import SearchConfig
from raylora.data.prepare import prepare_data
from raylora.data.rows import load_part
from raylora.errors import TrialError
from raylora.run.metrics import RungMetrics
from raylora.training import trl as training
from raylora.training.losses import eval_loss
from raylora.training.trl import TrlEngine
from tests.helpers import assignment

RUNGS = [1, 3, 9]


@pytest.fixture
def engine(make_config: Callable[..., SearchConfig], tmp_path: Path) -> TrlEngine:
    return load_engine(make_config(), tmp_path)


def load_engine(config: SearchConfig, tmp_path: Path, device: str = "cpu") -> TrlEngine:
    tokenizer = load_tokenizer(config.base_model, config.base_model.name)
    data = prepare_data(config.data, tokenizer, tmp_path)
    return TrlEngine.load(config, tokens_dir=data.tokens_dir, cache_dir=tmp_path, device=device)


def train(
    engine: TrlEngine, directory: Path, stop_at: float = math.inf, resume_from: str | None = None, **changes: object
) -> list[RungMetrics]:
    reports: list[RungMetrics] = []

    def report(one: RungMetrics) -> bool:
        reports.append(one)
        return one.step >= stop_at

    engine.fit(assignment(**changes), rungs=RUNGS, directory=directory, report=report, resume_from=resume_from)
    return reports


def test_a_trial_reports_at_every_rung_and_learns(engine: TrlEngine, tmp_path: Path) -> None:
    reports = train(engine, tmp_path / "a")
    assert [report.step for report in reports] == RUNGS
    assert reports[-1].eval_loss < reports[0].eval_loss
    assert all(Path(report.checkpoint).name == f"checkpoint-{report.step}" for report in reports)
    # r * (in + out) over 2 layers: q and o 64+64, k and v 64+32, three mlp layers 64+128
    assert reports[0].trainable_parameters == 4 * 2 * (2 * 128 + 2 * 96 + 3 * 192)
    assert all(report.train_seconds > 0 and report.other_seconds >= 0 for report in reports)


def test_the_same_seed_gives_the_same_losses_whatever_ran_before(engine: TrlEngine, tmp_path: Path) -> None:
    first = [report.eval_loss for report in train(engine, tmp_path / "a")]
    other = [report.eval_loss for report in train(engine, tmp_path / "b", r=8, seed=3)]
    again = [report.eval_loss for report in train(engine, tmp_path / "c")]
    assert first == again
    assert first != other


def test_a_stopped_trial_stops_and_resumes_as_if_never_stopped(engine: TrlEngine, tmp_path: Path) -> None:
    whole = train(engine, tmp_path / "a")
    part = train(engine, tmp_path / "b", stop_at=3)
    assert [report.step for report in part] == [1, 3]
    rest = train(engine, tmp_path / "c", resume_from=part[-1].checkpoint)
    assert [report.eval_loss for report in rest] == [report.eval_loss for report in whole[2:]]


def test_the_base_is_left_as_it_was(engine: TrlEngine, tmp_path: Path) -> None:
    def state() -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}

    before = state()
    train(engine, tmp_path / "a")
    after = state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "forward" not in engine.model.__dict__
    assert not any(parameter.requires_grad for parameter in engine.model.parameters())


def test_the_adapter_loads_with_peft_alone_and_is_float32(engine: TrlEngine, tmp_path: Path, tiny_model: Path) -> None:
    last = train(engine, tmp_path / "a")[-1]
    tensors = load_file(Path(last.checkpoint) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    model = PeftModel.from_pretrained(engine.model, last.checkpoint)
    loss = eval_loss(model, engine.validation, batch_size=8, pad_token_id=1)
    # the same arithmetic in another batch of kernels: equal to float32's rounding
    assert loss == pytest.approx(last.eval_loss, rel=1e-6)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), last.checkpoint)


def test_the_loss_does_not_depend_on_the_batch_size(engine: TrlEngine) -> None:
    losses = [eval_loss(engine.model, engine.validation, batch_size=size, pad_token_id=1) for size in (1, 3, 8)]
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-6)  # float32's rounding


def test_a_diverging_trial_fails_with_its_reason(
    engine: TrlEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(training, "eval_loss", lambda *args, **kwargs: math.nan)
        with pytest.raises(TrialError, match=r"diverged: eval_loss is nan at step 1"):
            train(engine, tmp_path / "a")
    assert len(train(engine, tmp_path / "b")) == len(RUNGS)  # and the engine lives on


def test_gradient_checkpointing_changes_nothing_but_memory(
    make_config: Callable[..., SearchConfig], engine: TrlEngine, tmp_path: Path
) -> None:
    plain = train(engine, tmp_path / "a", lora_dropout=0.0)
    config = make_config(training={"gradient_checkpointing": True})
    checkpointing = train(load_engine(config, tmp_path), tmp_path / "b", lora_dropout=0.0)
    # recomputed activations are the same numbers; sums may be taken in another order
    assert [r.eval_loss for r in checkpointing] == pytest.approx([r.eval_loss for r in plain], rel=1e-5)


def test_rows_of_like_length_can_be_batched_together(make_config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    engine = load_engine(make_config(training={"group_by_length": True, "optim": "paged_adamw_32bit"}), tmp_path)
    reports = train(engine, tmp_path / "a")
    assert reports[-1].eval_loss < reports[0].eval_loss


def test_a_part_is_memory_mapped(engine: TrlEngine) -> None:
    assert engine.train.cache_files
    assert (
        load_part(Path(engine.train.cache_files[0]["filename"]).parent.parent, "train").num_rows
        == engine.train.num_rows
    )
