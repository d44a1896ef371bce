"""SmoothQuant (Xiao et al. 2022): what is difficult in activations is moved into weights, which round more easily.

Channel j of the input of some matrices is divided by s_j = max|X_j|^a / max|W_j|^(1 - a), their columns are multiplied
by it, with a the strength. The division goes into the norm in front.
"""

from collections.abc import Sequence

from torch import Tensor

from hasten.compress import fold
from hasten.compress.blocks import Block, Inputs
from hasten.compress.stage import Context, change_block
from hasten.compress.statistics import collect, groups_of
from hasten.steps import Smooth

_LEAST = 1e-5


def smoothing_scales(largest: Tensor, weights: Sequence[Tensor], strength: float) -> Tensor:
    """s [K] of inputs whose largest magnitudes are `largest` [K], read by matrices [N, K]."""
    columns = weights[0].float().abs().amax(0)
    for weight in weights[1:]:
        columns = columns.maximum(weight.float().abs().amax(0))
    scales = largest.clamp(min=_LEAST) ** strength / columns.clamp(min=_LEAST) ** (1 - strength)
    return scales.clamp(min=_LEAST).masked_fill((largest == 0) | (columns == 0), 1)


@change_block.register
def _(step: Smooth, block: Block, inputs: Inputs, context: Context) -> None:
    groups = [group for group in groups_of(block) if fold.norm_of(group[0]) is not None]
    found = collect(block, inputs, [role for group in groups for role in group])
    for group in groups:
        weights = [block.linears[role].weight for role in group]
        fold.into_norm(block, group, smoothing_scales(found[group[0]].largest, weights, step.strength))
