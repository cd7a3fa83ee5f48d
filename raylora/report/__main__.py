"""Writes a run's tables and `report.md`, prints the tables, and sends it all to trackers if asked to.

Run as `python -m raylora.report RUN_DIRECTORY [--report_to TRACKER,TRACKER]`.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from raylora.cli.command import command, console, run_command
from raylora.config.load import change_config
from raylora.report.page import write_report
from raylora.report.screen import print_summary
from raylora.run.directory import existing_run
from raylora.run.holding import held, user_of_run
from raylora.trackers.processes import send_run
from raylora.trackers.tracker import check_installed


@command
def report(
    run_directory: Annotated[Path, typer.Argument(help="Folder or URL of a search.")],
    report_to: Annotated[
        str, typer.Option("--report_to", help="Trackers to send it to: tensorboard, mlflow, wandb, trackio.")
    ] = "none",
) -> None:
    """Write rank_vs_loss and report.md from the files of the run directory, and print the tables."""
    run = existing_run(run_directory)
    trackers = change_config(run.config(), {"report_to": report_to}).report_to
    check_installed(trackers)
    # a running search sends and uploads by itself; its report is written here all the same
    uploads = run.remote is not None and user_of_run(run) is None
    with held(run, console().print) if trackers or uploads else nullcontext():
        write_report(run)
        print_summary(run, console())
        send_run(run, trackers, console().print)


if __name__ == "__main__":
    run_command(report)
