"""Sets several runs side by side: which losses and scores may be compared, and a table of their figures."""

from typing import Any

from raylora.errors import RunDirectoryError
from raylora.report.answer import LABELS, headline
from raylora.report.evaluation_tables import score_row, unit
from raylora.report.facts import RunFacts, public
from raylora.report.words import change, learning_rate


def check_comparable(runs: list[RunFacts]) -> str | None:
    """Return a sentence if the losses of runs cannot be compared, though their answers can.

    Losses are per token, so they need equal tokens, which the data fingerprint is of. Answers need equal held-out
    references alone, so runs with other tokenizers can be compared by them.

    Raises:
        RunDirectoryError: there are fewer than two runs, or their held-out rows differ.
    """
    if len(runs) < 2:
        raise RunDirectoryError(f"a comparison needs two runs or more, found {len(runs)}")
    first, *others = runs
    for other in others:
        if _fingerprint(other) == _fingerprint(first):
            continue
        if not first.answers or _references(other) != _references(first):
            raise RunDirectoryError(
                f"runs on other held-out rows cannot be compared: {first.run.path.name} has data fingerprint "
                f"{_fingerprint(first)}, {other.run.path.name} has {_fingerprint(other)}"
            )
    if len({_fingerprint(run) for run in runs}) == 1:
        return None
    return (
        "The runs have the same held-out rows, but other tokens: another tokenizer, chat template or length. Their "
        "losses are per token and are not compared; their answers are."
    )


def comparison_rows(runs: list[RunFacts], *, losses: bool) -> list[dict[str, Any]]:
    """Return a table row for each figure, with a column for each run.

    Args:
        runs: at least two.
        losses: True if their losses can be compared.
    """
    best = min((run.chosen.eval_loss for run in runs if run.chosen and run.chosen.eval_loss is not None), default=None)
    name = shared_headline(runs)
    columns = {label(run, runs): _row(run, best, name, losses=losses) for run in runs}
    first = next(iter(columns.values()))
    return [{"figure": figure, **{run: row[figure] for run, row in columns.items()}} for figure in first]


def _row(run: RunFacts, best: float | None, name: str | None, *, losses: bool) -> dict[str, Any]:
    """Return one run's row."""
    chosen, model = run.chosen, run.judged
    row: dict[str, Any] = {
        "base": public(run.config.base_model.name),
        "trials": run.state.n_proposed(),
        "r": chosen.r if chosen else None,
        "learning rate": learning_rate(chosen.learning_rate) if chosen else None,
        "steps": run.max_steps,
    }
    if losses:
        loss = chosen.eval_loss if chosen else None
        row |= {"eval_loss": loss, "against the best": _against(loss, best)}
    row["merge against adapter"] = change(1 + run.merge["loss_increase"], 1) if run.merge and _measured(run) else None
    if losses:
        row["heldout_loss"] = run.evaluation["models"][model]["heldout_loss"] if run.evaluation and model else None
    if name and run.evaluation:
        scores = score_row(run.evaluation, model, name)
        row |= {f"{name}{unit(name)}": scores["value"], "95 % interval": scores.get("interval")}
    row["minutes"] = run.seconds / 60
    return row


def verdict(runs: list[RunFacts], *, losses: bool) -> str:
    """Return the result of a comparison in a few sentences."""
    budgets = sorted({run.max_steps for run in runs})
    unequal = f" Their budgets differ: {', '.join(map(str, budgets))} steps." if len(budgets) > 1 else ""
    return _highest(runs, losses=losses) + unequal


def _highest(runs: list[RunFacts], *, losses: bool) -> str:
    """Return which run is best by its held-out score, or by its loss if not all have one."""
    name = shared_headline(runs)
    if name is not None:
        return _by_score(runs, name)
    lowest = {label(run, runs): run.chosen.final_loss for run in runs if run.chosen}
    if not losses or len(lowest) < len(runs):
        return "Nothing that all runs were measured by can be compared yet."
    best = min(lowest, key=lambda run: lowest[run])
    return f"The validation loss is lowest for {best}: {lowest[best]:.4g} nats per token."


def _by_score(runs: list[RunFacts], name: str) -> str:
    """Return which run has the highest held-out score, and if that may be chance."""
    rows = {label(run, runs): score_row(run.evaluation, run.judged, name) for run in runs if run.evaluation}
    best = max(rows, key=lambda run: rows[run]["value"])
    highest = rows[best]["value"]
    if all(row["value"] == highest for row in rows.values()):
        return f"{LABELS[name]} is {highest:.1f}{unit(name)} in all runs."
    first = f"{LABELS[name]} is highest for {best}: {highest:.1f}{unit(name)}."
    if any("low" not in row for row in rows.values()):
        return f"{first} Some runs have no intervals, so it is open if that is more than chance."
    close = [run for run, row in rows.items() if run != best and row["high"] >= rows[best]["low"]]
    if close:
        return f"{first} Its 95 % interval overlaps with that of {', '.join(close)}: that may be chance."
    return f"{first} Its 95 % interval overlaps with no other."


def label(run: RunFacts, runs: list[RunFacts]) -> str:
    """Return the name of a run among others: of its folder, or its whole path where folders have the same name."""
    name = run.run.path.name
    return name if sum(other.run.path.name == name for other in runs) == 1 else str(run.run.path)


def shared_headline(runs: list[RunFacts]) -> str | None:
    """Return the score to compare runs by; None if one of them has none."""
    if not all(run.evaluation and run.judged for run in runs):
        return None
    merged = {run.run.path: run.evaluation["models"][run.judged] for run in runs if run.evaluation}
    name = headline({str(path): scores for path, scores in merged.items()})
    return name if name and all(name in scores for scores in merged.values()) else None


def _measured(run: RunFacts) -> bool:
    """Return True if the merge was measured."""
    return run.merge is not None and run.merge["loss_increase"] is not None


def _against(loss: float | None, best: float | None) -> str | None:
    """Return how far a loss is from the best one, in words."""
    if loss is None or best is None:
        return None
    return "best" if loss == best else change(loss, best)


def _fingerprint(run: RunFacts) -> str:
    """Return the data fingerprint of a run."""
    return str(run.provenance["data_fingerprint"])


def _references(run: RunFacts) -> list[list[str]]:
    """Return the references of the held-out prompts."""
    return [line["references"] for line in run.answers]
