"""GPTQ's and AWQ's mathematics against slow, plain solutions on small matrices."""

import itertools

import pytest

torch = pytest.importorskip("torch")

from hasten.compress import awq, gptq  # noqa: E402
from hasten.compress.grid import REACH, Grid  # noqa: E402
from hasten.errors import ModelError  # noqa: E402


def problem(rows: int, columns: int, seed: int = 0) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Weights, and second moments of correlated inputs of unequal size."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn((rows, columns), generator=random, dtype=torch.float64)
    mix = torch.randn((columns, columns), generator=random, dtype=torch.float64) + torch.eye(columns)
    x = torch.randn((4 * columns, columns), generator=random, dtype=torch.float64) @ mix
    x *= torch.linspace(0.2, 3, columns, dtype=torch.float64)
    return weight, x.T @ x / len(x)


def brain_surgeon(weight: "torch.Tensor", hessian: "torch.Tensor", round_: "callable") -> "torch.Tensor":
    """Columns in order: each is rounded, then all free ones are solved anew, by the inverse of what is left of H."""
    weight = weight.clone()
    columns = weight.shape[1]
    for j in range(columns):
        inverse = torch.linalg.inv(hessian[j:, j:])
        error = weight[:, j] - round_(weight[:, j], j)
        weight[:, j:] -= (error / inverse[0, 0])[:, None] * inverse[0]
    return weight


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_optimal_brain_surgeon_in_that_order(act_order: bool) -> None:
    weight, hessian = problem(5, 140)  # more than one run of 128 columns
    grid = Grid(4, scale_dtype=torch.float64)
    codes, scales, zeros = gptq.quantize(weight, hessian, grid, 0, act_order, damping=1e-12)
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(140)
    expected = torch.empty_like(weight)
    expected[:, order] = brain_surgeon(
        weight[:, order], hessian[order][:, order], lambda w, j: grid.nearest(w, scales[:, 0], zeros[:, 0])
    )
    assert torch.allclose(gptq.numbers(codes, scales, zeros), expected, atol=1e-8)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gptq_beats_rounding_and_stays_on_the_grid(bits: int, act_order: bool, symmetric: bool) -> None:
    weight, hessian = problem(24, 64)
    grid = Grid(bits, symmetric)
    codes, scales, zeros = gptq.quantize(weight, hessian, grid, 32, act_order)
    low, high = grid.ends
    assert low <= codes.min()
    assert codes.max() <= high
    assert torch.equal(scales, scales.bfloat16().double())
    rounded = awq.quantize(weight, hessian, grid, 32, clip=False)
    mine = gptq.output_error(gptq.numbers(codes, scales, zeros) - weight, hessian)
    plain = gptq.output_error(gptq.numbers(*rounded) - weight, hessian)
    assert mine < 0.9 * plain


def test_gptq_is_near_the_best_of_all_roundings() -> None:
    better = 0
    for seed in range(6):
        weight, hessian = problem(1, 6, seed)
        grid = Grid(2, scale_dtype=torch.float64)
        codes, scales, zeros = gptq.quantize(weight, hessian, grid, damping=1e-9)
        choices = torch.tensor(list(itertools.product(range(-2, 2), repeat=6)), dtype=torch.float64) * scales
        best = torch.stack([gptq.output_error(choice[None] - weight, hessian) for choice in choices]).min()
        mine = gptq.output_error(gptq.numbers(codes, scales, zeros) - weight, hessian)
        plain = gptq.output_error(grid.nearest(weight, scales, zeros) - weight, hessian)
        assert best <= mine * (1 + 1e-9)
        better += bool(mine <= plain)
    assert better >= 5


def test_what_pruning_made_zero_stays_zero() -> None:
    weight, hessian = problem(8, 64)
    weight[:, ::2] = 0
    codes, scales, zeros = gptq.quantize(weight, hessian, Grid(8), 0)
    assert (gptq.numbers(codes, scales, zeros)[:, ::2] == 0).all()


def test_inputs_that_never_come_do_no_harm() -> None:
    weight, hessian = problem(4, 32)
    hessian[5], hessian[:, 5] = 0, 0
    codes, scales, zeros = gptq.quantize(weight, hessian, Grid(4), 32)
    assert torch.isfinite(gptq.numbers(codes, scales, zeros)).all()


def test_the_factor_is_that_of_the_inverse() -> None:
    _, hessian = problem(1, 20)
    factor = gptq.inverse_factor(hessian, 1e-12)
    assert torch.allclose(factor.T @ factor, torch.linalg.inv(hessian), rtol=1e-6)
    assert torch.equal(factor, factor.triu())


def test_awq_scales_save_the_channels_that_carry_much() -> None:
    weight, hessian = problem(32, 64)
    hessian = hessian * torch.outer(*[torch.where(torch.arange(64) % 16 == 0, 30.0, 1.0).double()] * 2)
    absolute = hessian.diagonal().sqrt()
    grid = Grid(3)
    scales = awq.channel_scales([weight], absolute, hessian, [grid], [32])
    found = awq.quantize(weight * scales, hessian / torch.outer(scales, scales), grid, 32)
    mine = gptq.output_error(gptq.numbers(*found) / scales - weight, hessian)
    plain = gptq.output_error(grid.rounded(weight, 32) - weight, hessian)
    assert mine < 0.7 * plain


def test_a_fitted_range_is_no_worse_than_any_that_was_tried() -> None:
    weight, hessian = problem(16, 32)
    for grid in (Grid(4), Grid(4, symmetric=False), Grid(3)):
        for metric in (None, hessian.diagonal(), hessian):
            full = torch.eye(32).double() if metric is None else torch.diag(metric) if metric.dim() == 1 else metric
            errors = []
            for reach in (REACH, (0.875,), (1.0,), (1.3,)):
                found = grid.fit(weight, metric, reach)
                errors.append(gptq.output_error(grid.nearest(weight, *found) - weight, full))
            assert errors[0] == min(errors)


def test_moments_that_are_no_numbers_are_said_in_a_line() -> None:
    with pytest.raises(ModelError, match="they hold NaN or infinity"):
        gptq.inverse_factor(torch.full((4, 4), float("nan")), 0.01)
