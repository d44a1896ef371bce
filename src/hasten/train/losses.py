"""What a student loses by its logits: divergences from a teacher's next-token distributions, and the text's own loss.

P is the teacher's distribution, Q the student's, both at temperature T (Hinton et al. 2015):

    forward-kl       KL(P || Q)                                      covers all that the teacher says
    reverse-kl       KL(Q || P)                                      keeps to its modes (MiniLLM, Gu et al. 2023)
    jensen-shannon   b KL(P || M) + (1 - b) KL(Q || M), M = b P + (1 - b) Q     (GKD, Agarwal et al. 2023)

Times T^2, so that gradients keep their size when T changes. Over a large vocabulary the softmaxes are what takes
memory: rows are taken some at a time, and one gradient for all losses, known in closed form, is all that is kept.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

_CHUNK = 1 << 24  # logits that are worked on at a time

_At = tuple[slice, slice]  # sequences of a batch, positions
_Rows = Callable[[Tensor, _At], tuple[Tensor, Tensor]]  # logits in float32, their place -> losses, slopes


def divergence(
    student: Tensor, teacher: Tensor, kind: str, temperature: float = 1.0, beta: float = 0.5, chunk: int = _CHUNK
) -> Tensor:
    """Mean over the rows of logits [N, V], in nats, times temperature squared. Gradients go to the student alone."""
    return mixed_loss(student[None], teacher[None], None, kind, temperature, beta, chunk=chunk)


def mixed_loss(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor | None,
    kind: str,
    temperature: float = 1.0,
    beta: float = 0.5,
    weight: float = 1.0,
    start: int = 0,
    chunk: int = _CHUNK,
) -> Tensor:
    """weight times the divergence, plus 1 - weight times the nats of the targets, in the mean over positions.

    student: logits [b, T, V], of which those from position `start` on count, as many as the teacher's are [b, n, W];
    of tokens, the W first are compared. targets: [b, n]; None leaves the divergence alone, whatever its weight. One
    backward pass.
    """
    parts: list[tuple[float, _Rows]] = [(1.0 if targets is None else weight, _Taught(teacher, kind, temperature, beta))]
    if targets is not None:
        parts.append((1 - weight, _Told(targets)))
    place = slice(start, start + teacher.shape[1])
    result: Tensor = _Mixed.apply(student, parts, place, chunk)  # type: ignore[no-untyped-call]
    return result


def divergence_reference(
    student: Tensor, teacher: Tensor, kind: str, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """The same, slow and clear: what autograd makes of the definitions."""
    q = log_softmax(student.float() / temperature, -1)
    p = log_softmax(teacher.float() / temperature, -1)
    if kind == "forward-kl":
        value = kl_div(q, p, reduction="none", log_target=True)
    elif kind == "reverse-kl":
        value = kl_div(p, q, reduction="none", log_target=True)
    else:
        m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
        value = beta * kl_div(m, p, reduction="none", log_target=True)
        value = value + (1 - beta) * kl_div(m, q, reduction="none", log_target=True)
    return value.sum(-1).mean() * temperature**2


@dataclass(eq=False)
class _Taught:
    """The divergence of some rows [..., V] `at` their place, and its slopes."""

    teacher: Tensor
    kind: str
    temperature: float
    beta: float

    def __call__(self, logits: Tensor, at: _At) -> tuple[Tensor, Tensor]:
        known = self.teacher.shape[-1]
        q = log_softmax(logits[..., :known] / self.temperature, -1)
        p = log_softmax(self.teacher[at].float() / self.temperature, -1)
        values, slopes = _of_rows(q, p, self.kind, self.beta)
        # T^2 of the loss over T of the logits; tokens that the teacher does not know have no slope.
        return values * self.temperature**2, slopes.mul_(self.temperature)


@dataclass(eq=False)
class _Told:
    """The same of the nats of the tokens that a text has."""

    targets: Tensor

    def __call__(self, logits: Tensor, at: _At) -> tuple[Tensor, Tensor]:
        q = log_softmax(logits, -1)
        wanted = self.targets[at][..., None]
        slopes = q.exp()
        slopes.scatter_add_(-1, wanted, slopes.new_full(wanted.shape, -1))
        return -q.gather(-1, wanted)[..., 0], slopes


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, parts: list[tuple[float, _Rows]], place: slice, chunk: int) -> Tensor:
        gradient = torch.zeros(student.shape, dtype=student.dtype, device=student.device)
        counted, theirs = student[:, place], gradient[:, place]
        batch, count, columns = counted.shape
        rows = max(1, chunk // columns)
        some, many = max(1, rows // count), min(rows, count)  # whole sequences, or a part of one
        total = torch.zeros((), device=student.device)
        for top, left in product(range(0, batch, some), range(0, count, many)):
            at = slice(top, top + some), slice(left, left + many)
            logits = counted[at].float()
            for weight, part in parts:
                values, slopes = part(logits, at)
                total += weight * values.sum()
                theirs[at][..., : slopes.shape[-1]].add_(slopes, alpha=weight / (batch * count))
        ctx.gradient = gradient
        return total / (batch * count)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        gradient: Tensor = ctx.gradient
        ctx.gradient = None  # it is scaled in place
        return gradient.mul_(outer[0]), None, None, None


def _of_rows(q: Tensor, p: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """The divergence of each row of log-probabilities [..., V], and its gradient by the student's logits over T.

    Where D's gradient by Q is g, that by the logits is Q (g - sum Q g): a softmax's own.
    """
    if kind == "forward-kl":
        return (p.exp() * (p - q)).sum(-1), q.exp() - p.exp()
    if kind == "reverse-kl":
        values = (q.exp() * (q - p)).sum(-1)
        return values, q.exp() * (q - p - values[..., None])
    m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    from_student = (q.exp() * (q - m)).sum(-1)
    values = beta * (p.exp() * (p - m)).sum(-1) + (1 - beta) * from_student
    return values, (1 - beta) * q.exp() * (q - m - from_student[..., None])
