"""Shows `evaluation.json` as a table and one sentence per merged model."""

from typing import Any

from rich.console import Console

from raylora.report.tables import print_table

SIGNIFICANCE = 0.05
"""p-value below which a BLEU difference is called significant: the usual 5 %."""


def evaluation_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a table row for each model: its name and scores.

    Args:
        result: content of `evaluation.json`.
    """
    return [{"model": name, **scores} for name, scores in result["models"].items()]


def show_evaluation(result: dict[str, Any], screen: Console) -> None:
    """Print the table, and how well each merged model agrees with the adapter.

    Args:
        result: content of `evaluation.json`.
        screen: terminal to print to.
    """
    screen.print(f"\nheld-out check, {result['n_rows']} rows, {result['n_prompts']} prompts answered greedily")
    print_table(evaluation_rows(result), screen)
    if not result["n_prompts"]:
        screen.print("no row has a prompt that generation could start from, so there is a loss only")
    for name, shares in result["agreement_with_adapter"].items():
        p = shares["bleu_p_value"]
        difference = result["models"][name]["bleu"] - result["models"]["adapter"]["bleu"]
        chance = "which may be chance" if p >= SIGNIFICANCE else "more than by chance"
        bleu = f"its BLEU differs by {difference:+.2f}, {chance} (p = {p:.2f})"
        screen.print(
            f"{name} agrees with adapter in {100 * shares['tokens']:.1f} % of tokens; "
            + ("every answer is the same" if shares["answers"] == 1 else bleu)
        )
