"""Finds the best QLoRA fine-tune: search, merge, held-out check and report in one command.

Run as `python -m raylora.search [SPACE.yaml] [--output DIR] [--section.key value ...]`.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from raylora.cli.command import command, console, run_command, split_arguments
from raylora.cli.spaces import find_space
from raylora.config.load import load_config
from raylora.run.directory import open_run
from raylora.run.holding import held
from raylora.trackers.tracker import check_installed


@command
def search(
    context: typer.Context,
    space: Annotated[Path | None, typer.Argument(help="Search space file. [default: qlora.yaml]")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Run directory: folder, or URL such as s3://BUCKET/NAME. [default: results/NAME-OF-SPACE]"),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the search in the run directory.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Show settings, trials, memory and lanes, and stop.")] = False,
    address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="Ray cluster to use, e.g. auto; none starts a local one.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show all settings before the start.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but the result.")] = False,
    merge_tolerance: Annotated[float | None, typer.Option(help="As --merge.tolerance.")] = None,
) -> None:
    """Search, then merge and check the best trial. Any setting of the file: --section.key value."""
    space, overrides = split_arguments(space, context.args)
    if merge_tolerance is not None:
        overrides["merge.tolerance"] = str(merge_tolerance)
    space = find_space(space)
    config = load_config(space, overrides)
    check_installed(config.report_to)
    run, screen = open_run(output or Path("results") / space.stem, config, resume=resume), console()
    with nullcontext(lambda: None) if dry_run else held(run, screen.print) as push:
        from raylora.cli.pipeline import run_pipeline  # noqa: PLC0415  # loads torch and Ray: not for a wrong setting

        run_pipeline(run, config, screen, address=address, dry_run=dry_run, verbose=verbose, quiet=quiet, push=push)


if __name__ == "__main__":
    run_command(search, overrides=True)
