"""Prune, block by block: matrices in the order of use, each on what the pruned ones before it give."""

import torch
from torch import Tensor

from hasten.compress import sparsegpt, wanda
from hasten.compress.blocks import Block, Inputs
from hasten.compress.gptq import relative_error
from hasten.compress.stage import Context, change_block
from hasten.compress.statistics import collect, groups_of
from hasten.compress.targets import targeted
from hasten.steps import Prune

PATTERNS = {"unstructured": None, "2:4": (2, 4)}


@change_block.register
@torch.no_grad()
def _(step: Prune, block: Block, inputs: Inputs, context: Context) -> None:
    names = set(targeted(step, block.spec))
    for group in groups_of(block):
        roles = [role for role in group if block.name(role) in names]
        found = collect(block, inputs, roles, hessian=True) if roles else {}
        for role in roles:
            linear, hessian = block.linears[role], found[role].hessian
            before = linear.weight.float()
            after = pruned(step, before, hessian)
            context.lost(block.name(role), relative_error(before, after, hessian))
            linear.weight.data = after.to(linear.weight.dtype)


def pruned(step: Prune, weight: Tensor, hessian: Tensor) -> Tensor:
    """`weight` [N, K] under the step, given the second moment of its inputs [K, K]."""
    pattern = PATTERNS[step.pattern]
    if step.method == "sparsegpt":
        return sparsegpt.prune(weight, hessian, step.sparsity, pattern)
    if step.method == "wanda":
        return weight * wanda.wanda(weight, hessian.diagonal().sqrt(), step.sparsity, pattern)
    return weight * wanda.magnitude(weight, step.sparsity, pattern)
