"""Pruning: masks keep what they should, SparseGPT's changes are those of brute-force least squares, methods rank as in
their papers."""

import itertools

import pytest

torch = pytest.importorskip("torch")

from hasten.compress import sparsegpt, wanda  # noqa: E402
from hasten.errors import ModelError  # noqa: E402


def problem(n: int, k: int, seed: int = 0, outliers: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the second moment of correlated inputs, some of them much larger than others where asked."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8 * k, k, generator=generator, dtype=torch.float64)
    x = x @ (torch.eye(k) + 0.4 * torch.randn(k, k, generator=generator) / k**0.5 * 2).double()
    if outliers:
        x *= torch.exp(1.2 * torch.randn(k, generator=generator)).double()
    return torch.randn(n, k, generator=generator, dtype=torch.float64), x.T @ x / len(x)


def loss(change: torch.Tensor, hessian: torch.Tensor) -> float:
    return float((change @ hessian * change).sum())


def least_squares(target: torch.Tensor, hessian: torch.Tensor, fixed: dict[int, float], free: list[int]):
    """The row nearest to `target` under the hessian whose `fixed` entries have these values; brute force."""
    row = target.clone()
    for j, value in fixed.items():
        row[j] = value
    change = row - target
    if free:
        others = [j for j in range(len(row)) if j not in free]
        push = hessian[free][:, others] @ change[others]
        row[free] = target[free] - torch.linalg.solve(hessian[free][:, free], push)
    return row


def test_the_sweep_is_brute_force_from_the_left() -> None:
    """Each column in turn is fixed, at zero or where it stands, and all to its right are solved for anew."""
    weight, hessian = problem(5, 9)
    for block_size in (1, 3, 128):
        found = sparsegpt.sweep(weight, hessian, 0.4, damping=0, block_size=block_size)
        for row, target in zip(found, weight, strict=True):
            want, fixed = target.clone(), {}
            for j in range(9):
                fixed[j] = float(want[j]) if row[j] else 0.0
                want = least_squares(target, hessian, fixed, list(range(j + 1, 9)))
            torch.testing.assert_close(row, want)


def test_what_stays_is_the_least_squares_solution_for_its_mask() -> None:
    weight, hessian = problem(6, 10, 2)
    mask = torch.rand(6, 10, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[0] = False
    found = sparsegpt.refit(weight, weight * mask, hessian, damping=0)
    best = [least_squares(w, hessian, {j: 0.0 for j in range(10) if not keep[j]}, keep.nonzero()[:, 0].tolist())
            for w, keep in zip(weight, mask, strict=True)]  # fmt: skip
    torch.testing.assert_close(found, torch.stack(best), atol=1e-6, rtol=1e-6)
    assert torch.equal(found == 0, ~mask)
    swept = sparsegpt.sweep(weight, hessian, 0.5)
    assert loss(sparsegpt.prune(weight, hessian, 0.5) - weight, hessian) < 0.98 * loss(swept - weight, hessian)


def test_one_number_removed_is_the_cheapest_of_all() -> None:
    """Exhaustive Optimal Brain Surgeon for one number of a tiny matrix: the same number goes, at the same loss."""
    for seed in range(20):
        weight, hessian = problem(1, 5, seed)
        losses = []
        for j in range(5):
            row = least_squares(weight[0], hessian, {i: float(weight[0, i]) for i in range(j)} | {j: 0.0},
                                list(range(j + 1, 5)))  # fmt: skip
            losses.append(loss(row - weight[0], hessian))
        found = sparsegpt.sweep(weight, hessian, 0.2, damping=0)
        assert int((found[0] == 0).nonzero()) == losses.index(min(losses))
        assert loss(found - weight, hessian) == pytest.approx(min(losses))


def test_near_the_best_of_all_masks() -> None:
    """Against every mask of half a row, each solved exactly: the optimum is a bound, and magnitude is beaten."""
    total = {"best": 0.0, "sparsegpt": 0.0, "wanda": 0.0, "magnitude": 0.0}
    for seed in range(20):
        weight, hessian = problem(1, 8, seed)
        every = itertools.combinations(range(8), 4)
        total["best"] += min(
            loss(least_squares(weight[0], hessian, dict.fromkeys(gone, 0.0), [j for j in range(8) if j not in gone])
                 - weight[0], hessian)
            for gone in every
        )  # fmt: skip
        found = sparsegpt.prune(weight, hessian, 0.5, damping=0)
        assert int((found == 0).sum()) == 4
        total["sparsegpt"] += loss(found - weight, hessian)
        total["wanda"] += loss(weight * wanda.wanda(weight, hessian.diagonal().sqrt(), 0.5) - weight, hessian)
        total["magnitude"] += loss(weight * wanda.magnitude(weight, 0.5) - weight, hessian)
    assert total["best"] <= total["sparsegpt"] < 2 * total["best"]
    assert total["sparsegpt"] < total["wanda"] < total["magnitude"]


@pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8), (1, 4)], ids=str)
def test_methods_rank_as_in_their_papers(pattern: tuple[int, int] | None) -> None:
    weight, hessian = problem(32, 256, outliers=True)
    sparsity = 1 - pattern[0] / pattern[1] if pattern else 0.5
    norms = hessian.diagonal().sqrt()
    found = {
        "magnitude": weight * wanda.magnitude(weight, sparsity, pattern),
        "wanda": weight * wanda.wanda(weight, norms, sparsity, pattern),
        "sparsegpt": sparsegpt.prune(weight, hessian, sparsity, pattern),
    }
    for pruned in found.values():
        assert float((pruned == 0).double().mean()) == pytest.approx(sparsity)
        if pattern:
            assert ((pruned.unflatten(1, (-1, pattern[1])) != 0).sum(-1) == pattern[0]).all()
    losses = {name: loss(pruned - weight, hessian) for name, pruned in found.items()}
    assert losses["sparsegpt"] < losses["wanda"] < losses["magnitude"]


