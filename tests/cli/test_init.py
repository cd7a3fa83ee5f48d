"""`raylora init` writes a search space that loads, from options or from answers."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from raylora.cli.app import app
from raylora.config.load import load_config

OPTIONS = ["--model", "Qwen/Qwen3-4B", "--data", "rows: 1.jsonl", "--max-length", "512", "--max-new-tokens", "64"]


def test_options_become_a_search_space_with_comments(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    result = CliRunner().invoke(app, ["init", str(file), *OPTIONS, "--effort", "quick"])
    assert result.exit_code == 0, result.output
    config = load_config(file)
    assert config.base_model.name == "Qwen/Qwen3-4B" and config.data.train.endswith("rows: 1.jsonl")
    assert (config.data.max_length, config.evaluation.max_new_tokens, config.search.n_trials) == (512, 64, 9)
    assert file.read_text().startswith(f"# python -m raylora.search {file} --output results/mine\n")
    again = CliRunner().invoke(app, ["init", str(file), *OPTIONS, "--effort", "quick"])
    assert again.exit_code == 2 and "is there already, and nothing is overwritten" in again.output


def test_what_is_not_given_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    result = CliRunner().invoke(app, ["init", str(file)], input="some/model\nrows.jsonl\n2048\n\nusual\n")
    assert result.exit_code == 0, result.output
    config = load_config(file)
    assert config.base_model.name == "some/model" and config.data.max_length == 2048
    assert config.evaluation.max_new_tokens == 256 and config.search.n_trials == 27


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--effort", "huge", "--effort must be quick or usual"), ("--max-length", "1", "data.max_length = 1: must be")],
)
def test_an_answer_that_cannot_be_is_refused_and_nothing_is_written(
    tmp_path: Path, option: str, value: str, message: str
) -> None:
    file = tmp_path / "mine.yaml"
    result = CliRunner().invoke(app, ["init", str(file), *OPTIONS, "--effort", "quick", option, value])
    assert result.exit_code == 2 and message in result.output
    assert not file.exists()
