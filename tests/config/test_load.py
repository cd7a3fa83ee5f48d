"""Settings: precedence, messages, and every shipped search space file."""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from raylora.config.assignment import Schedule
from raylora.config.load import RENAMED, build_config, change_config, dump_config, load_config
from raylora.config.optimizers import OPTIMIZERS
from raylora.errors import ConfigError

SPACES = sorted((Path(__file__).parent.parent.parent / "search_spaces").glob("*.yaml"))
SMOKE = next(path for path in SPACES if path.stem == "smoke")


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_shipped_space_loads_and_opens_with_its_command(path: Path) -> None:
    load_config(path)
    first = path.read_text().splitlines()[0]
    assert f"search_spaces/{path.name}" in first or "python -m raylora.search" in first


def test_at_least_the_four_promised_spaces_are_shipped() -> None:
    assert {"smoke", "demo", "qlora", "rank_sweep"} <= {path.stem for path in SPACES}


def test_command_line_beats_file_beats_default() -> None:
    config = load_config(SMOKE, {"training.max_steps": "27", "space.r": "{choice: [1, 64]}"})
    assert config.training.max_steps == 27  # the file says 9
    assert config.data.max_length == 64  # the file's; the default is 1024
    assert config.training.optim == "adamw_torch"  # the default
    assert config.space["r"] == {"choice": [1, 64]}


@pytest.mark.parametrize(
    ("value", "trackers"),
    [
        ("mlflow", ["mlflow"]),
        ("tensorboard, wandb", ["tensorboard", "wandb"]),
        ("[trackio]", ["trackio"]),
        ("none", []),
    ],
)
def test_trackers_are_a_list_or_separated_by_commas(value: str, trackers: list[str]) -> None:
    assert load_config(SMOKE, {"report_to": value}).report_to == trackers
    assert load_config(SMOKE).report_to == []


def test_numbers_like_2e_4_are_numbers() -> None:
    assert load_config(SMOKE, {"space.learning_rate": "2e-4"}).space["learning_rate"] == 2e-4


def test_the_resolved_config_loads_to_the_same_config() -> None:
    config = load_config(SMOKE)
    assert build_config(yaml.safe_load(dump_config(config)), source="again") == config


