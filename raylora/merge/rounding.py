"""Rounds an updated weight to the NF4 grid of its base weight.

A dequantized NF4 weight lies on its grid, and the update of a fine-tune is far smaller than the step of the grid. So
rounding to the nearest level erases the update. `stochastic` keeps it on average. `calibrated` keeps the outputs of the
layer.

Weights, scales and results are (out_features, in_features), float32, unless stated otherwise.
"""

from collections.abc import Iterator
from functools import cached_property

import torch

from raylora.base.nf4 import levels, look_up, nearest, nearest_code, rooms, values_of

BLOCK = 256
"""Input features whose errors or moves one matrix product carries to all others, as in GPTQ."""

IN_TURN = 16
"""Input features of a block that are rounded one after the other; matrix products carry errors between such groups."""

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
    return values_of(below + up, scale)


class CalibrationInputs:
    """Statistics of a layer's calibration inputs. Layers that have the same inputs share them.

    Args:
        inputs: X, the inputs in the merged model, (n_tokens, in_features).
        target: Y, the inputs in the model with the adapter, (n_tokens, in_features).
    """

    def __init__(self, inputs: torch.Tensor, target: torch.Tensor) -> None:
        self._inputs, self._difference = inputs.float(), target.float() - inputs.float()
        self.hessian = _gram(self._inputs)
        self.hessian.diagonal().add_(DAMPING * self.hessian.diagonal().mean() + torch.finfo(torch.float32).tiny)
        """Damped Hessian H = X^T X, without the factor 2: (in_features, in_features), float32."""

        self._lower = torch.linalg.cholesky(self.hessian.flip(0, 1))

    @property
    def factor(self) -> torch.Tensor:
        """Upper triangular U with H = U U^T, (in_features, in_features)."""
        return self._lower.flip(0, 1)

    def corrected(self, weight: torch.Tensor) -> torch.Tensor:
        """Correct a weight for the errors of earlier layers.

        Args:
            weight: T, (out_features, in_features).

        Returns:
            T + T (Y - X)^T X H^-1, whose outputs from X are nearest to those of T from Y.
        """
        out_features, in_features = weight.shape
        if in_features <= out_features:
            return weight + weight @ self._correction
        return weight + self._over_hessian(weight @ self._difference.T @ self._inputs)

    @cached_property
    def _correction(self) -> torch.Tensor:
        """(Y - X)^T X H^-1, (in_features, in_features)."""
        return self._over_hessian(self._difference.T @ self._inputs)

    def _over_hessian(self, product: torch.Tensor) -> torch.Tensor:
        """Return product H^-1, (n, in_features)."""
        return torch.cholesky_solve(product.T.flip(0), self._lower).flip(0).T


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
    change = inputs.corrected(target) - base_weight
    rounded, gradient = error_feedback(base_weight + change, scale, inputs.factor)
    codes = nearest_code(rounded, scale)
    for _ in range(sweeps):
        descend(codes, gradient, scale, inputs.hessian)
    change_hessian = change @ inputs.hessian
    whole = (change * change_hessian).sum(1).clamp_min(torch.finfo(change_hessian.dtype).tiny)
    gain = torch.ones_like(whole)
    for _ in range(gain_sweeps):
        projection = ((values_of(codes, scale) - base_weight) * change_hessian).sum(1) / whole
        new_gain = (gain + 1 - projection).clamp(1 / MAX_GAIN, MAX_GAIN)
        gradient -= (new_gain - gain)[:, None] * change_hessian
        descend(codes, gradient, scale, inputs.hessian)
        gain = new_gain
    return values_of(codes, scale)


