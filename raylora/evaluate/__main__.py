"""Compares base, adapter and merged model on the held-out rows, which neither training nor the search reads.

Run as `python -m raylora.evaluate RUN_DIRECTORY`.
"""

from pathlib import Path
from typing import Annotated

import typer

from raylora.cli.command import command, console, run_command
from raylora.report.evaluation_tables import show_evaluation
from raylora.run.directory import existing_run
from raylora.run.holding import held


@command
def evaluate(run_directory: Annotated[Path, typer.Argument(help="Folder or URL of a search, merged.")]) -> None:
    """Generate on the held-out prompts with base, adapter and merged model, and score the answers."""
    run = existing_run(run_directory, folders=True)
    with held(run, console().print):
        from raylora.evaluate.heldout import evaluate_run  # noqa: PLC0415  # loads torch

        result = evaluate_run(run)
    show_evaluation(result, console())


if __name__ == "__main__":
    run_command(evaluate)
