"""Draws the search: losses against steps, r, learning rate and cost."""

import statistics
from typing import Any

import altair as alt

from raylora.report.baselines import baselines
from raylora.report.facts import RunFacts
from raylora.report.html.figure import (
    LOSS,
    Figure,
    Missing,
    best_on_top,
    by_standing,
    loss_axis,
    points,
    tooltip,
    trial_facts,
)


def loss_against_step(facts: RunFacts) -> Figure | Missing:
    """Return the learning curves of all trials."""
    title = "Validation loss against optimizer steps"
    rows = [
        {**trial_facts(facts.state.trials[row.number], facts.chosen), "step": row.step, "loss": row.eval_loss}
        for row in facts.state.history
    ]
    if not rows:
        return Missing(title, "no trial has been validated yet")
    rungs = sorted({row["step"] for row in rows})
    step = alt.X(
        "step:Q",
        title="optimizer steps",
        scale=alt.Scale(type="log", base=2, nice=False, padding=16),
        axis=alt.Axis(values=rungs, format="d", grid=False),
    )
    base = alt.Chart(points(best_on_top(rows))).encode(
        x=step, y=loss_axis([row["loss"] for row in rows]), color=by_standing(rows), detail="trial:N"
    )
    lines = base.mark_line(strokeWidth=2, opacity=0.75)
    dots = base.mark_circle(size=70, opacity=0.9).encode(tooltip=tooltip(alt.Tooltip("step:Q"), LOSS))
    caption = (
        "A line is a trial; it is grey if it was stopped at a rung. Compare losses at equal steps only. "
        "Early rungs validate on fewer rows, the same for all trials."
    )
    return Figure("curves", title, caption, lines + dots, len(rows), 360)


def comparable_steps(facts: RunFacts) -> list[int]:
    """Return the steps to compare trials at: the full budget if any trial is there, and the first rung."""
    steps = {row.step for row in facts.state.history}
    return sorted({min(steps), facts.max_steps} & steps, reverse=True) if steps else []


def loss_against_rank(facts: RunFacts, step: int) -> Figure:
    """Return a dot for each trial at one step over its r, with median and spread of each r."""
    rows = _rows_at(facts, step)
    by_rank: dict[int, list[float]] = {}
    for row in rows:
        by_rank.setdefault(row["r"], []).append(row["loss"])
    spread = [
        {"r": r, "low": min(losses), "high": max(losses), "loss": statistics.median(losses), "n": len(losses)}
        for r, losses in sorted(by_rank.items())
    ]
    r = alt.X("r:O", title="r", axis=alt.Axis(labelAngle=0))
    axis = loss_axis([row["loss"] for row in rows])
    of_rank = alt.Chart(points(spread)).encode(x=r)
    bars = of_rank.mark_rule(strokeWidth=8, opacity=0.18, color="#98a2ad", strokeCap="round")
    bars = bars.encode(y=alt.Y("low:Q", scale=axis["scale"]), y2="high:Q")
    said = [alt.Tooltip("r:O"), alt.Tooltip("n:Q", title="trials"), alt.Tooltip("loss:Q", title="median", format=".4g")]
    medians = of_rank.mark_tick(thickness=2, size=34, color="#98a2ad").encode(y=axis, tooltip=said)
    dots = alt.Chart(points(rows)).mark_circle(size=90, opacity=0.9)
    dots = dots.encode(x=r, y=axis, color=by_standing(rows), tooltip=tooltip(LOSS))
    layers, n_points = bars + medians + dots, len(rows) + len(spread)
    return Figure(f"rank{step}", f"r against loss at step {step}", _at(facts, step, rows), layers, n_points)