def error_feedback(
    target: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round one input feature after the other. Each makes up for the errors of those before it.

    With H = U U^T, the squared distance is the sum over features i of the squares of
    (U^T (Q - T))_i = U_ii (Q - T)_i + sum_(j < i) U_ji (Q - T)_j. Each feature in turn makes its own square least. The
    result is GPTQ's, which works on the inverse of H.

    Args:
        target: T.
        scale: scale of each element, > 0.
        factor: U, upper triangular, (in_features, in_features).

    Returns:
        Q, values on the grid of `scale`; and half the gradient of the squared distance there, (Q - T) H. Both
        (out_features, in_features).

    Source: Frantar et al. 2022, "GPTQ", algorithm 1 (arXiv:2210.17323).
    """
    # the weights of one input feature side by side
    target, scale = target.T.contiguous(), scale.T.contiguous()
    carried = (factor / factor.diagonal()).T
    best, rounded = target.clone(), torch.empty_like(target)
    for block in _slices(len(target), BLOCK):
        rounded[block] = _round_in_turn(best[block], target[block], scale[block], carried[block, block])
        best[block.stop :].addmm_(carried[block.stop :, block], rounded[block] - target[block], alpha=-1)
    missed = (rounded - best).mul_(factor.diagonal()[:, None])  # U^T (Q - T)
    gradient = target.new_empty(target.T.shape)
    for block in _slices(len(target), BLOCK):
        gradient[:, block] = missed[block.start :].T @ factor[block, block.start :].T
    return rounded.T.contiguous(), gradient


def _round_in_turn(
    best: torch.Tensor, target: torch.Tensor, scale: torch.Tensor, carried: torch.Tensor
) -> torch.Tensor:
    """Round the features of a block one after the other.

    Args:
        best: best value of each feature before those of the block are rounded, (n, out_features). On return, the best
            value when its turn came.
        target: T, (n, out_features).
        scale: scale of each element, > 0, (n, out_features).
        carried: [i, j] is the share of the error of feature j that is taken from the best value of a later feature i,
            (n, n).

    Returns:
        Values on the grid of `scale`, (n, out_features).
    """
    half = len(best) // 2
    if len(best) > IN_TURN:
        first = _round_in_turn(best[:half], target[:half], scale[:half], carried[:half, :half])
        best[half:].addmm_(carried[half:, :half], first - target[:half], alpha=-1)
        return torch.cat([first, _round_in_turn(best[half:], target[half:], scale[half:], carried[half:, half:])])
    rounded: list[torch.Tensor] = []
    # split beforehand: on a CPU, half of the time of a small layer would go to indexing
    rows, targets, scales, columns = best.unbind(0), target.unbind(0), scale.unbind(0), carried.unbind(1)
    for feature, column in enumerate(columns):
        rounded.append(nearest(rows[feature], scales[feature]))
        best[feature + 1 :].addr_(column[feature + 1 :], rounded[feature] - targets[feature], alpha=-1)
    return torch.stack(rounded)


def descend(codes: torch.Tensor, gradient: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor) -> None:
    """Move each weight in turn to its best level while the others stay, so that the distance never grows.

    This is one sweep of coordinate descent on the squared distance tr((Q - T') H (Q - T')^T).

    Args:
        codes: levels of Q, (out_features, in_features), int32, changed in place.
        gradient: half the gradient of the squared distance, (Q - T') H, updated in place.
        scale: scale of each element, > 0.
        hessian: damped Hessian H, (in_features, in_features).
    """
    diagonal = hessian.diagonal()
    for block in _slices(len(hessian), BLOCK):
        wish = -gradient[:, block] / diagonal[block]
        moves = _move_in_turn(codes[:, block], wish, scale[:, block], hessian[block, block] / diagonal[block])
        _add_product(gradient, moves, hessian[block])


def _move_in_turn(codes: torch.Tensor, wish: torch.Tensor, scale: torch.Tensor, carried: torch.Tensor) -> torch.Tensor:
    """Move the weights of a block to their best levels, in each output one after the other.

    All outputs take their turns at once: in each, the next weight that moves at all. Only a few of them do.

    Args:
        codes: levels of the weights, (out_features, n), int32, changed in place.
        wish: move of each weight to its best value while the others stay, (out_features, n).
        scale: scale of each element, > 0, (out_features, n).
        carried: [i, j] is the share of the move of weight i that is taken from the wish of weight j, (n, n).

    Returns:
        Moves, (out_features, n), most of them 0.
    """
    moves, outputs = torch.zeros_like(wish), torch.arange(len(wish), device=wish.device)
    below, above = (look_up(room, codes) * scale for room in rooms(wish.device))
    features, turn = torch.arange(len(carried), device=wish.device), torch.full_like(outputs, -1)
    later = carried.triu(1)
    while True:
        moving = ((wish < below) | (wish > above)) & (features > turn[:, None])
        left = moving.any(1).nonzero()[:, 0]
        if not len(left):
            return moves
        outputs, wish, below, above = (tensor.index_select(0, left) for tensor in (outputs, wish, below, above))
        turn = moving.index_select(0, left).byte().argmax(1)
        now = outputs, turn
        value = values_of(codes[now], scale[now])
        codes[now] = nearest_code(value + wish.gather(1, turn[:, None])[:, 0], scale[now])
        moves[now] = values_of(codes[now], scale[now]) - value
        wish.addcmul_(later.index_select(0, turn), moves[now][:, None], value=-1)


def _add_product(total: torch.Tensor, moves: torch.Tensor, matrix: torch.Tensor) -> None:
    """Add moves @ matrix to a total. One weight in a hundred moves, which a CPU makes use of."""
    total.addmm_(moves.to_sparse_csr() if moves.device.type == "cpu" else moves, matrix)


def _gram(inputs: torch.Tensor) -> torch.Tensor:
    """Return X^T X, (in_features, in_features). It is symmetric, so that little more than half is computed."""
    n = inputs.shape[1]
    product = inputs.new_empty(n, n)
    for block in _slices(n, max(BLOCK, n // 8)):
        product[: block.stop, block] = inputs[:, : block.stop].T @ inputs[:, block]
        product[block, : block.start] = product[: block.start, block].T
    return product


def _slices(n: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` that cover n features."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
