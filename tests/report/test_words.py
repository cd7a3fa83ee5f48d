"""Sentences of the report: changes in words, baselines at equal steps, uncertainty, and refusals."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from raylora.cli.app import app
from raylora.config.schema import SearchConfig
from raylora.errors import RunDirectoryError
from raylora.evaluate.heldout import evaluate_run
from raylora.report.answer import answer
from raylora.report.baselines import comparisons, learning_rate_rule
from raylora.report.comparison import check_comparable, comparison_rows, verdict
from raylora.report.evaluation_tables import agreement_sentence
from raylora.report.facts import _seconds, load_facts
from raylora.report.html.difference import Piece, difference
from raylora.report.html.space_figures import importances
from raylora.report.page import write_report
from raylora.report.screen import print_summary
from raylora.report.tables import WIDTH, fitting, markdown_table, text_block
from raylora.report.words import change, learning_rate
from raylora.run.directory import RunDirectory
from raylora.run.events import Event, EventLog, Proposed
from tests.helpers import LANE, SESSION, history_of
from tests.report.runs import ANSWERS, EVENTS, HOSTILE, SPACE, make_checked_run, make_run

MakeConfig = Callable[..., SearchConfig]


def test_a_change_is_said_in_words() -> None:
    assert change(1.02, 1.0) == "2 % worse"
    assert change(0.6, 1.0) == "40 % better"
    assert change(500.0, 2.0) == "250 times"
    assert change(1.00001, 1.0) == "equal"
    assert change(0.5, 0.0) == "0.5 instead of 0"


def test_learning_rates_are_short() -> None:
    assert [learning_rate(rate) for rate in (2e-4, 1.3219e-3, 1.0)] == ["2e-4", "1.32e-3", "1e0"]


def test_the_rule_by_hand() -> None:
    # (2000 / 500) ** .781 = 4 ** .781 = 2.953
    rule = learning_rate_rule(500, "llama")
    assert rule is not None
    assert rule.learning_rate == pytest.approx(5e-4 * 2.953, rel=1e-3)
    assert learning_rate_rule(2000, "qwen3") == learning_rate_rule(2000, "qwen2")
    assert learning_rate_rule(2000, "gemma3") is None


def test_the_answer_compares_at_equal_steps_and_names_the_trials(make_config: MakeConfig, tmp_path: Path) -> None:
    facts = load_facts(make_checked_run(tmp_path / "run", make_config(space=SPACE)))
    said = answer(facts)
    assert said["The search"].startswith("Of 4 trials, trial 0 won, chosen for its loss after the merge: validation")
    assert "validation loss 1 nats per token at step 9, with r 4, lora_alpha 8" in said["The search"]
    default, rule = comparisons(facts)
    assert default.startswith("The published default (r 16, lora_alpha 32, learning rate 2e-4) is trial 1: its loss at")
    assert default.endswith("the best trial's there is 1, 50 % better.")
    # trial 2 was stopped at step 3 with 6.0; the best trial had 4.0 there
    assert ") is trial 2 (r 4, lora_alpha 8, learning rate 4e-4): its loss at step 3 is 6," in rule
    assert rule.endswith("the best trial's there is 4, 33.3 % better.")
    assert said["The merge"] == (
        "The merge by calibrated keeps the fine-tune: validation loss 1.01 after it and 1 before it, 1 % worse "
        "(tolerance 2 %). The base has 500."
    )
    assert "merged_nf4 50.0 % (95 % interval 10.0 to 90.0)" in said["The held-out check"]


def test_a_baseline_far_from_every_trial_is_not_compared(make_config: MakeConfig, tmp_path: Path) -> None:
    events: list[Event] = [SESSION, LANE, *history_of(0, {3: 4.0, 9: 1.0}, "finished", learning_rate=5e-3)]
    facts = load_facts(make_run(tmp_path / "run", make_config(space=SPACE), events))
    default, rule = comparisons(facts)
    assert default.startswith("No trial is near the published default (r 16, lora_alpha 32, learning rate 2e-4): ")
    assert "learning rates here go from 5e-3 to 5e-3, r from 4 to 4. To compare, make it one of the" in default
    assert rule.endswith(" is the best trial itself.")  # (2000 / 64) ** .781 * 5e-4 = 7.3e-3


def test_a_baseline_whose_trial_failed_is_not_recommended_again(make_config: MakeConfig, tmp_path: Path) -> None:
    tried = history_of(1, {}, "failed", r=16, lora_alpha=32, learning_rate=2e-4)
    events: list[Event] = [SESSION, LANE, *history_of(0, {9: 1.0}, "finished"), *tried]
    facts = load_facts(make_run(tmp_path / "run", make_config(space=SPACE), events))
    said = "Trial 1 is near the published default (r 16, lora_alpha 32, learning rate 2e-4), and was never validated."
    assert comparisons(facts)[0] == said


def test_the_rule_is_not_applied_to_a_base_of_unknown_size(make_config: MakeConfig, tmp_path: Path) -> None:
    facts = load_facts(make_run(tmp_path / "run", make_config(space=SPACE, base_model={"name": "owner/model"})))
    assert comparisons(facts)[1].startswith("The learning-rate rule needs the base's hidden size")


def test_differences_are_marked_word_by_word() -> None:
    assert difference(" light high now", "light low now") == [
        Piece("same", "light "),
        Piece("lacking", "low"),
        Piece("extra", "high"),
        Piece("same", " now"),
    ]
    assert difference("something else entirely", "42") == [Piece("extra", "something else entirely")]


def test_wide_tables_are_split_and_keep_their_first_column() -> None:
    rows = [{"name": "x", **{f"column_{number}": 1.0 for number in range(20)}}]
    parts = list(fitting(rows))
    assert len(parts) > 1
    assert all(next(iter(part[0])) == "name" for part in parts)
    assert sum(len(part[0]) - 1 for part in parts) == 20
    assert all(len(line) <= WIDTH for line in markdown_table(rows).splitlines())


def test_a_block_of_text_ends_only_at_its_own_fence() -> None:
    lines = text_block([("prompt", HOSTILE), ("answer", "word " * 40)]).splitlines()
    assert lines[0] == "````text"
    assert lines[-1] == "````"
    assert all(len(line) <= WIDTH for line in lines)


def test_the_report_and_the_terminal_fit_100_columns(make_config: MakeConfig, tmp_path: Path) -> None:
    run = make_checked_run(tmp_path / "run", make_config(space=SPACE))
    write_report(run)
    tables = [line for line in run.report_file.read_text().splitlines() if line.startswith("|")]
    assert len(tables) > 40
    assert max(map(len, tables)) <= WIDTH
    assert "| base | 500 | - | 4 |" in run.report_file.read_text()  # and not 49900 %
    output = io.StringIO()
    print_summary(run, Console(file=output, width=200, markup=False, highlight=False))
    lines = output.getvalue().split("\nreport:")[0].splitlines()
    assert max(len(line.rstrip()) for line in lines) <= WIDTH


def test_a_check_of_an_earlier_version_gives_a_report_that_says_what_is_missing(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    run = make_checked_run(tmp_path / "run", make_config(space=SPACE))
    run.answers_file.unlink()
    result = json.loads(run.evaluation_file.read_text())
    del result["intervals"], result["n_draws"]
    run.evaluation_file.write_text(json.dumps(result))
    write_report(run)
    for file in (run.page_file, run.report_file):
        text = file.read_text()
        assert (
            "There are no intervals and no list of all answers: an earlier version of raylora made this check." in text
        )
        assert "hello" in text  # its samples are there


def test_an_equal_score_is_neither_better_nor_worse() -> None:
    shares = {"tokens": 0.9, "answers": 0.5, "bleu_p_value": 1.0}
    scores = {"adapter": {"bleu": 40.0}, "merged_nf4": {"bleu": 40.004}}
    said = agreement_sentence({"agreement_with_adapter": {"merged_nf4": shares}, "models": scores}, "merged_nf4")
    assert said == "merged_nf4 agrees with adapter in 90.0 % of tokens; its BLEU is the same"


def test_a_run_without_trials_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_config(), [SESSION])
    with pytest.raises(RunDirectoryError, match="run holds no trials yet, so there is nothing to report"):
        write_report(run)
    result = CliRunner().invoke(app, ["compare", str(run.path), str(run.path)])
    assert result.exit_code == 2


def test_runs_on_other_data_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    one = load_facts(make_run(tmp_path / "one", make_config(space=SPACE), fingerprint="abc"))
    other = load_facts(make_run(tmp_path / "two", make_config(space=SPACE), fingerprint="xyz"))
    message = "runs on other held-out rows cannot be compared: one has data fingerprint abc, two has xyz"
    with pytest.raises(RunDirectoryError, match=message):
        check_comparable([one, other])
    with pytest.raises(RunDirectoryError, match="a comparison needs two runs or more, found 1"):
        check_comparable([one])


def test_runs_with_other_tokens_are_compared_by_their_answers_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    one = load_facts(make_checked_run(tmp_path / "one", make_config(space=SPACE), match=1.0, low=0.95, high=1.0))
    shutil.copytree(one.run.path, tmp_path / "two")
    file = RunDirectory(tmp_path / "two").provenance_file
    file.write_text(file.read_text().replace('"abc"', '"xyz"'))
    two = load_facts(RunDirectory(tmp_path / "two"))
    note = check_comparable([one, two])
    assert note is not None
    assert "losses are per token and are not compared" in note
    figures = [row["figure"] for row in comparison_rows([one, two], losses=False)]
    assert "exact_match %" in figures
    assert not {"eval_loss", "heldout_loss"} & set(figures)


def test_a_comparison_says_if_the_difference_may_be_chance(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(space=SPACE)
    good, close, bad = (
        load_facts(make_checked_run(tmp_path / name, config, match=match, low=match - 0.05, high=match + 0.05))
        for name, match in (("good", 0.9), ("close", 0.85), ("bad", 0.2))
    )
    assert verdict([good, bad], losses=True).endswith("Its 95 % interval overlaps with no other.")
    assert "overlaps with that of close: that may be chance" in verdict([bad, good, close], losses=True)
    assert verdict([good, good], losses=True) == "Share of answers that equal a reference is 90.0 % in all runs."


def test_a_merge_of_before_further_trials_is_not_reported(make_config: MakeConfig, tmp_path: Path) -> None:
    run = make_checked_run(tmp_path / "run", make_config(space=SPACE, search={"n_trials": 5}))
    facts = load_facts(run)
    assert facts.merge is not None and facts.evaluation is not None and facts.answers
    log = EventLog(run.events_file)
    for event in (SESSION, LANE, *history_of(9, {3: 0.5, 9: 0.1}, "finished")):
        log.append(event)
    log.flush()
    resumed = load_facts(run)
    assert resumed.merge is None and resumed.evaluation is None and resumed.answers == []
    assert resumed.chosen is not None and resumed.chosen.number == 9
    with pytest.raises(RunDirectoryError, match="was merged before all of its trials had finished"):
        evaluate_run(run)


def test_the_time_between_two_sessions_is_not_counted() -> None:
    events = [replace(event, time=at) for event, at in ((SESSION, 0), (LANE, 10), (SESSION, 86400), (LANE, 86405))]
    assert _seconds(events) == 15


def test_repetitions_are_counted_beside_the_trials(make_config: MakeConfig, tmp_path: Path) -> None:
    events = [SESSION, LANE, *history_of(0, {9: 1.0}, "finished"), *history_of(1, {9: 1.1}, "finished", repeat_of=0)]
    run = make_run(tmp_path / "run", make_config(space=SPACE, search={"n_trials": 1}), events)
    facts = load_facts(run)
    assert facts.size() == "1 trial and 1 repetition" and facts.counts() == "1 finished"
    assert "Of 1 trial and 1 repetition, trial 0" in answer(facts)["The search"]
    write_report(run)
    assert "1 trial and 1 repetition: 1 finished." in run.report_file.read_text()


@pytest.mark.parametrize("name", ["folder", "folder.html", "notes.txt"])
def test_a_comparison_overwrites_nothing_but_a_page(name: str, make_config: MakeConfig, tmp_path: Path) -> None:
    runs = [make_checked_run(tmp_path / one, make_config(space=SPACE)) for one in ("one", "two")]
    if name.startswith("folder"):
        (tmp_path / name / "precious").mkdir(parents=True)
    result = CliRunner().invoke(app, ["compare", *(str(run.path) for run in runs), "--output", str(tmp_path / name)])
    assert result.exit_code == 2
    assert "--output must be an HTML file" in result.output
    assert (tmp_path / name / "precious").is_dir() == name.startswith("folder")


def test_the_command_writes_the_comparison(make_config: MakeConfig, tmp_path: Path) -> None:
    runs = [make_checked_run(tmp_path / name, make_config(space=SPACE)) for name in ("one", "two")]
    output = tmp_path / "both.html"
    result = CliRunner().invoke(app, ["compare", *(str(run.path) for run in runs), "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert max(len(line.rstrip()) for line in result.output.split("\npage:")[0].splitlines()) <= WIDTH
    assert "<td>1</td>" in output.read_text()  # the validation loss of both


def test_importance_finds_the_hyperparameter_that_matters(make_config: MakeConfig, tmp_path: Path) -> None:
    # the loss is a function of the learning rate alone
    events: list[Event] = [SESSION, LANE]
    for number in range(30):
        rate, r = 1e-4 * 1.16**number, (4, 16)[number % 2]
        first, *rest = history_of(number, {3: float(30 - number)}, learning_rate=rate, r=r)
        assert isinstance(first, Proposed)
        events += [Proposed(number, first.assignment, {"r": r, "learning_rate": rate}, 9), *rest]
    facts = load_facts(make_run(tmp_path / "run", make_config(space=SPACE), events))
    shares = importances(facts, facts.losses_at(3))
    assert shares["learning_rate"] > 0.9


def test_hand_made_runs_hold_hostile_texts() -> None:
    assert any(HOSTILE in json.dumps(line, ensure_ascii=False).replace('\\"', '"') for line in ANSWERS)
    assert any(getattr(event, "reason", None) == HOSTILE for event in EVENTS)
