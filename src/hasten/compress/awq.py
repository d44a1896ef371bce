"""AWQ (Lin et al. 2023): input channels that carry much are made larger before rounding, so that they lose less.

Channel j of the weights is multiplied by s_j, its input divided by it. s = (mean|x_j|)^a; of 20 values of a the one
with the least error of the rounded product's outputs is taken: sum over rows of e H e^T with e = Q(W s) / s - W and H
the inputs' second moments. Then each group's range is clipped to where its own part of that error is least.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.compress.gptq import output_error
from hasten.compress.grid import Grid

_STEPS = 20


def channel_scales(
    weights: Sequence[Tensor], absolute: Tensor, hessian: Tensor, grids: Sequence[Grid], groups: Sequence[int]
) -> Tensor:
    """s [K] for matrices [N, K] that read one input with these mean magnitudes [K]; grids, groups: of each matrix."""
    best, best_error = torch.ones_like(absolute), torch.inf
    for step in range(_STEPS):
        scales = _scales_of(absolute, step / _STEPS)
        error = 0.0
        for weight, grid, group in zip(weights, grids, groups, strict=True):
            error += float(output_error(grid.rounded(weight * scales, group) / scales - weight, hessian))
        if error < best_error:
            best, best_error = scales, error
    return best


def quantize(
    weight: Tensor, hessian: Tensor, grid: Grid, group_size: int = 0, clip: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], scales [N, G], zeros [N, G]. clip: ranges suit the outputs, not the weights alone."""
    columns = weight.shape[1]
    group = group_size or columns
    codes, scales, zeros = [], [], []
    for start in range(0, columns, group):
        part = slice(start, start + group)
        scale, zero = grid.fit(weight[:, part], hessian[part, part] if clip else None)
        codes.append(grid.codes(weight[:, part], scale, zero))
        scales.append(scale)
        zeros.append(zero)
    return torch.cat(codes, 1), torch.cat(scales, 1), torch.cat(zeros, 1)


def _scales_of(absolute: Tensor, power: float) -> Tensor:
    scales = absolute.clamp(min=1e-4) ** power
    return scales / (scales.max() * scales.min()).sqrt()
