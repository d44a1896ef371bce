"""A recipe carried out on a model folder: weights stream through, one at a time, into a new folder with its papers."""

import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from hasten.backends import missing_for_cuda
from hasten.compress.apply import carry_out
from hasten.compress.plan import Plan, only_rounds, reads_text, resolve
from hasten.compress.targets import matrix_shapes, total_bytes
from hasten.errors import HastenError, ModelError, ResourceError
from hasten.hardware import conditions, cpu_model, usable_threads, versions
from hasten.model.checkpoint import Checkpoint, open_checkpoint
from hasten.model.formats import Format, Weight
from hasten.model.hub import resolve as resolve_name
from hasten.model.settings import stated_run
from hasten.model.spec import config_of_text
from hasten.model.writer import write_checkpoint
from hasten.receipt import Receipt, UsedText, plain, sha256, used_texts
from hasten.recipe import Recipe, Run
from hasten.steps import Distill, Quantize, QuantizeKv, Smooth, Step, step_name

ProgressCallback = Callable[[int, int, str], None]

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def compress(
    model: str | Path,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    device: str = "auto",
    progress: ProgressCallback | None = None,
) -> Receipt:
    """Carry out `recipe` (a Recipe, plain data, a preset's name or a YAML file) on `model` and write the folder `out`,
    with recipe.yaml and receipt.json in it.

    device: "cpu", "cuda" or "auto", of steps that need more than rounding, which is the CPU's work. progress(done,
    total, name) is told of each matrix, or of each block. The recipe is checked before any weight is read. Raises
    RecipeError, ModelError, and ResourceError where `out` exists or cannot be written, the device is not there, or
    torch is missing; nothing half-written is left under that name, and what takes long goes on where it was
    interrupted.
    """
    check_out(out)
    recipe = Recipe.load(recipe)
    _check_device(device, recipe)
    recipe, unread = _without_unread(recipe)
    checkpoint = open_checkpoint(resolve_name(str(model)))
    before = {name: fmt for name, _, fmt in checkpoint.matrices()}
    plan = resolve(recipe, checkpoint.spec, before)
    rounds = only_rounds(recipe.steps)
    if not rounds:
        _check_extra()
        from hasten.compress import run

        device = run.device_of(device)
    how = run_of(recipe, checkpoint)
    receipt = Receipt(
        what="compress",
        model=str(model),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        versions=versions(),
        hardware={"cpu": cpu_model(), "threads": usable_threads()},
        conditions=conditions(),
        inputs=hashes(checkpoint),
        recipe=recipe,
        settings={
            "bytes_before": total_bytes(checkpoint.spec, before),
            "bytes_after": total_bytes(checkpoint.spec, {**before, **plan.formats}),
        },
        made_from=tuple(chain.from_iterable(map(made_from, (checkpoint.path, *_teachers(recipe))))),
        notes=(*unread, *plan.notes, *requantised(plan, before), *not_kept(recipe, checkpoint)),
    )
    if rounds:
        write_folder(out, checkpoint, recipe, {"receipt.json": receipt.to_json()}, progress, how)
        return receipt
    return run.run(recipe, plan, checkpoint, Path(out), receipt, device, progress)


def write_folder(
    out: str | Path,
    checkpoint: Checkpoint,
    recipe: Recipe,
    extra_files: Mapping[str, str],
    progress: ProgressCallback | None = None,
    how: Run | None = None,
) -> None:
    """The model under the recipe as a Hugging Face folder, with recipe.yaml, and how to run it (None: as the recipe
    says) in config.json's `hasten.run`. It appears whole or not at all."""
    found = {name: fmt for name, _, fmt in checkpoint.matrices()}
    plan = resolve(recipe, checkpoint.spec, found)
    config = config_of_text(checkpoint.config)
    config["hasten"] = {**config.get("hasten", {}), "run": run_settings(how or recipe.run)}
    formats = {**found, **plan.formats}
    kinds = {formats[name].kind for name in matrix_shapes(checkpoint.spec)}
    if len(kinds) == 1 and (dtype := _DTYPES.get(kinds.pop())) is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    with ThreadPoolExecutor(usable_threads()) as pool:
        weights = _told(carry_out(plan, all_weights(checkpoint), pool), len(formats), progress)
        files = {"recipe.yaml": recipe.to_yaml(), **extra_files}
        write_checkpoint(out, config, weights, checkpoint.path, files)


def run_settings(how: Run) -> dict[str, Any]:
    """How to run the model, as config.json's `hasten.run` says it."""
    return {key: value for key, value in plain(how).items() if value is not None}


def run_of(recipe: Recipe, checkpoint: Checkpoint) -> Run:
    """How the result is run: as the recipe says, else as the folder does that it is carried out on. That folder's KV
    cache was chosen for its keys and values: where a step changes them, it is not kept."""
    stated = stated_run(checkpoint)
    if _first_change(recipe.steps) is not None:
        stated = replace(stated, kv_cache=None)
    return replace(stated, **run_settings(recipe.run))


def undoes_kv_scales(steps: Sequence[Step]) -> Step | None:
    """The step that changes keys and values after their scales were made last, so that these no longer hold."""
    made = max((index for index, step in enumerate(steps) if isinstance(step, QuantizeKv)), default=-1)
    return _first_change(steps[made + 1 :])


