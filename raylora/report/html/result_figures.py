"""Draws the merge and the held-out check: losses, divergence, update kept per layer, scores with their intervals."""

import re
from typing import Any

import altair as alt

from raylora.report.evaluation_tables import score_row
from raylora.report.html.figure import MODELS, Figure, Missing, points

NO_SCORES = ("heldout_loss", "tokens_per_second")


def merge_figures(result: dict[str, Any] | None) -> list[Figure | Missing]:
    """Return the loss and the divergence of each merge strategy.

    Args:
        result: content of `merge.json`, or None.
    """
    if result is None or not result["models"].get("adapter"):
        return [Missing("What the merge keeps", "no merge was measured yet")]
    return [_merged_losses(result), _divergences(result)]


def _merged_losses(result: dict[str, Any]) -> Figure:
    """Return bars of validation loss: the adapter, and each strategy."""
    rows = _models(result, "eval_loss", leave_out="base")
    limit = result["models"]["adapter"]["eval_loss"] * (1 + result["tolerance"])
    x = alt.X("value:Q", title="validation loss, nats per token", axis=alt.Axis(format="~g", tickCount=4))
    bars = _bars(rows, x, "#1c7ed6")
    line = alt.Chart(points([{"value": limit, "said": f"tolerance: {limit:.4g}"}]))
    rule = line.mark_rule(strokeDash=[4, 4], strokeWidth=1.5, color="#98a2ad").encode(x=x, tooltip="said:N")
    base = result["models"]["base"]["eval_loss"]
    caption = f"The dashed line is the tolerance of {100 * result['tolerance']:g} %. The base is at {base:.4g}."
    return Figure("merged", "Loss after the merge, by strategy", caption, bars + rule, len(rows), 60 + 34 * len(rows))


def _divergences(result: dict[str, Any]) -> Figure:
    """Return bars of the KL divergence of each strategy from the adapter."""
    rows = [row for row in _models(result, "kl_to_adapter", leave_out="base") if row["model"] != "adapter"]
    x = alt.X("value:Q", title="KL divergence from the adapter, nats", axis=alt.Axis(format="~g", tickCount=4))
    caption = (
        f"Mean over validation tokens; 0 is the adapter itself. The written model is that of {result['strategy']}."
    )
    bars = _bars(rows, x, "#1c7ed6")
    return Figure(
        "divergence", "Distance from the adapter's predictions", caption, bars, len(rows), 60 + 34 * len(rows)
    )


def update_kept(result: dict[str, Any] | None) -> Figure | Missing:
    """Return a heat map of the share of the update that each layer's merged weight holds.

    Args:
        result: content of `merge.json`, or None.
    """
    if result is None:
        return Missing("Update kept per layer", "nothing was merged yet")
    title = f"Update kept per layer by {result['strategy']}"
    rows = []
    for layer, kept in result["update_kept"].get(result["strategy"], {}).items():
        found = re.search(r"\.(\d+)\.(.+)$", layer)
        depth, module = (int(found[1]), found[2]) if found else (-1, layer)
        rows.append({"depth": depth, "module": module.rpartition(".")[2], "kept": kept, "layer": layer})
    if not rows:
        return Missing(title, "this merge has no figures of single layers")
    modules = list(dict.fromkeys(row["module"] for row in rows))
    depths = sorted({row["depth"] for row in rows})
    fifth = [depth for depth in depths if len(depths) < 12 or depth % 5 == 0]
    x = alt.X("depth:O", title="depth", axis=alt.Axis(labelAngle=0, values=fifth))
    y = alt.Y("module:N", title=None, sort=modules)
    colour = alt.Color(
        "kept:Q",
        title="share kept",
        scale=alt.Scale(scheme="viridis", domain=[0, 1], clamp=True),
        legend=alt.Legend(format="%", gradientLength=160),
    )
    said = [alt.Tooltip("layer:N"), alt.Tooltip("kept:Q", title="update kept", format=".1%")]
    cells = alt.Chart(points(rows)).mark_rect(stroke=None).encode(x=x, y=y, color=colour, tooltip=said)
    caption = (
        "Share of the adapter's update that is in the merged 4-bit weight, by projection. calibrated keeps what a "
        "layer answers, not its weights: it may keep little where the data never look."
    )
    return Figure("kept", title, caption, cells, len(rows), 40 + 26 * len(modules))


def score_figure(evaluation: dict[str, Any] | None) -> Figure | Missing:
    """Return the held-out scores of all models in per cent, with 95 % intervals where the check has them.

    Args:
        evaluation: content of `evaluation.json`, or None.
    """
    title = "Held-out scores"
    if evaluation is None or not evaluation["n_prompts"]:
        return Missing(title, "no answers were generated yet" if evaluation is None else "no row has a prompt")
    rows = [
        {"model": model, "score": name, **score_row(evaluation, model, name)}
        for model, scores in evaluation["models"].items()
        for name in scores
        if name not in NO_SCORES
    ]
    models = list(evaluation["models"])
    x = alt.X("value:Q", title="per cent", scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(tickCount=5))
    said = [alt.Tooltip("model:N"), alt.Tooltip("score:N"), alt.Tooltip("value:Q", format=".1f")]
    said.append(alt.Tooltip("interval:N", title="95 % interval"))
    base = alt.Chart(points(rows)).encode(
        y=alt.Y("score:N", title=None, sort=None),
        yOffset=alt.YOffset("model:N", sort=models),
        color=alt.Color("model:N", title=None, sort=models, scale=alt.Scale(domain=models, range=list(MODELS))),
        tooltip=said,
    )
    dots = base.mark_circle(size=80, opacity=1).encode(x=x)
    whiskers = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2)
    whiskers = whiskers.encode(x=alt.X("low:Q", title="per cent"), x2="high:Q")
    n_scores = len({row["score"] for row in rows})
    has = "interval" in rows[0]
    caption = f"Over {evaluation['n_prompts']} prompts, answered greedily. " + (
        f"Bars are 95 % intervals, by bootstrap with {evaluation['n_draws']} draws."
        if has
        else "No intervals: an earlier version of raylora made this check."
    )
    return Figure("scores", title, caption, whiskers + dots, len(rows), 40 + n_scores * (12 + 14 * len(models)))


def _models(result: dict[str, Any], figure: str, *, leave_out: str) -> list[dict[str, Any]]:
    """Return a row for each model that has a figure."""
    return [
        {"model": name, "value": facts[figure], "written": name == result["strategy"]}
        for name, facts in result["models"].items()
        if name != leave_out and facts.get(figure) is not None
    ]


def _bars(rows: list[dict[str, Any]], x: alt.X, colour: str) -> alt.Chart:
    """Return bars, the written model's in another colour."""
    said = [alt.Tooltip("model:N"), alt.Tooltip("value:Q", title=str(x["title"]), format=".4g")]
    fill = alt.Color("written:N", legend=None, scale=alt.Scale(domain=[True, False], range=["#e8590c", colour]))
    bars = alt.Chart(points(rows)).mark_bar(cornerRadiusEnd=3)
    return bars.encode(x=x, y=alt.Y("model:N", title=None, sort=None), color=fill, tooltip=said)
