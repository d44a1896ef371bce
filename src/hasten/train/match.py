"""Matching inside: hidden states (TinyBERT, Jiao et al. 2020) and attention (MiniLM, Wang et al. 2020), layer by layer.

A student's layer learns from the teacher's layer of like depth, or from the one that a recipe names. Where widths
differ, a projection is trained with the student and dropped at the end. Knows outputs as Transformers gives them,
and no recipe.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss


def like_depth(student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """Each of the student's layers with the teacher's that it learns from: evenly, the last from the last; where the
    student is the deeper one, its first from the first."""
    return tuple((index, max(0, (index + 1) * teacher // student - 1)) for index in range(student))


def projection(student: int, teacher: int, seed: int = 0) -> nn.Module:
    """Takes hidden states of the student's width to the teacher's."""
    if student == teacher:
        return nn.Identity()
    linear = nn.Linear(student, teacher, bias=False)
    nn.init.orthogonal_(linear.weight, generator=torch.Generator().manual_seed(seed))
    return linear


def hidden_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], layers: Sequence[tuple[int, int]], project: nn.Module
) -> Tensor:
    """Mean squared error of hidden states over the teacher's mean square, so that it says a share.

    student, teacher: as Transformers' hidden_states, the embedding first, each [b, T, H]. layers: pairs of theirs.
    """
    losses = []
    for index, other in layers:
        wanted = teacher[other + 1].float()
        losses.append(mse_loss(project(student[index + 1]).float(), wanted) / wanted.square().mean().clamp(min=1e-8))
    return torch.stack(losses).mean()


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], layers: Sequence[tuple[int, int]]) -> Tensor:
    """Mean KL(teacher || student) of what each position attends to [b, heads, T, T]. Where the two have different
    numbers of heads, the means over heads are compared."""
    losses = []
    for index, other in layers:
        q, p = student[index].float(), teacher[other].float()
        if q.shape[1] != p.shape[1]:
            q, p = q.mean(1), p.mean(1)
        floor = torch.finfo(torch.float32).tiny
        losses.append((p * (p.clamp(min=floor).log() - q.clamp(min=floor).log())).sum(-1).mean())
    return torch.stack(losses).mean()
