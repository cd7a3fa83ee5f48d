"""Rounds an updated weight to the NF4 grid of its base weight.

A dequantized NF4 weight lies on its grid, and the update of a fine-tune is far smaller than the step of the grid. So
rounding to the nearest level erases the update. `stochastic` keeps it on average. `calibrated` keeps the outputs of the
layer.

Weights, scales and results are (out_features, in_features), float32, unless stated otherwise.
"""

import torch

from raylora.base.nf4 import levels, nearest

BLOCK = 64
"""Input features that are rounded before one matrix product carries their errors to all others, as in GPTQ."""

MAX_GAIN = 5.0
"""Largest gain of the update. A larger one would add more noise than it keeps of the update. Our choice."""

DAMPING = 0.01
"""Damping of the Hessian: this share of its mean diagonal is added to the diagonal, as in GPTQ.

It keeps the weights of input features that the calibration rows never excite.
"""


def stochastic(target: torch.Tensor, scale: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Round each weight up or down at random, so that the mean is the target.

    Args:
        target: the updated weight.
        scale: scale of each element, > 0.
        generator: random generator on the CPU.

    Returns:
        Values on the grid of `scale`.
    """
    grid = levels(target.device)
    position = (target / scale).clamp(-1, 1)
    below = (torch.bucketize(position, grid, right=True) - 1).clamp(0, len(grid) - 2)
    share = (position - grid[below]) / (grid[below + 1] - grid[below])
    up = torch.rand(target.shape, generator=generator).to(target.device) < share
    return grid[below + up] * scale


class CalibrationInputs:
    """Statistics of a layer's calibration inputs. Layers that have the same inputs share them.

    Args:
        inputs: X, the inputs in the merged model, (n_tokens, in_features).
        target: Y, the inputs in the model with the adapter, (n_tokens, in_features).
    """

    def __init__(self, inputs: torch.Tensor, target: torch.Tensor) -> None:
        inputs, target = inputs.float(), target.float()
        self.hessian = inputs.T @ inputs
        self.hessian.diagonal().add_(DAMPING * self.hessian.diagonal().mean() + torch.finfo(inputs.dtype).tiny)
        """Damped Hessian H = X^T X, without the factor 2: (in_features, in_features), float32."""

        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.hessian))
        """Inverse of the damped Hessian, (in_features, in_features)."""

        self.correction = (target - inputs).T @ inputs @ self.inverse
        """Correction (Y - X)^T X H^-1 for the errors of earlier layers, (in_features, in_features)."""


def calibrated(
    base_weight: torch.Tensor,
    target: torch.Tensor,
    scale: torch.Tensor,
    inputs: CalibrationInputs,
    *,
    sweeps: int,
    gain_sweeps: int,
) -> torch.Tensor:
    """Round T to Q on the grid, so that the outputs X Q^T are near Y T^T.

    Without rounding, the best weight is T' = T + T (Y - X)^T X H^-1, with the Hessian H = X^T X. Error feedback and
    coordinate descent find a Q with a small distance tr((Q - T') H (Q - T')^T).

    The least distance leaves out changes that are too small to move a weight by a whole step. It does so in every
    layer, so that the merged model falls short of the fine-tune. A gain per output corrects this: it multiplies the
    change T' - W, and it rises until the projection of Q - W on the change is the whole change.

    Args:
        base_weight: W, the weight without the update.
        target: T, the updated weight.
        scale: scale of each element, > 0.
        inputs: statistics of X and Y.
        sweeps: sweeps of coordinate descent over all input features.
        gain_sweeps: further sweeps, each after an update of the gain.

    Returns:
        Q, values on the grid of `scale`.
    """
    # the weights of one input feature side by side
    base_weight, scale = base_weight.T.contiguous(), scale.T.contiguous()
    change = (target + target @ inputs.correction).T - base_weight
    rounded = error_feedback(base_weight + change, scale, inputs.inverse)
    hessian_change = inputs.hessian @ change
    gradient = inputs.hessian @ (rounded - base_weight) - hessian_change
    for _ in range(sweeps):
        descend(rounded, gradient, scale, inputs.hessian)
    whole = (change * hessian_change).sum(0).clamp_min(torch.finfo(hessian_change.dtype).tiny)
    gain = torch.ones_like(whole)
    for _ in range(gain_sweeps):
        projection = ((rounded - base_weight) * hessian_change).sum(0) / whole
        new_gain = (gain + 1 - projection).clamp(1 / MAX_GAIN, MAX_GAIN)
        gradient -= (new_gain - gain) * hessian_change
        descend(rounded, gradient, scale, inputs.hessian)
        gain = new_gain
    return rounded.T.contiguous()


def error_feedback(target: torch.Tensor, scale: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Round one input feature after the other. Add the error of each to the features not yet rounded.

    Args:
        target: (in_features, out_features).
        scale: scale of each element, > 0, (in_features, out_features).
        inverse: inverse of the damped Hessian, (in_features, in_features).

    Returns:
        Values on the grid of `scale`, (in_features, out_features).

    Source: Frantar et al. 2022, "GPTQ", algorithm 1 (arXiv:2210.17323).
    """
    factor = torch.linalg.cholesky(inverse, upper=True)
    rest, rounded = target.clone(), torch.empty_like(target)
    for start in range(0, len(target), BLOCK):
        stop = min(start + BLOCK, len(target))
        errors = torch.empty_like(target[start:stop])
        for feature in range(start, stop):
            rounded[feature] = nearest(rest[feature], scale[feature])
            error = (rest[feature] - rounded[feature]) / factor[feature, feature]
            rest[feature + 1 : stop].addr_(factor[feature, feature + 1 : stop], error, alpha=-1)
            errors[feature - start] = error
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return rounded


def descend(rounded: torch.Tensor, gradient: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor) -> None:
    """Move each weight in turn to its best level while the others stay, so that the distance never grows.

    This is one sweep of coordinate descent on the squared distance tr((Q - T') H (Q - T')^T).

    Args:
        rounded: Q, (in_features, out_features), changed in place.
        gradient: half the gradient of the squared distance, H (Q - T'), (in_features, out_features), updated in place.
        scale: scale of each element, > 0, (in_features, out_features).
        hessian: damped Hessian H, (in_features, in_features).
    """
    for start in range(0, len(rounded), BLOCK):
        stop = min(start + BLOCK, len(rounded))
        local, unmoved = gradient[start:stop].clone(), rounded[start:stop].clone()
        for feature in range(start, stop):
            best = rounded[feature] - local[feature - start] / hessian[feature, feature]
            move = nearest(best, scale[feature]) - rounded[feature]
            rounded[feature] += move
            local[feature + 1 - start :].addr_(hessian[feature + 1 : stop, feature], move)
        gradient.addmm_(hessian[:, start:stop], rounded[start:stop] - unmoved)
