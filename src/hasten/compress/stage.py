"""What a step is told, and how it is called: the contract between run.py and whoever carries out a step.

A step changes one decoder block after the other (change_block), or a whole model folder (run_step). Which of the two,
the module that registers its type decides; `is_blockwise` says it.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import singledispatch
from pathlib import Path
from typing import Any

from hasten.compress.blocks import Block, Inputs
from hasten.compress.calibration import Sequences
from hasten.compress.plan import Plan
from hasten.errors import RecipeError
from hasten.recipe import Recipe
from hasten.steps import Factorize, Prune, Quantize, QuantizeKv, Recover, Smooth, SplitExperts, Step, step_name


@dataclass(eq=False)
class Context:
    """plan: of the whole recipe. original: the folder as it was before the recipe. source: the one that this stage
    reads. tokens(): the calibration sequences [n, T] int64, made when first asked for; tokens.held_out(): others, for
    what is to be judged. device: of computation, such as cpu or cuda. work: a folder of this stage's own, which stays
    where the work is interrupted. tell(part, what): how far the stage is, 0..1. errors: by matrix, the squared error of
    its outputs over their square. notes: what the user should know. facts: more for the receipt. surveys: by step, what
    `survey` found.
    """

    recipe: Recipe
    plan: Plan
    original: Path
    source: Path
    tokens: Sequences
    device: str
    work: Path
    tell: Callable[[float, str], None]
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)
    surveys: dict[Step, Any] = field(default_factory=dict)

    def lost(self, name: str, error: float) -> None:
        """Take the relative squared error that a step adds to a matrix's outputs. Those of steps one after the other
        add up, as errors do that have nothing to do with each other."""
        self.errors[name] = self.errors.get(name, 0.0) + error

    def of(self, steps: Collection[Step]) -> Plan:
        """The plan with the formats alone that these steps give."""
        formats = {name: fmt for name, fmt in self.plan.formats.items() if self.plan.steps[name] in steps}
        return replace(self.plan, formats=formats)

    def part(self, start: float, end: float) -> "Context":
        """The same, for work that takes the stage from `start` to `end`, 0..1."""
        return replace(self, tell=lambda part, what: self.tell(start + (end - start) * part, what))


def is_blockwise(step: Step) -> bool:
    """Whether a step changes one block after the other, rather than a whole folder."""
    if isinstance(step, Recover):
        return step.method == "block"
    return isinstance(step, Quantize | QuantizeKv | Smooth | Prune | Factorize | SplitExperts)


@singledispatch
def survey(step: object, blocks: Iterator[tuple[Block, Inputs]], context: Context) -> Any:
    """What a step must know of the whole model before it changes the first block, as plain data for JSON.

    blocks: each unchanged block with what it reads, in turn; nothing is read before the first is asked for.
    """
    return None


@singledispatch
def change_block(step: object, block: Block, inputs: Inputs, context: Context) -> None:
    """Change a block in place. `inputs` are what it reads in the calibration text, after the changes before it."""
    raise RecipeError(f"no way to apply {step_name(step)} to a block")  # type: ignore[arg-type]


@singledispatch
def run_step(step: object, source: Path, target: Path, context: Context) -> None:
    """Read the model folder `source` and write the changed one as the new folder `target`."""
    raise RecipeError(f"no way to apply {step_name(step)} to a model")  # type: ignore[arg-type]
