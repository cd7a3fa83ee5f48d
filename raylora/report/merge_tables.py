"""Shows `merge.json` as tables and one sentence."""

from typing import Any

from rich.console import Console

from raylora.report.tables import print_table


def merge_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a table row for each model: its measurements. Written models were measured after reloading.

    Args:
        result: content of `merge.json`.
    """
    adapter = result["models"].get("adapter", {}).get("eval_loss")
    written = {f"merged_{form}, reloaded": facts for form, facts in result["forms"].items()}
    rows = []
    for name, facts in {**result["models"], **written}.items():
        loss = facts.get("eval_loss")
        rows.append(
            {
                "model": name,
                "eval_loss": loss,
                "against adapter": None if loss is None else f"{100 * (loss / adapter - 1):+.2f} %",
                "KL to adapter": facts.get("kl_to_adapter"),
                "same token": facts.get("token_agreement"),
                "heldout_loss": facts.get("heldout_loss"),
                "update kept": facts.get("update_kept"),
                "seconds": facts.get("seconds"),
                "peak MiB": facts.get("peak_memory_mib"),
                "MiB on disk": facts.get("size_mib"),
            }
        )
    return rows


def verdict(result: dict[str, Any]) -> str:
    """Return the result of the merge in a sentence, without a full stop."""
    if result["passed"] is None:
        return f"merged by {result['strategy']}; without rows, its loss against the adapter was not measured"
    return (
        f"merged by {result['strategy']}: validation loss {100 * result['loss_increase']:+.2f} % against the adapter, "
        f"tolerance {100 * result['tolerance']:.0f} %"
    )


def least_kept(result: dict[str, Any], n: int = 3) -> list[dict[str, Any]]:
    """Return a table row for each of the n layers whose merged weights keep the least of the update."""
    shares = result["update_kept"].get(result["strategy"], {})
    return [{"layer": name, "update kept": shares[name]} for name in sorted(shares, key=lambda name: shares[name])[:n]]


def show_merge(result: dict[str, Any], screen: Console) -> None:
    """Print the table, the skipped strategies and the verdict.

    Args:
        result: content of `merge.json`.
        screen: terminal to print to.
    """
    screen.print("\nthe merge, on validation rows")
    print_table(merge_rows(result), screen)
    for strategy, reason in result["skipped"].items():
        screen.print(f"{strategy} was skipped: {reason}")
    screen.print(verdict(result))
