"""Turns the facts of several runs into one HTML page."""

from pathlib import Path
from typing import Any

import altair as alt

from raylora.report.comparison import comparison_rows, label, shared_headline, verdict
from raylora.report.evaluation_tables import score_row
from raylora.report.facts import RunFacts
from raylora.report.html.figure import LOSS, Figure, loss_axis, points, tooltip, trial_facts
from raylora.report.html.render import render
from raylora.run.atomic import write_text


def write_comparison(runs: list[RunFacts], note: str | None, output: Path) -> None:
    """Write the page.

    Args:
        runs: at least two, on the same held-out rows.
        note: sentence on what cannot be compared; None if all can.
        output: HTML file to write.
    """
    figures = [_scores(runs)] if shared_headline(runs) else []
    figures += [_losses(runs), _best_so_far(runs)] if note is None else []
    page = render(
        "comparison.html",
        drawn=figures,
        cache_dir=runs[0].run.cache(runs[0].config),
        title=f"{', '.join(label(run, runs) for run in runs)}: raylora",
        runs=runs,
        notes=[note, *(f"{label(run, runs)}: {text}" for run in runs if (text := run.unfinished()))],
        verdict=verdict(runs, losses=note is None),
        figures=figures,
        rows=comparison_rows(runs, losses=note is None),
    )
    write_text(output, page)


def _scores(runs: list[RunFacts]) -> Figure:
    """Return the score that runs are judged by, with its interval."""
    name = shared_headline(runs)
    assert name is not None
    rows = [
        {"run": label(run, runs), **score_row(run.evaluation, run.judged or "", name)} for run in runs if run.evaluation
    ]
    said = [
        alt.Tooltip("run:N"),
        alt.Tooltip("value:Q", format=".1f"),
        alt.Tooltip("interval:N", title="95 % interval"),
    ]
    base = alt.Chart(points(rows)).encode(y=alt.Y("run:N", title=None, sort=None), tooltip=said)
    scale = alt.X("value:Q", title=f"{name}, per cent", scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(tickCount=5))
    whiskers = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2, color="#1c7ed6")
    dots = base.mark_circle(size=90, color="#1c7ed6", opacity=1).encode(x=scale)
    layers = whiskers.encode(x=alt.X("low:Q", title=f"{name}, per cent"), x2="high:Q") + dots
    caption = "Held-out score of the merged model of each run, with its 95 % interval."
    return Figure("scores", "Held-out check", caption, layers, len(rows), 60 + 34 * len(rows))


def _losses(runs: list[RunFacts]) -> Figure:
    """Return all finished trials of all runs, by learning rate."""
    rows = [
        {**trial_facts(trial, run.chosen), "run": label(run, runs), "loss": trial.eval_loss}
        for run in runs
        for trial in run.state.finished()
    ]
    rate = alt.X(
        "learning_rate:Q",
        title="learning rate",
        scale=alt.Scale(type="log", nice=False, padding=24),
        axis=alt.Axis(format="~e", tickCount=4),
    )
    dots = alt.Chart(points(rows)).mark_circle(size=90, opacity=0.9)
    dots = dots.encode(
        x=rate,
        y=loss_axis([row["loss"] for row in rows]),
        color=alt.Color("run:N", title=None, sort=None),
        tooltip=[alt.Tooltip("run:N"), *tooltip(LOSS)],
    )
    steps = sorted({run.max_steps for run in runs})
    caption = "Finished trials of all runs." + ("" if len(steps) == 1 else f" Their budgets differ: {steps} steps.")
    return Figure("finished", "Final loss against learning rate", caption, dots, len(rows))


def _best_so_far(runs: list[RunFacts]) -> Figure:
    """Return the lowest final loss so far over the hours since the start of each run."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        began = min(trial.started_at for trial in run.state.trials.values())
        best = float("inf")
        for row in run.state.history:
            if row.step == run.max_steps and row.eval_loss < best:
                best = row.eval_loss
                rows.append({"run": label(run, runs), "minutes": (row.reported_at - began) / 60, "loss": best})
    lines = alt.Chart(points(rows)).mark_line(interpolate="step-after", point=True, strokeWidth=2)
    said = [alt.Tooltip("run:N"), alt.Tooltip("minutes:Q", format=".1f"), LOSS]
    lines = lines.encode(
        x=alt.X("minutes:Q", title="minutes since the start", axis=alt.Axis(tickCount=5)),
        y=loss_axis([row["loss"] for row in rows]),
        color=alt.Color("run:N", title=None, sort=None),
        tooltip=said,
    )
    caption = "Lowest loss at the full budget so far. Machines may differ, and pauses count."
    return Figure("sofar", "Best so far", caption, lines, len(rows))
