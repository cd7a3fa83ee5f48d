"""Says the result of a run in three sentences or so: what won, what the merge kept, what the held-out check found."""

from typing import Any

from raylora.report.baselines import comparisons
from raylora.report.evaluation_tables import agreement_sentence, score_row, unit
from raylora.report.facts import RunFacts
from raylora.report.merge_tables import merge_sentence
from raylora.report.words import learning_rate

CLAIM = 0.05
"""Share of right answers from which a match is worth talking about; below it the overlap with the reference is."""


def answer(facts: RunFacts) -> dict[str, str]:
    """Return what the report opens with: a heading and its sentences, in the order of the steps."""
    return {
        "The search": " ".join([_winner(facts), *comparisons(facts)]),
        "The merge": merge_sentence(facts.merge) if facts.merge else "The best adapter is not merged yet.",
        "The held-out check": _check(facts.evaluation),
    }


def _winner(facts: RunFacts) -> str:
    """Return a sentence on the best trial."""
    best, counts = facts.chosen, facts.counts()
    if best is None:
        return f"No trial has reached the full budget of {facts.max_steps} steps yet ({counts})."
    merged = facts.merge and facts.merge.get("merged_candidates")
    why = ", chosen for its loss after the merge" if merged else ""
    won = "leads" if facts.unfinished() else "won"
    return (
        f"Of {facts.size()}, trial {best.number} {won}{why}: validation loss {best.eval_loss:.4g} "
        f"nats per token at step {best.step}, with r {best.r}, lora_alpha {best.lora_alpha:g} and learning rate "
        f"{learning_rate(best.learning_rate)}."
    )


def _check(evaluation: dict[str, Any] | None) -> str:
    """Return the sentences on the held-out check."""
    if evaluation is None:
        return "The held-out check has not run yet."
    models = evaluation["models"]
    merged = [name for name in models if name.startswith("merged")]
    name = headline(models)
    if name is None:
        loss = ", ".join(f"{model} {scores['heldout_loss']:.4g}" for model, scores in models.items())
        return f"No held-out row has a prompt to generate from; the held-out losses are {loss} nats per token."
    shown = [said(evaluation, model, name) for model in ("base", "adapter", *merged)]
    first = f"{LABELS[name]}, over {evaluation['n_prompts']} held-out prompts: {'; '.join(shown)}."
    return " ".join([first, *(f"{agreement_sentence(evaluation, model)}." for model in merged)])


LABELS = {
    "answer_match": "Share of right final numbers",
    "tool_call_match": "Share of right tool calls",
    "exact_match": "Share of answers that equal a reference",
    "bleu": "BLEU",
}
"""Score -> its name in a sentence, the most telling one first."""


def headline(models: dict[str, dict[str, float]]) -> str | None:
    """Return the score to talk about: the first match that any model reaches, else BLEU; None without answers."""
    if not any("bleu" in scores for scores in models.values()):
        return None
    matches = [name for name in LABELS if name != "bleu"]
    return next((name for name in matches if max(s.get(name, 0.0) for s in models.values()) >= CLAIM), "bleu")


def said(evaluation: dict[str, Any], model: str, name: str) -> str:
    """Return a model's score with its interval, such as `base 0.0 % (95 % interval 0.0 to 6.2)`."""
    row = score_row(evaluation, model, name)
    shown = f"{model} {row['value']:.1f}{unit(name)}"
    return f"{shown} (95 % interval {row['interval']})" if "interval" in row else f"{shown} (no interval: {EARLIER})"


EARLIER = "an earlier version made this check"
