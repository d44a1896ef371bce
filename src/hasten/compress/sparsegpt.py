"""SparseGPT (Frantar & Alistarh 2023): zero numbers of a matrix and let those to their right make up for it.

Pure functions of tensors on any device; knows no model. With H the second moment of the inputs, the loss of a row's
change d is d H d^T. Columns are taken from the left. Setting w_j to zero while only the columns to its right may still
move costs w_j^2 / U_jj^2, and the best move is w_k -= w_j / U_jj * U_jk for k > j, where U is the upper Cholesky factor
of H^-1: row j of U holds what remains of the inverse when the columns before j are fixed (Optimal Brain Surgeon,
Hassibi et al. 1993, on one order of columns for all rows). So one factorisation serves the whole matrix.

Within a block of columns, masks are chosen by that cost as the columns stand at the block's start (for n:m, at each
group's start); what a block pushes to the right of itself is added when it is done, as one product.
"""

import torch
from torch import Tensor

from hasten.compress.gptq import inverse_factor
from hasten.compress.wanda import keep_largest, keep_of_each

BLOCK = 128


def prune(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
    damping: float = 0.01,
    block_size: int = BLOCK,
) -> Tensor:
    """`weight` [N, K] with a share `sparsity` of zeros in each block of columns, or n of each m inputs kept for pattern
    (n, m), and the rest changed to lose least under `hessian` [K, K].

    damping: added to the diagonal, as a share of its mean. float32 or float64, as the weight is.
    """
    return _solve(weight, hessian, sparsity, pattern, None, damping, block_size)


def adjust(weight: Tensor, hessian: Tensor, mask: Tensor, damping: float = 0.01, block_size: int = BLOCK) -> Tensor:
    """`weight` with zeros where `mask` [N, K] is False, the columns to the right of each changed to make up for it."""
    return _solve(weight, hessian, 0.0, None, mask, damping, block_size)


def _solve(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    pattern: tuple[int, int] | None,
    mask: Tensor | None,
    damping: float,
    block_size: int,
) -> Tensor:
    out = weight.clone()
    dead = hessian.diagonal() == 0  # an input that is always zero: its column does nothing
    out[:, dead] = 0
    upper = inverse_factor(hessian, damping)
    if pattern:
        block_size = max(block_size // pattern[1], 1) * pattern[1]
    for start in range(0, weight.shape[1], block_size):
        part = slice(start, min(start + block_size, weight.shape[1]))
        block, factor = out[:, part], upper[part, part]
        keep = mask[:, part] if mask is not None else None
        if keep is None and pattern is None:
            costs = (block / factor.diagonal()).square()
            keep = keep_largest(costs.flatten(), sparsity).view_as(costs)
        errors = _sweep(block, factor, keep, pattern)
        out[:, part.stop :] -= errors @ upper[part, part.stop :]
    return out


def _sweep(block: Tensor, factor: Tensor, keep: Tensor | None, pattern: tuple[int, int] | None) -> Tensor:
    """Zero one column of the block after the other, in place; the errors [N, b] that each leaves, over U_jj."""
    errors = torch.zeros_like(block)
    diagonal = factor.diagonal()
    mask = torch.ones_like(block, dtype=torch.bool) if keep is None else keep
    for j in range(block.shape[1]):
        if keep is None and pattern is not None and j % pattern[1] == 0:
            group = slice(j, j + pattern[1])
            mask[:, group] = keep_of_each((block[:, group] / diagonal[group]).square(), *pattern)
        errors[:, j] = block[:, j].masked_fill(mask[:, j], 0) / diagonal[j]
        block[:, j:] -= torch.outer(errors[:, j], factor[j, j:])
        block[:, j] *= mask[:, j]  # exactly zero, whatever the rounding
    return errors
