"""The `raylora` console script: each `python -m raylora.X` as a subcommand."""

import typer

from raylora.commands import OVERRIDES
from raylora.doctor import doctor
from raylora.evaluate import evaluate
from raylora.export import export
from raylora.merge import merge
from raylora.report import report
from raylora.search import search
from raylora.trial import trial

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)
for function in (search, trial, merge):
    app.command(context_settings=OVERRIDES)(function)
for function in (evaluate, report, export, doctor):
    app.command()(function)
