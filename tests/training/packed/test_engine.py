"""Trials that train together learn what each would learn alone, and what TRL and peft would teach it."""

import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raylora.config.assignment import Assignment
from raylora.config.schema import SearchConfig, TrainingSection
from raylora.data.rows import TokenRows
from raylora.errors import TrialError
from raylora.run.metrics import RungMetrics
from raylora.training import trl as training
from raylora.training.losses import eval_loss, validated_rows
from raylora.training.packed.adapter import Adapter
from raylora.training.packed.engine import PackedEngine, cut
from raylora.training.packed.layout import MicroBatch
from raylora.training.trl import TrlEngine
from tests.helpers import assignment
from tests.training.test_trl import load_engine

STEPS = list(range(1, 21))

PACK = [
    assignment(lora_dropout=0.0, learning_rate=2e-3, warmup_ratio=0.2, lr_scheduler_type="cosine"),
    assignment(r=16, lora_alpha=16, lora_dropout=0.0, learning_rate=1e-3, seed=3, gradient_accumulation_steps=3),
    assignment(r=3, lora_dropout=0.0, use_rslora=True, per_device_train_batch_size=7, weight_decay=0.1, seed=1),
    assignment(r=8, lora_dropout=0.0, target_modules="attention", lr_scheduler_type="constant", seed=2),
]


def packed(engine: TrlEngine, dtype: torch.dtype = torch.float32, **options: object) -> PackedEngine:
    """A packed engine on the base and data of another engine."""
    rows = (TokenRows(engine.train), TokenRows(engine.validation))
    values = {"tokens_per_pass": 256, "dtype": dtype, **options}
    return PackedEngine(engine.model, engine.architecture, *rows, engine.training, **values)


def run(
    engine: PackedEngine, trials: dict[int, Assignment], folder: Path, rungs: list[int] = STEPS
) -> dict[int, list[RungMetrics]]:
    """Trains all to the last rung; none stops early."""
    for number, one in trials.items():
        engine.add(number, one, rungs=rungs, directory=folder / str(number))
    reports: dict[int, list[RungMetrics]] = {number: [] for number in trials}
    while engine.trials:
        for number, report in engine.step().items():
            assert isinstance(report, RungMetrics)
            reports[number].append(report)
            if report.step == rungs[-1]:
                engine.remove(number)
    return reports


def losses(reports: list[RungMetrics]) -> list[float]:
    return [report.eval_loss for report in reports]


@pytest.fixture
def trl(make_config: Callable[..., SearchConfig], tmp_path: Path) -> TrlEngine:
    return load_engine(make_config(), tmp_path)


def reference(engine: TrlEngine, one: Assignment, folder: Path) -> list[float]:
    """Validation losses of the same trial trained alone by TRL and peft."""
    found: list[float] = []
    engine.fit(one, rungs=STEPS, directory=folder, report=lambda report: bool(found.append(report.eval_loss)))
    return found


