"""Compares the best trial with what one would have tried without a search: the published default and the rule.

A baseline is compared only if the search holds a trial near it, and only at a step that both trials were validated at.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from raylora.config.learning_rate import rule_learning_rate
from raylora.report.facts import RunFacts
from raylora.report.words import change, learning_rate
from raylora.run.atomic import read_json
from raylora.run.trial_row import TrialRow

NEAR_RATE = 1.5
"""Largest factor between the learning rates of a baseline and of a trial that stands for it. Our choice."""

NEAR_RANK = 2.0
"""Likewise for r, which matters far less (Hu et al. 2021, section 7.2)."""


@dataclass(frozen=True)
class Baseline:
    """Hyperparameters that somebody recommends."""

    name: str
    learning_rate: float
    r: int | None = None
    """Rank; None if the recommendation holds for any."""

    lora_alpha: int | None = None

    def __str__(self) -> str:
        values = [f"r {self.r}, lora_alpha {self.lora_alpha}, "] if self.r else []
        return f"{self.name} ({''.join(values)}learning rate {learning_rate(self.learning_rate)})"


PUBLISHED = Baseline("the published default", learning_rate=2e-4, r=16, lora_alpha=32)
"""r and lora_alpha of TRL's `ModelConfig`, and the learning rate of Dettmers et al. 2023, "QLoRA", table 9
(arXiv:2305.14314), for models up to 13B."""


def learning_rate_rule(hidden_size: int, model_type: str) -> Baseline | None:
    """Return the published rule's learning rate for a base, or None if the rule does not know its family.

    Args:
        hidden_size: of the base.
        model_type: transformers' name of its architecture.
    """
    rate = rule_learning_rate(hidden_size, model_type)
    return None if rate is None else Baseline("the learning-rate rule", rate)


def baselines(facts: RunFacts) -> list[Baseline]:
    """Return the baselines that are known for the base of a run."""
    shape = _shape(facts)
    rule = learning_rate_rule(*shape) if shape else None
    return [PUBLISHED, *([rule] if rule else [])]


def comparisons(facts: RunFacts) -> list[str]:
    """Return a sentence for each baseline, and one if the rule is not known. Empty if no trial has finished."""
    chosen = facts.chosen
    if chosen is None:
        return []
    known = baselines(facts)
    sentences = [_compare(facts, chosen, baseline) for baseline in known]
    if len(known) == 1:
        sentences.append(
            "The learning-rate rule says nothing here: it is published for Llama and Qwen."
            if _shape(facts)
            else "The learning-rate rule needs the base's hidden size, which the run directory holds after the merge."
        )
    return sentences


def nearest(facts: RunFacts, baseline: Baseline) -> TrialRow | None:
    """Return the trial that stands for a baseline: near enough, validated at least once, and the nearest of these."""

    def distance(trial: TrialRow) -> float:
        rank = math.log2(trial.r / baseline.r) / 8 if baseline.r else 0.0
        return abs(math.log2(trial.learning_rate / baseline.learning_rate)) + abs(rank)

    validated = [trial for trial in _near(facts, baseline) if trial.eval_loss is not None]
    return min(validated, key=lambda trial: (distance(trial), trial.number), default=None)


def _near(facts: RunFacts, baseline: Baseline) -> list[TrialRow]:
    """Return the trials that are near enough to a baseline."""
    return [
        trial
        for trial in facts.state.trials.values()
        if trial.repeat_of is None
        and _within(trial.learning_rate, baseline.learning_rate, NEAR_RATE)
        and (baseline.r is None or _within(trial.r, baseline.r, NEAR_RANK))
    ]


def _compare(facts: RunFacts, chosen: TrialRow, baseline: Baseline) -> str:
    """Return a sentence on the best trial against one baseline."""
    trial = nearest(facts, baseline)
    if trial is None:
        return _why_none(facts, baseline)
    if trial.number in (chosen.number, chosen.repeat_of):
        return f"Nearest to {baseline} is the best trial itself."
    losses = {number: _losses(facts, number) for number in (chosen.number, trial.number)}
    step = max(losses[chosen.number].keys() & losses[trial.number].keys(), default=None)
    values = f"(r {trial.r}, lora_alpha {trial.lora_alpha:g}, learning rate {learning_rate(trial.learning_rate)})"
    stand_in = f"Nearest to {baseline} is trial {trial.number} {values}"
    if _is_exactly(trial, baseline):
        name = str(baseline)
        stand_in = f"{name[0].upper()}{name[1:]} is trial {trial.number}"
    if step is None:
        return f"{stand_in}, which shares no step with the best trial."
    ours, theirs = losses[chosen.number][step], losses[trial.number][step]
    return (
        f"{stand_in}: its loss at step {step} is {theirs:.4g}, and the best trial's there is {ours:.4g}, "
        f"{change(ours, theirs)}."
    )


def _why_none(facts: RunFacts, baseline: Baseline) -> str:
    """Return a sentence on a baseline for which no trial stands."""
    if near := _near(facts, baseline):
        return f"Trial {near[0].number} is near {baseline}, and was never validated."
    rates = [trial.learning_rate for trial in facts.state.trials.values()]
    tried = f"learning rates here go from {learning_rate(min(rates))} to {learning_rate(max(rates))}"
    cure = "To compare, make it one of the starting_points."
    return f"No trial is near {baseline}: {tried}, r from {_ranks(facts)}. {cure}"


def _is_exactly(trial: TrialRow, baseline: Baseline) -> bool:
    """Return True if a trial has all that a baseline recommends."""
    same_rate = math.isclose(trial.learning_rate, baseline.learning_rate, rel_tol=0.02)
    return same_rate and all(
        wanted is None or found == wanted
        for found, wanted in ((trial.r, baseline.r), (trial.lora_alpha, baseline.lora_alpha))
    )


def _losses(facts: RunFacts, number: int) -> dict[int, float]:
    """Return step -> validation loss of one trial."""
    return {row.step: row.eval_loss for row in facts.state.history if row.number == number}


def _ranks(facts: RunFacts) -> str:
    """Return the range of r."""
    ranks = [trial.r for trial in facts.state.trials.values()]
    return f"{min(ranks)} to {max(ranks)}"


def _within(value: float, other: float, factor: float) -> bool:
    """Return True if two numbers differ by at most a factor."""
    return other / factor <= value <= other * factor


def _shape(facts: RunFacts) -> tuple[int, str] | None:
    """Return hidden size and model type of the base, or None if no config of it is at hand."""
    if "hidden_size" in facts.provenance:
        return facts.provenance["hidden_size"], facts.provenance["model_type"]
    folders = [facts.run.merged(form) for form in facts.config.merge.formats]
    for folder in (*folders, Path(facts.config.base_model.name)):
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json")
            text = config.get("text_config", config)
            if "hidden_size" in text:
                return text["hidden_size"], text.get("model_type", config["model_type"])
    return None
