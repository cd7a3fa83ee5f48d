"""Turns a run directory into the tables of rank against loss and into `report.md`.

Run as `python -m raylora.report RUN_DIRECTORY`.
"""

from typing import Any

from raylora.report.evaluation_tables import evaluation_rows
from raylora.report.merge_tables import least_kept, merge_rows, verdict
from raylora.report.rank_vs_loss import rank_vs_loss, write_rank_vs_loss
from raylora.report.tables import markdown_table
from raylora.run.atomic import read_json, write_text
from raylora.run.directory import RunDirectory
from raylora.run.state import ENDED, UNDER_WAY, SearchState, TrialRow


def write_report(run: RunDirectory) -> None:
    """Write `rank_vs_loss.*` and `report.md`. Sections of steps that have not run yet say so.

    Args:
        run: run directory of a search.
    """
    config, provenance, state = run.config(), run.provenance(), SearchState.load(run)
    trials = sorted(state.trials.values(), key=_by_loss)
    ranks = rank_vs_loss(trials, state.history)
    write_rank_vs_loss(run, ranks)
    best = _chosen(run, state)
    data = [{"part": part, **values} for part, values in provenance["data"].items()]
    sections = [
        f"# {run.path.name}: {config.base_model.name} on {config.data.train}",
        f"{len(trials)} trials: {_counts(state)}. Budget {provenance['rungs'][-1]} steps, validated at steps "
        f"{', '.join(map(str, provenance['rungs']))}. Losses are nats per token.",
        f"## Best trial\n\n{_best(best)}",
        f"## Held-out check\n\n{_evaluation(run)}",
        f"## Merge\n\n{_merge(run)}",
        *_repetitions(state),
        f"## Rank against loss\n\nFinal losses are of finished trials only, all at {provenance['rungs'][-1]} steps.\n\n"
        + markdown_table(ranks),
        "## Trials\n\nA stopped trial's loss is that of its last step. Do not compare it with a finished trial's.\n\n"
        + markdown_table([_trial(trial) for trial in trials]),
        f"## Data\n\nfingerprint {provenance['data_fingerprint']}\n\n{markdown_table(data)}",
        "## Provenance\n\n"
        + markdown_table([{"what": key, "value": provenance[key]} for key in _PROVENANCE])
        + "\n"
        + ", ".join(f"{name} {version}" for name, version in provenance["packages"].items()),
    ]
    write_text(run.report_file, "\n\n".join(sections) + "\n")


_PROVENANCE = (
    "started",
    "command",
    "git_commit",
    "base_model",
    "base_model_commit",
    "python",
    "platform",
    "n_lanes",
    "seed",
)


def _by_loss(trial: TrialRow) -> tuple[bool, bool, float]:
    """Return a sort key: finished trials first, failed ones last, the lowest loss first among each."""
    return trial.state != "finished", trial.state == "failed", trial.eval_loss if trial.eval_loss is not None else 0.0


def _counts(state: SearchState) -> str:
    """Return the number of trials in each state."""
    return ", ".join(f"{state.count(name)} {name}" for name in (*ENDED, *UNDER_WAY) if state.count(name))


def _chosen(run: RunDirectory, state: SearchState) -> TrialRow | None:
    """Return the trial that was merged, or the best one before the merge."""
    merged = read_json(run.merge_file)["trial"] if run.merge_file.is_file() else None
    return state.best() if merged is None else state.trials[merged]


def _best(best: TrialRow | None) -> str:
    """Return the section of the best trial."""
    if best is None:
        return "No trial reached the full budget."
    settings = [{"parameter": name, "value": value} for name, value in best.assignment().model_dump().items()]
    return (
        f"Trial {best.number}, validation loss {best.eval_loss:.4f} at step {best.step}.\n\n{markdown_table(settings)}"
    )


def _repetitions(state: SearchState) -> list[str]:
    """Return the section of repeated assignments, if there are any."""
    rows = state.repetitions()
    text = "Final validation loss of the best assignments over several seeds; the choice is by the mean."
    return [f"## Repetitions\n\n{text}\n\n{markdown_table(rows)}"] if rows else []


def _trial(trial: TrialRow) -> dict[str, Any]:
    """Return a trial's row of the table of trials."""
    shown = ("number", "state", "step", "eval_loss", "train_loss", "r", "lora_alpha", "lora_dropout", "learning_rate")
    return {name: getattr(trial, name) for name in (*shown, "tokens_per_second", "peak_memory_mib", "reason")}


def _merge(run: RunDirectory) -> str:
    """Return the section of the merge."""
    if not run.merge_file.is_file():
        return f"Not merged yet: `python -m raylora.merge {run.path}`"
    result = read_json(run.merge_file)
    return (
        f"{verdict(result).capitalize()}.\n\n{markdown_table(merge_rows(result))}\n"
        f"The layers that keep the least of the update:\n\n{markdown_table(least_kept(result))}"
    )


def _evaluation(run: RunDirectory) -> str:
    """Return the section of the held-out check."""
    if not run.evaluation_file.is_file():
        return f"Not evaluated yet: `python -m raylora.evaluate {run.path}`"
    result = read_json(run.evaluation_file)
    agreements = [{"model": name, **shares} for name, shares in result["agreement_with_adapter"].items()]
    return (
        f"{result['n_rows']} rows, {result['n_prompts']} prompts, greedy generation.\n\n"
        f"{markdown_table(evaluation_rows(result))}\n"
        f"Agreement with the adapter's answers:\n\n{markdown_table(agreements)}\n"
        f"Samples:\n\n{markdown_table(result['samples'])}"
    )