def draw_as_packed(model: PeftModel, one: Assignment, resume_from: str | None, dtype: torch.dtype) -> None:
    """Stand for `_keep_adapter_in_float32`: TRL's trial gets the factors that the packed one starts from."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    shapes = {name: (module.in_features, module.out_features) for name, module in layers.items()}
    adapter = Adapter(shapes, r=one.r, scaling=1.0, dropout=0.0, seed=one.seed)
    for name, module in layers.items():
        module.lora_A["default"].weight.data = adapter.lora_A[name].to(model.device, dtype)
        module.lora_B["default"].to(dtype)


def test_a_packed_trial_is_the_trial_of_trl_and_peft_in_float64(
    trl: TrlEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trl.model.double()
    monkeypatch.setattr(training, "_keep_adapter_in_float32", partial(draw_as_packed, dtype=torch.float64))
    alone = [reference(trl, one, tmp_path / f"trl-{number}") for number, one in enumerate(PACK)]
    together = run(packed(trl, torch.float64), dict(enumerate(PACK)), tmp_path)
    for number, expected in enumerate(alone):
        # a float64 Llama still rounds to float32 inside its norms and rotary angles: 1e-9 and not 1e-15
        assert losses(together[number]) == pytest.approx(expected, rel=1e-8), number
    assert len({one[-1] for one in alone}) == len(PACK)


def test_a_packed_trial_starts_from_the_adapter_that_peft_would_draw(trl: TrlEngine, tmp_path: Path) -> None:
    expected = [reference(trl, one, tmp_path / f"trl-{number}") for number, one in enumerate(PACK)]
    together = run(packed(trl), dict(enumerate(PACK)), tmp_path)
    for number, alone in enumerate(expected):
        # float32's rounding, grown over 20 steps of Adam, which divides by small second moments
        assert losses(together[number]) == pytest.approx(alone, rel=2e-4), number


def test_before_the_full_budget_validation_takes_no_more_rows_than_training() -> None:
    lengths, options = [50, 10, 30, 20, 40], TrainingSection(per_device_train_batch_size=1)
    assert validated_rows(lengths, 3, [3, 9], options) == [1, 3, 4]
    assert validated_rows(lengths, 6, [6, 9], options) == [1, 3, 2, 4, 0]
    assert len(validated_rows([10] * 100, 9, [1, 9], options)) == 100


def test_with_dropout_a_trial_in_a_pack_is_the_trial_alone(trl: TrlEngine, tmp_path: Path) -> None:
    trl.model.double()
    mine = assignment(lora_dropout=0.2)
    alone = run(packed(trl, torch.float64), {0: mine}, tmp_path / "alone")[0]
    others = {number: assignment(lora_dropout=0.1, seed=number, r=2 + number) for number in (1, 2, 3)}
    together = run(packed(trl, torch.float64), {**others, 0: mine}, tmp_path / "pack")[0]
    assert losses(together) == pytest.approx(losses(alone), rel=1e-8)


def test_trials_that_come_and_go_do_not_disturb_the_others(trl: TrlEngine, tmp_path: Path) -> None:
    trl.model.double()
    mine = assignment(lora_dropout=0.2)
    alone = losses(run(packed(trl, torch.float64), {0: mine}, tmp_path / "alone")[0])
    engine = packed(trl, torch.float64)
    engine.add(0, mine, rungs=STEPS, directory=tmp_path / "0")
    found = []
    while 0 in engine.trials:
        step = engine.trials[0].step
        if step in (2, 5):
            engine.add(step, assignment(seed=step), rungs=[100], directory=tmp_path / str(step))
        if step == 9:
            engine.remove(2)
        for number, report in engine.step().items():
            assert number == 0 and isinstance(report, RungMetrics)
            found.append(report.eval_loss)
            if report.step == STEPS[-1]:
                engine.remove(0)
    assert found == pytest.approx(alone, rel=1e-8)
    assert engine.trials[5].step == STEPS[-1] - 5


def test_a_paused_trial_goes_on_as_if_it_had_never_paused(trl: TrlEngine, tmp_path: Path) -> None:
    one = assignment(lora_dropout=0.2, lr_scheduler_type="cosine", warmup_ratio=0.3, weight_decay=0.1)
    whole = run(packed(trl), {0: one}, tmp_path / "whole")[0]
    engine = packed(trl)
    engine.add(0, one, rungs=STEPS, directory=tmp_path / "0")
    for _ in range(7):
        (report,) = engine.step().values()
    engine.remove(0)
    engine = packed(trl)
    engine.add(0, one, rungs=STEPS, directory=tmp_path / "0", resume_from=report.checkpoint)
    rest = []
    while engine.trials:
        (report,) = engine.step().values()
        rest.append(report)
        if report.step == STEPS[-1]:
            engine.remove(0)
    assert losses(rest) == losses(whole)[7:]  # to the last bit
    assert rest[-1].tokens_seen == whole[-1].tokens_seen
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == ["checkpoint-19", "checkpoint-20"]


def test_a_report_carries_loss_and_learning_rate_of_each_step_since_the_last(trl: TrlEngine, tmp_path: Path) -> None:
    one = assignment(lora_dropout=0.0, lr_scheduler_type="linear", learning_rate=8e-3, gradient_accumulation_steps=2)
    expected: list[RungMetrics] = []
    trl.fit(one, rungs=[2, 8], directory=tmp_path / "trl", report=lambda report: bool(expected.append(report)))
    engine = packed(trl)
    engine.add(0, one, rungs=[2, 8], directory=tmp_path / "0")
    (report,) = [report for _ in range(2) for report in engine.step().values()]
    for _ in range(3):
        engine.step()
    checkpoint = engine.trials[0].save()  # between two rungs
    engine = packed(trl)
    engine.add(0, one, rungs=[2, 8], directory=tmp_path / "0", resume_from=str(checkpoint))
    (last,) = [report for _ in range(3) for report in engine.step().values()]
    # 8e-3 falls to 0 in 8 steps; a step's rate is the one before the schedule moves on
    assert [*report.step_learning_rates, *last.step_learning_rates] == pytest.approx(
        [8e-3, 7e-3, 6e-3, 5e-3, 4e-3, 3e-3, 2e-3, 1e-3]
    )
    for mine, theirs in zip((report, last), expected, strict=True):
        assert mine.step_learning_rates == theirs.step_learning_rates
        # float32's rounding, grown over the steps
        assert mine.step_losses == pytest.approx(theirs.step_losses, rel=2e-4)
        assert mine.train_loss == pytest.approx(sum(mine.step_losses) / len(mine.step_losses))


def test_a_step_without_memory_changes_nothing_and_the_younger_half_leaves(
    trl: TrlEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = {number: assignment(seed=number, lora_dropout=0.1) for number in range(4)}
    whole = run(packed(trl), {3: trials[3]}, tmp_path / "whole")[3]
    engine = packed(trl, tokens_per_pass=1)  # a pass for each trial
    for number, one in trials.items():
        engine.add(number, one, rungs=STEPS, directory=tmp_path / str(number))
    engine.step()
    passes, backward = [], engine.pack.backward

    def third_pass_fails(batches: list) -> torch.Tensor:
        passes.append(batches)
        if len(passes) == 3:
            raise torch.OutOfMemoryError("made up")
        return backward(batches)

    with monkeypatch.context() as patch:
        patch.setattr(engine.pack, "backward", third_pass_fails)
        with pytest.raises(torch.OutOfMemoryError):
            engine.step()
    checkpoints = engine.shrink()
    assert list(engine.trials) == [0, 1] and engine.slots == 2
    assert set(checkpoints) == {2, 3}
    assert all(Path(checkpoint or "").name == "checkpoint-1" for checkpoint in checkpoints.values())
    engine.add(3, trials[3], rungs=STEPS, directory=tmp_path / "3", resume_from=checkpoints[3])
    engine.remove(0)
    engine.remove(1)
    (report,) = engine.step().values()
    assert isinstance(report, RungMetrics)
    assert report.eval_loss == pytest.approx(whole[1].eval_loss, rel=1e-5)  # float32, in packs of other shapes


def test_an_update_without_memory_leaves_no_gradient_to_be_counted_twice(
    trl: TrlEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(packed(trl), {1: assignment(seed=1)}, tmp_path / "whole")[1]
    engine = packed(trl)
    for number in range(3):
        engine.add(number, assignment(seed=number), rungs=STEPS, directory=tmp_path / str(number))

    def fails() -> None:
        raise torch.OutOfMemoryError("made up")

    with monkeypatch.context() as patched:
        patched.setattr(engine.trials[1]._optimizer, "step", fails)
        with pytest.raises(torch.OutOfMemoryError):
            engine.step()
    assert [trial.step for trial in engine.trials.values()] == [1, 0, 0]
    engine.remove(0)
    while 1 in engine.trials:
        for number, report in engine.step().items():
            assert isinstance(report, RungMetrics)
            if number == 1 and report.step == STEPS[-1]:
                assert report.step_losses == pytest.approx(whole[-1].step_losses, rel=1e-5)  # float32, in other packs
                engine.remove(1)


def test_two_shrinks_between_rungs_leave_the_reported_checkpoint_and_lose_no_second(
    trl: TrlEngine, tmp_path: Path
) -> None:
    engine, one = packed(trl), assignment(lora_dropout=0.1)
    engine.add(0, one, rungs=[2, 9], directory=tmp_path / "0")
    engine.step()
    (report,) = engine.step().values()
    assert isinstance(report, RungMetrics)
    trained = 0.0
    for _ in range(2):  # leaves the pack at steps 3 and 4 for want of memory
        engine.step()
        trial = engine.remove(0)
        trained = trial.seconds["train"]
        checkpoint = trial.save()
        engine.add(0, one, rungs=[2, 9], directory=tmp_path / "0", resume_from=str(checkpoint))
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert Path(report.checkpoint).is_dir()  # which table and log name
    assert engine.trials[0].seconds["train"] == trained > 0  # of two steps, in two stays
    while 0 in engine.trials:
        for last in engine.step().values():
            assert isinstance(last, RungMetrics)
            engine.remove(0)
    whole = run(packed(trl), {0: one}, tmp_path / "whole", rungs=[2, 9])[0]
    assert last.train_loss == pytest.approx(whole[1].train_loss, rel=1e-6)  # over all seven steps; float32
    assert last.train_seconds > trained


def test_a_trial_saved_at_a_rung_that_it_has_not_reported_reports_first(trl: TrlEngine, tmp_path: Path) -> None:
    engine, one = packed(trl), assignment(lora_dropout=0.1)
    engine.add(0, one, rungs=[1, 3], directory=tmp_path / "0")
    engine._train()  # memory ran short before it could be validated
    checkpoint = engine.remove(0).save()
    engine.add(0, one, rungs=[1, 3], directory=tmp_path / "0", resume_from=str(checkpoint))
    (report,) = engine.step().values()
    assert isinstance(report, RungMetrics)
    assert report.step == 1
    assert engine.step() == {}


def test_a_checkpoint_of_padded_ranks_goes_on_without_padding(trl: TrlEngine, tmp_path: Path) -> None:
    # on a GPU, ranks are padded to a multiple of 8; on a CPU they are not
    one = assignment(r=3, lora_dropout=0.2)
    gpu_like = packed(trl)
    gpu_like._adapter_options["rank_multiple"] = 8
    gpu_like.add(0, one, rungs=STEPS, directory=tmp_path / "0")
    for _ in range(5):
        gpu_like.step()
    gpu_like.remove(0)
    found = []
    for padding in (1, 8):
        engine = packed(trl)
        engine._adapter_options["rank_multiple"] = padding
        folder = shutil.copytree(tmp_path / "0", tmp_path / str(padding))
        engine.add(0, one, rungs=STEPS, directory=folder, resume_from=str(folder / "checkpoint-5"))
        found.append([losses(list(engine.step().values()))[0] for _ in range(3)])
        engine.remove(0)
    assert found[0] == pytest.approx(found[1], rel=1e-5)  # float32, in products of other shapes


def test_a_diverged_trial_is_said_to_have_diverged(trl: TrlEngine, tmp_path: Path) -> None:
    engine = packed(trl)
    for number in (0, 1):
        engine.add(number, assignment(seed=number), rungs=[1, 3], directory=tmp_path / str(number))
    engine.trials[0].adapter.parameters[1].data.fill_(math.nan)
    reports = engine.step()
    assert isinstance(reports[0], TrialError) and str(reports[0]) == "diverged: eval_loss is nan at step 1"
    assert isinstance(reports[1], RungMetrics)


def test_in_float16_a_step_whose_gradient_overflows_is_left_out(
    trl: TrlEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = packed(trl, autocast=torch.float16)
    for number in (1, 2):
        engine.add(number, PACK[1], rungs=[3], directory=tmp_path / str(number))
    engine.step()
    backward, trial = engine.pack.backward, engine.trials[1]

    def overflowing(batches: list[MicroBatch]) -> torch.Tensor:
        losses = backward(batches)
        trial.adapter.parameters[0].grad[0] = math.inf
        return losses

    before = [parameter.clone() for parameter in trial.adapter.parameters]
    moments = {name: moment.clone() for name, moment in trial._moment("exp_avg").items()}
    with monkeypatch.context() as patched:
        patched.setattr(engine.pack, "backward", overflowing)
        engine.step()
    assert all(map(torch.equal, trial.adapter.parameters, before))
    assert all(torch.equal(moment, moments[name]) for name, moment in trial._moment("exp_avg").items())
    # Adam has counted one step of two, also after a pause
    engine.add(3, PACK[1], rungs=[3], directory=tmp_path / "1", resume_from=str(trial.save()))
    for one in (trial, engine.remove(3)):
        assert one.step == 2 and {float(state["step"]) for state in one._optimizer.state.values()} == {1.0}
    reports = engine.step()
    assert not any(map(torch.equal, trial.adapter.parameters, before))
    assert all(isinstance(report, RungMetrics) for report in reports.values())


def test_a_packed_trials_adapter_is_an_adapter_of_peft(trl: TrlEngine, tmp_path: Path, tiny_model: Path) -> None:
    engine = packed(trl)
    last = run(engine, {0: assignment(use_rslora=True, target_modules="mlp")}, tmp_path)[0][-1]
    engine.close()
    tensors = load_file(Path(last.checkpoint) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    model = PeftModel.from_pretrained(trl.model, last.checkpoint)
    loss = eval_loss(model, trl.validation, batch_size=8, pad_token_id=1)
    assert loss == pytest.approx(last.eval_loss, rel=1e-5)  # float32, in other shapes
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), last.checkpoint)


def test_reports_count_tokens_and_share_time_by_them(trl: TrlEngine, tmp_path: Path) -> None:
    trials = {0: assignment(), 1: assignment(per_device_train_batch_size=1, gradient_accumulation_steps=2)}
    n_rows = len(trl.train)
    reports = run(packed(trl), trials, tmp_path, rungs=[n_rows // 4, n_rows // 2])
    tokens = sum(len(row) for row in trl.train["input_ids"])
    assert [reports[0][0].tokens_seen, reports[0][1].tokens_seen] == [tokens, 2 * tokens]
    assert reports[1][1].tokens_seen == tokens
    assert [reports[0][0].epoch, reports[1][1].epoch] == [1.0, 1.0]
    assert 1 < reports[0][0].train_seconds / reports[1][0].train_seconds < 4  # twice the rows a step


def test_passes_are_cut_by_tokens_and_of_about_one_size() -> None:
    def batch(n: int) -> MicroBatch:
        return MicroBatch(None, [torch.zeros(n)], [torch.zeros(n)])  # type: ignore[arg-type]

    def sizes(tokens: list[int], limit: int) -> list[list[int]]:
        return [[one.n_tokens for one in part] for part in cut([batch(n) for n in tokens], limit)]

    assert sizes([10] * 6, 40) == [[10] * 3] * 2
    assert sizes([50, 50], 40) == [[50], [50]]  # a micro-batch is never cut
    assert sizes([10, 30, 20], 60) == [[10, 30, 20]]
    assert sizes([30, 30, 30], 40) == [[30], [30], [30]]
