"""Says figures in words: changes of a loss, and learning rates."""

EQUAL = 0.005
"""Change in per cent that is called equal; it would be shown as 0.00 %."""


def change(loss: float, reference: float) -> str:
    """Return how a loss differs from another one, such as `1.92 % worse`.

    From twice the reference on, the factor is said instead: `288 times`.

    Args:
        loss: nats per token.
        reference: loss to compare with, nats per token.
    """
    if reference <= 0:
        return "equal" if loss == reference else f"{loss:.4g} instead of 0"
    percent = 100 * (loss / reference - 1)
    if abs(percent) < EQUAL:
        return "equal"
    if percent >= 100:
        return f"{loss / reference:.3g} times"
    return f"{abs(percent):.3g} % {'worse' if percent > 0 else 'better'}"


def learning_rate(value: float) -> str:
    """Return a learning rate as people write it: 2e-4, 1.08e-3."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
