"""Shrink: rank a model's structures, keep the best of each kind, strip the rest.

rank_by "activation" (Minitron, Muralidharan et al. 2024): what a structure gives on calibration text. A neuron, or a
group of heads, counts by the mean square of its outputs times that of the columns that read them; a hidden unit by its
mean magnitude where matrices read it, over all layers. "gradient": taylor.py. "magnitude": squared weights that go when
the structure goes. Layers always go by block influence (ShortGPT, Men et al. 2024): one minus the mean cosine between
what goes into a layer and what comes out.

Where there is text, the columns of `o` and `down` that stay are then fitted by least squares to what the whole matrices
gave, block after block: what goes is made up for by what goes along with it.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hasten.backends.torch.tensors import to_weight
from hasten.compress import taylor
from hasten.compress.blocks import Block, Inputs, Skeleton
from hasten.compress.gptq import relative_error
from hasten.compress.plan import shrunk_hidden, shrunk_layers
from hasten.compress.sparsegpt import refit
from hasten.compress.stage import Context, run_step
from hasten.compress.statistics import collect
from hasten.compress.strip import Kept, spread, strip, stripped_config
from hasten.compress.targets import matrix_shapes, targeted
from hasten.model.checkpoint import Checkpoint, open_checkpoint
from hasten.model.formats import Weight, dequantize
from hasten.model.spec import ModelSpec
from hasten.model.writer import write_checkpoint
from hasten.steps import Shrink

Float64 = NDArray[np.float64]


@dataclass(eq=False)
class Scores:
    """How much each structure matters, of a layer: groups [num_kv_heads], neurons [I]; of the model: hidden [H], layers
    [L]. Only comparable within one array."""

    groups: list[Float64]
    neurons: list[Float64]
    hidden: Float64
    layers: Float64


@run_step.register
def _(step: Shrink, source: Path, target: Path, context: Context) -> None:
    checkpoint = open_checkpoint(source)
    spec = checkpoint.spec
    kept = choose(step, spec, _scores(step, checkpoint, context))
    layer = [{"groups": len(kept.groups[i]), "neurons": len(kept.neurons[i])} for i in kept.layers]
    context.facts["shrink"] = {"layers": kept.layers.tolist(), "hidden": len(kept.hidden), "widths": layer}
    fitted = {} if step.rank_by == "magnitude" else refitted(checkpoint, kept, context)
    context.tell(1, "writing")
    config = stripped_config(checkpoint.config, spec, kept)
    weights = ((name, fitted.get(name, weight)) for name, weight in checkpoint.weights())
    write_checkpoint(target, config, strip(weights, spec, kept), source)


def choose(step: Shrink, spec: ModelSpec, scores: Scores) -> Kept:
    """The best of each kind, as many as the plan says; earlier ones where scores are equal."""
    after = shrunk_layers(step, spec)
    touched = {int(name.split(".")[1]) for name in targeted(step, spec) if name.startswith("layers.")}
    removed = round(step.layers * len(spec.layers))
    weakest = [i for i in np.argsort(scores.layers, kind="stable") if int(i) in touched][:removed]
    return Kept(
        np.setdiff1d(np.arange(len(spec.layers)), weakest),
        tuple(best(found, layer.num_kv_heads) for found, layer in zip(scores.groups, after, strict=True)),
        tuple(best(found, layer.intermediate_size) for found, layer in zip(scores.neurons, after, strict=True)),
        best(scores.hidden, shrunk_hidden(step, spec)),
    )


def best(scores: Float64, count: int) -> NDArray[np.int64]:
    """Rising indices of the `count` largest scores."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _scores(step: Shrink, checkpoint: Checkpoint, context: Context) -> Scores:
    needs_text = step.layers or step.rank_by == "activation"
    by_text = by_activation(checkpoint, context) if needs_text else None
    if step.rank_by == "activation" and by_text is not None:
        return by_text
    if step.rank_by == "gradient":
        groups, neurons, hidden = taylor.scores(
            checkpoint, context.tokens(), context.device, lambda part, what: context.tell(part / 2, what)
        )
        found = Scores(groups, neurons, hidden, np.zeros(len(checkpoint.spec.layers)))
    else:
        found = by_magnitude(checkpoint.weights(), checkpoint.spec)
    if by_text is not None:
        found.layers = by_text.layers
    return found


