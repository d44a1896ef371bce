"""Recover, block by block: fit a changed block to what the unchanged model's block gives (BRECQ, Li et al. 2021; EBFT,
Guo et al. 2024).

A few hundred Adam steps on the squared distance between the block's outputs, on inputs that come through the changed
blocks before it, and the unchanged model's. So a block also learns to make up for the ones before it. Numbers that are
zero stay zero. A part of the sequences is held out; where they are not served better, the block stays as it was.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hasten.compress.blocks import Block, Inputs
from hasten.compress.stage import Context, change_block
from hasten.errors import RecipeError
from hasten.model.checkpoint import Checkpoint
from hasten.model.names import sources
from hasten.steps import Recover

_HELD_OUT = 8  # one of so many sequences
_BATCH_TOKENS = 2048

Run = Callable[[dict[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Fit:
    """Parameters by name, in float32, and the relative squared error on held-out sequences before and after."""

    parameters: dict[str, Tensor]
    before: float
    after: float


@change_block.register
def _(step: Recover, block: Block, inputs: Inputs, context: Context) -> None:
    parameters = trained(block.module, step.parts)
    if not parameters:
        raise nothing_to_fit(step)
    args, named = block.call

    def run(values: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Any = functional_call(block.module, values, (x, *args), named)
        return cast(Tensor, out[0] if isinstance(out, tuple) else out)

    fit = reconstruct(run, parameters, inputs, step.steps, step.rate, _seed(block, context))
    context.errors[f"layers.{block.index}"] = min(fit.before, fit.after)
    if fit.after < fit.before:
        for name, values in fit.parameters.items():
            parameters[name].data = values.to(parameters[name].dtype)
    else:
        context.notes.append(f"layers.{block.index}: recover did not help on held-out sequences, it stays as it was")


def check_parts(step: Recover, checkpoint: Checkpoint) -> None:
    """RecipeError where no layer of the model has any of the parts that are to be fitted."""
    every = sources(checkpoint.spec, checkpoint.config)
    found = [source for source in every if source.parts[0].name.startswith("layers.")]
    has = {
        "weights": True,
        "biases": any(source.bias for source in found),
        "norms": any(source.role == "norm" for source in found),
    }
    if step.method == "block" and not any(has[part] for part in step.parts):
        raise nothing_to_fit(step)


def nothing_to_fit(step: Recover) -> RecipeError:
    return RecipeError(
        f"recover fits the parts {', '.join(step.parts) or 'none'}, of which this model's layers have none: add weights"
    )


def trained(module: nn.Module, parts: Collection[str]) -> dict[str, nn.Parameter]:
    """The parameters of a block that are of these parts: "weights" (matrices), "biases", "norms"."""

    def part(name: str, parameter: nn.Parameter) -> str:
        return "weights" if parameter.ndim > 1 else "biases" if name.endswith("bias") else "norms"

    return {name: parameter for name, parameter in module.named_parameters() if part(name, parameter) in parts}


def reconstruct(
    run: Run, parameters: dict[str, nn.Parameter], inputs: Inputs, steps: int, learning_rate: float, seed: int
) -> Fit:
    """Fit `parameters` so that run(parameters, inputs) comes near the inputs' targets. The module is left as it was.

    Adam with a learning rate that falls to zero, on float32 copies: steps are smaller than bfloat16 tells apart.
    """
    assert inputs.targets is not None, "the sweep keeps what the unchanged model gives where a step is Recover"
    masters = {name: value.detach().float().clone().requires_grad_() for name, value in parameters.items()}
    masks = {name: value != 0 for name, value in parameters.items() if value.ndim > 1}

    def current() -> dict[str, Tensor]:
        out = {}
        for name, master in masters.items():
            values = master * masks[name] if name in masks else master
            out[name] = values.to(parameters[name].dtype)
        return out

    order = torch.randperm(len(inputs.states), generator=torch.Generator().manual_seed(seed))
    held = order[: max(1, len(order) // _HELD_OUT)]
    fitted = order[len(held) :] if len(order) > len(held) else held
    before = _error(run, current(), inputs, held)
    _adam(lambda x: run(current(), x), list(masters.values()), inputs, fitted, steps, learning_rate, seed)
    with torch.no_grad():
        return Fit({k: v.detach() for k, v in current().items()}, before, _error(run, current(), inputs, held))


def _adam(
    run: Callable[[Tensor], Tensor],
    masters: list[Tensor],
    inputs: Inputs,
    rows: Tensor,
    steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    optimiser = torch.optim.Adam(masters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    generator = torch.Generator().manual_seed(seed)
    count = max(1, min(len(rows), _BATCH_TOKENS // inputs.states.shape[1], inputs.batch_size))
    with torch.enable_grad():
        for _ in range(steps):
            batch = rows[torch.randint(len(rows), (count,), generator=generator)]
            x, wanted = _rows(inputs, batch)
            loss = (run(x).float() - wanted).square().sum() / wanted.square().sum()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()


@torch.no_grad()
def _error(run: Run, parameters: dict[str, Tensor], inputs: Inputs, rows: Tensor) -> float:
    """Squared error over the targets' square, on these sequences."""
    lost = total = 0.0
    for batch in torch.split(rows, inputs.batch_size):
        x, wanted = _rows(inputs, batch)
        lost += float((run(parameters, x).float() - wanted).square().sum())
        total += float(wanted.square().sum())
    return lost / max(total, 1e-30)


def _rows(inputs: Inputs, batch: Tensor) -> tuple[Tensor, Tensor]:
    assert inputs.targets is not None
    where = batch.to(inputs.states.device)
    return inputs.states[where].to(inputs.device), inputs.targets[where].to(inputs.device).float()


def _seed(block: Block, context: Context) -> int:
    return context.recipe.calibration.seed + block.index
