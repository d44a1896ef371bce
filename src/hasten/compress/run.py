"""A recipe with steps that need torch or text: stage after stage in a work folder beside the result, which a killed run
leaves and the next one goes on from.

A stage reads a model folder and writes one. Consecutive steps that change a block at a time are one stage, one sweep
over the blocks: each is changed by all of them, then run, so that the next one sees what was done. Finished blocks are
kept as files; going on, they are read and run, not changed again. Knows no method.
"""

import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hasten.compress import prune, quantize, reconstruct, rotate, shrink, smooth, store
from hasten.compress.apply import carry_out
from hasten.compress.blocks import Block, Inputs, Skeleton
from hasten.compress.calibration import Int32, calibration_tokens, digest
from hasten.compress.folder import run_settings
from hasten.compress.plan import Plan, needs_text
from hasten.compress.stage import Context, change_block, is_blockwise, run_step, survey
from hasten.errors import ModelError, ResourceError
from hasten.hardware import memory_available, usable_threads
from hasten.model.checkpoint import Checkpoint, open_checkpoint
from hasten.model.formats import Weight, bytes_of
from hasten.model.spec import config_of_text
from hasten.model.writer import write_checkpoint
from hasten.receipt import Receipt, plain, write_text
from hasten.recipe import Recipe
from hasten.steps import Quantize, Recover, Step, step_name

# Modules that register their steps as they are imported.
CHANGES = (prune, quantize, reconstruct, rotate, shrink, smooth)

Progress = Callable[[int, int, str], None]
_STATES_SHARE = 4  # hidden states take at most this part of free memory; else they lie in a mapped file


def run(
    recipe: Recipe,
    plan: Plan,
    checkpoint: Checkpoint,
    out: Path,
    receipt: Receipt,
    device: str,
    progress: Progress | None = None,
) -> Receipt:
    """Carry out the stages and write the folder `out`; the receipt comes back with what was found out.

    receipt: what is known before the work. Raises ResourceError where the work folder is of other work.
    """
    started = time.monotonic()
    work = _work_folder(out, recipe, receipt)
    stages = stages_of(recipe.steps)
    tokens = _Tokens(recipe, checkpoint.path, work, device)
    source, notes = checkpoint.path, list(receipt.notes)
    errors: dict[str, float] = {}
    facts: dict[str, object] = {}
    for index, steps in enumerate(stages):
        target = work / f"stage-{index}"
        own = work / f"work-{index}"
        own.mkdir(exist_ok=True)
        tell = _teller(progress, index, len(stages), len(checkpoint.spec.layers))
        context = Context(recipe, plan, checkpoint.path, tokens.get, device, own, tell)
        if not target.is_dir():  # else it was finished before an interruption
            _run_stage(steps, source, target, context)
        context = _remembered(own, context)
        errors, facts, notes = errors | context.errors, facts | context.facts, [*notes, *context.notes]
        source = target
    settings = {
        **receipt.settings,
        "bytes_after": sum(bytes_of(fmt, shape) for _, shape, fmt in open_checkpoint(source).matrices()),
        "device": device,
        "calibration": tokens.about(),
        "errors": errors,
        "seconds": round(time.monotonic() - started, 3),
        "peak_memory": _peak_memory(),
        **facts,
    }
    receipt = replace(receipt, settings=settings, notes=tuple(notes))
    _publish(source, out, recipe, receipt)
    shutil.rmtree(work, ignore_errors=True)
    return receipt


def device_of(name: str) -> str:
    """ "auto" is a GPU where there is one. ResourceError where the device is not there."""
    cuda = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if cuda else "cpu"
    if name.startswith("cuda") and not cuda:
        raise ResourceError("no GPU that torch can use is here: use --device cpu")
    return name


def stages_of(steps: tuple[Step, ...]) -> list[tuple[Step, ...]]:
    """Steps that are carried out together."""
    stages: list[tuple[Step, ...]] = []
    for step in steps:
        if stages and is_blockwise(step) and is_blockwise(stages[-1][0]):
            stages[-1] = (*stages[-1], step)
        else:
            stages.append((step,))
    return stages


def _run_stage(steps: tuple[Step, ...], source: Path, target: Path, context: Context) -> None:
    if is_blockwise(steps[0]) and needs_text(steps):
        _sweep(steps, source, target, context)
    elif isinstance(steps[0], Quantize):
        _round(source, target, context)
    else:
        run_step(steps[0], source, target, context)


