"""Shows what `evaluation.json` says as a table and one sentence per merged model."""

from typing import Any

from rich.console import Console

from raylora.report.tables import print_table

SIGNIFICANCE = 0.05
"""A difference that chance alone makes as large less often than this is shown as a real one."""


def evaluation_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Scores of each model, for a table."""
    return [{"model": name, **scores} for name, scores in result["models"].items()]


def show_evaluation(result: dict[str, Any], screen: Console) -> None:
    """Prints the table."""
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
