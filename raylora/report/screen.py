"""Prints the summary of a run on the terminal, at the end of a search or by `raylora report`."""

from rich.console import Console

from raylora.report.evaluation_tables import show_evaluation
from raylora.report.merge_tables import show_merge
from raylora.report.rank_vs_loss import rank_vs_loss
from raylora.report.tables import print_table
from raylora.run.atomic import read_json
from raylora.run.directory import RunDirectory
from raylora.run.state import SearchState

_ON_SCREEN = {
    "r": "r",
    "n": "trials",
    "n_finished": "finished",
    "n_stopped": "stopped",
    "n_failed": "failed",
    "eval_loss_best": "best",
    "eval_loss_median": "median",
    "eval_loss_spread": "spread",
    "first_rung_eval_loss_median": "median, 1st rung",
    "trainable_parameters": "parameters",
    "peak_memory_mib": "MiB",
    "tokens_per_second": "tokens/s",
}
"""Columns of the rank table that fit on a terminal -> their short names."""


def print_summary(run: RunDirectory, screen: Console) -> None:
    """Print the tables of ranks, repetitions, merge and held-out check, and the path of the report.

    Args:
        run: run directory of a search.
        screen: terminal to print to.
    """
    state = SearchState.load(run)
    ranks = rank_vs_loss(list(state.trials.values()), state.history)
    screen.print(
        f"\nrank against validation loss: finished trials at {ranks[0]['max_steps']} steps, all at the first rung"
    )
    print_table([{short: row[name] for name, short in _ON_SCREEN.items()} for row in ranks], screen)
    if repetitions := state.repetitions():
        screen.print("the best assignments with other seeds: mean and spread of the final validation loss")
        print_table(repetitions, screen)
    if run.merge_file.is_file():
        show_merge(read_json(run.merge_file), screen)
    if run.evaluation_file.is_file():
        show_evaluation(read_json(run.evaluation_file), screen)
    screen.print(f"\nreport: {run.report_file}")
