"""What a block's matrices read: second moments and largest magnitudes of their inputs over the calibration text.

Runs the block as it is at the moment, so that what earlier steps and earlier matrices changed is felt.
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.compress.blocks import Block, Inputs
from hasten.errors import ModelError

# Roles that read the same input, in the order of use: what is measured for one holds for all.
INPUT_GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


@dataclass(eq=False)
class Statistics:
    """Over the rows x [K] that a matrix reads. second [K, K]: mean of x x^T, None where it was not asked for.
    square [K]: mean of x^2. absolute [K]: mean of |x|. largest [K]: max of |x|. All float32."""

    second: Tensor | None
    square: Tensor
    absolute: Tensor
    largest: Tensor

    @property
    def hessian(self) -> Tensor:
        """Mean of x x^T [K, K]."""
        assert self.second is not None, "collect(..., hessian=True) was not asked for"
        return self.second


@torch.no_grad()
def collect(block: Block, inputs: Inputs, roles: Collection[str], hessian: bool = False) -> dict[str, Statistics]:
    """Statistics of what the matrices of these roles read, in one run of the block over all inputs. Roles that read the
    same input share one Statistics. ModelError where it is not finite."""
    groups = [[role for role in group if role in roles] for group in groups_of(block)]
    sums = {group[0]: _Sums(hessian) for group in groups if group}
    with ExitStack() as stack:
        for role, sum_ in sums.items():
            hook = block.linears[role].register_forward_pre_hook(sum_.add)
            stack.callback(hook.remove)
        for x in inputs.batches():
            block(x)
    found = {role: sum_.finish() for role, sum_ in sums.items()}
    for role, seen in found.items():
        if not seen.square.isfinite().all():
            raise ModelError(
                f"{block.name(role)} reads NaN or infinity on the calibration text: the model's numbers overflow its "
                "dtype, on a CPU they are float32"
            )
    return {role: found[group[0]] for group in groups for role in group}


@torch.no_grad()
def rows_of(block: Block, inputs: Inputs, role: str, most: int) -> Tensor:
    """Rows that a matrix reads, [R, K] on the device, at most so many, evenly over all inputs."""
    kept: list[Tensor] = []
    share = max(1, -(-most // -(-len(inputs.states) // inputs.batch_size)))

    def keep(module: Any, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].flatten(0, -2)
        kept.append(x[torch.linspace(0, len(x) - 1, min(share, len(x)), device=x.device).long()])

    hook = block.linears[role].register_forward_pre_hook(keep)
    for x in inputs.batches():
        block(x)
    hook.remove()
    return torch.cat(kept)[:most]


def groups_of(block: Block) -> list[tuple[str, ...]]:
    """The block's roles in groups that read the same input, in the order of use."""
    return grouped(block.linears)


def grouped(roles: Collection[str]) -> list[tuple[str, ...]]:
    """Roles of a block in such groups; the second of two thin matrices, which reads what the first gives, is a group of
    its own."""
    groups: list[tuple[str, ...]] = []
    for group in INPUT_GROUPS:
        names = [name for role in group for name in (role, f"{role}.a") if name in roles]
        groups += [tuple(names)] if names else []
        groups += [(f"{role}.b",) for role in group if f"{role}.b" in roles]
    return groups


@contextmanager
def _tf32(exact: bool) -> Iterator[None]:
    """Tensor cores for float32 products whose factors come from 16 bits, which they hold exactly; sums are float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = exact or before
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class _Sums:
    """A forward pre-hook that adds up."""

    def __init__(self, hessian: bool) -> None:
        self.hessian = hessian
        self.count = 0
        self.second: Tensor | None = None
        self.square: Tensor | None = None
        self.absolute: Tensor | None = None
        self.largest: Tensor | None = None

    def add(self, module: Any, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].flatten(0, -2).float()
        self.count += len(x)
        magnitudes = x.abs()
        square, absolute, largest = x.square().sum(0), magnitudes.sum(0), magnitudes.amax(0)
        if self.square is None or self.absolute is None or self.largest is None:
            self.square, self.absolute, self.largest = square, absolute, largest
        else:
            self.square += square
            self.absolute += absolute
            torch.maximum(self.largest, largest, out=self.largest)
        if self.hessian:
            if self.second is None:
                self.second = torch.zeros((x.shape[1], x.shape[1]), device=x.device)
            with _tf32(arguments[0].dtype != torch.float32):
                self.second.addmm_(x.T, x)

    def finish(self) -> Statistics:
        assert self.square is not None
        assert self.absolute is not None
        assert self.largest is not None
        second = None if self.second is None else self.second.div_(self.count)
        return Statistics(second, self.square / self.count, self.absolute / self.count, self.largest)
