"""Shows how far a search is that runs elsewhere, from the files of its run directory.

Run as `python -m raylora.status RUN_DIRECTORY`.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from raylora.cli.command import command, console, run_command
from raylora.report.progress import SEARCHING, Progress
from raylora.run.activity import read_activity
from raylora.run.directory import existing_run
from raylora.run.holding import user_of_run
from raylora.run.state import UNDER_WAY, SearchState
from raylora.search.forecast import Sizes
from raylora.search.messages import Pulse


@command
def status(run_directory: Annotated[Path, typer.Argument(help="Folder or URL of a search.")]) -> None:
    """Show trials, best loss and time left of a search, while it runs or after."""
    run, screen = existing_run(run_directory), console()
    state, activity = SearchState.load(run), read_activity(run.activity_file)
    user = user_of_run(run)
    config, provenance = run.config(), run.provenance()
    sizes = Sizes.of(config.training, provenance["data"])
    progress = Progress(state, config, provenance["rungs"], screen, sizes=sizes)
    if user is not None and activity is not None and activity.what == SEARCHING:
        progress.beat({name: _pulse(values) for name, values in activity.facts["pulses"].items()})
    screen.print(progress.view())
    if user is None:
        under_way = "; trials under way go on by --resume" if state.numbers(*UNDER_WAY) else ""
        report = f"; report: {run.page_file}" if run.page_file.is_file() else ""
        screen.print(f"nothing runs here now{under_way}{report}")
    else:
        doing = f"{activity.what}: {activity.done:,} of {activity.total:,}" if activity else "between two stages"
        screen.print(f"{user}; {doing}")


def _pulse(values: dict[str, Any]) -> Pulse:
    """Return a pulse as it was before JSON, which makes text of its trials' numbers."""
    return Pulse(**{**values, "steps": {int(number): step for number, step in values["steps"].items()}})


if __name__ == "__main__":
    run_command(status)
