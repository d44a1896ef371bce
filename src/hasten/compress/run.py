"""A recipe with steps that need torch or text: stage after stage in a work folder beside the result, which a killed run
leaves and the next one goes on from.

A stage reads a model folder and writes one. Consecutive steps that change a block at a time are one stage, one sweep
over the blocks (sweep.py). Finished stages are kept until the whole is. Knows no method.
"""

import fcntl
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hasten.backends.torch.tensors import to_tensor, to_weight
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
from hasten.compress.calibration import Sequences, check_text, fingerprint
from hasten.compress.folder import all_weights, check_out, run_of, run_settings, undoes_kv_scales
from hasten.compress.plan import Plan, only_rounds, reads_text
from hasten.compress.refusals import text_of, trains
from hasten.compress.stage import Context, is_blockwise, run_step
from hasten.compress.sweep import sweep
from hasten.compress.targets import targeted
from hasten.errors import HastenError, RecipeError, ResourceError
from hasten.hardware import usable_threads
from hasten.model.checkpoint import Checkpoint, open_checkpoint
from hasten.model.formats import DENSE_BYTES, Weight, bytes_of, sparsify
from hasten.model.jsonfile import read_kept
from hasten.model.spec import config_of_text
from hasten.model.writer import write_checkpoint
from hasten.receipt import Receipt, write_text
from hasten.recipe import Recipe, Run
from hasten.steps import Distill, Prune, Quantize, Recover, Step, step_name

# Modules that register their steps as they are imported.
CHANGES = (factorize, kv_scales, prune, quantize, reconstruct, rotate, shrink, smooth, split, threshold)

