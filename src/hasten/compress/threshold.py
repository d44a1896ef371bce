"""Bits for each matrix from the share of quality that may be lost: measured, then the cheapest bits first.

On text that calibration does not see, each group of matrices that read one input is rounded alone, in each format that
is narrower than what it has, and the model run on: how far its distributions move from the original's (KL divergence,
nats a token) is what that format costs there. Costs are taken to add up. From all matrices as they are, the steps that
save the most bytes for what they cost are taken while the sum stays within threshold * the original's own nats a token.

Variants go through the blocks side by side, so each block is loaded once. Rounding to nearest stands in for the method
that is used in the end, which does better.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hasten.compress.blocks import Block, Inputs, Skeleton
from hasten.compress.grid import Grid
from hasten.compress.plan import matrix_shapes, stored_as
from hasten.compress.stage import Context, survey
from hasten.compress.statistics import grouped
from hasten.hardware import memory_available
from hasten.model.checkpoint import open_checkpoint
from hasten.model.formats import Format, bytes_of
from hasten.model.spec import ModelSpec
from hasten.steps import Quantize, Step

Options = Sequence[tuple[int, float]]  # bytes and cost, the widest first
Variant = tuple[str, int]  # a unit that is rounded, and to which of its options

_STATES_SHARE = 4  # hidden states take at most this part of free memory


class Unit(NamedTuple):
    """Matrices that are rounded together; of each option, as they are and then ever narrower, formats and bytes."""

    names: tuple[str, ...]
    formats: list[list[Format]]
    sizes: list[int]


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
    units = _units(step, skeleton.spec, context)
    tokens = context.tokens.held_out()
    nats, costs = 0.0, {(name, number): 0.0 for name, unit in units.items() for number in range(1, len(unit.sizes))}
    for part in torch.split(tokens, _at_once(len(costs), skeleton, tokens.shape[1])):
        own, found = _measured(step, skeleton, units, part, context)
        nats += own * len(part) / len(tokens)
        for key, cost in found.items():
            costs[key] += cost * len(part) / len(tokens)
    options = {
        name: [(size, max(costs.get((name, number), 0.0), 0.0)) for number, size in enumerate(unit.sizes)]
        for name, unit in units.items()
    }
    chosen = choose(options, step.threshold * nats)
    kinds = ("keep", *dict.fromkeys(("int8", step.format)))
    return {
        "kinds": {name: kinds[index] for unit, index in chosen.items() for name in units[unit].names},
        "costs": {unit: [cost for _, cost in found] for unit, found in options.items()},
        "expected": sum(options[unit][index][1] for unit, index in chosen.items()) / nats,
    }


def _units(step: Quantize, spec: ModelSpec, context: Context) -> dict[str, Unit]:
    """What is rounded alone: matrices of a layer that read one input, as far as the step targets them."""
    units, shapes = {}, matrix_shapes(spec)
    for index in range(len(spec.layers)):
        before = f"layers.{index}."
        mine = [name.removeprefix(before) for name in shapes if name.startswith(before)]
        for group in grouped([role for role in mine if context.plan.steps.get(before + role) == step]):
            names = tuple(before + role for role in group)
            formats = [[Format(spec.dtype)] * len(names)]
            if step.format != "int8":
                formats.append([stored_as(wide(step), spec, shapes[name][1]) for name in names])
            formats.append([context.plan.formats[name] for name in names])
            sizes = [sum(map(bytes_of, found, (shapes[name] for name in names))) for found in formats]
            units[before + "+".join(group)] = Unit(names, formats, sizes)
    return units


def _at_once(num_variants: int, skeleton: Skeleton, length: int) -> int:
    """Sequences whose hidden states, one copy a variant, take no more than a part of the memory that is free. More of
    them are measured in several passes over the blocks."""
    size = (num_variants + 1) * length * skeleton.spec.hidden_size * skeleton.dtype.itemsize
    return max(1, memory_available() // _STATES_SHARE // size)


def _measured(
    step: Quantize, skeleton: Skeleton, units: Mapping[str, Unit], tokens: Tensor, context: Context
) -> tuple[float, dict[Variant, float]]:
    """The original's -log p a token, and what each variant costs, on these sequences [n, T]."""
    original = skeleton.inputs(tokens)
    variants: dict[Variant, Inputs] = {}
    num_blocks = len(skeleton.spec.layers)
    for index in range(num_blocks):
        context.tell(0, f"measuring what rounding costs: block {index + 1} of {num_blocks}")
        block = skeleton.block(index)
        for inputs in variants.values():
            inputs.advance(block)
        for name, unit in units.items():
            if name.startswith(block.name("")):
                for number, formats in list(enumerate(unit.formats))[1:]:
                    variants[name, number] = _rounded(step, block, unit.names, formats, original)
        original.advance(block)
    return _costs(_Head(skeleton), original, variants, tokens)


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
    """Hidden states behind the last block [T, H] -> log-probabilities [T, V]."""

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
    """The original's -log p a token, and KL(original || variant) of each variant, nats a token. A sequence at a time:
    distributions of all text at once may not fit."""
    total, found = 0.0, dict.fromkeys(variants, 0.0)
    for row, ids in enumerate(tokens):
        log_p = head(original.states[row].to(original.device))
        total -= float(log_p[:-1].gather(1, ids[1:, None].to(log_p.device)).sum())
        p = log_p.exp()
        for key, inputs in variants.items():
            found[key] += float((p * (log_p - head(inputs.states[row].to(inputs.device)))).sum())
    return total / tokens[:, 1:].numel(), {key: cost / tokens.numel() for key, cost in found.items()}


def wide(step: Quantize) -> Quantize:
    """The step with int8 in place of its format."""
    return replace(step, format="int8", group_size=None, symmetric=True, bits=None, threshold=None)


def _rounded(step: Quantize, block: Block, names: Sequence[str], formats: Sequence[Format], inputs: Inputs) -> Inputs:
    """The block's outputs with these matrices rounded; the block is left as it was."""
    weights = [block.linears[name.removeprefix(block.name(""))].weight for name in names]
    before = [weight.data for weight in weights]
    for weight, fmt in zip(weights, formats, strict=True):
        grid = Grid(8 if fmt.kind == "int8" else step.bits or 4, fmt.symmetric)
        weight.data = grid.rounded(weight.float(), fmt.group_size).to(weight.dtype)
    out = replace(inputs, states=inputs.states.clone())
    out.advance(block)
    for weight, values in zip(weights, before, strict=True):
        weight.data = values
    return out
