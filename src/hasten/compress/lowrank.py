"""A matrix as a product of two thin ones: truncated SVD, and SVD-LLM (Wang et al. 2024), which looks at the inputs.

Pure functions of tensors on any device; knows no model. SVD-LLM: with H = S S^T the second moment of the inputs
(S: Cholesky factor), the loss of W' is tr((W' - W) H (W' - W)^T) = |W' S - W S|^2. So W S is what is truncated, and the
loss is exactly the sum of the squared singular values left out. y = b (a x), with b [N, r] and a [r, K].
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from hasten.errors import ModelError

DAMPING = 1e-6  # of the mean diagonal: inputs that never vary get a factor all the same


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Squared singular values [min(N, K)] of a matrix, falling: what each rank is worth; and its shape [N, K]."""

    energies: Tensor
    shape: tuple[int, int]

    @property
    def cost(self) -> int:
        """Numbers stored for each rank."""
        return sum(self.shape)

    @property
    def size(self) -> int:
        """Numbers of the matrix as it is."""
        return self.shape[0] * self.shape[1]


def root(hessian: Tensor) -> Tensor:
    """Lower triangular S [K, K] with S S^T = H, in float64; a little is added to the diagonal where H is singular."""
    moment = hessian.double()
    mean = moment.diagonal().mean()
    for share in (0.0, DAMPING, 100 * DAMPING, 1e4 * DAMPING):
        damped = moment + share * mean * torch.eye(len(moment), dtype=torch.float64, device=moment.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return cast(Tensor, lower)
    raise ModelError("the inputs' second moment is not positive definite: more calibration text is needed")


def spectrum(weight: Tensor, hessian: Tensor | None = None) -> Spectrum:
    """What each rank of `weight` is worth: in numbers of the matrix, or, with a hessian, of its outputs."""
    seen = weight.double() if hessian is None else weight.double() @ root(hessian)
    return Spectrum(torch.linalg.svdvals(seen).square(), (weight.shape[0], weight.shape[1]))


def svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest b [N, r], a [r, K] to `weight`, in its dtype (Eckart & Young 1936)."""
    return _truncate(weight.double(), rank, None, weight.dtype)


def svd_llm(weight: Tensor, hessian: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """b [N, r], a [r, K] whose outputs are nearest to those of `weight` on inputs with this second moment [K, K]."""
    lower = root(hessian)
    return _truncate(weight.double() @ lower, rank, lower, weight.dtype)


def _truncate(seen: Tensor, rank: int, lower: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(seen, full_matrices=False)
    scale = values[:rank].sqrt()  # shared out evenly: both factors stay of a size that small formats hold
    a = scale[:, None] * right[:rank]
    if lower is not None:
        a = torch.linalg.solve_triangular(lower, a, upper=False, left=False)
    return (left[:, :rank] * scale).to(dtype).contiguous(), a.to(dtype).contiguous()


def allocate(spectra: Mapping[str, Spectrum], keep: float, multiples: Mapping[str, int]) -> dict[str, int | None]:
    """A rank for each matrix so that together they store at most a share `keep` of their numbers; None: left dense.

    Ranks go where they save most: the next `multiples[name]` singular values, as a share of their matrix's energy, for
    each number stored, the best first. A matrix that would store no fewer numbers than dense is left as it is, with all
    that it is worth, and the others share the rest of the budget.
    """
    budget = keep * sum(found.size for found in spectra.values())
    dense: set[str] = set()
    while True:
        left = budget - sum(spectra[name].size for name in dense)
        ranks = _greedy({name: found for name, found in spectra.items() if name not in dense}, left, multiples)
        full = {name for name, rank in ranks.items() if rank * spectra[name].cost >= spectra[name].size}
        if not full:
            return {name: ranks.get(name) for name in spectra}
        dense |= full


def _greedy(spectra: Mapping[str, Spectrum], budget: float, multiples: Mapping[str, int]) -> dict[str, int]:
    """Ranks by falling worth for each number stored; every matrix gets at least one step."""
    ranks = {name: min(multiples[name], len(found.energies)) for name, found in spectra.items()}
    spent = sum(rank * spectra[name].cost for name, rank in ranks.items())
    cumulated = {name: [0.0, *(found.energies.cumsum(0) / found.energies.sum()).tolist()]
                 for name, found in spectra.items()}  # fmt: skip
    waiting: list[tuple[float, str, int]] = []

    def offer(name: str) -> None:
        rank, found = ranks[name], spectra[name]
        step = min(multiples[name], len(found.energies) - rank)
        if step and rank * found.cost < found.size:
            gain = cumulated[name][rank + step] - cumulated[name][rank]
            heapq.heappush(waiting, (-gain / (step * found.cost), name, step))

    for name in spectra:
        offer(name)
    while waiting:
        _, name, step = heapq.heappop(waiting)
        cost = step * spectra[name].cost
        if spent + cost <= budget:
            spent += cost
            ranks[name] += step
            offer(name)
    return ranks
