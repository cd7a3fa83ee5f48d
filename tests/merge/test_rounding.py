"""Rounding keeps an update: on average, or in what a layer makes of its inputs."""

import pytest
import torch

from raylora.base.nf4 import levels, nearest, nearest_code, values_of
from raylora.merge import rounding
from raylora.merge.rounding import CalibrationInputs, calibrated, descend, error_feedback, stochastic


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight on its grid, the scales, and correlated inputs: 600 tokens of 64 features, mostly of rank 8."""
    torch.manual_seed(0)
    scale = torch.rand(32, 1).expand(32, 64) + 0.5
    weight = levels(torch.device("cpu"))[torch.randint(0, 16, (32, 64))] * scale
    inputs = torch.randn(600, 8) @ torch.randn(8, 64) + 0.1 * torch.randn(600, 64)
    return weight, scale, inputs


def test_stochastic_rounding_is_right_on_average() -> None:
    # 0.2 lies between the levels 0.1609 and 0.2461: of 40,000 draws the mean's standard error is 0.0427 / 200 = 2e-4
    target = torch.full((200, 200), 0.2)
    rounded = stochastic(target, torch.ones_like(target), torch.Generator().manual_seed(0))
    assert rounded.unique().tolist() == pytest.approx([0.1609, 0.2461], abs=1e-4)
    assert rounded.mean().item() == pytest.approx(0.2, abs=8e-4)


def test_stochastic_rounding_leaves_levels_alone_and_clips_at_the_ends() -> None:
    target = torch.cat([levels(torch.device("cpu")), torch.tensor([1.5, -1.5])])[None]
    rounded = stochastic(target, torch.ones_like(target), torch.Generator().manual_seed(0))
    assert torch.equal(rounded[0, :16], target[0, :16])
    assert rounded[0, 16:].tolist() == [1, -1]


def output_error(rounded: torch.Tensor, target: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs @ (rounded - target).T).square().sum())


def test_calibrated_rounding_keeps_the_outputs_that_nearest_rounding_loses(
    layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    weight, scale, inputs = layer
    target = weight + 0.01 * torch.randn(32, 4) @ torch.randn(4, 64)
    rounded = calibrated(weight, target, scale, CalibrationInputs(inputs, inputs), sweeps=2, gain_sweeps=0)
    assert torch.equal(nearest(rounded, scale), rounded)
    error = output_error(rounded, target, inputs)
    assert error < 0.2 * output_error(nearest(target, scale), target, inputs)
    generator = torch.Generator().manual_seed(0)
    assert error < 0.2 * output_error(stochastic(target, scale, generator), target, inputs)


def test_descent_never_makes_the_outputs_worse(layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    weight, scale, inputs = layer
    target = weight + 0.02 * torch.randn(32, 64)
    statistics = CalibrationInputs(inputs, inputs)
    rounded, gradient = error_feedback(target, scale, statistics.factor)
    codes = nearest_code(rounded, scale)

    def objective() -> float:
        off = values_of(codes, scale) - target
        return float((off * (off @ statistics.hessian)).sum())

    objectives = [objective()]
    for _ in range(3):
        descend(codes, gradient, scale, statistics.hessian)
        objectives.append(objective())
    assert objectives == sorted(objectives, reverse=True)
    assert objectives[-1] < objectives[0]
    expected = (values_of(codes, scale) - target) @ statistics.hessian
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-3)


def test_a_sweep_moves_each_weight_in_turn(layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """Compare a sweep with one that takes weight by weight in float64."""
    weight, scale, inputs = layer
    target = weight + 0.1 * torch.randn(32, 64)
    hessian = CalibrationInputs(inputs, inputs).hessian
    codes = nearest_code(weight, scale)
    gradient = (weight - target) @ hessian
    expected, slow_gradient = weight.double(), gradient.double()
    for feature in range(64):
        best = expected[:, feature] - slow_gradient[:, feature] / hessian[feature, feature].double()
        moved = nearest(best.float(), scale[:, feature]).double()
        slow_gradient += torch.outer(moved - expected[:, feature], hessian[feature].double())
        expected[:, feature] = moved
    descend(codes, gradient, scale, hessian)
    assert torch.equal(values_of(codes, scale).double(), expected)
    assert (expected != weight).sum() > 100  # several in each output, so that turns matter


def test_blocks_change_nothing_but_the_time(
    layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, scale, inputs = layer
    target = weight + 0.02 * torch.randn(32, 64)

    def rounded(block: int, in_turn: int) -> torch.Tensor:
        monkeypatch.setattr(rounding, "BLOCK", block)
        monkeypatch.setattr(rounding, "IN_TURN", in_turn)
        statistics = CalibrationInputs(inputs, 1.01 * inputs)
        return calibrated(weight, target, scale, statistics, sweeps=2, gain_sweeps=2)

    one_by_one = rounded(block=64, in_turn=64)
    assert torch.equal(rounded(block=24, in_turn=24), one_by_one)
    assert torch.equal(rounded(block=40, in_turn=4), one_by_one)
    assert not torch.equal(one_by_one, weight)


def test_calibrated_rounding_mends_what_earlier_layers_got_wrong(
    layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    # the merged model's inputs are 5 % too large: outputs come out right only if the weight becomes smaller
    weight, scale, target = layer
    weight = weight * 0.5  # room on the grid
    inputs = 1.05 * target
    mended = calibrated(weight, weight, scale, CalibrationInputs(inputs, target), sweeps=2, gain_sweeps=0)
    blind = calibrated(weight, weight, scale, CalibrationInputs(inputs, inputs), sweeps=2, gain_sweeps=0)

    def error(rounded: torch.Tensor) -> float:
        return float((inputs @ rounded.T - target @ weight.T).square().sum())

    assert error(mended) < 0.2 * error(blind)


def test_the_gain_keeps_all_of_an_update_that_descent_leaves_half_undone(
    layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    weight, scale, inputs = layer
    update = 0.004 * torch.randn(32, 4) @ torch.randn(4, 64)
    statistics = CalibrationInputs(inputs, inputs)

    def kept(gain_sweeps: int) -> float:
        rounded = calibrated(weight, weight + update, scale, statistics, sweeps=2, gain_sweeps=gain_sweeps)
        return float(
            (((rounded - weight) @ statistics.hessian) * update).sum() / ((update @ statistics.hessian) * update).sum()
        )

    # three rounds of a gain that may overshoot by what one more flip brings
    assert kept(0) < 0.85
    assert abs(1 - kept(3)) < 0.5 * (1 - kept(0))
