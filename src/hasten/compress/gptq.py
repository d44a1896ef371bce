"""GPTQ (Frantar et al. 2022): columns are rounded one after the other, and each one's error is made up for by the
columns that are still free, as the inputs' second moments say.

With H = mean of x x^T and U upper triangular, U^T U = H^-1: rounding column j of W to q_j leaves the error
e = (w_j - q_j) / U_jj, and the columns behind it become W_k - e U_jk, which is the least squared output error that they
can reach (Optimal Brain Surgeon). 128 columns are handled at a time; what lies behind them is updated once.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hasten.compress.grid import Grid, spread
from hasten.errors import ModelError

Solve = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

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
    early = act_order or not group_size
    scales, zeros = _fitted(weight, metric, grid, group) if early else _room(weight, columns // group)
    order = metric.argsort(descending=True) if act_order else torch.arange(columns, device=weight.device)
    if act_order:
        weight, free, hessian = weight[:, order], free[:, order], hessian[order][:, order]
    group_of = order // group
    factor = inverse_factor(hessian, damping)
    codes = torch.empty_like(weight)
    step = _COLUMNS if early else group
    solve = _solver(grid, weight.device, rows, min(step, columns), columns)
    for start in range(0, columns, step):
        part = slice(start, min(start + step, columns))
        if not early:
            here = slice(start // group, start // group + 1)
            scales[:, here], zeros[:, here] = grid.fit(weight[:, part], metric[part])
        mine = group_of[part]
        codes[:, part], errors = solve(
            weight[:, part], factor[part, part], scales[:, mine], zeros[:, mine], free[:, part]
        )
        weight[:, part.stop :] -= errors @ factor[part, part.stop :]
    return codes[:, order.argsort()], scales, zeros


def solve_columns(
    weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, free: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Codes [N, c] of a run of columns, and what each one's rounding leaves to those behind the run, [N, c].

    weight, scales, zeros, free: [N, c], a scale for each number; factor: the run's own part of U, [c, c].
    """
    weight, codes, errors = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
    for j in range(weight.shape[1]):
        w, scale, zero = weight[:, j], scales[:, j], zeros[:, j]
        code = torch.where(free[:, j], grid.codes(w, scale, zero), zero)
        codes[:, j] = code
        errors[:, j] = (w - (code - zero) * scale) / factor[j, j]
        weight[:, j + 1 :] -= errors[:, j, None] * factor[j, j + 1 :]
    return codes, errors


def _solver(grid: Grid, device: torch.device, rows: int, run: int, columns: int) -> Solve:
    """solve_columns; on a GPU as a graph for runs of this shape, since launching a dozen small kernels a column, one by
    one, takes longer than what they do."""
    plain: Solve = partial(solve_columns, grid=grid)
    if device.type != "cuda" or columns < 2 * run:
        return plain
    shapes = [(rows, run), (run, run), (rows, run), (rows, run)]
    weight, factor, scales, zeros = (torch.ones(shape, device=device) for shape in shapes)
    free = torch.ones((rows, run), dtype=torch.bool, device=device)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):  # torch.cuda.graph would give all cached memory back first, matrix after matrix
        graph.capture_begin()
        found = plain(weight, factor, scales, zeros, free)
        graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)

    def replayed(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        if tensors[0].shape != weight.shape:  # the last run may be shorter
            return plain(*tensors)
        for target, tensor in zip((weight, factor, scales, zeros, free), tensors, strict=True):
            target.copy_(tensor)
        graph.replay()
        return found

    return replayed


def _fitted(weight: Tensor, metric: Tensor, grid: Grid, group: int) -> tuple[Tensor, Tensor]:
    scales, zeros = _room(weight, weight.shape[1] // group)
    for index in range(scales.shape[1]):
        part, here = slice(index * group, (index + 1) * group), slice(index, index + 1)
        scales[:, here], zeros[:, here] = grid.fit(weight[:, part], metric[part])
    return scales, zeros


def _room(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    scales = weight.new_empty((len(weight), groups))
    return scales, torch.empty_like(scales)


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
        damping = max(10 * damping, 1e-4)
    raise ModelError("the inputs' second moments have no Cholesky factor: they hold NaN or infinity")


def numbers(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The numbers [N, K] that codes stand for."""
    group = codes.shape[1] // scales.shape[1]
    return (codes - spread(zeros, group)) * spread(scales, group)


def output_error(error: Tensor, hessian: Tensor) -> Tensor:
    """Mean over inputs of |E x|^2, summed over rows."""
    return (error @ hessian * error).sum().clamp(min=0)


def relative_error(before: Tensor, after: Tensor, hessian: Tensor) -> float:
    """Squared error of the outputs over their square, over inputs with this second moment."""
    return float(output_error(after - before, hessian) / output_error(before, hessian).clamp(min=1e-30))
