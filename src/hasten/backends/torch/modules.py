"""Torch modules for what Transformers' layers do not have: matrices apart, of low rank, and experts; put into a layer.

Knows how names.py splits a layer into modules, and no files.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hasten.model.names import Source
from hasten.model.spec import Layer


class Joined(nn.Module):
    """Matrices that Transformers keeps as one module, apart: their outputs in the order that it expects."""

    order: Tensor | None

    def __init__(self, parts: list[nn.Module], order: Tensor | None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([part(x) for part in self.parts], dim=-1)
        return joined if self.order is None else joined[..., self.order]


class LowRank(nn.Module):
    """b (a x): a matrix as two thin ones; the bias is b's."""

    def __init__(self, a: nn.Linear, b: nn.Linear) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.b(self.a(x)))


class MaskedInput(nn.Module):
    """A matrix that sees only the inputs that its mask, set before each run, lets through."""

    def __init__(self, matrix: nn.Module) -> None:
        super().__init__()
        self.matrix = matrix
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.matrix(x if self.mask is None else x * self.mask.to(x.dtype)))


class Experts(nn.Module):
    """An MLP of which the experts with the largest router scores give something. Computes all neurons and masks them:
    what backends that skip them are compared with."""

    def __init__(self, mlp: nn.Module, down: str, router: nn.Linear, active: int) -> None:
        super().__init__()
        self.mlp, self.router, self.active = mlp, router, active
        self._masked = MaskedInput(mlp.get_submodule(down))
        mlp.set_submodule(down, self._masked)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        # Equal scores: the first ones, as everywhere.
        chosen = scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.active]
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)
        self._masked.mask = mask.repeat_interleave(self._neurons() // scores.shape[-1], dim=-1)
        return cast(Tensor, self.mlp(x))

    def _neurons(self) -> int:
        matrix = self._masked.matrix
        first = matrix.a if isinstance(matrix, LowRank) else matrix
        return int(cast(Tensor, first.weight).shape[1])


def install(module: nn.Module, layer: Layer, sources: Iterable[Source], linears: Mapping[str, nn.Linear]) -> None:
    """Put a layer's matrices into its Transformers module, whose path is that of the sources up to the layer's number.

    linears: by canonical name within the layer (q, down.a, router, ...).
    """
    homes: dict[str, list[tuple[str, NDArray[np.int64]]]] = {}
    for source in sources:
        if source.role == "norm" or source.parts[0].name.endswith(".router"):
            continue
        home = _within(source.home or source.module)
        for part in source.parts:
            rows = source.home_rows if source.home else part.rows
            role = part.name.split(".", 2)[2]
            if not role.endswith(".a"):
                homes.setdefault(home, []).append((role.removesuffix(".b"), _indices(rows)))
    for home, members in homes.items():
        parts = [_matrix(role, linears) for role, _ in members]
        order = _order([rows for _, rows in members])
        device = next(parts[0].parameters()).device
        joined = Joined(parts, None if order is None else order.to(device))
        module.set_submodule(home, parts[0] if len(parts) == 1 else joined)
        if members[0][0] == "down" and layer.experts:
            path, name = home.rsplit(".", 1)
            module.set_submodule(
                path, Experts(module.get_submodule(path), name, linears["router"], layer.active_experts)
            )
    _adapt(module, layer)


def _within(path: str) -> str:
    """A module's path below its layer."""
    parts = path.split(".")
    index = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[index + 1 :])


def _indices(rows: slice | NDArray[np.int64] | None) -> NDArray[np.int64]:
    if isinstance(rows, slice):
        return np.arange(rows.start or 0, rows.stop)
    assert rows is not None
    return rows


def _matrix(role: str, linears: Mapping[str, nn.Linear]) -> nn.Module:
    return LowRank(linears[f"{role}.a"], linears[f"{role}.b"]) if f"{role}.a" in linears else linears[role]


def _order(rows: list[NDArray[np.int64]]) -> Tensor | None:
    """Where each output of the fused module is among its parts' outputs side by side."""
    joined = np.concatenate(rows)
    return None if np.array_equal(joined, np.arange(len(joined))) else torch.from_numpy(np.argsort(joined))


def _adapt(module: nn.Module, layer: Layer) -> None:
    """Tell attention its own number of heads, where Transformers reads it from the configuration or an attribute."""
    width = layer.num_heads * layer.head_dim
    known: dict[str, Any] = {
        "num_heads": layer.num_heads,
        "num_attention_heads": layer.num_heads,
        "num_key_value_heads": layer.num_kv_heads,
        "split_size": width,  # GPT-2
    }
    for attention in module.children():
        if not (hasattr(attention, "head_dim") or hasattr(attention, "head_size")):
            continue
        for key, value in known.items():
            if isinstance(getattr(attention, key, None), int):
                setattr(attention, key, value)
        config: Any = getattr(attention, "config", None)
        if config is not None and (config.num_attention_heads, _kv_heads(config)) != (
            layer.num_heads,
            layer.num_kv_heads,
        ):
            own = copy.deepcopy(config)
            head_dim = getattr(config, "head_dim", None)
            own.num_attention_heads = layer.num_heads
            if hasattr(config, "num_key_value_heads"):
                own.num_key_value_heads = layer.num_kv_heads
            if head_dim is not None:
                own.head_dim = head_dim
            attention.config = own


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
