"""Divergences between a teacher's and a student's next-token distributions, as pure functions of logits.

P is the teacher's distribution, Q the student's, both at temperature T (Hinton et al. 2015):

    forward-kl       KL(P || Q)                                      covers all that the teacher says
    reverse-kl       KL(Q || P)                                      keeps to its modes (MiniLLM, Gu et al. 2023)
    jensen-shannon   b KL(P || M) + (1 - b) KL(Q || M), M = b P + (1 - b) Q     (GKD, Agarwal et al. 2023)

Times T^2, so that gradients keep their size when T changes. Over a large vocabulary the softmaxes are what takes
memory: rows are taken some at a time, and their gradients, known in closed form, are all that is kept.
"""

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

_CHUNK = 1 << 24  # logits that are worked on at a time


def divergence(
    student: Tensor, teacher: Tensor, kind: str, temperature: float = 1.0, beta: float = 0.5, chunk: int = _CHUNK
) -> Tensor:
    """Mean over the rows of logits [n, V] or [b, n, V], in nats, times temperature squared. Gradients go to the student
    alone. Parts of larger tensors are read in place."""
    if student.ndim == 2:
        student, teacher = student[None], teacher[None]
    result: Tensor = _Divergence.apply(  # type: ignore[no-untyped-call]
        student, teacher, kind, temperature, beta, chunk
    )
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


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, kind: str, temperature: float, beta: float, chunk: int
    ) -> Tensor:
        batch, count, columns = student.shape
        rows = max(1, chunk // columns)
        gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        total = torch.zeros((), device=student.device)
        for index, start in product(range(batch), range(0, count, rows)):
            part = index, slice(start, start + rows)
            q = log_softmax(student[part].float() / temperature, -1)
            p = log_softmax(teacher[part].float() / temperature, -1)
            values, slopes = _of_rows(q, p, kind, beta)
            total += values.sum()
            gradient[part] = slopes * (temperature / (batch * count))  # T^2 of the loss over T of the logits
        ctx.save_for_backward(gradient)
        return total * (temperature**2 / (batch * count))

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None, None, None, None, None


def _of_rows(q: Tensor, p: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """The divergence of each row of log-probabilities [n, V], and its gradient by the student's logits over T.

    Where D's gradient by Q is g, that by the logits is Q (g - sum Q g): a softmax's own.
    """
    if kind == "forward-kl":
        return (p.exp() * (p - q)).sum(-1), q.exp() - p.exp()
    if kind == "reverse-kl":
        values = (q.exp() * (q - p)).sum(-1)
        return values, q.exp() * (q - p - values[:, None])
    m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    from_student = (q.exp() * (q - m)).sum(-1)
    values = beta * (p.exp() * (p - m)).sum(-1) + (1 - beta) * from_student
    return values, (1 - beta) * q.exp() * (q - m - from_student[:, None])
