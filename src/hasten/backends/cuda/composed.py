"""Products made of several: matrices of low rank, and an MLP of which a router runs some experts. To the decoder each
is a Linear."""

import torch
import triton

from hasten.backends.cuda.kernels import experts as kernels
from hasten.backends.cuda.linear import ACTIVATIONS, MAX_SKINNY, Linear
from hasten.backends.cuda.matrix import COLUMNS, DENSE, INT4, ROWS, Norm, Running

_PAIRS = 16384  # of scores that are compared at once


class Composed(Linear):
    """Parts whose outputs lie side by side, with their biases: each whole, or the b of a pair for b (a x). a: all
    of the a's as one product; `starts`: where in its outputs a part's begin (None: the part is whole and reads x).
    joined: the last `num_joined` parts, of low rank and alike, as one product for few rows."""

    def __init__(
        self,
        a: Linear,
        parts: list[Linear],
        starts: list[int | None],
        gated: bool,
        joined: Linear | None,
        num_joined: int,
    ) -> None:
        matrices = [matrix for linear in (a, *parts) for matrix in linear.matrices]
        super().__init__(a.device, a.ops, matrices, None, gated, a.fixed)
        self._a = a
        self._parts = parts
        self._starts = starts
        self._joined = joined
        self._num_apart = len(parts) - num_joined
        self._readers = [a, *(part for part, start in zip(parts, starts, strict=True) if start is None)]
        self.n = sum(part.n for part in parts)
        self.k = a.k
        self.is_whole = False

    def fuses_norm(self, rows: int, dtype: torch.dtype, weight: torch.Tensor) -> bool:
        return all(linear.fuses_norm(rows, dtype, weight) for linear in self._readers)

    def fuses_residual(self, rows: int) -> bool:
        return len(self._parts) == 1 and self._parts[0].fuses_residual(rows)

    def takes_eight(self, rows: int) -> torch.dtype | None:
        taken = {linear.takes_eight(rows) for linear in self._readers}
        return taken.pop() if len(taken) == 1 else None

    @property
    def num_weights(self) -> int:
        return self._a.num_weights + sum(linear.num_weights for linear in self._parts)

    def __call__(
        self,
        x: torch.Tensor,
        *,
        x_scales: torch.Tensor | None = None,
        norm: Norm | None = None,
        residual: torch.Tensor | None = None,
        scale: float = 1.0,
        activation: str = "none",
        dtype: torch.dtype | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As Linear's."""
        assert out is None, "nobody asks"
        dtype = dtype or (torch.bfloat16 if x_scales is not None else x.dtype)
        hidden = self._a(x, x_scales=x_scales, norm=norm, dtype=torch.bfloat16 if x_scales is not None else x.dtype)
        joined = self._joined
        if joined is not None and (not joined.fuses_residual(len(x)) or (self.gated and activation == "none")):
            joined = None
        if joined is not None and self.gated:
            return joined(hidden, activation=activation, dtype=dtype)
        made = torch.empty((len(x), self.n), dtype=dtype, device=x.device)
        first = 0
        for index, (part, start) in enumerate(zip(self._parts, self._starts, strict=True)):
            columns = made[:, first : first + part.n]
            if joined is not None and index == self._num_apart:
                joined(_aligned(hidden[:, start:]), dtype=dtype, out=made[:, first:])
                break
            if start is None:
                part(x, x_scales=x_scales, norm=norm, dtype=dtype, out=columns)
            else:
                given = _aligned(hidden[:, start : start + part.k])
                part(given, residual=residual, scale=scale, dtype=dtype, out=columns)
            first += part.n
        return made if activation == "none" else self.ops.activate(made, ACTIVATIONS[activation], self.gated)


def _aligned(columns: torch.Tensor) -> torch.Tensor:
    """Some columns, such that kernels may read four at a time."""
    return columns.contiguous() if columns.storage_offset() % 4 or columns.stride(0) % 4 else columns


class Experts(Linear):
    """gate_up (or up) of an MLP in equal runs of neurons, `active` of which run: MoEfication (Zhang et al. 2022).

    Few rows: the others are neither computed nor read, nor does `down` read them, where both products know who runs
    (Linear.running). Else all are computed, and those that the router left out set to zero.
    """

    def __init__(self, inner: Linear, router: Linear, experts: int, active: int) -> None:
        matrices, bias = inner.matrices, inner.bias
        super().__init__(inner.device, inner.ops, matrices, bias, inner.gated, inner.fixed, running=inner.running)
        self._inner = inner
        self._router = router
        self._experts = experts
        self._active = active
        self.n, self.k = inner.n, inner.k
        self.is_whole = inner.is_whole

    def fuses_norm(self, rows: int, dtype: torch.dtype, weight: torch.Tensor) -> bool:
        return self._skips(rows) and self._inner.fuses_norm(rows, dtype, weight)

    def fuses_residual(self, rows: int) -> bool:
        return True  # nothing follows the activation

    def takes_eight(self, rows: int) -> torch.dtype | None:
        return None  # the router reads more exact ones

    @property
    def num_weights(self) -> int:
        return self._inner.num_weights + self._router.num_weights

    def __call__(
        self,
        x: torch.Tensor,
        *,
        x_scales: torch.Tensor | None = None,
        norm: Norm | None = None,
        residual: torch.Tensor | None = None,
        scale: float = 1.0,
        activation: str = "none",
        dtype: torch.dtype | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The activated neurons; of experts that do not run zero, or anything where `down` does not read them."""
        if self._skips(len(x)):
            self._route(x, norm)
            return self._inner(x, norm=norm, activation=activation, dtype=dtype)
        assert norm is None, "experts that are all computed do not norm their input"
        hidden = self._inner(x, activation=activation, dtype=dtype)
        scores = self._router(x, dtype=torch.float32)
        # Stable: of equal scores the first experts win, as in the reference.
        ranked = scores.sort(dim=1, descending=True, stable=True).indices[:, : self._active]
        chosen = torch.zeros_like(scores, dtype=hidden.dtype).scatter_(1, ranked, 1)
        return (hidden.view(len(x), self._experts, -1) * chosen[:, :, None]).view(len(x), -1)

    def _skips(self, rows: int) -> bool:
        return self._inner.experts(rows) is not None

    def _route(self, x: torch.Tensor, norm: Norm | None) -> None:
        """Write who runs into `running`."""
        running, router, device = self._inner.running, self._router.matrices[0], self.device
        assert running is not None
        padded: int = triton.next_power_of_2(self._experts)
        at_once = max(1, min(triton.next_power_of_2(len(x)), _PAIRS // padded**2))
        block = triton.next_power_of_2(self.k)
        device.launch(
            kernels.route, (self._experts, len(x)),
            x, router.data, norm.weight if norm else x, device.workspace, running.experts, running.taken,
            device.counters, len(x), self._experts, self.k, self._active, norm.eps if norm else 0.0,
            NORM=norm is not None, EP=padded, BT=at_once, BK=block,
            num_warps=4 if block <= 4096 else 8,
        )  # fmt: skip


def split_mlp(gate_up: Linear, down: Linear, router: Linear, experts: int, active: int) -> tuple[Experts, Linear]:
    """gate_up and down of an MLP in experts; sharing what says who runs, where their kernels can skip the others."""
    size = down.k // experts
    can_route = router.is_whole and router.bias is None and router.matrices[0].kind == DENSE and experts**2 <= _PAIRS
    if can_route and all(_can_skip(linear, size) for linear in (gate_up, down)):
        handle = down.device.handle
        running = torch.zeros(1 + experts, dtype=torch.int32, device=handle)
        taken = torch.zeros((MAX_SKINNY, experts), dtype=torch.int8, device=handle)
        gate_up.running = Running(ROWS, size, active, running, taken)
        down.running = Running(COLUMNS, size, active, running, taken)
    return Experts(gate_up, router, experts, active), down


def _can_skip(linear: Linear, size: int) -> bool:
    """Whether a product of few rows can be of some experts. Not where it is fixed: nothing may depend on other rows."""
    if type(linear) is not Linear or not linear.is_whole or linear.fixed:
        return False
    matrix = linear.matrices[0]
    if matrix.mask is not None:
        return False
    chunk = 4 * (32 if matrix.group == 32 else 64) if matrix.kind == INT4 else 1  # columns that are stored together
    return size % chunk == 0 and (matrix.group in (0, matrix.k) or size % matrix.group == 0)
