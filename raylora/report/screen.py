"""Prints the summary of a run on the terminal, at the end of a search or by `raylora report`."""

from rich.console import Console

from raylora.report.answer import answer
from raylora.report.evaluation_tables import show_evaluation
from raylora.report.facts import load_facts
from raylora.report.merge_tables import show_merge
from raylora.report.rank_vs_loss import rank_vs_loss, short_rows
from raylora.report.tables import WIDTH, print_table
from raylora.run.directory import RunDirectory


def print_summary(run: RunDirectory, screen: Console) -> None:
    """Print the tables of ranks, repetitions, merge and held-out check, the result in words, and the report's path.

    Args:
        run: run directory of a search.
        screen: terminal to print to.
    """
    facts = load_facts(run)
    state = facts.state
    ranks = rank_vs_loss(list(state.trials.values()), state.history)
    screen.print(
        f"\nrank against validation loss: finished trials at {ranks[0]['max_steps']} steps, all at the first rung"
    )
    print_table(short_rows(ranks), screen)
    if repetitions := state.repetitions():
        screen.print("the best assignments with other seeds: mean and spread of the final validation loss")
        print_table(repetitions, screen)
    if facts.merge:
        show_merge(facts.merge, screen)
    if facts.evaluation:
        show_evaluation(facts.evaluation, screen)
    screen.print()
    for name, text in answer(facts).items():
        screen.print(f"{name}: {text}", width=WIDTH)
    if note := facts.unfinished():
        screen.print(note, width=WIDTH)
    screen.print(f"\nreport: {run.page_file}, and as text: {run.report_file}")
