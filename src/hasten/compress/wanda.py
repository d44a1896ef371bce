"""Which numbers of a matrix stay: by magnitude, or by magnitude times the size of the input (Wanda, Sun et al. 2023).

Pure functions of tensors on any device. A mask [N, K] is True where a number stays. Knows no model and no statistics:
the norms of the inputs are given. Which numbers stay is all that these methods decide; sparsegpt.py also changes them.
"""

import torch
from torch import Tensor


def magnitude(weight: Tensor, sparsity: float, pattern: tuple[int, int] | None = None) -> Tensor:
    """Mask that keeps the largest |w|, over the whole matrix, or n of each m inputs for pattern (n, m)."""
    scores = weight.abs()
    return keep_of_each(scores, *pattern) if pattern else keep_largest(scores.flatten(), sparsity).view_as(scores)


def wanda(weight: Tensor, norms: Tensor, sparsity: float, pattern: tuple[int, int] | None = None) -> Tensor:
    """Mask that keeps the largest |w_ij| * ||x_j|| of each output row, or n of each m inputs for pattern (n, m).

    norms [K]: root mean square of each input. Comparing within a row, not over the matrix, is what the paper found to
    matter: every output keeps the same number of inputs.
    """
    scores = weight.abs() * norms
    return keep_of_each(scores, *pattern) if pattern else keep_largest(scores, sparsity)


def keep_largest(scores: Tensor, sparsity: float) -> Tensor:
    """Mask of the last axis without the round(sparsity * length) smallest scores; exact where scores are equal."""
    removed = round(sparsity * scores.shape[-1])
    mask = torch.ones_like(scores, dtype=torch.bool)
    smallest = scores.topk(removed, dim=-1, largest=False).indices
    return mask.scatter_(-1, smallest, False)


def keep_of_each(scores: Tensor, n: int, m: int) -> Tensor:
    """Mask [N, K] of the n largest scores of each m successive ones. m must divide K."""
    grouped = scores.reshape(len(scores), -1, m)
    mask = torch.zeros_like(grouped, dtype=torch.bool)
    return mask.scatter_(-1, grouped.topk(n, dim=-1).indices, True).flatten(-2)
