"""Weights held at zero while a model trains: those that were pruned before, and those that a schedule prunes.

The schedule is Zhu & Gupta's (2017): from begin_step to end_step sparsity rises as

    s(t) = final + (initial - final) (1 - (t - begin) / (end - begin))^3

quickly while much is redundant, then slowly; every so many steps the smallest weights at that time go to zero. What is
zero stays so, and when the training ends, the zeros are in the weights: stripping the masks changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hasten.compress.targets import select
from hasten.errors import RecipeError
from hasten.steps import Gradual

PRUNED = 0.01  # a matrix with this share of exact zeros was pruned; training itself hardly makes any


def sparsity_at(schedule: Gradual, step: int) -> float:
    """The share of zeros after `step` steps; 0 before the beginning, exactly final_sparsity from the end on."""
    if step < schedule.begin_step:
        return 0.0
    left = max(0.0, 1 - (step - schedule.begin_step) / (schedule.end_step - schedule.begin_step))
    return schedule.final_sparsity + (schedule.initial_sparsity - schedule.final_sparsity) * left**3


def is_due(schedule: Gradual, step: int) -> bool:
    """Whether masks are renewed after `step` steps: at both ends, and every so many steps between them."""
    if not schedule.begin_step <= step <= schedule.end_step:
        return False
    return (step - schedule.begin_step) % schedule.every == 0 or step == schedule.end_step


def mask_of(weight: Tensor, sparsity: float, pattern: str) -> Tensor:
    """True where a matrix [N, K] keeps its weight. "unstructured": exactly round(sparsity N K) of the smallest go.
    "2:4": the two smallest of each four inputs, in that share of the groups that makes `sparsity`, those that lose the
    least of their sum of squares."""
    if pattern == "unstructured":
        sizes = weight.detach().abs().flatten()
        count = round(sparsity * len(sizes))
        if not count:
            return torch.ones_like(weight, dtype=torch.bool)
        limit = sizes.kthvalue(count).values  # a third of the time of sorting so many
        keep = sizes > limit
        equal = (sizes == limit).nonzero().flatten()
        keep[equal[count - int((sizes < limit).sum()) :]] = True
        return keep.view_as(weight)
    groups = weight.detach().float().square().view(-1, 4)
    small = groups.topk(2, dim=1, largest=False)
    count = min(len(groups), round(2 * sparsity * len(groups)))
    chosen = small.values.sum(1).topk(count, largest=False).indices
    keep = torch.ones_like(groups, dtype=torch.bool)
    keep[chosen[:, None], small.indices[chosen]] = False
    return keep.view_as(weight)


@dataclass(eq=False)
class Masks:
    """Holds zeros in place: called after each step with the number of steps done.

    weights: of the decoder layers' matrices, by canonical name. schedule: prunes more as training goes on. Zeros are
    read from the weights, so that a training that goes on from a checkpoint knows them again.
    """

    weights: Mapping[str, Tensor]
    schedule: Gradual | None = None
    keep: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.schedule is not None and self.schedule.pattern == "2:4":
            for name in self.targets():
                if self.weights[name].shape[1] % 4:
                    raise RecipeError(
                        f"{name} has {self.weights[name].shape[1]} inputs, 2:4 needs a multiple of 4: ignore it"
                    )

    def targets(self) -> list[str]:
        """What the schedule prunes."""
        if self.schedule is None:
            return []
        ignored = select(self.weights, self.schedule.ignore, tied_head=False) if self.schedule.ignore else []
        return [n for n in select(self.weights, self.schedule.targets, tied_head=False) if n not in ignored]

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        if self.keep is None:
            pruned = {name: weight.detach() != 0 for name, weight in self.weights.items()}
            least = dict.fromkeys(self.targets(), 0.0)
            self.keep = {n: keep for n, keep in pruned.items() if is_pruned(keep, least.get(n, PRUNED))}
            for name, weight in self.weights.items():
                if weight.requires_grad:
                    weight.register_hook(partial(_masked, self.keep, name))  # type: ignore[no-untyped-call]
        if self.schedule is not None and is_due(self.schedule, step):
            sparsity = sparsity_at(self.schedule, step)
            for name in self.targets():
                new = mask_of(self.weights[name], sparsity, self.schedule.pattern)
                self.keep[name] = new & self.keep.get(name, new)
        for name, keep in self.keep.items():
            self.weights[name].mul_(keep)


def _masked(keep: Mapping[str, Tensor], name: str, gradient: Tensor) -> Tensor:
    """What is zero takes no gradient, nor part in the norm by which all are clipped."""
    return gradient * keep[name] if name in keep else gradient


def is_pruned(keep: Tensor, least: float = PRUNED) -> bool:
    """Whether more than `least` of a matrix is zero, though not all: somebody pruned it."""
    share = 1 - keep.float().mean().item()
    return least < share < 1
