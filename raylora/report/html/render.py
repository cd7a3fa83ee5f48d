"""Turns the facts of a run, and their plots, into one HTML file that needs nothing else.

All texts of users are escaped by Jinja. Should one slip through, the page's Content-Security-Policy runs no script but
the two whose hash it names, and lets no request leave the file.
"""

import base64
import hashlib
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from raylora.report.answer import answer
from raylora.report.evaluation_tables import evaluation_rows, interval_rows
from raylora.report.facts import RunFacts, public
from raylora.report.html.difference import difference
from raylora.report.html.figure import Figure, Missing
from raylora.report.html.result_figures import merge_figures, score_figure, update_kept
from raylora.report.html.search_figures import (
    comparable_steps,
    loss_against_cost,
    loss_against_rank,
    loss_against_rate,
    loss_against_step,
    merged_against_loss,
)
from raylora.report.html.space_figures import importance, parallel_coordinates
from raylora.report.merge_tables import cost_rows, merge_rows
from raylora.report.rank_vs_loss import short_rows
from raylora.report.tables import cell
from raylora.report.text import MISSING, data_rows, provenance_pairs, trial_row
from raylora.run.atomic import write_text
from raylora.run.lock import made_once

TEMPLATES = Path(__file__).parent / "templates"

LIBRARY = "vega.js"


def write_page(facts: RunFacts, ranks: list[dict[str, Any]]) -> None:
    """Write `report.html`.

    Args:
        facts: the run.
        ranks: rows of `rank_vs_loss`.
    """
    figures = _figures(facts)
    page = render(
        "page.html",
        drawn=_all(figures),
        cache_dir=facts.run.cache(facts.config),
        title=f"{facts.run.path.name}: raylora",
        facts=facts,
        note=facts.unfinished(),
        answer=answer(facts),
        figures=figures,
        tables=_tables(facts, ranks),
        missing=MISSING,
        first=[_card(line) for line in facts.samples()],
        worst=[_card(line) for line in _worst(facts)],
        again=dict(provenance_pairs(facts))["repeat it by"],
    )
    write_text(facts.run.page_file, page)


def render(template: str, *, drawn: Iterable[Figure], cache_dir: Path, **values: Any) -> str:
    """Return a page.

    Args:
        template: file in `templates`.
        drawn: figures of the page.
        cache_dir: keeps the plotting library, which takes seconds to bundle.
        values: what the template shows.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"cell": cell, "public": public}
    library = (made_once(cache_dir / f"vega-{version('vl-convert-python')}", _bundle) / LIBRARY).read_text(
        encoding="utf-8"
    )
    scripts = {"library": library, "plots": (TEMPLATES / "plots.js").read_text(encoding="utf-8")}
    return environment.get_template(template).render(
        policy=_policy(scripts.values()),
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        specs={figure.name: figure.spec() for figure in drawn},
        **{name: Markup(text) for name, text in scripts.items()},  # ours and Vega's: no text of a user is in them
        **values,
    )


def _bundle(directory: Path) -> None:
    """Write Vega, Vega-Lite and Vega-Embed as one script."""
    directory.mkdir()
    (directory / LIBRARY).write_text(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"), encoding="utf-8")


def _policy(scripts: Iterable[str]) -> str:
    """Return a Content-Security-Policy: these scripts run, and nothing is loaded. Vega compiles expressions (eval)."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    return (
        f"default-src 'none'; script-src {allowed} 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _figures(facts: RunFacts) -> dict[str, Any]:
    """Return the figures of the page by place."""
    steps = comparable_steps(facts)
    first = steps[-1] if steps else None
    return {
        "curves": loss_against_step(facts),
        "ranks": [loss_against_rank(facts, step) for step in steps],
        "rates": [loss_against_rate(facts, step) for step in steps],
        "space": [] if first is None else [parallel_coordinates(facts, first), importance(facts, first)],
        "costs": [] if first is None else [*loss_against_cost(facts, first), *merged_against_loss(facts)],
        "merge": merge_figures(facts.merge),
        "kept": update_kept(facts.merge),
        "scores": score_figure(facts.evaluation),
    }


def _all(figures: dict[str, Any]) -> list[Figure]:
    """Return all figures that are drawn."""
    items: list[Figure | Missing] = []
    for value in figures.values():
        items += value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, Figure)]


def _tables(facts: RunFacts, ranks: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the tables of the page."""
    best = facts.chosen.assignment().model_dump() if facts.chosen else {}
    return {
        "merge": merge_rows(facts.merge) if facts.merge else [],
        "merge_cost": cost_rows(facts.merge) if facts.merge else [],
        "scores": evaluation_rows(facts.evaluation) if facts.evaluation else [],
        "intervals": interval_rows(facts.evaluation) if facts.evaluation else [],
        "best": [{"hyperparameter": name, "value": value} for name, value in best.items()],
        "repetitions": facts.state.repetitions(),
        "trials": [trial_row(trial) for trial in facts.trials],
        "ranks": short_rows(ranks),
        "data": data_rows(facts),
        "provenance": [{"what": name, "value": value} for name, value in provenance_pairs(facts)[:-1]],
    }


def _worst(facts: RunFacts) -> list[dict[str, Any]]:
    """Return the lines of the answers that are farthest from their reference, and not equal to it."""
    judged = facts.judged
    wrong = [line for line in facts.answers if not line["answers"][judged]["exact_match"]]
    wrong.sort(key=lambda line: (line["answers"][judged]["rouge_l"], line["answers"][judged]["chrf"]))
    return wrong[: facts.config.evaluation.n_samples]


def _card(line: dict[str, Any]) -> dict[str, Any]:
    """Return a prompt with its reference and all answers in pieces, as the page shows them."""
    reference = line["references"][0]
    answers = {name: difference(given["text"], reference) for name, given in line["answers"].items()}
    return {"prompt": line["prompt"].strip(), "reference": reference.strip(), "answers": answers}
