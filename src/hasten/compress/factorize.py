"""Factorize, block by block: ranks from one look at the whole model, factors on what the changed matrices give."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hasten.compress import lowrank
from hasten.compress.blocks import Block, Inputs
from hasten.compress.gptq import relative_error
from hasten.compress.plan import rank_multiple
from hasten.compress.stage import Context, change_block, survey
from hasten.compress.statistics import collect, groups_of
from hasten.compress.targets import matrix_shapes, targeted
from hasten.model.spec import ModelSpec
from hasten.steps import Factorize


@survey.register
@torch.no_grad()
def _(step: Factorize, blocks: Iterator[tuple[Block, Inputs]], context: Context) -> dict[str, Any]:
    """Ranks by name, None for a matrix that stays whole; empty where the step gives one rank for all."""
    if step.rank is not None:
        return {}
    spectra = {}
    for block, inputs in blocks:
        names = set(targeted(step, block.spec))
        roles = [role for role in block.linears if block.name(role) in names]
        seen = collect(block, inputs, roles, hessian=True) if step.method == "svd-llm" else {}
        for role in roles:
            hessian = seen[role].hessian if seen else None
            spectra[block.name(role)] = lowrank.spectrum(block.linears[role].weight, hessian)
    multiples = {name: rank_multiple(found.shape) for name, found in spectra.items()}
    return dict(lowrank.allocate(spectra, step.keep, multiples))


@change_block.register
@torch.no_grad()
def _(step: Factorize, block: Block, inputs: Inputs, context: Context) -> None:
    names, ranks = set(targeted(step, block.spec)), context.surveys[step]
    for group in groups_of(block):
        chosen: dict[str, int] = {}
        for role in group:
            name = block.name(role)
            rank = rank_of(step, tuple(block.linears[role].weight.shape), ranks.get(name)) if name in names else 0
            if rank:
                chosen[role] = rank
        if chosen:
            found = collect(block, inputs, list(chosen), hessian=True)
            _replace(step, block, chosen, {role: found[role].hessian for role in chosen}, context)
    if block.index == len(block.spec.layers) - 1:
        context.notes += whole(step, block.spec, ranks)


def rank_of(step: Factorize, shape: tuple[int, ...], given: int | None) -> int:
    """The rank of a matrix [N, K], or 0 where it stays whole."""
    rank = step.rank or given or 0
    return rank if rank * sum(shape) < shape[0] * shape[1] else 0


def whole(step: Factorize, spec: ModelSpec, ranks: Mapping[str, int | None]) -> list[str]:
    """A line for matrices of one kind that stay as they are, such as "layers.*.v (6)"."""
    shapes = matrix_shapes(spec)
    kinds: dict[str, list[str]] = {}
    for name in targeted(step, spec):
        if not rank_of(step, shapes[name], ranks.get(name)):
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    return [
        f"{names[0] if len(names) == 1 else f'{kind} ({len(names)})'}: stays as it is, two would hold no fewer numbers"
        for kind, names in kinds.items()
    ]


def _replace(
    step: Factorize, block: Block, ranks: dict[str, int], hessians: dict[str, Tensor], context: Context
) -> None:
    linears: dict[str, nn.Linear] = {}
    for role, linear in block.linears.items():
        if role not in ranks:
            linears[role] = linear
            continue
        weight, rank = linear.weight.float(), ranks[role]
        b, a = lowrank.factors(weight, hessians[role] if step.method == "svd-llm" else None, rank)
        context.lost(block.name(role), relative_error(weight, b @ a, hessians[role]))
        linears[f"{role}.a"], linears[f"{role}.b"] = _linear(a, None, linear), _linear(b, linear.bias, linear)
    ranked = tuple(sorted((*block.layer.ranks, *ranks.items())))
    block.reshape(replace(block.layer, ranks=ranked), linears)


def _linear(weight: Tensor, bias: nn.Parameter | None, like: nn.Linear) -> nn.Linear:
    out = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    out.weight = nn.Parameter(weight.to(like.weight.dtype), requires_grad=False)
    if bias is not None:
        out.bias = bias
    return out
