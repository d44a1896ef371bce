"""Quantize, block by block: which matrix takes which format by which method. In the order of use, so that each matrix
sees the inputs that rounding those before it leaves."""

from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from hasten.backends.torch.tensors import to_weight
from hasten.compress import awq, fold, gptq, rtn
from hasten.compress.blocks import Block, Inputs
from hasten.compress.grid import Grid, pack
from hasten.compress.stage import Context, change_block
from hasten.compress.statistics import Statistics, collect, groups_of
from hasten.compress.targets import stored_as
from hasten.compress.threshold import wide
from hasten.hardware import usable_threads
from hasten.model.formats import Format
from hasten.model.fp8 import LARGEST
from hasten.steps import Quantize

_LEAST = 1e-6  # of a scale of inputs
Found = tuple[Tensor, Tensor, Tensor]  # codes [N, K], scales and zeros [N, G]


@change_block.register
def _(step: Quantize, block: Block, inputs: Inputs, context: Context) -> None:
    wanted = {role for role in block.linears if _format(step, block, role, context) is not None}
    if step.method == "awq":
        _scale_channels(step, block, wanted, inputs, context)
    for group in groups_of(block):
        roles = [role for role in group if role in wanted]
        if not roles:
            continue
        found = collect(block, inputs, roles, hessian=True)[roles[0]]
        if step.method == "rtn":
            for role in roles:
                _round(step, block, role, found, context)
            continue
        formats = [_format(step, block, role, context) for role in roles]
        for fmt in dict.fromkeys(formats):
            assert fmt is not None
            alike = [role for role, other in zip(roles, formats, strict=True) if other == fmt]
            _fit(step, block, alike, fmt, found.hessian, context)


def _format(step: Quantize, block: Block, role: str, context: Context) -> Format | None:
    """What this step stores a matrix as; None where it leaves it alone."""
    name = block.name(role)
    if context.plan.steps.get(name) != step:
        return None
    kind = step.format if step.threshold is None else context.surveys[step]["kinds"][name]
    if kind == "keep":
        return None
    planned = context.plan.formats[name]
    return planned if kind == step.format else stored_as(wide(step), block.spec, block.linears[role].weight.shape[1])


def _round(step: Quantize, block: Block, role: str, found: Statistics, context: Context) -> None:
    before = block.linears[role].weight.float().clone()
    dense = to_weight(before, "fp32")
    fmt = _format(step, block, role, context)
    assert fmt is not None
    bits = step.bits if fmt.kind == step.format else None
    with ThreadPoolExecutor(usable_threads()) as pool:
        weight = rtn.quantize(block.name(role), dense, fmt, pool, bits=bits)
    if step.activations == "fp8-static":
        scale = (found.largest.max() / LARGEST).clamp(min=_LEAST).bfloat16().float()
        weight = replace(weight, input_scale=scale.reshape(1).cpu().numpy())
    block.store(role, weight)
    context.lost(block.name(role), gptq.relative_error(before, block.linears[role].weight.float(), found.hessian))


def _fit(step: Quantize, block: Block, roles: Sequence[str], fmt: Format, hessian: Tensor, context: Context) -> None:
    """Matrices that read the same input and take the same format, by GPTQ (all at once) or AWQ."""
    if step.method == "awq":
        for role in roles:
            # Clipping queries and keys does harm, as AWQ's authors found.
            before = block.linears[role].weight.float()
            found = awq.quantize(before, hessian, _grid(step, fmt), fmt.group_size, clip=role not in ("q", "k"))
            _store(block, role, fmt, before, found, hessian, context)
        return
    matrices = [block.linears[role].weight.float() for role in roles]
    rows = [len(matrix) for matrix in matrices]
    found = gptq.quantize(torch.cat(matrices), hessian, _grid(step, fmt), fmt.group_size, step.act_order, step.damping)
    parts = zip(*(torch.split(values, rows) for values in found), strict=True)
    for role, before, part in zip(roles, matrices, parts, strict=True):
        _store(block, role, fmt, before, part, hessian, context)


def _store(
    block: Block, role: str, fmt: Format, before: Tensor, found: Found, hessian: Tensor, context: Context
) -> None:
    numbers = gptq.numbers(*found)
    context.lost(block.name(role), gptq.relative_error(before, numbers, hessian))
    block.store(role, pack(fmt, *found), numbers)


def _scale_channels(step: Quantize, block: Block, wanted: Set[str], inputs: Inputs, context: Context) -> None:
    """AWQ's scales, folded into what is in front of the matrices, where there is something that takes them exactly: all
    of a block before one of its matrices is stored, since what has its final form takes none."""
    statistics = collect(block, inputs, wanted, hessian=True)
    for group in groups_of(block):
        roles, front = [role for role in group if role in wanted], _in_front(block, group)
        if not roles or front is None or not block.stored.keys().isdisjoint((front, *group)):
            continue
        formats = [fmt for role in roles if (fmt := _format(step, block, role, context)) is not None]
        weights = [block.linears[role].weight.float() for role in roles]
        grids, groups = [_grid(step, fmt) for fmt in formats], [fmt.group_size for fmt in formats]
        found = statistics[roles[0]]
        scales = awq.channel_scales(weights, found.absolute, found.hessian, grids, groups)
        if front in block.norms:
            fold.into_norm(block, group, scales)
        else:
            fold.into_matrix(block, front, group[0], scales)


def _in_front(block: Block, group: Sequence[str]) -> str | None:
    """The norm or matrix whose outputs, channel by channel, these matrices read."""
    norm = fold.norm_of(group[0])
    if norm is not None:
        return norm if block.spec.pre_norm else None
    if group == ("o",):
        return "v" if block.layer.num_heads == block.layer.num_kv_heads else None
    return "up" if "gate" in block.linears else None


def _grid(step: Quantize, fmt: Format) -> Grid:
    return Grid(8 if fmt.kind == "int8" else step.bits or 4, fmt.symmetric)