@torch.no_grad()
def by_activation(checkpoint: Checkpoint, context: Context) -> Scores:
    """Scores from one sweep over the blocks, and the influence of each."""
    spec = checkpoint.spec
    skeleton = Skeleton(checkpoint, context.device)
    inputs = skeleton.inputs(context.tokens())
    found = Scores([], [], np.zeros(spec.hidden_size), np.zeros(len(spec.layers)))
    for index in range(len(spec.layers)):
        context.tell(index / len(spec.layers) / 2, f"block {index + 1} of {len(spec.layers)}: looking at it for shrink")
        block = skeleton.block(index)
        seen = collect(block, inputs, ("q", "up", "o", "down"))
        shared = spec.layers[index].num_kv_heads
        heads = contribution(seen["o"].square, block.linears["o"].weight)
        found.groups.append(_numpy(heads.reshape(shared, -1).sum(1)))
        found.neurons.append(_numpy(contribution(seen["down"].square, block.linears["down"].weight)))
        for role in ("q", "up"):
            found.hidden += _numpy(seen[role].absolute / seen[role].absolute.mean())
        found.layers[index] = advance(block, inputs)
    return found


@torch.no_grad()
def refitted(checkpoint: Checkpoint, kept: Kept, context: Context) -> dict[str, Weight]:
    """By name, `o` and `down` where they lose columns: zeros there, and the others changed to lose least."""
    spec = checkpoint.spec
    skeleton = Skeleton(checkpoint, context.device)
    inputs, found = skeleton.inputs(context.tokens()), {}
    for number, index in enumerate(map(int, kept.layers)):
        context.tell((1 + number / len(kept.layers)) / 2, f"block {index + 1}: fitting what stays")
        block, layer = skeleton.block(index), spec.layers[index]
        queries = spread(kept.groups[index], layer.num_heads // layer.num_kv_heads * layer.head_dim)
        for role, columns in (("o", queries), ("down", kept.neurons[index])):
            weight = block.linears[role].weight
            if len(columns) == weight.shape[1]:
                continue
            hessian, before = collect(block, inputs, (role,), hessian=True)[role].hessian, weight.float()
            stays = torch.zeros_like(before)
            stays[:, columns] = 1
            after = refit(before, before * stays, hessian)
            context.lost(block.name(role), relative_error(before, after, hessian))
            weight.data = after.to(weight.dtype)
            found[block.name(role)] = to_weight(after, spec.dtype)
        inputs.advance(block)
    return found


def contribution(square: Tensor, reader: Tensor) -> Tensor:
    """Mean squares [K] of what a matrix [N, K] reads, times the squared lengths of its columns."""
    return square * reader.float().square().sum(0)


def advance(block: Block, inputs: Inputs) -> float:
    """Put the block's outputs in place of its inputs; its influence: one minus their mean cosine."""
    total = 0.0
    for start in range(0, len(inputs.states), inputs.batch_size):
        part = inputs.states[start : start + inputs.batch_size]
        before = part.to(inputs.device)
        after = block(before)
        total += float((1 - cosine_similarity(before.float(), after.float(), dim=-1)).sum())
        part.copy_(after)
    return total / inputs.states[..., 0].numel()


def by_magnitude(weights: Iterable[tuple[str, Weight]], spec: ModelSpec) -> Scores:
    """Squared weights of each structure; matrices stream through."""
    groups = [np.zeros(layer.num_kv_heads) for layer in spec.layers]
    neurons = [np.zeros(layer.intermediate_size) for layer in spec.layers]
    found = Scores(groups, neurons, np.zeros(spec.hidden_size), np.zeros(len(spec.layers)))
    for name, rows, columns in _squares(weights, matrix_shapes(spec)):
        layer = re.fullmatch(r"layers\.(\d+)\.(\w+)", name)
        if layer is None:
            found.hidden += columns
            continue
        index, role = int(layer[1]), layer[2]
        inner, outer = (columns, rows) if role in ("o", "down") else (rows, columns)
        found.hidden += outer
        if role in ("q", "k", "v", "o"):
            groups[index] += inner.reshape(len(groups[index]), -1).sum(1)
        else:
            neurons[index] += inner
    return found


def _squares(weights: Iterable[tuple[str, Weight]], matrices: Iterable[str]) -> Iterator[tuple[str, Float64, Float64]]:
    """Of each matrix the squared lengths of its rows and of its columns."""
    wanted = set(matrices)
    for name, weight in weights:
        if name in wanted:
            squares = np.square(dequantize(weight))
            yield name, squares.sum(1, dtype=np.float64), squares.sum(0, dtype=np.float64)


def _numpy(values: Tensor) -> Float64:
    return values.double().cpu().numpy()
