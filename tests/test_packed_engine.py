"""Trials that train together learn what each would learn alone, and what TRL and peft would teach it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from raylora import training
from raylora.batches import TokenRows
from raylora.config import SearchConfig
from raylora.packed import Adapter
from raylora.packed_engine import PackedEngine
from raylora.rung import Report
from raylora.space import Assignment
from raylora.training import TrlEngine
from tests.test_training import assignment, load_engine

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
    return PackedEngine(engine.model, engine.module_names, *rows, engine.training, **values)


def run(
    engine: PackedEngine, trials: dict[int, Assignment], folder: Path, rungs: list[int] = STEPS
) -> dict[int, list[Report]]:
    """Trains all to the last rung; none stops early."""
    for number, one in trials.items():
        engine.add(number, one, rungs=rungs, directory=folder / str(number))
    reports: dict[int, list[Report]] = {number: [] for number in trials}
    while engine.training:
        for number, report in engine.step().items():
            assert isinstance(report, Report)
            reports[number].append(report)
            if report.step < rungs[-1]:
                engine.go_on(number)
            else:
                engine.remove(number)
    return reports


def losses(reports: list[Report]) -> list[float]:
    return [report.eval_loss for report in reports]


@pytest.fixture
def trl(make_config: Callable[..., SearchConfig], tmp_path: Path) -> TrlEngine:
    return load_engine(make_config(), tmp_path)


def reference(engine: TrlEngine, one: Assignment, folder: Path) -> list[float]:
    """Validation losses of the same trial trained alone by TRL and peft."""
    found: list[float] = []
    engine.fit(one, rungs=STEPS, directory=folder, report=lambda report: bool(found.append(report.eval_loss)))
    return found


def test_a_packed_trial_is_the_trial_of_trl_and_peft_in_float64(
    trl: TrlEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trl.model.dequantize() if trl.model.is_quantized else None
    trl.model.double()

    def draw_as_packed(model: PeftModel, one: Assignment, resume_from: str | None) -> None:
        shapes = {name: (m.in_features, m.out_features) for name, m in trl_layers(model)}
        adapter = Adapter(shapes, r=one.r, scaling=1.0, dropout=0.0, seed=one.seed)
        for name, module in trl_layers(model):
            module.lora_A["default"].weight.data = adapter.lora_A[name].double()
            module.lora_B["default"].weight.data = module.lora_B["default"].weight.data.double()

    def trl_layers(model: PeftModel) -> list[tuple[str, torch.nn.Module]]:
        return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]

    monkeypatch.setattr(training, "_keep_adapter_in_float32", draw_as_packed)
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