def test_blocks_of_columns_change_little_and_float32_little_more() -> None:
    weight, hessian = problem(16, 300, 3)
    whole = loss(sparsegpt.prune(weight, hessian, 0.6, (2, 4)) - weight, hessian)
    narrow = loss(sparsegpt.prune(weight, hessian, 0.6, (2, 4), block_size=16) - weight, hessian)
    assert narrow == pytest.approx(whole)  # for n:m a block is only a matter of when sums are made
    single = sparsegpt.prune(weight.float(), hessian.float(), 0.6, (2, 4)).double()
    assert loss(single - weight, hessian) == pytest.approx(whole, rel=1e-3)


def test_wanda_keeps_the_same_number_in_each_row_and_ties_are_broken() -> None:
    weight = torch.ones(4, 10)
    weight[0] *= 100
    assert (wanda.wanda(weight, torch.ones(10), 0.3).sum(1) == 7).all()
    assert wanda.magnitude(weight, 0.5).sum() == 20
    assert wanda.magnitude(weight, 0.5)[0].all()


def test_dead_inputs_and_a_singular_moment() -> None:
    weight, hessian = problem(4, 12)
    hessian[3] = hessian[:, 3] = 0
    found = sparsegpt.prune(weight, hessian, 0.25)
    assert (found[:, 3] == 0).all()
    assert torch.isfinite(found).all()
    few = torch.randn(3, 12, dtype=torch.float64)  # fewer rows than inputs: of rank 3
    assert torch.isfinite(sparsegpt.prune(weight, few.T @ few / 3, 0.5)).all()
    with pytest.raises(ModelError, match="no Cholesky factor: they hold NaN"):
        sparsegpt.prune(weight, torch.full((12, 12), torch.nan, dtype=torch.float64), 0.5)
