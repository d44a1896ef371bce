"""Recover(method="lora"): low-rank additions W + M * (B A) to every matrix of the layers, trained alone and merged
(LoRA, Hu et al. 2021). M is 0 where W was pruned, so that what is zero stays zero.

A starts random and B at zero: the model starts as it is. As parametrizations of torch, which merge by themselves.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hasten.compress.stage import Context, run_step
from hasten.steps import Distill, Recover
from hasten.train.distill import Lesson, load_teacher
from hasten.train.finetune import train
from hasten.train.folder import Opened, frozen_dtype, open_folder, write_folder
from hasten.train.masks import is_pruned
from hasten.train.teacher import check_teacher
from hasten.train.text import sequences_of


@run_step.register
def _(step: Recover, source: Path, target: Path, context: Context) -> None:
    opened = open_folder(source, context.device, frozen_dtype(source, context.device))
    wanted = Distill(
        text=step.text, steps=step.steps, batch_size=step.batch_size, sequence_len=step.sequence_len,
        learning_rate=step.rate, weight_decay=0.0, seed=step.seed, weight=step.weight,
    )  # fmt: skip
    lesson = None
    if step.weight:
        vocab = check_teacher(context.original, source)
        lesson = Lesson(wanted, load_teacher(context.original, context.device), nn.Identity(), vocab)
    sequences, training = sequences_of(wanted, opened.checkpoint, context)
    add(opened, step.rank, step.seed)
    train(step, training, opened, sequences, context, lesson)
    merge(opened)
    write_folder(opened, target)


class Addition(nn.Module):
    """W -> W + M * (B A)."""

    keep: Tensor | None

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        start = torch.randn(rank, columns, generator=generator) / columns**0.5
        self.a = nn.Parameter(start.to(weight.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        keep = weight.detach() != 0
        self.register_buffer("keep", keep if is_pruned(keep) else None, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        addition = self.b @ self.a
        return (weight + (addition if self.keep is None else addition * self.keep)).to(weight.dtype)


def add(opened: Opened, rank: int, seed: int) -> None:
    """Freeze the model, and add to each matrix of its layers; to factors of low rank no more than theirs."""
    opened.model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for linear in opened.matrices().values():
        most = min(linear.weight.shape)
        parametrize.register_parametrization(linear, "weight", Addition(linear.weight, min(rank, most), generator))


def merge(opened: Opened) -> None:
    """The additions become part of the weights."""
    for linear in opened.matrices().values():
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
