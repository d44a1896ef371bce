"""Bits for each matrix from the share of quality that may be lost: measured, then the cheapest bits first.

On text that calibration does not see, each group of matrices that read one input is rounded alone, in each format that
is narrower than what it has, and the model run on: how far its distributions move from the original's (KL divergence,
nats a token) is what that format costs there. Costs are taken to add up. From all matrices as they are, the steps that
save the most bytes for what they cost are taken while the sum stays within threshold * the original's own nats a token.

All variants go through the blocks side by side, so each block is loaded once. Rounding to nearest stands in for the
method that is used in the end, which does better.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.compress.blocks import Block, Inputs, Skeleton
from hasten.compress.grid import Grid
from hasten.compress.plan import stored_as
from hasten.compress.stage import Context, survey
from hasten.compress.statistics import groups_of
from hasten.model.checkpoint import open_checkpoint
from hasten.model.formats import Format, bytes_of
from hasten.steps import Quantize, Step

Options = Sequence[tuple[int, float]]  # bytes and cost, the widest first
Variant = tuple[str, int]  # matrices that are rounded, and to which of their options


def choose(options: Mapping[str, Options], budget: float) -> dict[str, int]:
    """Which option each unit takes, by index: few bytes at costs that sum to at most `budget`, what saves the most for
    what it costs first. The first option of each is where it starts from."""
    chosen = dict.fromkeys(options, 0)
    spent = sum(option[0][1] for option in options.values())
    while True:
        moves = []
        for unit, found in options.items():
            size, cost = found[chosen[unit]]
            for index in range(chosen[unit] + 1, len(found)):
                saved, lost = size - found[index][0], found[index][1] - cost
                if saved > 0 and spent + lost <= budget:
                    moves.append((lost / saved, unit, index, lost))
        if not moves:
            return chosen
        _, unit, index, lost = min(moves)
        chosen[unit] = index
        spent += lost


@survey.register
def _(step: Quantize, blocks: Iterator[tuple[Block, Inputs]], context: Context) -> dict[str, Any] | None:
    """The kind of format that each targeted matrix takes: that of the step, int8, or none ("keep")."""
    if step.threshold is None:
        return None
    skeleton = Skeleton(open_checkpoint(context.source), context.device)
    tokens = context.tokens.held_out()
    original = skeleton.inputs(tokens)
    variants: dict[Variant, Inputs] = {}
    members: dict[str, list[str]] = {}
    sizes: dict[str, list[int]] = {}
    num_blocks = len(skeleton.spec.layers)
    for index in range(num_blocks):
        context.tell(0, f"measuring what rounding costs: block {index + 1} of {num_blocks}")
        block = skeleton.block(index)
        for inputs in variants.values():
            inputs.advance(block)
        for group in groups_of(block):
            roles = [role for role in group if context.plan.steps.get(block.name(role)) == step]
            if not roles:
                continue
            unit = block.name("+".join(roles))
            members[unit] = [block.name(role) for role in roles]
            sizes[unit] = [_bytes(block, roles, [Format(skeleton.spec.dtype)] * len(roles))]
            for number, formats in enumerate(_narrower(step, block, roles, context), 1):
                sizes[unit].append(_bytes(block, roles, formats))
                variants[unit, number] = _rounded(step, block, roles, formats, original)
        original.advance(block)
    nats, costs = _costs(_Head(skeleton), original, variants, tokens)
    options = {
        unit: [(size, costs.get((unit, number), 0.0)) for number, size in enumerate(found)]
        for unit, found in sizes.items()
    }
    chosen = choose(options, step.threshold * nats)
    kinds = ("keep", *(kind for kind in ("int8", step.format) if kind in _kinds(step)))
    return {
        "kinds": {name: kinds[index] for unit, index in chosen.items() for name in members[unit]},
        "costs": {unit: [cost for _, cost in found] for unit, found in options.items()},
        "expected": sum(options[unit][index][1] for unit, index in chosen.items()) / nats,
    }


def check(steps: Sequence[Step], target: Path, context: Context) -> None:
    """What was lost in the end, on the text that was held out, for the receipt; a note where that is too much."""
    for step in steps:
        if not isinstance(step, Quantize) or step.threshold is None:
            continue
        before, after = (nats_of(folder, context) for folder in (context.source, target))
        loss, found = after / before - 1, context.surveys[step]
        kinds = list(found["kinds"].values())
        context.facts["threshold"] = {
            "allowed": step.threshold, "expected": found["expected"], "measured": loss, "kinds": found["kinds"],
            "costs": found["costs"],
        }  # fmt: skip
        words = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        context.notes.append(f"threshold {step.threshold:.2%}: {words}; {loss:+.2%} nats on text that was held out")
        if loss > step.threshold:
            context.notes.append(f"that is more than the threshold of {step.threshold:.2%}: choose a lower one")


def nats_of(folder: Path, context: Context) -> float:
    """What a model folder needs a token on the text that was held out."""
    skeleton = Skeleton(open_checkpoint(folder), context.device)
    tokens = context.tokens.held_out()
    inputs = skeleton.inputs(tokens)
    for index in range(len(skeleton.spec.layers)):
        inputs.advance(skeleton.block(index))
    return _costs(_Head(skeleton), inputs, {}, tokens)[0]


class _Head:
    """Hidden states behind the last block [b, T, H] -> log-probabilities [b, T, V]."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._norm, self._weight = skeleton.final_norm(), skeleton.head()
        self._spec = skeleton.spec

    @torch.no_grad()
    def __call__(self, states: Tensor) -> Tensor:
        logits: Tensor = (self._norm(states) @ self._weight.T).float() * self._spec.logit_scale
        if self._spec.final_softcap:
            logits = self._spec.final_softcap * torch.tanh(logits / self._spec.final_softcap)
        return logits.log_softmax(-1)


