"""SparseGPT (Frantar & Alistarh 2023): zero numbers of a matrix and let those to their right make up for it.

Pure functions of tensors on any device; knows no model. With H the second moment of the inputs, the loss of a row's
change d is d H d^T. Columns are taken from the left. Setting w_j to zero while only the columns to its right may still
move costs w_j^2 / U_jj^2, and the best move is w_k -= w_j / U_jj * U_jk for k > j, where U is the upper Cholesky factor
of H^-1: row j of U holds what remains of the inverse when the columns before j are fixed (Optimal Brain Surgeon,
Hassibi et al. 1993, on one order of columns for all rows). So one factorisation serves the whole matrix.

Within a block of columns, masks are chosen by that cost as the columns stand at the block's start (for n:m, at each
group's start); what a block pushes to the right of itself is added when it is done, as one product.

Beyond the paper: with the mask given, the weights that stay are then fitted to the least loss that it allows, which the
sweep does not reach, since a column never makes up for one to its right (as in ALPS, Meng et al. 2024).
"""

import torch
from torch import Tensor

from hasten.compress.gptq import inverse_factor
from hasten.compress.wanda import keep_largest, keep_of_each

BLOCK = 128
_STEPS = 10  # of conjugate gradients; more gain nothing


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
    return refit(weight, sweep(weight, hessian, sparsity, pattern, damping, block_size), hessian, damping)


def sweep(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
    damping: float = 0.01,
    block_size: int = BLOCK,
) -> Tensor:
    """The paper's pass over the columns."""
    out = weight.clone()
    out[:, hessian.diagonal() == 0] = 0  # an input that is always zero: its column does nothing
    upper = inverse_factor(hessian, damping)
    if pattern:
        block_size = max(block_size // pattern[1], 1) * pattern[1]
    for start in range(0, weight.shape[1], block_size):
        part = slice(start, min(start + block_size, weight.shape[1]))
        block, factor = out[:, part], upper[part, part]
        keep = None
        if pattern is None:
            costs = (block / factor.diagonal()).square()
            keep = keep_largest(costs.flatten(), sparsity).view_as(costs)
        errors = _sweep_block(block, factor, keep, pattern)
        out[:, part.stop :] -= errors @ upper[part, part.stop :]
    return out


def refit(weight: Tensor, pruned: Tensor, hessian: Tensor, damping: float = 0.01) -> Tensor:
    """`pruned` [N, K] with what is not zero moved to where it loses least against `weight`: least squares of each row,
    all rows at once, by conjugate gradients from where it stands, divided by the Hessian's diagonal."""
    kept, out = pruned != 0, pruned.clone()
    damped = hessian.clone()
    damped.diagonal().add_(damping * hessian.diagonal().mean())
    size = damped.diagonal().clamp(min=torch.finfo(weight.dtype).tiny)
    left = ((weight - out) @ damped) * kept
    direction = left / size
    length = (left * direction).sum(1, keepdim=True)
    for _ in range(_STEPS):
        pushed = (direction @ damped) * kept
        step = _over(length, (direction * pushed).sum(1, keepdim=True))
        out += step * direction
        left -= step * pushed
        before, length = length, (left * left / size).sum(1, keepdim=True)
        direction = left / size + _over(length, before) * direction
    return out


def _over(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where a row is at its end."""
    return torch.where(b > 0, a / b, 0)


def _sweep_block(block: Tensor, factor: Tensor, keep: Tensor | None, pattern: tuple[int, int] | None) -> Tensor:
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
