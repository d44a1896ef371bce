"""GPTQ (Frantar et al. 2022): columns are rounded one after the other, and each one's error is made up for by the
columns that are still free, as the inputs' second moments say.

With H = mean of x x^T and U upper triangular, U^T U = H^-1: rounding column j of W to q_j leaves the error
e = (w_j - q_j) / U_jj, and the columns behind it become W_k - e U_jk, which is the least squared output error that they
can reach (Optimal Brain Surgeon). 128 columns are handled at a time; what lies behind them is updated once.
"""

import torch
from torch import Tensor

from hasten.compress.grid import Grid, spread

_COLUMNS = 128  # a multiple of every group size


def quantize(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    group_size: int = 0,
    act_order: bool = False,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], scales [N, G] and zeros [N, G] of `weight` [N, K], with G groups of group_size columns (0: one).

    act_order: columns with the largest inputs first; then scales are those of the original weights. Otherwise a group's
    scales suit its weights as they are when its turn comes. What is exactly zero in `weight`, as pruning leaves it,
    stays so.
    """
    weight = weight.clone()
    rows, columns = weight.shape
    group = group_size or columns
    free = weight != 0
    metric = hessian.diagonal()
    scales = torch.empty((rows, columns // group), dtype=weight.dtype, device=weight.device)
    zeros = torch.empty_like(scales)
    early = act_order or not group_size
    if early:
        for index in range(columns // group):
            part = slice(index * group, (index + 1) * group)
            scales[:, index : index + 1], zeros[:, index : index + 1] = grid.fit(weight[:, part], metric[part])
    order = metric.argsort(descending=True) if act_order else torch.arange(columns, device=weight.device)
    group_of = (order // group).tolist()
    if act_order:
        weight, free, hessian = weight[:, order], free[:, order], hessian[order][:, order]
    factor = inverse_factor(hessian, damping)
    codes = torch.empty_like(weight)
    for start in range(0, columns, _COLUMNS):
        stop = min(start + _COLUMNS, columns)
        block, inner = weight[:, start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for j in range(stop - start):
            column = start + j
            index = group_of[column]
            if not early and column % group == 0:
                found = grid.fit(block[:, j : j + group], metric[column : column + group])
                scales[:, index : index + 1], zeros[:, index : index + 1] = found
            scale, zero, w = scales[:, index], zeros[:, index], block[:, j]
            code = torch.where(free[:, column], grid.codes(w, scale, zero), zero)
            codes[:, column] = code
            errors[:, j] = (w - (code - zero) * scale) / inner[j, j]
            block[:, j:] -= errors[:, j, None] * inner[j, j:]
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes[:, order.argsort()], scales, zeros


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with U^T U the inverse of the damped Hessian.

    H = R R^T with R upper triangular (the Cholesky factor of H with rows and columns reversed), and U = R^-1. More
    damping is tried where H is too near to singular.
    """
    size = hessian.shape[0]
    diagonal = hessian.diagonal()
    dead = diagonal == 0  # an input that is always zero: its column is rounded, and nothing is made up
    mean = diagonal.mean().clamp(min=torch.finfo(hessian.dtype).tiny)
    for _ in range(4):
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        damped.diagonal()[dead] = mean
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        del damped
        if not failed:
            identity = torch.eye(size, dtype=hessian.dtype, device=hessian.device)
            factor: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
            return factor.flip(0, 1)
        damping *= 10
    raise ArithmeticError("the inputs' second moments have no Cholesky factor: they hold NaN or infinity")


def numbers(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The numbers [N, K] that codes stand for."""
    group = codes.shape[1] // scales.shape[1]
    return (codes - spread(zeros, group)) * spread(scales, group)


def output_error(error: Tensor, hessian: Tensor) -> Tensor:
    """Mean over inputs of |E x|^2, summed over rows."""
    return (error @ hessian * error).sum()
