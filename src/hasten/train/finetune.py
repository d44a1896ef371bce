"""Finetune: the text's own loss; from the model's weights, or from random ones. What all training steps share, too."""

from pathlib import Path

from hasten.compress.stage import Context, run_step
from hasten.errors import HastenError
from hasten.model.checkpoint import open_checkpoint
from hasten.steps import Finetune, Step, Training, step_name
from hasten.train.data import Sequences
from hasten.train.dropout import dropped
from hasten.train.folder import Opened, open_folder, write_folder
from hasten.train.masks import Masks
from hasten.train.student import from_config
from hasten.train.text import sequences_of
from hasten.train.trainer import Around, Kind, Loss, fit


@run_step.register
def _(step: Finetune, source: Path, target: Path, context: Context) -> None:
    if step.fresh:
        fresh = context.work / "fresh"
        if not fresh.is_dir():
            from_config(open_checkpoint(source).config, source, fresh, step.seed)
        source = fresh
    opened = open_folder(source, context.device)
    sequences, training = sequences_of(step, opened.checkpoint, context)
    train(step, training, opened, sequences, context)
    write_folder(opened, target)


def train(
    step: Step,
    training: Training,
    opened: Opened,
    sequences: Sequences,
    context: Context,
    loss: Loss | None = None,
    kind: Kind | None = None,
) -> None:
    """Train what is opened in place, zeros of pruned matrices held, with checkpoints in the stage's work folder; the
    curve goes into the receipt, and a note where it rose. HastenError where the loss is lost."""
    name = step_name(step)
    masks = Masks(opened.weights(), training.sparsity)
    around = Around(context.work, loss, masks, lambda part, what: context.tell(part, f"{name}: {what}"), kind=kind)
    with dropped(opened.additions(), training.dropout):
        trained = fit(opened.model, sequences, training, around)
    last = trained.curve[-1][1] if trained.curve else 0.0
    if not last < float("inf"):
        raise HastenError(f"{name} ended at a loss of {last}: lower learning_rate, which is {training.learning_rate}")
    if trained.rose:
        first, end = trained.ends() or (0.0, 0.0)
        slower = "" if training.sparsity is None else ", or prune over more steps"
        context.notes.append(
            f"{name}: the loss rose from {first:.3f} to {end:.3f}: lower learning_rate, which is "
            f"{training.learning_rate}{slower}"
        )
    number = next(index for index, other in enumerate(context.recipe.steps) if other is step)  # equal ones are others
    context.facts[f"{name}-{number}"] = trained.facts()
