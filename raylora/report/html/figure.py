"""A plot of the page with its words, and the looks that all plots share."""

from dataclasses import dataclass
from typing import Any

import altair as alt

from raylora.report.words import learning_rate
from raylora.run.trial_row import TrialRow

COLOURS = {
    "best": "#e8590c",
    "finished": "#1c7ed6",
    "under way": "#2b9a55",
    "stopped": "#98a2ad",
    "failed": "#c2255c",
}
"""Standing of a trial -> colour, readable on white and on black."""

MODELS = ("#98a2ad", "#1c7ed6", "#e8590c", "#2b9a55", "#9c36b5")
"""Colours of base, adapter and the merged models, in this order."""

LOG_FROM = 10
"""Ratio of the largest to the smallest loss from which an axis is logarithmic."""


@dataclass(frozen=True)
class Figure:
    """One plot."""

    name: str
    """Name in the page's HTML, letters only."""

    title: str
    caption: str
    chart: alt.TopLevelMixin
    n_points: int
    """Number of marks that carry data; a test counts them on the drawn page."""

    height: int = 300
    """Pixels."""

    def spec(self) -> dict[str, Any]:
        """Return the plot in Vega-Lite, as wide as its place on the page."""
        chart = self.chart.properties(width="container", height=self.height).configure(
            background="transparent",
            font="system-ui, sans-serif",
            autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
            axis=alt.AxisConfig(labelFontSize=12, titleFontSize=12, titleFontWeight="normal", labelOverlap=True),
            legend=alt.LegendConfig(labelFontSize=12, titleFontSize=12, orient="top", titleFontWeight="normal"),
            view=alt.ViewConfig(stroke=None),
        )
        spec: dict[str, Any] = chart.to_dict()
        return spec


@dataclass(frozen=True)
class Missing:
    """A plot that this run does not allow, with the reason."""

    title: str
    reason: str


def points(rows: list[dict[str, Any]]) -> alt.Data:
    """Return rows as the data of a plot."""
    return alt.Data(values=rows)


def standing(trial: TrialRow, best: TrialRow | None) -> str:
    """Return what became of a trial: a key of `COLOURS`."""
    if best is not None and trial.number in (best.number, best.repeat_of):
        return "best"
    return trial.state if trial.state in COLOURS else "under way"


def trial_facts(trial: TrialRow, best: TrialRow | None) -> dict[str, Any]:
    """Return what hovering over a trial shows."""
    return {
        "trial": trial.number,
        "standing": standing(trial, best),
        "state": trial.state,
        "r": trial.r,
        "lora_alpha": trial.lora_alpha,
        "lora_dropout": round(trial.lora_dropout, 4),
        "learning_rate": trial.learning_rate,
        "rate": learning_rate(trial.learning_rate),
    }


def tooltip(*more: alt.Tooltip) -> list[alt.Tooltip]:
    """Return the tooltip of a trial, and further entries."""
    names = {"trial": "trial", "state": "state", "r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
    return [alt.Tooltip(f"{name}:N", title=title) for name, title in {**names, "rate": "learning_rate"}.items()] + [
        *more
    ]


def best_on_top(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows in the order in which they are drawn: stopped trials first, the best one last."""
    order = ("failed", "stopped", "under way", "finished", "best")
    return sorted(rows, key=lambda row: order.index(row["standing"]))


LOSS = alt.Tooltip("loss:Q", title="loss", format=".4g")


def by_standing(rows: list[dict[str, Any]]) -> alt.Color:
    """Return the colour of trials by what became of them; the legend names those that are there."""
    there = [name for name in COLOURS if any(row["standing"] == name for row in rows)]
    return alt.Color(
        "standing:N", title=None, scale=alt.Scale(domain=there, range=[COLOURS[name] for name in there]), sort=there
    )


def loss_axis(losses: list[float], title: str = "validation loss, nats per token") -> alt.Y:
    """Return the axis of a loss, logarithmic where losses lie far apart."""
    positive = [loss for loss in losses if loss > 0]
    log = len(positive) == len(losses) and bool(losses) and max(losses) / min(losses) >= LOG_FROM
    if not log:
        return alt.Y("loss:Q", title=title, scale=alt.Scale(zero=False), axis=alt.Axis(format="~g", tickCount=6))
    scale = alt.Scale(type="log", domain=[min(losses) / 1.2, max(losses) * 1.2])
    return alt.Y("loss:Q", title=title, scale=scale, axis=alt.Axis(format="~g", tickCount=4))