# What interrupted work goes on from: stages that are finished, text, blocks, a training.
_KEPT = ("found.json", "survey-*.json", "*.npy", "block-*.npz", "checkpoint-*")
_LOCK = "lock"  # of a work folder; the kernel lets go of it, even where the process is killed

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

    receipt: what is known before the work. Raises ResourceError where the work folder is of other work, has one of a
    process that is still at it, or cannot be written; HastenError where a text is seen to be unfit before the work.
    """
    _check(recipe, checkpoint)
    with _locked(out.with_name(out.name + ".work")) as work:
        with _tidied(work, "looking"):
            check_out(out)  # once more: another process may have made it since
        _claim(work, recipe, receipt)
        try:
            folder, receipt = _stages(recipe, plan, checkpoint, work, receipt, device, progress)
        except OSError as error:  # such as a full disk
            raise ResourceError(f"{error.filename or work} cannot be written: {error.strerror or error}") from error
        _publish(folder, out, recipe, run_of(recipe, checkpoint), receipt)
        shutil.rmtree(work, ignore_errors=True)
    return receipt


def _check(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """What can be known of texts, and of what a step needs of the model, before the work."""
    for step in recipe.steps:
        if isinstance(step, Recover):
            reconstruct.check_parts(step, checkpoint)
    for text in _texts(recipe):
        check_text(text, checkpoint.path)
    for step in recipe.steps:
        if trains(step) and not _reads_tokens((step,), recipe) and (own := text_of(step, recipe)) is not None:
            check_text(own, checkpoint.path, step.sequence_len)


def _texts(recipe: Recipe) -> list[str]:
    """All that the recipe and its steps name."""
    named = [recipe.calibration.text, *(getattr(step, "text", None) for step in recipe.steps)]
    return list(dict.fromkeys(text for text in named if text is not None))


def _reads_tokens(steps: tuple[Step, ...], recipe: Recipe) -> bool:
    """Whether a stage of these steps asks for the calibration sequences."""
    step = steps[0]
    if is_blockwise(step):
        return not only_rounds(steps) and not _streams(steps, recipe)
    if not trains(step):
        return reads_text(steps)
    text = text_of(step, recipe)
    if text is None:  # where a teacher writes, it writes all of it
        return not (isinstance(step, Distill) and step.samples == "teacher")
    return text.endswith(".npy")


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
    clock = _Clock(work / "seconds")
    stages = stages_of(recipe.steps)
    held_out = any(isinstance(step, Quantize) and step.threshold is not None for step in recipe.steps)
    tokens = Sequences(recipe.calibration, checkpoint.path, work / "calibration.npy", device, held_out)
    source, notes = checkpoint.path, list(receipt.notes)
    errors: dict[str, float] = {}
    facts: dict[str, object] = {}
    if any(_reads_tokens(steps, recipe) for steps in stages):
        with _tidied(work, "the making of calibration text"):
            tokens()  # before the first stage: a text may be too short
    for index, steps in enumerate(stages):
        target = work / f"stage-{index}"
        own = work / f"work-{index}"
        own.mkdir(exist_ok=True)
        tell = _teller(progress, clock, index, len(stages), len(checkpoint.spec.layers))
        context = Context(recipe, plan, checkpoint.path, source, tokens, device, own, tell)
        if (found := read_kept(own / "found.json", dict)) is None:  # else it was finished before an interruption
            shutil.rmtree(target, ignore_errors=True)
            with _tidied(work, ", ".join(map(step_name, steps))):
                _run_stage(steps, target, context)
            found = _remember(context)
        for block in own.glob("block-*.npz"):
            block.unlink()
        context = replace(context, **found)
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
        "seconds": round(clock.seconds(), 3),
        "peak_memory": _peak_memory(),
        **facts,
    }
    return source, replace(receipt, settings=settings, notes=tuple(notes))


def device_of(name: str) -> str:
    """What a device's name, which folder.py has checked, stands for: "auto" is a GPU where there is one. ResourceError
    where the device is not there."""
    cuda = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if cuda else "cpu"
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


@contextmanager
def _tidied(work: Path, what: str) -> Iterator[None]:
    """Where `what` fails before anything is worth keeping, the work folder goes: it would be in a mended recipe's
    way."""
    try:
        yield
    except (HastenError, torch.OutOfMemoryError) as error:
        if not _holds_work(work):
            shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, HastenError):
            raise
        raise ResourceError(
            f"the GPU's memory ran out in {what}: free it of other work, lower batch_size "
            "or sequence_len where the step has them, or use --device cpu"
        ) from None


def _streams(steps: tuple[Step, ...], recipe: Recipe) -> bool:
    """Whether steps look at the weights alone, and no text is named on which their errors could be measured."""
    by_weights = [step for step in steps if isinstance(step, Prune) and step.method == "magnitude"]
    return recipe.calibration.text is None and only_rounds(step for step in steps if step not in by_weights)


def _run_stage(steps: tuple[Step, ...], target: Path, context: Context) -> None:
    if is_blockwise(steps[0]) and _streams(steps, context.recipe):
        _round(target, replace(context, plan=context.of(steps)), steps)
    elif is_blockwise(steps[0]) and not only_rounds(steps):
        sweep(steps, target, context)
        threshold.check(steps, target, context)
    elif isinstance(steps[0], Quantize):
        _round(target, replace(context, plan=context.of(steps)))  # a threshold's matrices are not touched before it
    else:
        run_step(steps[0], context.source, target, context)


def _round(target: Path, context: Context, steps: tuple[Step, ...] = ()) -> None:
    """Steps that only round, after those that prune by magnitude: weights stream through."""
    checkpoint = open_checkpoint(context.source)
    by_step = [(step, set(targeted(step, checkpoint.spec))) for step in steps if isinstance(step, Prune)]

    def pruned() -> Iterator[tuple[str, Weight]]:
        for name, weight in all_weights(checkpoint):
            for step in (step for step, names in by_step if name in names):
                values = prune.pruned(step, to_tensor(weight, context.device, torch.float32), torch.empty(0))
                weight = to_weight(values, checkpoint.spec.dtype)
            yield name, weight

    with ThreadPoolExecutor(usable_threads()) as pool:
        weights = carry_out(context.plan, pruned(), pool)
        write_checkpoint(target, config_of_text(checkpoint.config), weights, checkpoint.path)


@contextmanager
def _locked(work: Path) -> Iterator[Path]:
    """The folder of this work, new or found again, which no other process has meanwhile. ResourceError where one has
    it, or where it is no such folder."""
    try:
        taken = work.exists() and not (work / "state.json").is_file()
        if taken and (not work.is_dir() or any(path.name != _LOCK for path in work.iterdir())):
            raise ResourceError(f"{work} is in the way, and is no unfinished work: remove it, or take another -o")
        work.mkdir(parents=True, exist_ok=True)
        file = open(work / _LOCK, "a")  # noqa: SIM115
    except OSError as error:
        raise ResourceError(f"{work} cannot be written: {error.strerror or error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = (work / _LOCK).exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(work / _LOCK))
        except BlockingIOError:
            alone = False
        except OSError:
            alone = True  # a file system without locks
        if not alone:
            raise ResourceError(f"another process is working in {work}: wait for it, or choose another output")
        yield work


def _claim(work: Path, recipe: Recipe, receipt: Receipt) -> None:
    """Write down what work this is. ResourceError where other work lies there that has begun to be worth keeping, or
    this one has begun with other text."""
    texts = {text: mark for text in _texts(recipe) if (mark := fingerprint(text)) is not None}
    about = {"recipe": json.loads(json.dumps(recipe.to_dict())), "inputs": receipt.inputs, "texts": texts}
    state = work / "state.json"
    try:
        found = read_kept(state, dict)
        if found == about:
            return
        before = {"texts": {}, **(found or {})}
        if before != {**about, "texts": before["texts"]}:
            if state.is_file() and _holds_work(work):
                raise ResourceError(
                    f"{work} holds unfinished work of another recipe or model: remove it, or take another -o"
                )
            for beside in (".npy", ".json"):
                (work / f"calibration{beside}").unlink(missing_ok=True)
        elif _holds_work(work):
            for text in texts.keys() & before["texts"].keys():
                if texts[text] != before["texts"][text]:
                    raise ResourceError(f"{text} has changed since this work began: remove {work}, or put it back")
        write_text(state, json.dumps(about))
    except OSError as error:
        raise ResourceError(f"{work} cannot be written: {error.strerror or error}") from None


def _holds_work(work: Path) -> bool:
    """Whether there is what took long to make. Sequences cut from a text did not, those that the model wrote did."""
    recipe = (read_kept(work / "state.json", dict) or {}).get("recipe", {})
    cut = (recipe.get("calibration") or {}).get("text") is not None
    kept = (file for pattern in _KEPT for file in work.rglob(pattern))
    return any(not cut or file != work / "calibration.npy" for file in kept)


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


def _remember(context: Context) -> dict[str, Any]:
    """Keep what a stage found out: a run that goes on may find the stage finished."""
    found = {"errors": context.errors, "notes": context.notes, "facts": context.facts}
    write_text(context.work / "found.json", json.dumps(found))
    return found


class _Clock:
    """Seconds of this work: those of runs before that were interrupted, kept in a file, and of this one."""

    def __init__(self, file: Path) -> None:
        self._file, self._started, self._kept = file, time.monotonic(), 0.0
        try:
            self._before = float(file.read_text())
        except (FileNotFoundError, ValueError):
            self._before = 0.0

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def keep(self) -> None:
        """About once a second: writing is not to take time itself."""
        if self.seconds() - self._kept > 1:
            self._kept = self.seconds()
            write_text(self._file, f"{self._kept:.3f}")


def _teller(
    progress: Progress | None, clock: _Clock, stage: int, num_stages: int, num_blocks: int
) -> Callable[[float, str], None]:
    """A stage's share of the whole work, told in blocks."""

    def tell(part: float, what: str) -> None:
        clock.keep()
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
