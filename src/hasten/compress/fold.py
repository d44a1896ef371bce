"""Scales of input channels moved from one side of a product to the other: the model computes the same.

The vector or matrix in front is divided, the matrices that read it are multiplied. What is in front is rounded to the
model's dtype first, and the matrices take the scale that this leaves, so that rounding loses nothing.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from hasten.backends.torch.tensors import TORCH_DTYPES
from hasten.compress.blocks import Block
from hasten.compress.targets import NORM_OF


def norm_of(role: str) -> str | None:
    """The norm whose outputs a matrix reads, or the first of the two that it was split into; None where it is none."""
    return NORM_OF.get(role.removesuffix(".a"))


@torch.no_grad()
def into_norm(block: Block, roles: Sequence[str], scales: Tensor) -> None:
    """Divide what the norm before `roles` gives by `scales` [K], and multiply the columns of all that read it: these
    roles, and a router of experts."""
    name = norm_of(roles[0])
    assert name is not None
    norm = block.norms[name]
    if name == "mlp_norm" and "router" in block.linears:
        roles = (*roles, "router")
    offset = block.spec.norm_offset
    weight = cast(nn.Parameter, norm.weight)
    before = weight.float() + offset
    after = _rounded(before / scales - offset, block) + offset
    fits = (before != 0) & (after != 0) & after.isfinite()  # else the channel is left as it is
    left = torch.where(fits, before / after, torch.ones_like(before))
    weight.data = torch.where(fits, after - offset, weight.float()).to(weight.dtype)
    bias = getattr(norm, "bias", None)
    if bias is not None:
        bias.data = (bias.float() / left).to(bias.dtype)
    for role in roles:
        _multiply(block.linears[role], left)


@torch.no_grad()
def into_matrix(block: Block, front: str, role: str, scales: Tensor) -> None:
    """Divide the outputs of `front` by `scales` [K], and multiply the columns of `role` that reads them."""
    matrix = block.linears[front]
    matrix.weight.data = (matrix.weight.float() / scales[:, None]).to(matrix.weight.dtype)
    if matrix.bias is not None:
        matrix.bias.data = (matrix.bias.float() / scales).to(matrix.bias.dtype)
    _multiply(block.linears[role], scales)


def _multiply(linear: nn.Linear, scales: Tensor) -> None:
    linear.weight.data = (linear.weight.float() * scales).to(linear.weight.dtype)


def _rounded(values: Tensor, block: Block) -> Tensor:
    return values.to(TORCH_DTYPES[block.spec.dtype]).float()
