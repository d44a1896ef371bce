"""A recipe with steps that need torch or text: stage after stage in a work folder beside the result, which a killed run
leaves and the next one goes on from.

A stage reads a model folder and writes one. Consecutive steps that change a block at a time are one stage, one sweep
over the blocks (sweep.py). Finished stages are kept until the whole is. Knows no method.
"""

import json
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from hasten.compress import (
    factorize,
    kv_scales,
    prune,
    quantize,
    reconstruct,
    rotate,
    shrink,
    smooth,
    split,
    threshold,
)
from hasten.compress.apply import carry_out
from hasten.compress.calibration import Sequences
from hasten.compress.folder import all_weights, run_of, run_settings, undoes_kv_scales
from hasten.compress.plan import Plan, only_rounds
from hasten.compress.stage import Context, is_blockwise, run_step
from hasten.compress.sweep import sweep
from hasten.errors import HastenError, RecipeError, ResourceError
from hasten.hardware import usable_threads
from hasten.model.checkpoint import Checkpoint, open_checkpoint
from hasten.model.formats import DENSE_BYTES, Weight, bytes_of, sparsify
from hasten.model.spec import config_of_text
from hasten.model.writer import write_checkpoint
from hasten.receipt import Receipt, write_text
from hasten.recipe import Recipe, Run
from hasten.steps import Quantize, Step, step_name

# Modules that register their steps as they are imported.
CHANGES = (factorize, kv_scales, prune, quantize, reconstruct, rotate, shrink, smooth, split, threshold)

# What interrupted work goes on from: stages that are finished, text, blocks, a training.
_KEPT = ("found.json", "survey-*.json", "*.npy", "block-*.npz", "checkpoint-*")

Progress = Callable[[int, int, str], None]


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

    receipt: what is known before the work. Raises ResourceError where the work folder is of other work, or cannot be
    written.
    """
    work = _work_folder(out, recipe, receipt)
    try:
        folder, receipt = _stages(recipe, plan, checkpoint, work, receipt, device, progress)
    except OSError as error:  # such as a full disk
        raise ResourceError(f"{error.filename or work} cannot be written: {error.strerror or error}") from error
    _publish(folder, out, recipe, run_of(recipe, checkpoint), receipt)
    shutil.rmtree(work, ignore_errors=True)
    return receipt


def _stages(
    recipe: Recipe,
    plan: Plan,
    checkpoint: Checkpoint,
    work: Path,
    receipt: Receipt,
    device: str,
    progress: Progress | None,
) -> tuple[Path, Receipt]:
    """Stage after stage, each from the folder of the one before: the last one's folder, and the receipt."""
    started = time.monotonic()
    stages = stages_of(recipe.steps)
    held_out = any(isinstance(step, Quantize) and step.threshold is not None for step in recipe.steps)
    tokens = Sequences(recipe.calibration, checkpoint.path, work / "calibration.npy", device, held_out)
    source, notes = checkpoint.path, list(receipt.notes)
    errors: dict[str, float] = {}
    facts: dict[str, object] = {}
    for index, steps in enumerate(stages):
        target = work / f"stage-{index}"
        own = work / f"work-{index}"
        own.mkdir(exist_ok=True)
        tell = _teller(progress, index, len(stages), len(checkpoint.spec.layers))
        context = Context(recipe, plan, checkpoint.path, source, tokens, device, own, tell)
        if not (own / "found.json").is_file():  # else it was finished before an interruption
            shutil.rmtree(target, ignore_errors=True)
            _try_stage(steps, target, context, work)
            _remember(context)
        context = _remembered(context)
        facts, notes = facts | context.facts, [*notes, *context.notes]
        errors |= {name: errors.get(name, 0.0) + error for name, error in context.errors.items()}
        source = target
    notes += tokens.notes
    source = _packed(source, work / "packed", recipe, plan, notes)
    after = open_checkpoint(source)
    notes += _widened(checkpoint, after)
    settings = {
        **receipt.settings,
        "bytes_after": sum(bytes_of(fmt, shape) for _, shape, fmt in after.matrices()),
        "device": device,
        "calibration": tokens.about(),
        "errors": errors,
        "seconds": round(time.monotonic() - started, 3),
        "peak_memory": _peak_memory(),
        **facts,
    }
    return source, replace(receipt, settings=settings, notes=tuple(notes))


def device_of(name: str) -> str:
    """ "auto" is a GPU where there is one. ResourceError where the device is not there."""
    cuda = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if cuda else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ResourceError(f"device is {name!r}, expected auto, cpu or cuda")
    if name.startswith("cuda") and not cuda:
        raise ResourceError("no GPU that torch can use is here: use --device cpu")
    return name


def stages_of(steps: tuple[Step, ...]) -> list[tuple[Step, ...]]:
    """Steps that are carried out together. A threshold is measured on, and against, what the steps before it left."""
    stages: list[tuple[Step, ...]] = []
    for step in steps:
        alone = isinstance(step, Quantize) and step.threshold is not None
        if stages and is_blockwise(step) and is_blockwise(stages[-1][0]) and not alone:
            stages[-1] = (*stages[-1], step)
        else:
            stages.append((step,))
    return stages


