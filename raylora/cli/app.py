"""Collects the commands of all stages as subcommands of the `raylora` console script.

Command modules import torch and Ray inside their functions, so that `raylora --help` answers at once.
"""

import typer

from raylora.cli.command import OVERRIDES
from raylora.compare import compare
from raylora.doctor import doctor
from raylora.evaluate.__main__ import evaluate
from raylora.export.__main__ import export
from raylora.init import init
from raylora.merge.__main__ import merge
from raylora.report.__main__ import report
from raylora.search.__main__ import search
from raylora.status import status
from raylora.trial import trial

app = typer.Typer(
    pretty_exceptions_enable=False, no_args_is_help=True, help="Find, merge and check the best QLoRA fine-tune."
)
for function in (search, trial, merge):
    app.command(context_settings=OVERRIDES)(function)
for function in (init, status, evaluate, report, compare, export, doctor):
    app.command()(function)
