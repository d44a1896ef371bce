"""What of a recipe is refused before its matrices are looked at: steps that would undo earlier ones, sequences that a
model cannot read, models that are quantised already. plan.py asks, and does the rest."""

from collections.abc import Mapping
from typing import TypeGuard

from hasten.errors import RecipeError
from hasten.model.spec import ModelSpec
from hasten.recipe import Recipe
from hasten.steps import (
    Distill,
    Factorize,
    Finetune,
    Prune,
    Quantize,
    QuantizeKv,
    Recover,
    Rotate,
    Shrink,
    Smooth,
    SplitExperts,
    Step,
    Training,
    step_name,
)

# What a step cannot follow.
UNDONE: Mapping[type, tuple[type, ...]] = {
    Rotate: (Prune, Factorize, SplitExperts, Smooth),
    Shrink: (Prune, Factorize, SplitExperts),
    Factorize: (Prune,),
    SplitExperts: (Prune,),
    Prune: (Factorize,),
    Smooth: (Factorize,),
}
_RECOVERED = (Prune, Factorize, SplitExperts)  # steps that Recover by block can follow


def check_order(recipe: Recipe) -> None:
    """What a step made must not be undone by a later one."""
    done: dict[type, str] = {}
    before: Step | None = None
    for step in recipe.steps:
        name = step_name(step)
        if isinstance(step, Recover) and step.method == "block" and not isinstance(before, _RECOVERED):
            raise RecipeError(
                "recover by block fits blocks to what they gave before the step in front of it: "
                "put it right behind prune, factorize or split_experts, or use method lora"
            )
        before = step
        if Quantize in done and not isinstance(step, Quantize | QuantizeKv):
            raise RecipeError(
                f"{name} comes after quantize, and would work on rounded numbers: move quantize to the end"
            )
        if QuantizeKv in done and not isinstance(step, Quantize | QuantizeKv | Smooth):
            raise RecipeError(
                f"{name} comes after quantize_kv, and would change what it measured: move quantize_kv to the end"
            )
        for kind, undone in UNDONE.items():
            for other in undone if isinstance(step, kind) else ():
                if other not in done:
                    continue
                if kind in UNDONE.get(other, ()):
                    raise RecipeError(
                        f"{done[other]} and {name} do not go together, each would undo the other: remove one of them"
                    )
                raise RecipeError(
                    f"{name} comes after {done[other]}, and would undo it: put {name} in front of {done[other]}"
                )
        done[type(step)] = name


def check_teaches(step: Distill, recipe: Recipe, teacher: ModelSpec) -> None:
    """RecipeError where a teacher cannot read the sequences, or has not the layers that are to be matched."""
    check_length(step, recipe, teacher, "the teacher")
    for _, layer in step.layer_map:
        if layer >= len(teacher.layers):
            raise RecipeError(f"layer_map names the teacher's layer {layer}, it has {len(teacher.layers)}")


def check_length(step: Finetune | Distill | Recover, recipe: Recipe, spec: ModelSpec, whose: str) -> None:
    """RecipeError where a model, called `whose`, cannot read the sequences that a step trains on. Ready ones are no
    longer than those of the calibration, which they are."""
    text = text_of(step, recipe)
    if step.text is not None and step.text.endswith(".npy") and step.text != recipe.calibration.text:
        raise RecipeError(f"text is {step.text}: name ready tokens in calibration, or give {step_name(step)} a text")
    length = step.sequence_len
    written = isinstance(step, Distill) and step.samples == "teacher" and text is None
    if not written and (text is None or text.endswith(".npy")):
        length = min(length, recipe.calibration.sequence_len)
    if length > spec.max_position:
        raise RecipeError(
            f"training sequences have {length} tokens, {whose} at most {spec.max_position}: lower sequence_len"
        )


def trains_lora(step: Step) -> TypeGuard[Recover]:
    return isinstance(step, Recover) and step.method == "lora"


def trains(step: Step) -> TypeGuard[Finetune | Distill | Recover]:
    """Whether a step is one of hasten.train."""
    return isinstance(step, Finetune | Distill) or trains_lora(step)


def text_of(step: Training | Recover, recipe: Recipe) -> str | None:
    """The text that a step trains on: its own, or the calibration's."""
    return step.text or recipe.calibration.text


def takes_dense(step: Step) -> bool:
    """Whether a step works on unquantised models alone. A student that starts afresh is one."""
    fresh = getattr(step, "fresh", False) or getattr(step, "student", None) is not None
    return isinstance(step, Shrink) or trains_lora(step) or (isinstance(step, Training) and not fresh)