def _sweep(steps: tuple[Step, ...], source: Path, target: Path, context: Context) -> None:
    """All blocks once: change, settle, keep, run."""
    checkpoint = open_checkpoint(source)
    skeleton = Skeleton(checkpoint, context.device)
    tokens = context.tokens()
    if tokens.shape[1] > checkpoint.spec.max_position:
        raise ModelError(
            f"calibration sequences have {tokens.shape[1]} tokens, the model at most {checkpoint.spec.max_position}: "
            "lower sequence_len"
        )
    context.surveys.update(_surveys(steps, skeleton, context))
    inputs = skeleton.inputs(tokens, _states(skeleton, tokens, context.work))
    unchanged = replace(inputs, states=inputs.states.clone()) if any(isinstance(s, Recover) for s in steps) else None
    num_blocks = len(checkpoint.spec.layers)
    for index in range(num_blocks):
        file = _block_file(context, index)
        what = f"block {index + 1} of {num_blocks}: {', '.join(dict.fromkeys(map(step_name, steps)))}"
        context.tell(index / num_blocks, what)
        if unchanged is not None:
            unchanged.advance(skeleton.block(index))
            inputs.targets = unchanged.states
        if file.is_file():
            weights, noted = store.load(file)
            block = skeleton.block(index, weights)
            context.errors.update(noted)
        else:
            before = dict(context.errors)
            block = skeleton.block(index)
            for step in steps:
                change_block(step, block, inputs, context)
            block.settle()
            noted = {name: error for name, error in context.errors.items() if name not in before}
            store.save(file, dict(block.weights()), noted)
        inputs.advance(block)
    context.tell(1, "writing")
    _remember(context)
    _write(checkpoint, target, context, _swept(checkpoint, steps, context))


def _surveys(steps: tuple[Step, ...], skeleton: Skeleton, context: Context) -> dict[Step, Any]:
    """What steps must know beforehand; kept for a run that goes on."""
    found = {}
    for number, step in enumerate(steps):
        if survey.dispatch(type(step)) is survey.dispatch(object):
            continue
        file = context.work / f"survey-{number}.json"
        if not file.is_file():
            context.tell(0, f"looking at the model for {step_name(step)}")
            write_text(file, json.dumps(survey(step, _unchanged(skeleton, context), context)))
        found[step] = json.loads(file.read_text())
    return found


def _unchanged(skeleton: Skeleton, context: Context) -> Iterator[tuple[Block, Inputs]]:
    tokens = context.tokens()
    inputs = skeleton.inputs(tokens, _states(skeleton, tokens, context.work))
    for index in range(len(skeleton.spec.layers)):
        block = skeleton.block(index)
        yield block, inputs
        inputs.advance(block)


def _swept(checkpoint: Checkpoint, steps: tuple[Step, ...], context: Context) -> Iterator[tuple[str, Weight]]:
    """The changed model's weights: blocks from their files, the rest rounded where a step of this stage says so."""
    formats = {name: fmt for name, fmt in context.plan.formats.items() if context.plan.steps[name] in steps}
    plan = replace(context.plan, formats=formats)
    with ThreadPoolExecutor(usable_threads()) as pool:
        yield from carry_out(plan, _outside(checkpoint, before=True), pool)
        for index in range(len(checkpoint.spec.layers)):
            yield from store.load(_block_file(context, index))[0].items()
        yield from carry_out(plan, _outside(checkpoint, before=False), pool)


def _outside(checkpoint: Checkpoint, before: bool) -> Iterator[tuple[str, Weight]]:
    """What lies before, or behind, the decoder layers."""
    for prefix in ("embed", "position_embed") if before else ("final_norm", "head"):
        yield from checkpoint.weights(prefix)


def _round(source: Path, target: Path, context: Context) -> None:
    """Steps that only round: weights stream through."""
    checkpoint = open_checkpoint(source)
    with ThreadPoolExecutor(usable_threads()) as pool:
        _write(checkpoint, target, context, carry_out(context.plan, checkpoint.weights(), pool))


def _write(checkpoint: Checkpoint, target: Path, context: Context, weights: Iterator[tuple[str, Weight]]) -> None:
    write_checkpoint(target, config_of_text(checkpoint.config), weights, checkpoint.path)


