"""Rounds an updated weight to the NF4 grid of the weight that it updates.

A dequantized NF4 weight lies on its grid, and the update of a fine-tune is far smaller than the grid's step: rounded to
the nearest level, it vanishes. `stochastic` keeps it on average; `calibrated` keeps what the layer makes of its inputs.

Weights, scales and results are (out_features, in_features), float32, unless said otherwise.
"""

import torch

from raylora.base.nf4 import levels, nearest

BLOCK = 64
"""Input features rounded before the change is carried over to all others in one matrix product."""


MAX_GAIN = 5.0
"""Of the change aimed at; beyond, noise would outweigh what is kept."""


DAMPING = 0.01
"""Added to the moment's diagonal, in means of it, as GPTQ does: keeps what the calibration rows never excite."""


def stochastic(target: torch.Tensor, scale: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rounds each weight up or down at random, so that the mean is the target.

    Args:
        target: the updated weight.
        scale: of each element.
        generator: source of the draws, on the CPU.
    """
    grid = levels(target.device)
    position = (target / scale).clamp(-1, 1)
    below = (torch.bucketize(position, grid, right=True) - 1).clamp(0, len(grid) - 2)
    share = (position - grid[below]) / (grid[below + 1] - grid[below])
    up = torch.rand(target.shape, generator=generator).to(target.device) < share
    return grid[below + up] * scale


class Inputs:
    """What a layer's inputs say about its weights, for as many layers as share them."""

    def __init__(self, inputs: torch.Tensor, wanted: torch.Tensor) -> None:
        """Takes the inputs' second moments.

        Args:
            inputs: X, (tokens, in_features), as the merged model will see them.
            wanted: Y, (tokens, in_features), as the adapter sees them.
        """
        inputs, wanted = inputs.float(), wanted.float()
        self.moment = inputs.T @ inputs
        self.moment.diagonal().add_(DAMPING * self.moment.diagonal().mean() + torch.finfo(inputs.dtype).tiny)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.moment))
        self.correction = (wanted - inputs).T @ inputs @ self.inverse


def calibrated(
    before: torch.Tensor, target: torch.Tensor, scale: torch.Tensor, inputs: Inputs, *, sweeps: int, gain_sweeps: int
) -> torch.Tensor:
    """Rounds T to Q so that Q X is near T Y: error feedback, coordinate descent, and a gain against shrinking.

    Without rounding the best answer would be T' = T + T (Y - X)^T X H^-1, with H = X^T X. Q comes near to it in the
    metric of H, with a small tr((Q - T') H (Q - T')^T). That leaves out changes too small to move a weight by a whole
    step, in every layer alike, so that the model falls short of the fine-tune. So each output's change T' - W is aimed
    at with a gain, raised until what Q changes is, projected on it, the whole of it.

    Args:
        before: W, the weight without the update.
        target: T, the updated weight.
        scale: of each element.
        inputs: X and Y.
        sweeps: rounds of coordinate descent over all input features.
        gain_sweeps: more of them, each after a new gain.
    """
    before, scale = before.T.contiguous(), scale.T.contiguous()  # one input feature's weights side by side
    change = (target + target @ inputs.correction).T - before
    rounded = error_feedback(before + change, scale, inputs.inverse)
    seen = inputs.moment @ change
    gradient = inputs.moment @ (rounded - before) - seen
    for _ in range(sweeps):
        descend(rounded, gradient, scale, inputs.moment)
    whole = (change * seen).sum(0).clamp_min(torch.finfo(seen.dtype).tiny)
    gain = torch.ones_like(whole)
    for _ in range(gain_sweeps):
        raised = (gain + 1 - ((rounded - before) * seen).sum(0) / whole).clamp(1 / MAX_GAIN, MAX_GAIN)
        gradient -= (raised - gain) * seen
        descend(rounded, gradient, scale, inputs.moment)
        gain = raised
    return rounded.T.contiguous()


def error_feedback(target: torch.Tensor, scale: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Rounds one input feature after the other; those still to come take up each one's error.

    Args:
        target: (in_features, out_features), as are scale and result.
        scale: of each element.
        inverse: of the damped moment, (in_features, in_features).

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


def descend(rounded: torch.Tensor, gradient: torch.Tensor, scale: torch.Tensor, moment: torch.Tensor) -> None:
    """Moves each weight in turn, in place, to the level that is best while the others stay; it never gets worse.

    Args:
        rounded: (in_features, out_features), as are gradient and scale.
        gradient: half that of the squared distance to the target, moment (rounded - target); kept up to date.
        scale: of each element.
        moment: damped, (in_features, in_features).
    """
    for start in range(0, len(rounded), BLOCK):
        stop = min(start + BLOCK, len(rounded))
        local, before = gradient[start:stop].clone(), rounded[start:stop].clone()
        for feature in range(start, stop):
            best = rounded[feature] - local[feature - start] / moment[feature, feature]
            move = nearest(best, scale[feature]) - rounded[feature]
            rounded[feature] += move
            local[feature + 1 - start :].addr_(moment[feature + 1 : stop, feature], move)
        gradient.addmm_(moment[:, start:stop], rounded[start:stop] - before)
