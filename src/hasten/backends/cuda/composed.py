"""Products made of several: matrices of low rank, and an MLP of which a router runs some experts. To the decoder each
is a Linear; norms and activations in 8 bits stay outside them.

All experts are computed and those that the router left out set to zero: exact, and no faster than the dense MLP.
"""

import torch

from hasten.backends.cuda.linear import ACTIVATIONS, Linear, Norm
from hasten.backends.cuda.ops import Ops


class Composed(Linear):
    """Parts whose outputs lie side by side, each whole or a pair (a, b) for b (a x), with their biases in the last."""

    def __init__(self, ops: Ops, parts: list[tuple[Linear, ...]], gated: bool) -> None:
        every = [linear for part in parts for linear in part]
        matrices = [matrix for linear in every for matrix in linear.matrices]
        super().__init__(every[0].device, ops, matrices, None, gated, every[0].fixed)
        self._parts = parts
        self.n = sum(part[-1].n for part in parts)
        self.k = parts[0][0].k
        self.is_whole = False

    def fuses_norm(self, rows: int, dtype: torch.dtype, weight: torch.Tensor) -> bool:
        return False

    def fuses_residual(self, rows: int) -> bool:
        return len(self._parts) == 1 and self._parts[0][-1].fuses_residual(rows)

    def takes_fp8(self, rows: int) -> bool:
        return False

    @property
    def num_weights(self) -> int:
        return sum(linear.num_weights for part in self._parts for linear in part)

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
    ) -> torch.Tensor:
        """As Linear's."""
        assert norm is None, "nothing here norms its input"
        outs = []
        for part in self._parts:
            hidden = x if len(part) == 1 else part[0](x)
            outs.append(part[-1](hidden, residual=residual, scale=scale, dtype=dtype))
        out = outs[0] if len(outs) == 1 else torch.cat(outs, 1)
        return out if activation == "none" else self.ops.activate(out, ACTIVATIONS[activation], self.gated)


class Experts(Linear):
    """gate_up (or up) of an MLP in equal runs of neurons, `active` of which run: MoEfication (Zhang et al. 2022)."""

    def __init__(self, inner: Linear, router: Linear, experts: int, active: int) -> None:
        super().__init__(inner.device, inner.ops, inner.matrices, inner.bias, inner.gated, inner.fixed)
        self._inner = inner
        self._router = router
        self._experts = experts
        self._active = active
        self.n, self.k = inner.n, inner.k
        self.is_whole = False

    def fuses_norm(self, rows: int, dtype: torch.dtype, weight: torch.Tensor) -> bool:
        return False

    def fuses_residual(self, rows: int) -> bool:
        return True  # nothing follows the activation

    def takes_fp8(self, rows: int) -> bool:
        return False

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
    ) -> torch.Tensor:
        """The activated neurons, those of experts that do not run set to zero."""
        assert norm is None, "nothing here norms its input"
        hidden = self._inner(x, activation=activation, dtype=dtype)
        scores = self._router(x, dtype=torch.float32)
        # Stable: of equal scores the first experts win, as in the reference.
        ranked = scores.sort(dim=1, descending=True, stable=True).indices[:, : self._active]
        chosen = torch.zeros_like(scores, dtype=hidden.dtype).scatter_(1, ranked, 1)
        return (hidden.view(len(x), self._experts, -1) * chosen[:, :, None]).view(len(x), -1)
