"""Shows `merge.json` as tables and one sentence."""

from typing import Any

from rich.console import Console

from raylora.report.tables import print_table
from raylora.report.words import change


def merge_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a table row for each model: its measurements, those of written models after reloading.

    Args:
        result: content of `merge.json`.
    """
    models, adapter = _models(result), result["models"].get("adapter", {}).get("eval_loss")
    has_heldout = any("heldout_loss" in facts for facts in models.values())
    return [
        {
            "model": name,
            "eval_loss": facts.get("eval_loss"),
            "against adapter": _against(name, facts.get("eval_loss"), adapter),
            "KL": facts.get("kl_to_adapter"),
            "same token": facts.get("token_agreement"),
            **({"heldout_loss": facts.get("heldout_loss")} if has_heldout else {}),
        }
        for name, facts in models.items()
    ]


def cost_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a table row for each merged model: share of the update kept, seconds, peak memory and size on disk."""
    return [
        {
            "model": name,
            "update kept": facts.get("update_kept"),
            "seconds": facts.get("seconds"),
            "peak MiB": facts.get("peak_memory_mib"),
            "MiB on disk": facts.get("size_mib"),
        }
        for name, facts in _models(result).items()
        if "seconds" in facts
    ]


def _models(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return model -> measurements, those that were written last."""
    return {**result["models"], **{f"merged_{form}, reloaded": facts for form, facts in result["forms"].items()}}


def _against(name: str, loss: float | None, adapter: float | None) -> str | None:
    """Return how a model's loss differs from the adapter's, in words; the base's is too far away to compare."""
    if loss is None or adapter is None or name in ("adapter", "base"):
        return None
    return change(loss, adapter)


def verdict(result: dict[str, Any]) -> str:
    """Return the result of the merge in a sentence, without a full stop."""
    if result["passed"] is None:
        return f"merged by {result['strategy']}; without rows, its loss against the adapter was not measured"
    against = change(1 + result["loss_increase"], 1)
    word = "to " if against == "equal" else "" if against.endswith("times") else "than "
    return (
        f"merged by {result['strategy']}: validation loss {against} {word}the adapter's, "
        f"tolerance {100 * result['tolerance']:.3g} %"
    )


def merge_sentence(result: dict[str, Any]) -> str:
    """Return what the merge kept, in a sentence or two."""
    if result["passed"] is None:
        return f"{verdict(result).capitalize()}."
    models = result["models"]
    merged, adapter, base = (models[name]["eval_loss"] for name in (result["strategy"], "adapter", "base"))
    kept = "keeps the fine-tune" if result["passed"] else "does not keep the fine-tune"
    return (
        f"The merge by {result['strategy']} {kept}: validation loss {merged:.4g} after it and {adapter:.4g} before it, "
        f"{change(merged, adapter)} (tolerance {100 * result['tolerance']:.3g} %). The base has {base:.4g}."
    )


def least_kept(result: dict[str, Any], n: int = 3) -> list[dict[str, Any]]:
    """Return a table row for each of the n layers whose merged weights keep the least of the update."""
    shares = result["update_kept"].get(result["strategy"], {})
    return [{"layer": name, "update kept": shares[name]} for name in sorted(shares, key=lambda name: shares[name])[:n]]


def show_merge(result: dict[str, Any], screen: Console) -> None:
    """Print the tables, the skipped strategies and the verdict.

    Args:
        result: content of `merge.json`.
        screen: terminal to print to.
    """
    screen.print("\nthe merge, on validation rows")
    print_table(merge_rows(result), screen)
    print_table(cost_rows(result), screen)
    for strategy, reason in result["skipped"].items():
        screen.print(f"{strategy} was skipped: {reason}")
    screen.print(verdict(result))