def _try_stage(steps: tuple[Step, ...], target: Path, context: Context, work: Path) -> None:
    """Where it fails before anything is worth keeping, the work folder goes: it would be in a mended recipe's way."""
    try:
        _run_stage(steps, target, context)
    except (HastenError, torch.OutOfMemoryError) as error:
        if not _holds_work(work):
            shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, HastenError):
            raise
        raise ResourceError(
            f"the GPU's memory ran out in {', '.join(map(step_name, steps))}: free it of other work, lower batch_size "
            "or sequence_len where the step has them, or use --device cpu"
        ) from None


def _run_stage(steps: tuple[Step, ...], target: Path, context: Context) -> None:
    if is_blockwise(steps[0]) and not only_rounds(steps):
        sweep(steps, target, context)
        threshold.check(steps, target, context)
    elif isinstance(steps[0], Quantize):
        _round(target, replace(context, plan=context.of(steps)))  # a threshold's matrices are not touched before it
    else:
        run_step(steps[0], context.source, target, context)


def _round(target: Path, context: Context) -> None:
    """Steps that only round: weights stream through."""
    checkpoint = open_checkpoint(context.source)
    with ThreadPoolExecutor(usable_threads()) as pool:
        weights = carry_out(context.plan, all_weights(checkpoint), pool)
        write_checkpoint(target, config_of_text(checkpoint.config), weights, checkpoint.path)


def _work_folder(out: Path, recipe: Recipe, receipt: Receipt) -> Path:
    """The folder of this work beside `out`, new or found again. ResourceError where it is of other work that has begun
    to be worth keeping."""
    work = out.with_name(out.name + ".work")
    about = json.dumps({"recipe": recipe.to_dict(), "inputs": receipt.inputs})
    state = work / "state.json"
    try:
        if state.is_file() and state.read_text() == about:
            return work
        if state.is_file() and _holds_work(work):
            raise ResourceError(
                f"{work} holds unfinished work of another recipe or model: remove it, or take another -o"
            )
        if work.exists() and not state.is_file() and any(work.iterdir()):
            raise ResourceError(f"{work} is in the way, and is no unfinished work: remove it, or take another -o")
        work.mkdir(parents=True, exist_ok=True)
        write_text(state, about)
    except OSError as error:
        raise ResourceError(f"{work} cannot be written: {error.strerror or error}") from None
    return work


def _holds_work(work: Path) -> bool:
    return any(any(work.rglob(pattern)) for pattern in _KEPT)


def _packed(source: Path, target: Path, recipe: Recipe, plan: Plan, notes: list[str]) -> Path:
    """The folder with 2:4 matrices stored as such, where a stage behind the pruning wrote them with their zeros, and
    without scales of keys and values that no longer hold, which blocks carry along."""
    checkpoint = open_checkpoint(source)
    left = plan.sparse - {name for name, _, fmt in checkpoint.matrices() if fmt.sparse24}
    stale = undoes_kv_scales(recipe.steps) is not None and any(True for _ in checkpoint.kv_scales())
    if not left and not stale:
        return source

    def weights() -> Iterator[tuple[str, Weight]]:
        for name, weight in checkpoint.weights() if stale else all_weights(checkpoint):
            try:
                yield name, sparsify(weight) if name in left else weight
            except RecipeError:
                notes.append(f"{name} is no longer 2:4 after the steps behind prune, and is stored whole")
                yield name, weight

    shutil.rmtree(target, ignore_errors=True)
    write_checkpoint(target, config_of_text(checkpoint.config), weights(), checkpoint.path)
    return target


def _widened(before: Checkpoint, after: Checkpoint) -> list[str]:
    """A line where matrices that were quantised were changed, and are no longer."""
    narrow = {name for name, _, fmt in before.matrices() if fmt.kind not in DENSE_BYTES}
    wide = [name for name, _, fmt in after.matrices() if name in narrow and fmt.kind in DENSE_BYTES]
    if not wide:
        return []
    return [
        f"{len(wide)} matrices that were quantised ({wide[0]}, ...) were changed, and are stored whole: quantise them"
    ]


def _remember(context: Context) -> None:
    """Keep what a stage found out: a run that goes on may find the stage finished."""
    found = {"errors": context.errors, "notes": context.notes, "facts": context.facts}
    write_text(context.work / "found.json", json.dumps(found))


def _remembered(context: Context) -> Context:
    for block in context.work.glob("block-*.npz"):
        block.unlink()
    return replace(context, **json.loads((context.work / "found.json").read_text()))


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


def _publish(folder: Path, out: Path, recipe: Recipe, how: Run, receipt: Receipt) -> None:
    """The papers are added, and the folder gets its name. ResourceError where that cannot be."""
    try:
        config = json.loads((folder / "config.json").read_text())
        config.setdefault("hasten", {})["run"] = run_settings(how)
        write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_text(folder / "recipe.yaml", recipe.to_yaml())
        receipt.save(folder / "receipt.json")
        folder.rename(out)
    except OSError as error:
        raise ResourceError(f"{out} cannot be written: {error.strerror or error}") from None
