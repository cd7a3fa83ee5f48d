"""Search spaces: kinds, dependence, starting points and grids."""

import optuna
import pytest

from raylora.config.space import parse_space
from raylora.errors import ConfigError

FIXED = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "learning_rate": 1e-3}


def suggest(space: dict, n: int = 40) -> list[dict]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    parsed = parse_space({**FIXED, **space})
    return [parsed.suggest(study.ask()) for _ in range(n)]


def test_int_ranges_include_both_ends() -> None:
    assert {point["r"] for point in suggest({"r": {"int": [1, 3]}})} == {1, 2, 3}
    drawn = {point["r"] for point in suggest({"r": {"logint": [1, 4]}}, 80)}
    assert {1, 4} <= drawn <= {1, 2, 3, 4}


def test_loguniform_draws_as_many_values_in_each_decade() -> None:
    values = [point["learning_rate"] for point in suggest({"learning_rate": {"loguniform": [1e-5, 1e-3]}}, 400)]
    # half of the draws are expected below 1e-4; 40 is four standard deviations of a fair coin thrown 400 times
    assert abs(sum(value < 1e-4 for value in values) - 200) < 40


def test_times_multiplies_by_the_other_parameter() -> None:
    points = suggest({"r": {"choice": [4, 8]}, "lora_alpha": {"choice": [1, 2], "times": "r"}})
    assert {(point["r"], point["lora_alpha"]) for point in points} == {(4, 4), (4, 8), (8, 8), (8, 16)}


def test_cases_pick_a_kind_by_another_value_whatever_the_order_in_the_file() -> None:
    cases = {"depends_on": "r", "cases": {4: 0.0, 64: {"uniform": [0.1, 0.2]}}}
    for point in suggest({"lora_dropout": cases, "r": {"choice": [4, 64]}}):
        assert point["lora_dropout"] == 0.0 if point["r"] == 4 else 0.1 <= point["lora_dropout"] <= 0.2


def test_module_lists_become_choices() -> None:
    points = suggest({"target_modules": {"choice": ["all-linear", ["q_proj", "v_proj"]]}})
    assert {point["target_modules"] for point in points} == {"all-linear", "q_proj,v_proj"}


def test_starting_points_are_translated_for_optuna() -> None:
    space = parse_space(
        {
            **FIXED,
            "r": {"choice": [4, 8]},
            "lora_alpha": {"choice": [1, 2], "times": "r"},
            "learning_rate": {"loguniform": [1e-4, 1e-2]},
        }
    )
    point = {"r": 8, "lora_alpha": 16, "learning_rate": 2e-4, "lora_dropout": 0.0}
    assert space.to_optuna(point, where="x") == {"r": 8, "lora_alpha/r": 2, "learning_rate": 2e-4}


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"r": 5}, r"point 1: r = 5 must be one of \[4, 8\]"),
        ({"r": 4, "lora_alpha": 12}, r"point 1: lora_alpha = 12 must be one of \[1, 2\] times r"),
        ({"lora_alpha": 8}, r"point 1: lora_alpha depends on r, which the point must name too"),
        ({"rank": 8}, r"point 1: rank is not in the space"),
    ],
)
def test_starting_points_outside_the_space_fail(point: dict, message: str) -> None:
    space = parse_space({**FIXED, "r": {"choice": [4, 8]}, "lora_alpha": {"choice": [1, 2], "times": "r"}})
    with pytest.raises(ConfigError, match=message):
        space.to_optuna(point, where="point 1")


def test_grid_is_every_combination_in_order() -> None:
    space = parse_space(
        {**FIXED, "r": {"choice": [1, 2]}, "lora_alpha": {"choice": [2], "times": "r"}, "seed": {"choice": [0, 1]}}
    )
    assert [(point["r"], point["lora_alpha"], point["seed"]) for point in space.grid()] == [
        (1, 2, 0),
        (1, 2, 1),
        (2, 4, 0),
        (2, 4, 1),
    ]


def test_parameters_that_depend_on_each_other_fail() -> None:
    with pytest.raises(ConfigError, match="depend on each other"):
        parse_space({**FIXED, "r": {"choice": [1], "times": "lora_alpha"}, "lora_alpha": {"choice": [1], "times": "r"}})


def test_a_product_that_can_leave_its_range_fails() -> None:
    with pytest.raises(ConfigError, match=r"space\.lora_dropout = 1\.6: must be less than 1"):
        parse_space({**FIXED, "lora_dropout": {"choice": [0.2], "times": "r"}})


def test_a_case_may_multiply_by_a_parameter_that_comes_later() -> None:
    alpha = {"depends_on": "use_rslora", "cases": {True: {"choice": [1], "times": "r"}, False: 16}}
    space = {"lora_alpha": alpha, "r": {"choice": [4, 8]}, "use_rslora": {"choice": [True, False]}}
    points = suggest(space)
    assert {(point["use_rslora"], point["lora_alpha"] / point["r"]) for point in points if point["use_rslora"]} == {
        (True, 1.0)
    }
    assert {point["lora_alpha"] for point in points if not point["use_rslora"]} == {16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_dropout": {"depends_on": "r", "cases": {4: 0.1}}}, r"no case for r = 8; has \[4\]"),
        (
            {"lora_dropout": {"depends_on": "learning_rate", "cases": {0.1: 0.1}}},
            "depends_on needs a parameter of values or choices, found learning_rate",
        ),
        (
            {"lora_alpha": {"depends_on": "r", "cases": {4: {"choice": [1], "times": "seed"}, 8: 1}}},
            "depends on seed, which the space does not name",
        ),
        ({"lora_alpha": {"choice": [1], "times": "lr_scheduler_type"}, "lr_scheduler_type": "linear"}, "needs numbers"),
    ],
)
def test_dependencies_that_would_fail_in_a_trial_are_found_at_once(changes: dict, message: str) -> None:
    space = {**FIXED, "r": {"choice": [4, 8]}, "learning_rate": {"uniform": [1e-4, 1e-3]}, **changes}
    with pytest.raises(ConfigError, match=message):
        parse_space(space)
