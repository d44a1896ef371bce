"""A matrix as a product of two thin ones: truncated SVD, and SVD-LLM (Wang et al. 2024), which looks at the inputs.

Pure functions of tensors on any device; knows no model. SVD-LLM: with H = S S^T the second moment of the inputs, the
loss of W' is tr((W' - W) H (W' - W)^T) = |W' S - W S|^2, so W S is what is truncated, and the loss is exactly the sum
of the squared singular values left out. With U the left singular vectors that stay, that is W' = U U^T W: S cancels.
U are eigenvectors of the outputs' second moment W H W^T, which are found several times faster than singular vectors,
also where H is singular. y = b (a x), with b [N, r] and a [r, K].
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST = 1e-12  # of the largest energy, in what factors are scaled by


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


def spectrum(weight: Tensor, hessian: Tensor | None = None) -> Spectrum:
    """What each rank of `weight` is worth: in numbers of the matrix, or, with a hessian, of its outputs."""
    moment = _moment(_core(weight)[1], hessian)
    energies = torch.linalg.eigvalsh(moment).flip(0).clamp(min=0)
    return Spectrum(energies, (weight.shape[0], weight.shape[1]))


def factors(weight: Tensor, hessian: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """b [N, r], a [r, K] in the dtype of `weight`, whose outputs are nearest to its own on inputs with this second
    moment [K, K]; without one, whose product is nearest to it (Eckart & Young 1936)."""
    basis, core = _core(weight)
    energies, vectors = torch.linalg.eigh(_moment(core, hessian))
    kept = vectors[:, -rank:].flip(1)
    b = kept if basis is None else basis @ kept
    # Singular values are shared out evenly: both factors stay of a size that small formats hold.
    scale = energies[-rank:].flip(0).clamp(min=_LEAST * float(energies[-1])).sqrt().sqrt()
    scale = scale.masked_fill(scale == 0, 1)
    return (b * scale).to(weight.dtype).contiguous(), (kept.T @ core / scale[:, None]).to(weight.dtype).contiguous()


def _core(weight: Tensor) -> tuple[Tensor | None, Tensor]:
    """Q [N, K] with orthonormal columns and R [K, K], W = Q R, where W has more rows than columns; else itself."""
    weight = weight.double()
    if weight.shape[0] <= weight.shape[1]:
        return None, weight
    basis, core = torch.linalg.qr(weight)
    return basis, core


def _moment(core: Tensor, hessian: Tensor | None) -> Tensor:
    return core @ core.T if hessian is None else core @ hessian.double() @ core.T


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
    cumulated = {name: [0.0, *(found.energies.cumsum(0) / found.energies.sum().clamp(min=1e-30)).tolist()]
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