def loss_against_rate(facts: RunFacts, step: int) -> Figure:
    """Return a dot for each trial at one step over its learning rate, coloured by r; baselines as lines."""
    rows = _rows_at(facts, step)
    rates = [row["learning_rate"] for row in rows]
    marks = [
        {"learning_rate": baseline.learning_rate, "name": baseline.name.removeprefix("the "), "said": str(baseline)}
        for baseline in baselines(facts)
        if min(rates) / 3 <= baseline.learning_rate <= max(rates) * 3  # farther ones would squeeze the dots
    ]
    rate = alt.X(
        "learning_rate:Q",
        title="learning rate",
        scale=alt.Scale(type="log", nice=False, padding=24),
        axis=alt.Axis(format="~e", tickCount=4),
    )
    axis = loss_axis([row["loss"] for row in rows])
    dots = alt.Chart(points(rows)).mark_circle(size=90, opacity=0.9)
    colour = alt.Color("r:O", title="r", scale=alt.Scale(scheme="viridis"))
    dots = dots.encode(x=rate, y=axis, color=colour, tooltip=tooltip(LOSS))
    layers: list[alt.Chart] = []
    if marks:
        lines = alt.Chart(points(marks)).encode(x=rate, tooltip=alt.Tooltip("said:N", title="baseline"))
        names = lines.mark_text(align="left", dx=4, dy=6, baseline="top", fontSize=11)
        layers = [
            lines.mark_rule(strokeDash=[4, 4], color="#98a2ad", strokeWidth=1.5),
            names.encode(text="name:N", y=alt.value(0)),
        ]
    return Figure(
        f"rate{step}",
        f"Learning rate against loss at step {step}",
        _at(facts, step, rows),
        alt.layer(*layers, dots),
        len(rows),
    )


COSTS = {
    "trainable_parameters": ("trainable parameters", ""),
    "peak_memory_mib": ("peak memory, MiB", " The peak is that of the lane with all trials on it."),
    "tokens_per_second": ("training tokens per second", " A pack's time is shared out by tokens."),
}
"""Column of a trial -> title of its axis, and what to know about it."""


def loss_against_cost(facts: RunFacts, step: int) -> list[Figure]:
    """Return plots of the loss at one step against what a trial costs."""
    figures = []
    for column, (title, note) in COSTS.items():
        rows = [{**row, "cost": getattr(facts.state.trials[row["trial"]], column)} for row in _rows_at(facts, step)]
        axis = alt.Axis(format="~s", tickCount=4)
        x = alt.X("cost:Q", title=title, scale=alt.Scale(zero=False, padding=20), axis=axis)
        dots = alt.Chart(points(rows)).mark_circle(size=90, opacity=0.9)
        dots = dots.encode(
            x=x,
            y=loss_axis([row["loss"] for row in rows]),
            color=by_standing(rows),
            tooltip=tooltip(LOSS, alt.Tooltip("cost:Q", title=title, format=",.4g")),
        )
        name = "".join(letter for letter in column if letter.isalpha())
        heading = f"{title[0].upper()}{title[1:].partition(',')[0]}"
        figures.append(Figure(name, heading, f"Loss at step {step}.{note}", dots, len(rows), 240))
    return figures


def merged_against_loss(facts: RunFacts) -> list[Figure]:
    """Return the loss after the merge against the loss before it, if the search merged several trials."""
    candidates = facts.merge["merged_candidates"] if facts.merge else {}
    trials = {int(number): facts.state.trials[int(number)] for number in candidates}
    rows = [
        {**trial_facts(trial, facts.chosen), "before": trial.final_loss, "loss": candidates[str(number)]}
        for number, trial in trials.items()
    ]
    if not rows:
        return []
    axis = alt.Axis(format="~g", tickCount=4)
    x = alt.X("before:Q", title="validation loss, unmerged", scale=alt.Scale(zero=False, padding=20), axis=axis)
    dots = alt.Chart(points(rows)).mark_circle(size=90, opacity=0.9)
    dots = dots.encode(
        x=x,
        y=loss_axis([row["loss"] for row in rows], "validation loss, merged"),
        color=by_standing(rows),
        tooltip=tooltip(LOSS, alt.Tooltip("before:Q", title="unmerged", format=".4g")),
    )
    caption = "The merge was tried for the best trials, and the lowest merged loss won."
    return [Figure("candidates", "Loss after the merge", caption, dots, len(rows), 240)]


def _rows_at(facts: RunFacts, step: int) -> list[dict[str, Any]]:
    """Return a row for each trial that was validated at a step."""
    trials = facts.state.trials
    rows = [{**trial_facts(trials[n], facts.chosen), "loss": loss} for n, loss in facts.losses_at(step).items()]
    return best_on_top(rows)


def _at(facts: RunFacts, step: int, rows: list[dict[str, Any]]) -> str:
    """Return a caption that says which trials a plot at one step holds."""
    if step == facts.max_steps:
        return f"{len(rows)} trials that reached the full budget of {step} steps. Weaker ones were stopped before."
    return f"All {len(rows)} trials that reached the first rung. At few steps, fast learners look best."
