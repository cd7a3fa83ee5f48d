"""Turns a run directory into tables of rank against loss and one readable report.

Run as `python -m raylora.report RUN_DIRECTORY`.
"""

from typing import Any

from raylora.report.evaluation_tables import evaluation_rows
from raylora.report.merge_tables import least_kept, merge_rows, verdict
from raylora.report.rank_vs_loss import rank_vs_loss, write_rank_vs_loss
from raylora.report.tables import markdown_table
from raylora.run.atomic import read_json, write_text
from raylora.run.directory import RunDirectory
from raylora.run.tables import ENDED, Records, TrialRow


def write_report(run: RunDirectory) -> None:
    """Writes `rank_vs_loss.*` and `report.md`; parts whose step has not run yet say so."""
    config, provenance, records = run.config(), run.provenance(), Records.load(run)
    trials = sorted(records.trials.values(), key=_by_loss)
    ranks = rank_vs_loss(trials, records.history)
    write_rank_vs_loss(run, ranks)
    best = _chosen(run, records)
    data = [{"part": part, **values} for part, values in provenance["data"].items()]
    sections = [
        f"# {run.path.name}: {config.base_model.name} on {config.data.train}",
        f"{len(trials)} trials: {_counts(records)}. Budget {provenance['rungs'][-1]} steps, validated at steps "
        f"{', '.join(map(str, provenance['rungs']))}. Losses are nats per token.",
        f"## Best trial\n\n{_best(best)}",
        f"## Held-out check\n\n{_evaluation(run)}",
        f"## Merge\n\n{_merge(run)}",
        *_repetitions(records),
        f"## Rank against loss\n\nFinal losses are of finished trials only, all at {provenance['rungs'][-1]} steps.\n\n"
        + markdown_table(ranks),
        "## Trials\n\nA stopped trial's loss is that of its last step, and comparable to no finished one.\n\n"
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
    return trial.state != "finished", trial.state == "failed", trial.eval_loss if trial.eval_loss is not None else 0.0


def _counts(records: Records) -> str:
    return ", ".join(f"{records.count(state)} {state}" for state in (*ENDED, "paused", "running"))


def _chosen(run: RunDirectory, records: Records) -> TrialRow | None:
    """The trial that was merged, or would be."""
    merged = read_json(run.merge_file)["trial"] if run.merge_file.is_file() else None
    return records.best() if merged is None else records.trials[merged]


def _best(best: TrialRow | None) -> str:
    if best is None:
        return "No trial reached the full budget."
    settings = [{"parameter": name, "value": value} for name, value in best.assignment().model_dump().items()]
    return (
        f"Trial {best.number}, validation loss {best.eval_loss:.4f} at step {best.step}.\n\n{markdown_table(settings)}"
    )


def _repetitions(records: Records) -> list[str]:
    rows = records.repetitions()
    what = "Final validation loss of the best assignments over several seeds; the choice is by the mean."
    return [f"## Repetitions\n\n{what}\n\n{markdown_table(rows)}"] if rows else []


def _trial(trial: TrialRow) -> dict[str, Any]:
    shown = ("number", "state", "step", "eval_loss", "train_loss", "r", "lora_alpha", "lora_dropout", "learning_rate")
    return {name: getattr(trial, name) for name in (*shown, "tokens_per_second", "peak_memory_mib", "reason")}


def _merge(run: RunDirectory) -> str:
    if not run.merge_file.is_file():
        return f"Not merged yet: `python -m raylora.merge {run.path}`"
    result = read_json(run.merge_file)
    return (
        f"{verdict(result).capitalize()}.\n\n{markdown_table(merge_rows(result))}\n"
        f"The layers that hold least of the update:\n\n{markdown_table(least_kept(result))}"
    )


def _evaluation(run: RunDirectory) -> str:
    if not run.evaluation_file.is_file():
        return f"Not evaluated yet: `python -m raylora.evaluate {run.path}`"
    result = read_json(run.evaluation_file)
    agreements = [{"model": name, **shares} for name, shares in result["agreement_with_adapter"].items()]
    return (
        f"{result['n_rows']} rows, {result['n_prompts']} prompts, greedy.\n\n"
        f"{markdown_table(evaluation_rows(result))}\n"
        f"Agreement with the adapter's answers:\n\n{markdown_table(agreements)}\n"
        f"Samples:\n\n{markdown_table(result['samples'])}"
    )