def _costs(
    head: _Head, original: Inputs, variants: Mapping[Variant, Inputs], tokens: Tensor
) -> tuple[float, dict[Variant, float]]:
    """The original's -log p a token, and KL(original || variant) of each variant, nats a token. A batch at a time:
    distributions of all text at once may not fit."""
    total, found = 0.0, dict.fromkeys(variants, 0.0)
    others = {key: inputs.batches() for key, inputs in variants.items()}
    for states, part in zip(original.batches(), torch.split(tokens, original.batch_size), strict=True):
        log_p = head(states)
        total += _nats(log_p, part)
        for key, batches in others.items():
            found[key] += float((log_p.exp() * (log_p - head(next(batches)))).sum())
    return total / tokens[:, 1:].numel(), {key: max(cost / tokens.numel(), 0.0) for key, cost in found.items()}


def _nats(log_p: Tensor, tokens: Tensor) -> float:
    """-log p of each token but the first, summed; log_p [b, T, V]."""
    return -float(log_p[:, :-1].gather(2, tokens[:, 1:, None].to(log_p.device)).sum())


def _kinds(step: Quantize) -> tuple[str, ...]:
    return ("int8",) if step.format == "int8" else ("int8", step.format)


def _narrower(step: Quantize, block: Block, roles: Sequence[str], context: Context) -> Iterator[list[Format]]:
    for kind in _kinds(step):
        if kind == step.format:
            yield [context.plan.formats[block.name(role)] for role in roles]
        else:
            columns = [block.linears[role].weight.shape[1] for role in roles]
            yield [stored_as(wide(step), block.spec, number) for number in columns]


def wide(step: Quantize) -> Quantize:
    """The step with int8 in place of its format."""
    return replace(step, format="int8", group_size=None, symmetric=True, bits=None, threshold=None)


def _bytes(block: Block, roles: Sequence[str], formats: Sequence[Format]) -> int:
    shapes = [tuple(block.linears[role].weight.shape) for role in roles]
    return sum(bytes_of(fmt, (rows, columns)) for fmt, (rows, columns) in zip(formats, shapes, strict=True))


def _rounded(step: Quantize, block: Block, roles: Sequence[str], formats: Sequence[Format], inputs: Inputs) -> Inputs:
    """The block's outputs with these matrices rounded; the block is left as it was."""
    before = {role: block.linears[role].weight.data for role in roles}
    for role, fmt in zip(roles, formats, strict=True):
        bits = 8 if fmt.kind == "int8" else step.bits or 4
        weight = block.linears[role].weight
        weight.data = Grid(bits, fmt.symmetric).rounded(weight.float(), fmt.group_size).to(weight.dtype)
    out = replace(inputs, states=inputs.states.clone())
    out.advance(block)
    for role, weight in before.items():
        block.linears[role].weight.data = weight
    return out
