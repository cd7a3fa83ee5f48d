"""Warnings before a search starts, and the speed that it remembers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raylora.base.locate import load_tokenizer
from raylora.config.learning_rate import rule_learning_rate
from raylora.config.schema import SearchConfig
from raylora.data.prepare import PreparedData, prepare_data
from raylora.search.speed import Speed, measured_speed, remember_speed, remembered_speed
from raylora.search.warnings import warnings
from tests.search.test_forecast import history_of, state_of

FAR_RATES = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "learning_rate": {"loguniform": [1e-2, 1e-1]}}

TWO_BATCHES = {**FAR_RATES, "learning_rate": 5e-4, "per_device_train_batch_size": {"choice": [4, 8]}}


@pytest.fixture
def of(make_config: Callable[..., SearchConfig], tmp_path: Path) -> Callable[..., list[str]]:
    """Returns the warnings of a search on tiny rows, of which each test breaks one thing."""

    def warn(rungs: tuple[int, ...] = (40, 120), **changes: Any) -> list[str]:
        shape = {"n_adapter_parameters": 1, "hidden_size": 2000, "model_type": "llama", "n_positions": 256}
        shape |= {name: changes.pop(name) for name in shape.keys() & changes.keys()}
        sections = changes
        sections = {"data": {"validation_size": 30, "heldout_size": 8, **sections.pop("data", {})}, **sections}
        sections = {"search": {"n_trials": 9, **sections.pop("search", {})}, **sections}
        config = make_config(**sections)
        data: PreparedData = prepare_data(
            config.data, load_tokenizer(config.base_model, config.base_model.name), tmp_path
        )
        return warnings(config, data, list(rungs), **shape)  # type: ignore[arg-type]

    return warn


def test_a_search_that_can_tell_trials_apart_is_not_warned_of(of: Callable[..., list[str]]) -> None:
    assert of() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rungs": [4, 120]}, "the first rung, step 4, lies within the warm-up of 4 steps"),
        ({"search": {"n_trials": 8}, "rungs": [40, 80, 120]}, "2 trials are compared at step 80"),
        ({"data": {"validation_size": 8}}, "8 validation rows are few"),
        ({"space": FAR_RATES}, "from 0.01 to 0.1 are far from the published"),
        ({"data": {"max_length": 12}}, "training rows are cut; raise data.max_length"),
        ({"n_positions": 8}, "rows are longer than the 8 tokens that the base was made for"),
        (
            {"training": {"max_steps": None}, "space": TWO_BATCHES},
            "a step takes 4 to 8 rows, so that 120 steps are 18 to 37 epochs; training.max_steps sets the budget",
        ),
        ({"n_adapter_parameters": 10**6}, "note: the largest adapter has 1,000,000 parameters"),
    ],
)
def test_what_will_disappoint_is_warned_of(of: Callable[..., list[str]], changes: dict[str, Any], message: str) -> None:
    lines = of(**changes)
    assert any(message in line for line in lines), lines


def test_the_learning_rate_rule_is_the_published_one() -> None:
    assert rule_learning_rate(2000, "llama") == pytest.approx(5e-4)
    assert rule_learning_rate(4000, "llama") == pytest.approx(5e-4 * 0.5**0.781)
    assert rule_learning_rate(4000, "gemma3") is None


def test_a_search_remembers_its_speed_for_the_next(make_config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    base = make_config().base_model
    assert remembered_speed(tmp_path, base, "cpu") is None
    state = state_of(*history_of(0, {4: 1.0}))
    assert measured_speed(state_of(), 100) is None
    speed = measured_speed(state, 100)
    row = state.trials[0]
    assert speed is not None
    assert speed.tokens_per_second == pytest.approx(row.tokens_per_second)
    assert speed.seconds_per_report == pytest.approx((row.eval_seconds + row.other_seconds) / 100)
    remember_speed(tmp_path, base, "cpu", Speed(1.0, 2.0, "2026-01-01"))
    remember_speed(tmp_path, base, "a GPU", speed)
    assert remembered_speed(tmp_path, base, "cpu") == Speed(1.0, 2.0, "2026-01-01")
    (tmp_path / "speeds.json").write_text("{")
    assert remembered_speed(tmp_path, base, "cpu") is None
