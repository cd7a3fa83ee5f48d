"""Writes a run's tables and `report.md`, and prints the tables.

Run as `python -m raylora.report RUN_DIRECTORY`.
"""

from pathlib import Path
from typing import Annotated

import typer

from raylora.cli.command import command, console, run_command
from raylora.report.page import write_report
from raylora.report.screen import print_summary
from raylora.run.directory import existing_run


@command
def report(run_directory: Annotated[Path, typer.Argument(help="Folder of a search.")]) -> None:
    """Write rank_vs_loss and report.md from the files of the run directory, and print the tables."""
    run = existing_run(run_directory)
    write_report(run)
    print_summary(run, console())


if __name__ == "__main__":
    run_command(report)