def _states(skeleton: Skeleton, tokens: torch.Tensor, folder: Path) -> torch.Tensor:
    """Room for the hidden states of all sequences: on the device where they are a small part of its free memory, else
    in memory, else in a mapped file."""
    shape = (*tokens.shape, skeleton.spec.hidden_size)
    size = int(np.prod(shape)) * skeleton.dtype.itemsize
    if skeleton.device.type == "cuda" and size < torch.cuda.mem_get_info(skeleton.device)[0] // _STATES_SHARE:
        return torch.empty(shape, dtype=skeleton.dtype, device=skeleton.device)
    if size < memory_available() // _STATES_SHARE:
        return torch.empty(shape, dtype=skeleton.dtype)
    mapped = torch.from_file(str(folder / "states"), shared=True, size=int(np.prod(shape)), dtype=skeleton.dtype)
    return mapped.view(shape)


def _block_file(context: Context, index: int) -> Path:
    return context.work / f"block-{index:05}.npz"


class _Tokens:
    """The calibration sequences, made when they are first needed and kept for a run that goes on."""

    def __init__(self, recipe: Recipe, folder: Path, work: Path, device: str) -> None:
        self._recipe, self._folder, self._device = recipe, folder, device
        self._file = work / "calibration.npy"
        self.found: Int32 | None = None

    def get(self) -> torch.Tensor:
        if self.found is None:
            if self._file.is_file():
                self.found = np.load(self._file)
            else:
                self.found = calibration_tokens(self._recipe.calibration, self._folder, self._device)
                with open(self._file.with_suffix(".partial"), "wb") as file:
                    np.save(file, self.found)
                os.replace(file.name, self._file)
        return torch.from_numpy(self.found.astype(np.int64))

    def about(self) -> dict[str, Any]:
        """For the receipt; empty where no step asked for text."""
        if self.found is None and self._file.is_file():
            self.get()
        return {} if self.found is None else {**plain(self._recipe.calibration), "sha256": digest(self.found)}


def _work_folder(out: Path, recipe: Recipe, receipt: Receipt) -> Path:
    """The folder of this work beside `out`, new or found again. ResourceError where it is of other work."""
    work = out.with_name(out.name + ".work")
    about = {"recipe": recipe.to_dict(), "inputs": receipt.inputs}
    state = work / "state.json"
    if state.is_file():
        if json.loads(state.read_text()) != json.loads(json.dumps(about)):
            raise ResourceError(
                f"{work} holds unfinished work of another recipe or model: remove it, or take another -o"
            )
    elif work.exists():
        raise ResourceError(f"{work} is in the way, and is no unfinished work: remove it, or take another -o")
    else:
        try:
            work.mkdir(parents=True)
            write_text(state, json.dumps(about))
        except OSError as error:
            raise ResourceError(f"{work} cannot be written: {error.strerror or error}") from None
    return work


def _remember(context: Context) -> None:
    """Keep what a stage found out: a run that goes on may find the stage finished."""
    found = {"errors": context.errors, "notes": context.notes, "facts": context.facts}
    write_text(context.work / "found.json", json.dumps(found))


def _remembered(own: Path, context: Context) -> Context:
    file = own / "found.json"
    if not file.is_file():
        _remember(context)
    for block in own.glob("block-*.npz"):
        block.unlink()
    return replace(context, **json.loads(file.read_text()))


def _teller(progress: Progress | None, stage: int, num_stages: int, num_blocks: int) -> Callable[[float, str], None]:
    """A stage's share of the whole work, told in blocks."""

    def tell(part: float, what: str) -> None:
        if progress is not None:
            progress(round((stage + part) * num_blocks), num_stages * num_blocks, what)

    return tell


def _peak_memory() -> dict[str, int]:
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        peak["device"] = torch.cuda.max_memory_allocated()
    return peak


def _publish(folder: Path, out: Path, recipe: Recipe, receipt: Receipt) -> None:
    """The papers are added, and the folder gets its name. ResourceError where that cannot be."""
    try:
        config = json.loads((folder / "config.json").read_text())
        config.setdefault("hasten", {})["run"] = run_settings(recipe)
        write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_text(folder / "recipe.yaml", recipe.to_yaml())
        receipt.save(folder / "receipt.json")
        folder.rename(out)
    except OSError as error:
        raise ResourceError(f"{out} cannot be written: {error.strerror or error}") from None
