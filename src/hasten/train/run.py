"""`hasten.compress`: a recipe carried out, those steps too that train. Loads what they need only where they occur."""

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.compress.folder import ProgressCallback, in_the_way
from hasten.compress.folder import compress as carry_out
from hasten.compress.refusals import check_teaches, trains
from hasten.errors import ResourceError
from hasten.model.checkpoint import open_checkpoint
from hasten.model.hub import resolve
from hasten.receipt import Receipt
from hasten.recipe import Recipe
from hasten.steps import Distill

_PACKAGES = ("torch", "transformers", "accelerate")


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

    device: "cpu", "cuda" or "auto", of steps that need more than rounding. progress(done, total, name) is told of each
    matrix, or of each block. The recipe is checked before any weight is read. Raises RecipeError, ModelError, and
    ResourceError where `out` exists or cannot be written, or torch is missing; nothing half-written is left under that
    name, and what takes long goes on where it was interrupted.
    """
    recipe = Recipe.load(recipe)
    if any(map(trains, recipe.steps)):
        missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise ResourceError(
                f"this recipe needs {' and '.join(missing)}, not installed here: pip install 'hasten[compress]'"
            )
        _check_logs(recipe)
        _check_teachers(recipe, resolve(str(model)))
        for module in ("finetune", "distill", "lora"):
            importlib.import_module(f"hasten.train.{module}")
    return carry_out(model, recipe, out, device=device, progress=progress)


def _check_logs(recipe: Recipe) -> None:
    """ResourceError where a step's logs cannot be made: that is not to be found out after the steps before it."""
    for logs in filter(None, (getattr(step, "logs", None) for step in recipe.steps)):
        if importlib.util.find_spec("tensorboard") is None:
            raise ResourceError("logs needs the package tensorboard: pip install 'hasten[compress]', or remove logs")
        if (above := in_the_way(Path(logs))) is not None:
            raise ResourceError(
                f"logs is {logs}, which cannot be made: {above} is no folder that may be written to: choose another"
            )


def _check_teachers(recipe: Recipe, model: Path) -> None:
    """Those that steps name; the model itself is plan.py's to check."""
    from hasten.train.teacher import check_teacher

    for step in recipe.steps:
        if isinstance(step, Distill) and step.teacher is not None:
            teacher = resolve(step.teacher)
            check_teacher(teacher, model)
            check_teaches(step, recipe, open_checkpoint(teacher).spec)