def test_the_cases_of_a_resolved_config_are_still_numbers_and_booleans(tmp_path: Path) -> None:
    dropout = "{depends_on: r, cases: {2: 0.0, 4: {uniform: [0, 0.1]}}}"
    decay = "{depends_on: use_rslora, cases: {true: 0.1, false: 0.0}}"
    rslora = "{choice: [true, false]}"
    config = load_config(
        SMOKE,
        {
            "space.r": "{choice: [2, 4]}",
            "space.lora_dropout": dropout,
            "space.use_rslora": rslora,
            "space.weight_decay": decay,
            "starting_points": "[]",
        },
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config
    changed = change_config(config, {"search.n_trials": "5"})
    assert changed.space == config.space and changed.search.n_trials == 5


@pytest.mark.parametrize(
    ("key", "typed", "value"),
    [
        ("evaluation.answer_pattern", "#### (.+)", "#### (.+)"),
        ("evaluation.answer_pattern", "Answer: (.+)", "Answer: (.+)"),
        ("evaluation.answer_pattern", '"answer": "(.+)"', '"answer": "(.+)"'),
        ("evaluation.answer_pattern", "'(a)'", "(a)"),
        ("evaluation.answer_pattern", "null", None),
        ("data.train", "*.jsonl", "*.jsonl"),
        ("data.train", "rows #1.jsonl", "rows #1.jsonl"),
        ("data.subset", "no", "no"),
        ("data.subset", "1e5", "1e5"),
        ("data.subset", "2024-02-30", "2024-02-30"),
        ("data.columns", "{prompt: question}", {"prompt": "question"}),
        ("data.columns.prompt", "2", "2"),
        ("data.chat_template_kwargs", "{date: 2024-07-26, x: no}", {"date": "2024-07-26", "x": False}),
        ("training.max_steps", "null", None),
    ],
)
def test_texts_are_taken_as_they_are_typed(key: str, typed: str, value: object, tmp_path: Path) -> None:
    config = load_config(SMOKE, {key: typed})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    for one in (config, load_config(tmp_path / "config.yaml")):
        section, name = key.split(".")[:2]
        found = getattr(getattr(one, section), name)
        found = found["prompt"] if key.endswith(".prompt") else found
        assert found == value or (name == "train" and Path(found).name == value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.max_stps", "3", r"training\.max_stps: unknown key; did you mean max_steps\?"),
        ("data.layout", "text", r"data\.layout: renamed to data\.format"),
        ("serch.n_trials", "3", r"serch: unknown key; did you mean search\?"),
        ("training.max_steps", "-3", r"training\.max_steps = -3: must be greater than 0"),
        ("training.max_steps", "many", r"training\.max_steps = 'many': must be a valid integer"),
        ("training", "3", r"training = 3: must be a valid dictionary"),
        ("search.scheduler", "hyperband", r"search\.scheduler = 'hyperband': must be 'asha', 'halving' or 'none'"),
        ("space.r", "0", r"space\.r = 0: must be greater than or equal to 1"),
        ("space.r", "{logint: [0, 8]}", r"0 < low <= high, found \[0, 8\]"),
        ("space.r", "{choice: []}", r"space\.r\.choice: must be a list of one value or more"),
        ("space.r", "{chioce: [1]}", r"space\.r: must be a value or one of choice, uniform"),
        ("space.lora_dropout", "1.0", r"space\.lora_dropout = 1\.0: must be less than 1"),
        ("space.learning_rate", "-1e-4", r"space\.learning_rate = -0\.0001: must be greater than 0"),
        ("space.learning_rat", "1e-4", r"space\.learning_rat: unknown parameter; did you mean learning_rate\?"),
        ("space", "{}", r"space: must name r, lora_alpha, lora_dropout, learning_rate, found nothing"),
        ("space.r", "{uniform: [2, 8]}", r"space\.r: takes whole numbers; draw them by `int` or `logint`"),
        ("space.learning_rate", "'2e-4'", r"must be a number, found text '2e-4'; leave the quotes out"),
        ("space.lora_alpha", "{choice: [1], times: [r]}", r"space\.lora_alpha\.times: must be the name of a parameter"),
        ("space.lora_dropout", "{depends_on: [r], cases: {2: 0.1}}", r"lora_dropout\.depends_on: must be the name of"),
        ("space", "{r: 8}", r"space\.lora_alpha: required, but not given"),
        ("search.sampler", "grid", r"space\.lora_dropout: sampler grid needs values or choices"),
        ("report_to", "mlfow", r"report_to\.0 = 'mlfow': must be 'tensorboard', 'mlflow', 'wandb' or 'trackio'"),
        ("report_to", "3", r"report_to = 3: must be a valid list"),
    ],
)
def test_bad_settings_name_key_value_and_rule(key: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(SMOKE, {key: value})


def test_a_renamed_key_in_a_file_names_the_present_one(tmp_path: Path) -> None:
    old = yaml.safe_load(SMOKE.read_text())
    old["data"]["layout"] = "text"
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    with pytest.raises(ConfigError, match=r"old\.yaml: data\.layout: renamed to data\.format$"):
        load_config(tmp_path / "old.yaml")


def test_every_renamed_key_names_a_key_that_exists() -> None:
    for former, present in RENAMED.items():
        section, key = present.split(".")
        fields = getattr(load_config(SMOKE), section).model_dump()
        assert key in fields and former.split(".")[1] not in fields


def test_a_missing_or_broken_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="search space file not found"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "latin.yaml").write_bytes("a: ä".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml is not UTF-8: byte 0xe4; save it as UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_rungs_grow_by_the_reduction_factor_up_to_the_budget() -> None:
    assert load_config(SMOKE, {"search.n_trials": "2"}).rungs(27) == [27]
    assert load_config(SMOKE, {"search.n_trials": "6"}).rungs(27) == [9, 27]
    nine = load_config(SMOKE, {"search.n_trials": "9"})
    assert nine.rungs(27) == [3, 9, 27]  # first rung: 27 / 3**2, so that 9, 3 and 1 trials come to them
    assert nine.rungs(60) == [7, 21, 60]
    hundred = load_config(SMOKE, {"search.n_trials": "100"})
    assert hundred.rungs(135) == [5, 15, 45, 135]  # no earlier than 1/27
    assert hundred.rungs(134) == [15, 45, 134]  # nor with fewer than five steps
    assert load_config(SMOKE, {"search.scheduler": "none"}).rungs(27) == [27]
    with pytest.raises(ConfigError, match=r"search\.grace_period must be at most max_steps = 5, found 9"):
        load_config(SMOKE, {"search.grace_period": "9"}).rungs(5)


def test_importing_config_loads_neither_torch_nor_ray() -> None:
    code = "import sys, raylora.config.load; sys.exit(bool({'torch', 'ray', 'optuna'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "training.lr_scheduler_type",
            "cosin",
            "training.lr_scheduler_type = 'cosin': must be 'constant', 'con",
        ),
        ("training.optim", "adamw_torhc", "training.optim: unknown optimizer adamw_torhc; did you mean adamw_torch?"),
        ("base_model.attn_implementation", "flash_atention_2", "did you mean flash_attention_2?"),
        ("evaluation.answer_pattern", "([", r"evaluation.answer_pattern: is no regular expression: unterminated"),
        ("evaluation.answer_pattern", "x+", r"evaluation.answer_pattern: must have a group"),
        ("data.validation_size", "1.5", r"data.validation_size: must be a share below 1, or a whole number of rows"),
        ("cache_dir", "s3://bucket/cache", r"cache_dir: must be a local path, found s3://bucket/cache"),
    ],
)
def test_settings_that_would_fail_in_a_search_are_found_at_once(key: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(SMOKE, {key: value})


def test_a_long_text_is_no_path() -> None:
    template = "{{ messages }}" * 100
    assert load_config(SMOKE, {"data.chat_template": template}).data.chat_template == template


def test_every_optimizer_and_schedule_is_one_of_transformers() -> None:
    assert {optimizer.value for optimizer in OptimizerNames} == set(OPTIMIZERS)
    assert {schedule.value for schedule in SchedulerType} >= set(get_args(Schedule))
