"""Turns a run directory into the tables of rank against loss, `report.md` and `report.html`.

Run as `python -m raylora.report RUN_DIRECTORY`.
"""

from raylora.report.facts import load_facts
from raylora.report.rank_vs_loss import rank_vs_loss, write_rank_vs_loss
from raylora.report.text import markdown_report
from raylora.run.atomic import write_text
from raylora.run.directory import RunDirectory


def write_report(run: RunDirectory) -> None:
    """Write `rank_vs_loss.*`, `report.md` and `report.html`. Sections of steps that have not run yet say so.

    Args:
        run: run directory of a search.

    Raises:
        RunDirectoryError: it holds no trials.
    """
    from raylora.report.html.render import write_page  # noqa: PLC0415  # loads Altair and Optuna: not for --help

    facts = load_facts(run)
    ranks = rank_vs_loss(facts.trials, facts.state.history)
    write_rank_vs_loss(run, ranks)
    write_text(run.report_file, markdown_report(facts, ranks))
    write_page(facts, ranks)
