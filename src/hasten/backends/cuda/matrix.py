"""What products are given: a matrix as it lies on the device, a norm to do on the way, which experts run."""

from dataclasses import dataclass
from functools import cached_property

import torch

from hasten.backends.cuda.kernels import linear as kernels

DENSE, FP8, INT8, INT4 = (kind.value for kind in (kernels.DENSE, kernels.FP8, kernels.INT8, kernels.INT4))
KINDS = {DENSE: "dense", FP8: "fp8", INT8: "int8", INT4: "int4"}
ROWS, COLUMNS = kernels.EXPERT_ROWS.value, kernels.EXPERT_COLUMNS.value


@dataclass(frozen=True)
class Matrix:
    """N rows of K columns as `kernels.skinny` reads them. scales [groups, N]; perm: which column of x each column of
    the matrix multiplies. mask: of a 2:4 matrix, of which data holds the numbers that are kept, as kernels/sparse.py
    reads it. int8_inputs: the folder says so."""

    kind: int
    n: int
    k: int
    data: torch.Tensor
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    group: int = 0
    perm: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    int8_inputs: bool = False

    @property
    def layout(self) -> tuple[int, int, int, int, bool]:
        """What its kernels are compiled and tuned for."""
        return self.kind, self.group, self.n, self.k, self.mask is not None

    @cached_property
    def stored(self) -> str:
        """How its numbers are stored, for people and for what is measured."""
        return KINDS[self.kind] + (f"-g{self.group}" if self.group else "") + ("" if self.mask is None else "-2:4")

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in (self.data, self.scales, self.zeros, self.mask) if t is not None)


@dataclass(frozen=True)
class Norm:
    """An RMS norm that a product may do on the way. weight float32 [K]."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Running:
    """Which experts run, as kernels.experts.route writes it, and what is theirs in a product of few rows: ROWS or
    COLUMNS of the matrix, `size` each in turn. experts [1 + E]: how many, and which. taken [MAX_SKINNY, E]: by which
    row of x."""

    side: int
    size: int
    active: int
    experts: torch.Tensor
    taken: torch.Tensor

    def shape(self, n: int, k: int, rows: int) -> tuple[int, int]:
        """Rows and columns of the matrix that `rows` rows of x have use for, at the most."""
        used = self.size * min(self.taken.shape[1], rows * self.active)
        return (used, k) if self.side == ROWS else (n, used)
