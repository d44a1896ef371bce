"""Bits for each matrix from the share of quality that may be lost: measured, then the cheapest bits first.

On text that calibration does not see, each group of matrices that read one input is rounded alone, in each format that
is narrower than what it has, and the model run on: how far its distributions move from the original's (KL divergence,
nats a token) is what that format costs there. Costs are taken to add up. From all matrices as they are, the steps that
save the most bytes for what they cost are taken while the sum stays within threshold * the original's own nats a token.
That is an estimate: where the model that comes out has lost more on the same text, it is made again with less to spend.

Variants go through the blocks side by side, so each block is loaded once; the time grows as the square of their number.
Rounding to nearest stands in for the method that is used in the end, which does better.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hasten.compress.blocks import Block, Inputs, Skeleton
from hasten.compress.grid import Grid
from hasten.compress.stage import Context, survey
from hasten.compress.statistics import grouped
from hasten.compress.sweep import forget, sweep
from hasten.compress.targets import matrix_shapes, stored_as
from hasten.errors import RecipeError
from hasten.hardware import memory_available
from hasten.model.checkpoint import open_checkpoint
from hasten.model.formats import Format, bytes_of
from hasten.model.spec import ModelSpec
from hasten.steps import Quantize, Step, step_name

Options = Sequence[tuple[int, float]]  # bytes and cost, the widest first
Variant = tuple[str, int]  # a unit that is rounded, and to which of its options

_STATES_SHARE = 4  # hidden states take at most this part of free memory
_TRIES = 3  # with less to spend, where more was lost than was expected


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
    parts = torch.split(tokens, _at_once(len(costs), skeleton, tokens.shape[1]))
    for number, part in enumerate(parts):
        own, found = _measured(
            step, skeleton, units, part, context.part(number / len(parts), (number + 1) / len(parts))
        )
        nats += own * len(part) / len(tokens)
        for key, cost in found.items():
            costs[key] += cost * len(part) / len(tokens)
    by_unit = {
        name: [max(costs.get((name, number), 0.0), 0.0) for number in range(len(unit.sizes))]
        for name, unit in units.items()
    }
    return _chosen(step, units, by_unit, nats, step.threshold)


def _chosen(
    step: Quantize,
    units: Mapping[str, Unit],
    costs: Mapping[str, Sequence[float]],
    nats: float,
    share: float,
    tried: Sequence[float] = (),
) -> dict[str, Any]:
    """The kinds of formats for a share of the original's nats; below 0 all stay as they are. tried: what choices before
    this one were measured to lose."""
    chosen = choose(
        {name: list(zip(unit.sizes, costs[name], strict=True)) for name, unit in units.items()}, share * nats
    )
    kinds = ("keep", *dict.fromkeys(("int8", step.format)))
    return {
        "kinds": {name: kinds[index] for unit, index in chosen.items() for name in units[unit].names},
        "costs": costs,
        "nats": nats,
        "expected": sum(costs[unit][index] for unit, index in chosen.items()) / nats,
        "tried": list(tried),
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
        # Each block is run for all variants of those before it: the time grows as the square.
        context.tell((index / num_blocks) ** 2, f"measuring what rounding costs: block {index + 1} of {num_blocks}")
        block = skeleton.block(index)
        for inputs in variants.values():
            inputs.advance(block)
        for name, unit in units.items():
            if name.startswith(block.name("")):
                for number, formats in list(enumerate(unit.formats))[1:]:
                    variants[name, number] = _rounded(step, block, unit.names, formats, original)
        original.advance(block)
    return _costs(_Head(skeleton), original, variants, tokens)


def check(steps: tuple[Step, ...], target: Path, context: Context) -> None:
    """Hold a step to its threshold: where the model that was written has lost more on the text that was held out, its
    stage is done again with less to spend, and in the end with nothing. What was lost, for the receipt. RecipeError
    where the steps behind it lose too much by themselves."""
    step = steps[0]  # the first of its stage
    if not isinstance(step, Quantize) or step.threshold is None:
        return
    before = nats_of(context.source, context)
    while (loss := nats_of(target, context) / before - 1) > step.threshold:
        found = context.surveys[step]
        if set(found["kinds"].values()) == {"keep"}:
            if not steps[1:]:
                break  # the model is what it was: a device may add the same numbers up otherwise
            raise RecipeError(
                f"threshold is {step.threshold:g}, and {', '.join(map(step_name, steps[1:]))} behind it alone lose "
                f"{loss:.5f}: raise it, or remove them"
            )
        forget(steps, step, _with_less(step, found, loss, context), context)
        shutil.rmtree(target)
        sweep(steps, target, context)
    found = context.surveys[step]
    context.facts["threshold"] = {"allowed": step.threshold, **found, "measured": loss}
    kinds = list(found["kinds"].values())
    words = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    context.notes.append(f"threshold {step.threshold:.2%}: {words}; {loss:+.2%} nats on text that was held out")
    if found["tried"]:
        lost = ", ".join(f"{tried:+.2%}" for tried in found["tried"])
        context.notes.append(f"more than the threshold was lost at first ({lost}): done again with less to spend")


def _with_less(step: Quantize, found: dict[str, Any], loss: float, context: Context) -> dict[str, Any]:
    """What is chosen of the same costs after `loss` was measured: what is lost is taken to fall as what was expected
    does, and half of that is to be lost at most. Nothing after some tries, or where the same would be chosen again."""
    assert step.threshold is not None
    tried = [*found["tried"], loss]
    units = _units(step, open_checkpoint(context.source).spec, context)
    for share in (found["expected"] * min(step.threshold / loss, 0.5), -1.0)[len(tried) > _TRIES :]:
        chosen = _chosen(step, units, found["costs"], found["nats"], share, tried)
        if chosen["kinds"] != found["kinds"]:
            break
    return chosen


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
