"""Holds a merge to its tolerance: the merge gate."""

from typing import Any

from raylora.errors import MergeError


def check_tolerance(result: dict[str, Any]) -> None:
    """Check the merge gate: the validation loss of the merged model against `merge.tolerance`.

    Args:
        result: from `merge_adapter`.

    Raises:
        MergeError: the loss of the written model is above the tolerance.
    """
    if result["passed"] is False:
        another = ", or write a format that loses less: --merge.formats '[residual, bf16]'"
        another = another if "nf4" in result["forms"] else ""
        raise MergeError(
            f"the merged model's validation loss is {100 * result['loss_increase']:.2f} % above the adapter's, and "
            f"merge.tolerance is {100 * result['tolerance']:.2f} %; keep the adapter unmerged{another}"
        )
