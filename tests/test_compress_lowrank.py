"""Low rank: the loss is what the singular values say, whitening beats plain SVD, the budget is kept and spent well."""

import itertools

import pytest

torch = pytest.importorskip("torch")

from hasten.compress import lowrank  # noqa: E402
from hasten.compress.lowrank import Spectrum  # noqa: E402
from hasten.compress.plan import rank_multiple  # noqa: E402


def problem(n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * k, k, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(k, k, generator=generator, dtype=torch.float64) + 2
    return torch.randn(n, k, generator=generator, dtype=torch.float64), x.T @ x / len(x)


def loss(weight: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor], hessian: torch.Tensor) -> float:
    change = factors[0] @ factors[1] - weight
    return float((change @ hessian * change).sum())


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)], ids=str)
def test_svd_llm_loses_what_the_discarded_singular_values_say(shape: tuple[int, int]) -> None:
    weight, hessian = problem(*shape)
    found = lowrank.spectrum(weight, hessian)
    assert (found.energies.diff() <= 0).all()
    for rank in (1, 5, 12):
        b, a = lowrank.factors(weight, hessian, rank)
        assert b.shape == (shape[0], rank)
        assert a.shape == (rank, shape[1])
        assert loss(weight, (b, a), hessian) == pytest.approx(float(found.energies[rank:].sum()), abs=1e-7)
        assert loss(weight, (b, a), hessian) <= loss(weight, lowrank.factors(weight, None, rank), hessian) + 1e-7


def test_no_other_factors_of_the_rank_are_better() -> None:
    """Gradient descent from the found factors, and from chance, does not get below."""
    weight, hessian = problem(6, 8)
    best = loss(weight, lowrank.factors(weight, hessian, 3), hessian)
    b, a = (t.clone().requires_grad_() for t in lowrank.factors(weight, None, 3))
    optimiser = torch.optim.LBFGS([b, a], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        change = b @ a - weight
        value = (change @ hessian * change).sum()
        value.backward()
        return value

    for _ in range(5):
        optimiser.step(closure)
    assert loss(weight, (b.detach(), a.detach()), hessian) == pytest.approx(best, rel=1e-3)
    assert loss(weight, (b.detach(), a.detach()), hessian) >= best * (1 - 1e-9)


def test_plain_svd_is_nearest_in_numbers() -> None:
    weight, _ = problem(10, 16)
    b, a = lowrank.factors(weight, None, 4)
    assert float((b @ a - weight).square().sum()) == pytest.approx(float(lowrank.spectrum(weight).energies[4:].sum()))


def test_singular_moments_and_single_precision() -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    b, a = lowrank.factors(weight, x.T @ x / 5, 5)
    assert b.dtype == a.dtype == torch.float32
    torch.testing.assert_close(x @ a.T @ b.T, x @ weight.T, atol=1e-5, rtol=1e-5)  # rank 5 inputs: nothing is lost
    for wanted in (3, 5, 8):  # against truncating the outputs themselves, also beyond the inputs' rank
        b, a = lowrank.factors(weight.double(), (x.T @ x / 5).double(), wanted)
        left, values, right = torch.linalg.svd(x.double() @ weight.T.double(), full_matrices=False)
        best = (left[:, :wanted] * values[:wanted]) @ right[:wanted]
        torch.testing.assert_close(x.double() @ a.T @ b.T, best, atol=1e-6, rtol=1e-6)


def test_a_matrix_of_zeros_has_factors_of_zeros() -> None:
    for shape in ((4, 6), (6, 4)):
        b, a = lowrank.factors(torch.zeros(shape), torch.eye(shape[1]), 2)
        assert not (b @ a).any()
    spectra = {"idle": lowrank.spectrum(torch.zeros(4, 6)), "other": Spectrum(0.5 ** torch.arange(4.0), (4, 6))}
    assert lowrank.allocate(spectra, 0.9, {"idle": 1, "other": 1})["idle"] == 1


def energy_left(spectra: dict[str, Spectrum], ranks: dict[str, int]) -> float:
    return sum(float(spectra[name].energies[rank:].sum() / spectra[name].energies.sum())
               for name, rank in ranks.items())  # fmt: skip


def test_the_budget_goes_where_it_is_needed() -> None:
    """Against every choice of ranks that the budget allows."""
    spectra = {
        "steep": Spectrum(0.2 ** torch.arange(12.0), (12, 16)),
        "middle": Spectrum(0.5 ** torch.arange(12.0), (12, 18)),
        "flat": Spectrum(0.9 ** torch.arange(12.0), (60, 12)),
    }
    ones = dict.fromkeys(spectra, 1)
    ranks = lowrank.allocate(spectra, 0.45, ones)
    budget = 0.45 * sum(s.size for s in spectra.values())
    spent = sum(rank * spectra[name].cost for name, rank in ranks.items())
    assert spent <= budget
    legal = (
        dict(zip(spectra, choice, strict=True)) for choice in itertools.product(range(1, 7), range(1, 8), range(1, 11))
    )
    best = min(
        energy_left(spectra, choice)
        for choice in legal
        if sum(rank * spectra[name].cost for name, rank in choice.items()) <= budget
    )
    assert energy_left(spectra, ranks) <= best + 0.05  # greedy: within what the last step is worth
    assert ranks["steep"] < ranks["middle"]


def test_a_matrix_that_would_not_shrink_stays_dense() -> None:
    spectra = {"needy": Spectrum(torch.ones(16), (16, 16)), "easy": Spectrum(0.01 ** torch.arange(32.0), (32, 512))}
    ranks = lowrank.allocate(spectra, 0.5, {"needy": 1, "easy": 1})
    assert ranks["needy"] is None
    assert ranks["easy"] is not None
    assert 256 + ranks["easy"] * 544 <= 0.5 * (256 + 32 * 512)


def test_ranks_are_multiples() -> None:
    spectra = {str(i): Spectrum(0.9 ** torch.arange(64.0), (64, 128)) for i in range(3)}
    ranks = lowrank.allocate(spectra, 0.6, dict.fromkeys(spectra, 8))
    assert all(rank is not None and rank % 8 == 0 for rank in ranks.values())
    assert [rank_multiple((n, 4096)) for n in (48, 64, 288, 1024)] == [2, 8, 8, 32]
