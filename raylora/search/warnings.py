"""Warns before a search starts of what will disappoint at its end."""

import math
from collections.abc import Iterator

from raylora.config.learning_rate import rule_learning_rate
from raylora.config.schema import SearchConfig
from raylora.data.prepare import PreparedData

FEW_TRIALS = 3
"""Fewest trials of a rung that can be called compared. Our choice."""

FEW_ROWS = 30
"""Fewest validation rows whose mean loss tells trials apart. Our choice."""

FAR = 10.0
"""Factor between a learning rate and the rule's from which on it is unusual. Our choice."""

FEW_CUT = 0.05
"""Share of training rows that may be cut."""


def warnings(
    config: SearchConfig,
    data: PreparedData,
    rungs: list[int],
    *,
    n_adapter_parameters: int,
    hidden_size: int,
    model_type: str,
    n_positions: int | None,
) -> list[str]:
    """Return a sentence for each thing that will disappoint.

    Args:
        config: settings of the search.
        data: its rows.
        rungs: optimizer steps at which trials are compared.
        n_adapter_parameters: of the largest adapter.
        hidden_size: of the base.
        model_type: transformers' name of the base's architecture.
        n_positions: tokens of the longest text that the base was made for; None if it does not say.
    """
    train, validation = data.summaries["train"], data.summaries["validation"]
    found = [*_of_rungs(config, rungs), *_of_learning_rate(config, hidden_size, model_type)]
    if validation.rows < FEW_ROWS:
        found.append(f"{validation.rows} validation rows are few: their mean loss may rank trials by chance")
    if n_positions is not None and data.longest(config.data) > n_positions:
        found.append(f"rows are longer than the {n_positions} tokens that the base was made for; lower data.max_length")
    fewest, most = config.rows_per_step()
    if config.training.max_steps is None and fewest < most:
        low, high = (rows * rungs[-1] / train.rows for rows in (fewest, most))
        found.append(
            f"a step takes {fewest} to {most} rows, so that {rungs[-1]} steps are {low:.2g} to {high:.2g} epochs; "
            "training.max_steps sets the budget"
        )
    if train.n_long > FEW_CUT * train.rows:
        found.append(f"{train.n_long} of {train.rows} training rows are cut; raise data.max_length")
    lines = [f"warning: {text}" for text in found]
    if n_adapter_parameters > train.trained_tokens:  # the rule and not the exception: every adapter of a small data set
        lines.append(
            f"note: the largest adapter has {n_adapter_parameters:,} parameters, and {train.trained_tokens:,} tokens "
            "to learn: more epochs will learn them by heart"
        )
    return lines


def _of_rungs(config: SearchConfig, rungs: list[int]) -> Iterator[str]:
    """Warn of rungs that compare too little or too early."""
    warm_up = math.ceil(max(config.extremes("warmup_ratio")) * rungs[-1])
    if len(rungs) > 1 and rungs[0] <= warm_up:
        yield f"the first rung, step {rungs[0]}, lies within the warm-up of {warm_up} steps; raise search.grace_period"
    n_trials = config.n_trials()
    for step in rungs[:-1]:
        if n_trials < FEW_TRIALS:
            yield f"{n_trials} trials are compared at step {step}; raise search.n_trials"
            return
        n_trials //= config.search.reduction_factor


def _of_learning_rate(config: SearchConfig, hidden_size: int, model_type: str) -> Iterator[str]:
    """Warn of a range of learning rates that lies far from the published rule."""
    rule, rates = rule_learning_rate(hidden_size, model_type), config.extremes("learning_rate")
    if rule is not None and not min(rates) / FAR <= rule <= max(rates) * FAR:
        yield f"learning rates from {min(rates):g} to {max(rates):g} are far from the published rule's {rule:.1e}"
