"""Compares several searches on the same held-out rows: one table, and one page.

Run as `python -m raylora.compare RUN RUN... [--output comparison.html]`.
"""

from pathlib import Path
from typing import Annotated

import typer

from raylora.cli.command import command, console, local_path, run_command
from raylora.errors import ConfigError
from raylora.report.comparison import check_comparable, comparison_rows, verdict
from raylora.report.facts import load_facts
from raylora.report.tables import WIDTH, print_table
from raylora.run.directory import existing_run


@command
def compare(
    run_directories: Annotated[list[Path], typer.Argument(help="Folders or URLs of searches, two or more.")],
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("comparison.html"),
) -> None:
    """Set searches on the same held-out rows side by side: a table, and a page with plots."""
    output = local_path(output)
    if output.suffix != ".html" or output.is_dir():
        raise ConfigError(f"--output must be an HTML file, which is overwritten, found {output}")
    runs = [load_facts(existing_run(path)) for path in run_directories]
    note = check_comparable(runs)
    from raylora.report.html.comparison_page import write_comparison  # noqa: PLC0415  # loads Altair

    write_comparison(runs, note, output)
    screen = console()
    print_table(comparison_rows(runs, losses=note is None), screen)
    for text in (note, verdict(runs, losses=note is None), *(run.unfinished() for run in runs)):
        if text:
            screen.print(text, width=WIDTH)
    screen.print(f"\npage: {output}")


if __name__ == "__main__":
    run_command(compare)
