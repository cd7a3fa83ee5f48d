"""Draws the searched hyperparameters: parallel coordinates, and their importance by Optuna."""

import math
from typing import Any

import altair as alt
import optuna
from optuna.trial import TrialState

from raylora.report.facts import RunFacts
from raylora.report.html.figure import LOSS, Figure, Missing, best_on_top, by_standing, points, tooltip, trial_facts
from raylora.report.words import learning_rate
from raylora.search.sampler import distributions

MIN_TRIALS = 20
"""Least number of trials for importances. Our choice: the best quarter, which is set apart, is then five trials."""

BEST = 0.25
"""Share of trials that PED-ANOVA sets apart. Optuna's default of a tenth would be two of twenty."""

LOGARITHMIC = 20
"""Ratio of the largest to the smallest value from which a coordinate is logarithmic."""


def parallel_coordinates(facts: RunFacts, step: int) -> Figure | Missing:
    """Return a line for each trial through its hyperparameters, and through its loss at one step."""
    title = f"Each trial's way through the space, to its loss at step {step}"
    losses = facts.losses_at(step)
    trials = {number: facts.state.trials[number] for number in losses}
    columns: dict[str, dict[int, Any]] = {
        name: {number: getattr(trial, name) for number, trial in trials.items()} for name in facts.config.space
    }
    columns = {name: values for name, values in columns.items() if len(set(values.values())) > 1}
    if not columns:
        return Missing(title, "all trials that got there have the same hyperparameters")
    columns["loss"] = losses
    rows, ends = [], []
    for name, values in columns.items():
        places, low, high = _coordinates(values)
        ends += [{"name": name, "place": 0.0, "said": low}, {"name": name, "place": 1.0, "said": high}]
        rows += [
            {**trial_facts(trials[n], facts.chosen), "name": name, "place": place, "loss": losses[n]}
            for n, place in places.items()
        ]
    order = list(columns)
    x = alt.X(
        "name:N", sort=order, title=None, axis=alt.Axis(labelAngle=-25, labelOverlap=False, grid=True, domain=False)
    )
    y = alt.Y("place:Q", axis=None, scale=alt.Scale(domain=[-0.12, 1.12]))
    base = alt.Chart(points(best_on_top(rows))).encode(x=x, y=y, color=by_standing(rows), detail="trial:N")
    lines = base.mark_line(strokeWidth=2, opacity=0.7)
    dots = base.mark_circle(size=50, opacity=0.9).encode(tooltip=tooltip(LOSS))
    labels = alt.Chart(points(ends)).encode(x=x, y=y, text="said:N")
    top = labels.transform_filter("datum.place > 0").mark_text(dy=-14, fontSize=11)
    bottom = labels.transform_filter("datum.place == 0").mark_text(dy=14, fontSize=11)
    caption = "Each axis goes from the lowest value tried, at its foot, to the highest. Low loss is at the foot."
    return Figure("ways", title, caption, lines + dots + top + bottom, len(rows), 340)


def importance(facts: RunFacts, step: int) -> Figure | Missing:
    """Return Optuna's importance of each hyperparameter for the loss at one step."""
    title = f"Importance of hyperparameters for the loss at step {step}"
    losses = facts.losses_at(step)
    if len(losses) < MIN_TRIALS:
        return Missing(
            title,
            f"{len(losses)} trials are too few to tell hyperparameters from luck; from {MIN_TRIALS} on it is shown",
        )
    shares = importances(facts, losses)
    if not shares:
        return Missing(title, "no hyperparameter was sampled in all trials")
    rows = [{"name": name, "share": share} for name, share in shares.items()]
    y = alt.Y("name:N", sort="-x", title=None, axis=alt.Axis(labelLimit=140))
    x = alt.X("share:Q", title="share of the importance", axis=alt.Axis(format="%", tickCount=5))
    said = [alt.Tooltip("name:N"), alt.Tooltip("share:Q", format=".1%")]
    bars = alt.Chart(points(rows)).mark_bar(color="#1c7ed6", cornerRadiusEnd=3).encode(x=x, y=y, tooltip=said)
    caption = (
        f"PED-ANOVA over {len(losses)} trials: what sets the best quarter apart. It holds for this space only, says "
        "nothing of the direction, and with so few trials two bars of like length are equal."
    )
    return Figure("importance", title, caption, bars, len(rows), 60 + 36 * len(rows))


def importances(facts: RunFacts, losses: dict[int, float]) -> dict[str, float]:
    """Return hyperparameter -> share of the importance, by Optuna's PED-ANOVA.

    Args:
        facts: the run.
        losses: trial -> loss, all at one step.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space, study = facts.config.search_space(), optuna.create_study(direction="minimize")
    for number, loss in losses.items():
        if params := facts.state.params[number]:
            kinds = distributions(space, params)
            study.add_trial(
                optuna.trial.create_trial(state=TrialState.COMPLETE, value=loss, params=params, distributions=kinds)
            )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=BEST)
    try:
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
    except ValueError:  # no parameter in common
        return {}


def _coordinates(values: dict[int, Any]) -> tuple[dict[int, float], str, str]:
    """Return the place of each value on its axis, in [0, 1], and the words at both ends."""
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values.values()):
        names = sorted(set(map(str, values.values())))
        step = 1 / max(1, len(names) - 1)
        return {number: names.index(str(value)) * step for number, value in values.items()}, names[0], names[-1]
    low, high = min(values.values()), max(values.values())
    scale = math.log if low > 0 and high / low >= LOGARITHMIC else float
    width = (scale(high) - scale(low)) or 1.0
    places = {number: (scale(value) - scale(low)) / width for number, value in values.items()}
    return places, _short(low), _short(high)


def _short(value: float) -> str:
    """Return a number in a few characters."""
    return learning_rate(value) if 0 < abs(value) < 0.01 else f"{value:.4g}"