def _first_change(steps: Sequence[Step]) -> Step | None:
    """The first step that changes keys and values by more than rounding. AWQ may divide values by what it multiplies
    `o` with."""
    for step in steps:
        awq = isinstance(step, Quantize) and step.method == "awq"
        if awq or not isinstance(step, Quantize | QuantizeKv | Smooth):
            return step
    return None


def not_kept(recipe: Recipe, checkpoint: Checkpoint) -> Iterator[str]:
    """A line for each thing about keys and values that the result no longer has."""
    made = any(isinstance(step, QuantizeKv) for step in recipe.steps)
    step = undoes_kv_scales(recipe.steps)
    if step is not None and (made or any(True for _ in checkpoint.kv_scales())):
        yield (
            f"scales of keys and values were dropped, since {step_name(step)} changes what they were measured on: "
            "end the recipe with quantize_kv to have new ones"
        )
    if others := checkpoint.other_kv_scales():
        yield f"{len(others)} scales of keys and values ({others[0]}, ...) are not one number a layer, and were dropped"
    stated, step = stated_run(checkpoint).kv_cache, _first_change(recipe.steps)
    if stated is not None and step is not None and recipe.run.kv_cache is None:
        yield (
            f"kv_cache {stated}, as the model was run, was not kept, since {step_name(step)} changes keys and values: "
            "name it in the recipe's run to have it"
        )


def all_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, Weight]]:
    """Everything that a folder made from this one is to hold: its weights, and scales of keys and values."""
    return chain(checkpoint.weights(), checkpoint.kv_scales())


def made_from(folder: Path) -> tuple[UsedText, ...]:
    """The texts that made the model in `folder`, as its receipt says. ModelError where that cannot be read: whether a
    text is new to what is made from it would not be known."""
    try:
        return used_texts(folder)
    except HastenError as error:
        raise ModelError(
            f"{folder / 'receipt.json'} should say which texts made the model: {error}; or remove it"
        ) from None


def _teachers(recipe: Recipe) -> list[Path]:
    """What they have seen, the student learns from."""
    return [resolve_name(step.teacher) for step in recipe.steps if isinstance(step, Distill) and step.teacher]


def hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """sha256 of the configuration, the tokenizer and every file of weights."""
    wanted = [
        *checkpoint.path.glob("*.safetensors"),
        checkpoint.path / "config.json",
        checkpoint.path / "tokenizer.json",
    ]
    files = [path for path in sorted(wanted) if path.is_file()]
    with ThreadPoolExecutor(usable_threads()) as pool:
        return dict(zip([path.name for path in files], pool.map(sha256, files), strict=True))


def _check_extra() -> None:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ResourceError(
            f"this recipe needs {' and '.join(missing)}, not installed here: pip install 'hasten[compress]'"
        )


def _check_device(device: object, recipe: Recipe) -> None:
    """Also of a recipe that only rounds, for which torch is not asked: what a caller wants is there, or it is said."""
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ResourceError(f"device is {device!r}, expected auto, cpu or cuda")
    if device.startswith("cuda") and only_rounds(recipe.steps) and (reason := missing_for_cuda()) is not None:
        raise ResourceError(f"device {device} cannot be used: {reason}")


def _without_unread(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """Without the text that no step looks at, and a line on it: text that a recipe names counts as used."""
    calibration = recipe.calibration
    if calibration.text is None or reads_text(recipe.steps):
        return recipe, ()
    line = f"calibration text {calibration.text} was not read, as no step looks at it, and is not recorded as used"
    return replace(recipe, calibration=replace(calibration, text=None)), (line,)


def check_out(out: str | Path) -> None:
    """Fail before the work rather than after it: ResourceError where a new folder `out`, and those that it is to lie
    in, cannot be made."""
    if out == "":
        raise ResourceError("the name of the new folder is empty: name one")
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise ResourceError(f"{out} exists already: remove it or choose another folder")
    if (above := in_the_way(out)) is not None:
        raise ResourceError(f"{out} cannot be made: {above} is no folder that may be written to: choose another")


def in_the_way(folder: Path) -> Path | None:
    """What keeps `folder` from being made or written to: of it and those above the first that exists, where that is no
    folder that may be written to."""
    folder = folder.absolute()
    first = next(path for path in (folder, *folder.parents) if path.exists())
    return None if first.is_dir() and os.access(first, os.W_OK) else first


def requantised(plan: Plan, before: Mapping[str, Format]) -> tuple[str, ...]:
    """A line where matrices that were quantised already are quantised again: what was lost stays lost."""
    formats = {name: fmt for name, fmt in plan.formats.items() if name in before}
    again = [n for n, fmt in formats.items() if before[n].kind in ("int8", "int4") and before[n] != fmt]
    if not again:
        return ()
    return (
        f"{len(again)} matrices were quantised already ({again[0]}, ...) and are quantised again from what is left",
    )


def _told(
    weights: Iterator[tuple[str, Weight]], total: int, progress: ProgressCallback | None
) -> Iterator[tuple[str, Weight]]:
    done = 0
    for name, weight in weights:
        yield name, weight
        if weight.shape[1] > 1:
            done += 1
            if progress is not None:
                progress(min(done, total), total, name)
