"""One sweep over a model's blocks: each is changed by the steps, settled, kept as a file, and run, so that the next one
sees what was done. Going on after an interruption, kept blocks are read and run, not changed again. Knows no method."""

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hasten.compress import store
from hasten.compress.apply import carry_out
from hasten.compress.blocks import Block, Inputs, Skeleton
from hasten.compress.stage import Context, change_block, survey
from hasten.errors import RecipeError
from hasten.hardware import memory_available, usable_threads
from hasten.model.checkpoint import Checkpoint, open_checkpoint
from hasten.model.formats import Weight, sparsify
from hasten.model.jsonfile import read_kept
from hasten.model.spec import Layer, configured
from hasten.model.writer import write_checkpoint
from hasten.receipt import write_text
from hasten.steps import Recover, Step, step_name

_STATES_SHARE = 4  # hidden states take at most this part of free memory; else they lie in a mapped file


def sweep(steps: tuple[Step, ...], target: Path, context: Context) -> None:
    """All blocks once: change, settle, keep, run."""
    checkpoint = open_checkpoint(context.source)
    skeleton = Skeleton(checkpoint, context.device)
    tokens = context.tokens()
    told = []

    def looking(part: float, what: str) -> None:
        told.append(part)
        context.tell(part / 2, what)

    context.surveys.update(_surveys(_survey_files(steps, context), skeleton, replace(context, tell=looking)))
    tell = context.part(1 / 2 if told else 0, 1).tell  # what looked at the model took some of the time
    inputs = skeleton.inputs(tokens, _states(skeleton, tokens, context.work))
    unchanged = replace(inputs, states=inputs.states.clone()) if any(isinstance(s, Recover) for s in steps) else None
    num_blocks = len(checkpoint.spec.layers)
    layers: list[Layer] = []
    for index in range(num_blocks):
        file = _block_file(context, index)
        what = f"block {index + 1} of {num_blocks}: {', '.join(dict.fromkeys(map(step_name, steps)))}"
        tell(index / num_blocks, what)
        if unchanged is not None:
            unchanged.advance(skeleton.block(index))
            inputs.targets = unchanged.states
        if (found := store.find(file)) is not None:
            weights, noted = found
            block = skeleton.block(index, weights, _layer(noted["layer"]))
            context.errors.update(noted["errors"])
            context.notes += noted["notes"]
        else:
            if file.is_file():  # damaged: so go those behind it, which were made on what it gave
                for later in range(index, num_blocks):
                    _block_file(context, later).unlink(missing_ok=True)
            before, so_far = dict(context.errors), len(context.notes)
            block = skeleton.block(index)
            for step in steps:
                change_block(step, block, inputs, context)
            block.settle()
            errors = {name: error for name, error in context.errors.items() if name not in before}
            about = {"errors": errors, "notes": context.notes[so_far:], "layer": asdict(block.layer)}
            store.save(file, dict(block.weights()), about)
        layers.append(block.layer)
        inputs.advance(block)
    tell(1, "writing")
    config = configured(checkpoint.config, layers)
    write_checkpoint(target, config, _swept(checkpoint, steps, context), checkpoint.path)


def _layer(data: dict[str, Any]) -> Layer:
    return Layer(**{**data, "ranks": tuple((role, rank) for role, rank in data["ranks"])})


def _survey_files(steps: tuple[Step, ...], context: Context) -> dict[Step, Path]:
    """Of the steps that must know something beforehand."""
    return {
        step: context.work / f"survey-{number}.json"
        for number, step in enumerate(steps)
        if survey.dispatch(type(step)) is not survey.dispatch(object)
    }


def _surveys(files: Mapping[Step, Path], skeleton: Skeleton, context: Context) -> dict[Step, Any]:
    """What steps must know beforehand; kept for a run that goes on."""
    found: dict[Step, Any] = {}
    for number, (step, file) in enumerate(files.items()):
        if (kept := read_kept(file, dict)) is None:
            own = context.part(number / len(files), (number + 1) / len(files))
            blocks = _unchanged(skeleton, own, f"looking for {step_name(step)}")
            write_text(file, json.dumps(survey(step, blocks, own)))
            kept = read_kept(file, dict)
        found[step] = kept
    return found


def forget(steps: tuple[Step, ...], step: Step, found: Any, context: Context) -> None:
    """Drop the blocks that were changed, so that the next sweep changes them again. `found` is then what the step's
    survey says."""
    for block in context.work.glob("block-*.npz"):  # before the survey: what an interruption leaves of them fits it
        block.unlink()
    write_text(_survey_files(steps, context)[step], json.dumps(found))
    context.errors.clear()
    context.notes.clear()


def _unchanged(skeleton: Skeleton, context: Context, what: str) -> Iterator[tuple[Block, Inputs]]:
    tokens = context.tokens()
    inputs = skeleton.inputs(tokens, _states(skeleton, tokens, context.work))
    num_blocks = len(skeleton.spec.layers)
    for index in range(num_blocks):
        context.tell(index / num_blocks, f"{what}: block {index + 1} of {num_blocks}")
        block = skeleton.block(index)
        yield block, inputs
        inputs.advance(block)


def _swept(checkpoint: Checkpoint, steps: tuple[Step, ...], context: Context) -> Iterator[tuple[str, Weight]]:
    """The changed model's weights: blocks from their files, the rest rounded where a step of this stage says so."""
    plan = context.of(steps)
    with ThreadPoolExecutor(usable_threads()) as pool:
        yield from carry_out(plan, _outside(checkpoint, before=True), pool)
        for index in range(len(checkpoint.spec.layers)):
            for name, weight in store.load(_block_file(context, index))[0].items():
                yield name, _as_stored(weight) if name in context.plan.sparse else weight
        yield from carry_out(plan, _outside(checkpoint, before=False), pool)


def _as_stored(weight: Weight) -> Weight:
    """A matrix that is to be 2:4; as it is, where a later step makes it so."""
    try:
        return weight if weight.mask is not None else sparsify(weight)
    except RecipeError:
        return weight


def _outside(checkpoint: Checkpoint, before: bool) -> Iterator[tuple[str, Weight]]:
    """What lies before, or behind, the decoder layers."""
    for prefix in ("embed", "position_embed") if before else ("final_norm", "head"):
        yield from checkpoint.weights(prefix)


def _states(skeleton: Skeleton, tokens: torch.Tensor, folder: Path) -> torch.Tensor:
    """Room for the hidden states of all sequences: on the device where they are a small part of its free memory, else
    in memory, else in a mapped file."""
    shape = (*tokens.shape, skeleton.spec.hidden_size)
    size = int(np.prod(shape)) * skeleton.dtype.itemsize
    if skeleton.device.type == "cuda" and size < torch.cuda.mem_get_info(skeleton.device)[0] // _STATES_SHARE:
        return torch.empty(shape, dtype=skeleton.dtype, device=skeleton.device)
    if size < memory_available() // _STATES_SHARE:
        return torch.empty(shape, dtype=skeleton.dtype)
    with open(folder / "states", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a disk that fills up under a mapped file would kill the process
    mapped = torch.from_file(file.name, shared=True, size=int(np.prod(shape)), dtype=skeleton.dtype)
    return mapped.view(shape)


def _block_file(context: Context, index: int) -> Path:
    return context.work / f"block-{index:05}.npz"
