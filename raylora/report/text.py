"""Writes the facts of a run as Markdown: `report.md`."""

import textwrap
from typing import Any

from raylora.report.answer import answer
from raylora.report.evaluation_tables import evaluation_rows, interval_rows
from raylora.report.facts import RunFacts
from raylora.report.merge_tables import cost_rows, least_kept, merge_rows, verdict
from raylora.report.rank_vs_loss import short_rows
from raylora.report.tables import WIDTH, markdown_table, text_block
from raylora.run.trial_row import TrialRow


def markdown_report(facts: RunFacts, ranks: list[dict[str, Any]]) -> str:
    """Return the content of `report.md`.

    Args:
        facts: the run.
        ranks: rows of `rank_vs_loss`.
    """
    config, provenance, rungs = facts.config, facts.provenance, facts.provenance["rungs"]
    sections = [
        f"# {facts.run.path.name}: {config.base_model.name} on {config.data.train}",
        f"{facts.size()}: {facts.counts()}. Budget {rungs[-1]} steps, validated at steps "
        f"{', '.join(map(str, rungs))}.\nLosses are nats per token. With plots: `report.html`.",
        *([note] if (note := facts.unfinished()) else []),
        *(textwrap.fill(f"**{name}.** {text}", WIDTH) for name, text in answer(facts).items()),
        f"## Best trial\n\n{_best(facts.chosen)}",
        f"## Held-out check\n\n{_evaluation(facts)}",
        f"## Merge\n\n{_merge(facts)}",
        *_repetitions(facts),
        f"## Rank against loss\n\nFinal losses are of finished trials only, all at {rungs[-1]} steps.\n\n"
        + markdown_table(short_rows(ranks)),
        "## Trials\n\nA stopped trial's loss is that of its last step. Do not compare it with a finished trial's.\n\n"
        + markdown_table([trial_row(trial) for trial in facts.trials]),
        f"## Data\n\nfingerprint {provenance['data_fingerprint']}\n\n{markdown_table(data_rows(facts))}",
        f"## Provenance\n\n{text_block(provenance_pairs(facts))}",
    ]
    return "\n\n".join(section.rstrip("\n") for section in sections) + "\n"


def trial_row(trial: TrialRow) -> dict[str, Any]:
    """Return a trial's row of the table of trials."""
    shown = ("number", "state", "step", "eval_loss", "train_loss", "r", "lora_alpha", "lora_dropout", "learning_rate")
    reason = trial.reason if trial.reason is None or len(trial.reason) <= LONGEST else f"{trial.reason[:LONGEST]}..."
    return {
        **{name: getattr(trial, name) for name in shown},
        "tokens/s": trial.tokens_per_second,
        "peak MiB": trial.peak_memory_mib,
        "reason": reason,
    }


LONGEST = 60
"""Characters of a reason in the table of trials; the event log holds all of it."""


def data_rows(facts: RunFacts) -> list[dict[str, Any]]:
    """Return a table row for each count of the data that is not 0 everywhere."""
    parts = facts.provenance["data"]
    counts = next(iter(parts.values()))
    rows = [{"count": name, **{part: values[name] for part, values in parts.items()}} for name in counts]
    return [row for row in rows if any(value for name, value in row.items() if name != "count")]


def provenance_pairs(facts: RunFacts) -> list[tuple[str, str]]:
    """Return what the run was made with, and the command that repeats it."""
    provenance = facts.provenance
    names = ("started", "command", "raylora", "git_commit", "base_model", "base_model_commit")
    values = [(name, provenance[name]) for name in (*names, "python", "platform", "n_lanes", "seed")]
    packages = ", ".join(f"{name} {version}" for name, version in provenance["packages"].items())
    again = f"python -m raylora.search {facts.run.config_file} --output {facts.run.location}-again"
    pairs = [*values, ("packages", packages), ("repeat it by", again)]
    return [(name, str(value)) for name, value in pairs if value is not None]


def _best(best: TrialRow | None) -> str:
    """Return the section of the best trial."""
    if best is None:
        return "No trial reached the full budget."
    settings = [{"parameter": name, "value": value} for name, value in best.assignment().model_dump().items()]
    return (
        f"Trial {best.number}, validation loss {best.eval_loss:.4f} at step {best.step}.\n\n{markdown_table(settings)}"
    )


def _repetitions(facts: RunFacts) -> list[str]:
    """Return the section of repeated assignments, if there are any."""
    rows = facts.state.repetitions()
    text = "Final validation loss of the best assignments over several seeds; the choice is by the mean."
    return [f"## Repetitions\n\n{text}\n\n{markdown_table(rows)}"] if rows else []


def _merge(facts: RunFacts) -> str:
    """Return the section of the merge."""
    result = facts.merge
    if result is None:
        return f"Not merged yet: `python -m raylora.merge {facts.run.location}`"
    return (
        f"{verdict(result).capitalize()}.\n\n{markdown_table(merge_rows(result))}\n{markdown_table(cost_rows(result))}\n"
        f"The layers that keep the least of the update:\n\n{markdown_table(least_kept(result))}"
    )


def _evaluation(facts: RunFacts) -> str:
    """Return the section of the held-out check."""
    result = facts.evaluation
    if result is None:
        return f"Not evaluated yet: `python -m raylora.evaluate {facts.run.location}`"
    agreements = [{"model": name, **shares} for name, shares in result["agreement_with_adapter"].items()]
    intervals = interval_rows(result)
    parts = [
        f"{result['n_rows']} rows, {result['n_prompts']} prompts, greedy generation.",
        markdown_table(evaluation_rows(result)),
        f"95 % intervals, by bootstrap over rows:\n\n{markdown_table(intervals)}" if intervals else MISSING,
        f"Agreement with the adapter's answers:\n\n{markdown_table(agreements)}",
        "Samples:",
        *(text_block(_sample(line)) for line in facts.samples()),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts)


MISSING = (
    "There are no intervals and no list of all answers: an earlier version of raylora made this check. "
    "`python -m raylora.evaluate` makes it anew."
)


def _sample(line: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a prompt, its first reference and all answers as named texts."""
    answers = [(name, given["text"]) for name, given in line["answers"].items()]
    return [("prompt", line["prompt"]), ("reference", line["references"][0]), *answers]
