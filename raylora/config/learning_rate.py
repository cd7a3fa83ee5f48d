"""Knows the published rule for the learning rate of LoRA: a starting point, and the figure to beat."""

RULE_EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
"""Beginning of transformers' `model_type` -> exponent of the rule."""


def rule_learning_rate(hidden_size: int, model_type: str) -> float | None:
    """Return the rule's learning rate for a base, or None if the rule does not know its family.

    Args:
        hidden_size: of the base.
        model_type: transformers' name of its architecture.

    Source: Thinking Machines, Tinker cookbook: 5e-5 * 10 * (2000 / hidden_size) ** exponent.
    """
    exponent = next((value for name, value in RULE_EXPONENTS.items() if model_type.startswith(name)), None)
    return None if exponent is None else 5e-5 * 10 * (2000 / hidden_size) ** exponent
