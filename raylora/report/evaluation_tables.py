"""Shows `evaluation.json` as tables and one sentence per merged model."""

from typing import Any

from rich.console import Console

from raylora.report.tables import print_table

SIGNIFICANCE = 0.05
"""p-value below which a BLEU difference is called significant: the usual 5 %."""

PER_CENT = {"bleu": 1.0, "chrf": 1.0}
"""Factor from a score to per cent; 100 for the shares."""


def evaluation_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a table row for each model: its name and scores.

    Args:
        result: content of `evaluation.json`.
    """
    return [{"model": name, **scores} for name, scores in result["models"].items()]


def interval_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a table row for each model: the 95 % interval of each score. Empty for a check by an earlier version.

    Args:
        result: content of `evaluation.json`.
    """
    return [
        {"model": name, **{score: interval(ends[score]) for score in result["models"][name] if score in ends}}
        for name, ends in result.get("intervals", {}).items()
    ]


def interval(ends: list[float]) -> str:
    """Return an interval in words."""
    return f"{ends[0]:.3g} to {ends[1]:.3g}"


def unit(name: str) -> str:
    """Return the unit of a score as `score_row` gives it: per cent, but for scores that go to 100 by themselves."""
    return "" if name in PER_CENT else " %"


def score_row(evaluation: dict[str, Any], model: str, name: str) -> dict[str, Any]:
    """Return a score in per cent, and the ends of its interval and its words, if there is one.

    Args:
        evaluation: content of `evaluation.json`.
        model: key of `models`.
        name: score.

    Returns:
        value; and low, high, interval.
    """
    factor = PER_CENT.get(name, 100.0)
    row: dict[str, Any] = {"value": factor * evaluation["models"][model][name]}
    if ends := evaluation.get("intervals", {}).get(model, {}).get(name):
        low, high = (factor * end for end in ends)
        row |= {"low": low, "high": high, "interval": f"{low:.1f} to {high:.1f}"}
    return row


def agreement_sentence(result: dict[str, Any], name: str) -> str:
    """Return how far a merged model agrees with the adapter, in a sentence without a full stop."""
    shares = result["agreement_with_adapter"][name]
    agrees = f"{name} agrees with adapter in {100 * shares['tokens']:.1f} % of tokens; "
    if shares["answers"] == 1:
        return agrees + "every answer is the same"
    p = shares["bleu_p_value"]
    difference = result["models"][name]["bleu"] - result["models"]["adapter"]["bleu"]
    if round(difference, 2) == 0:
        return agrees + "its BLEU is the same"
    chance = "which may be chance" if p >= SIGNIFICANCE else "more than by chance"
    word = "better" if difference > 0 else "worse"
    return agrees + f"its BLEU is {abs(difference):.2f} {word}, {chance} (p = {p:.2f})"


def show_evaluation(result: dict[str, Any], screen: Console) -> None:
    """Print the tables, and how well each merged model agrees with the adapter.

    Args:
        result: content of `evaluation.json`.
        screen: terminal to print to.
    """
    screen.print(f"\nheld-out check, {result['n_rows']} rows, {result['n_prompts']} prompts answered greedily")
    print_table(evaluation_rows(result), screen)
    if rows := interval_rows(result):
        screen.print("95 % intervals, by bootstrap over rows")
        print_table(rows, screen)
    if not result["n_prompts"]:
        screen.print("no row has a prompt that generation could start from, so there is a loss only")
    for name in result["agreement_with_adapter"]:
        screen.print(agreement_sentence(result, name))
