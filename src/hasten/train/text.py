"""The sequences that a training step learns from: its own text, else the recipe's."""

from dataclasses import replace
from typing import TypeVar

import torch

from hasten.compress.refusals import text_of
from hasten.compress.stage import Context
from hasten.model.checkpoint import Checkpoint
from hasten.steps import Training
from hasten.train.data import Sequences, tokens_of
from hasten.train.trainer import sequences_needed

Kind = TypeVar("Kind", bound=Training)


def sequences_of(training: Kind, checkpoint: Checkpoint, context: Context) -> tuple[Sequences, Kind]:
    """On the context's device; and the step, whose sequences may be shorter where it has only the recipe's. Those are
    the calibration sequences, which the model itself wrote where the recipe names no text.
    """
    text = text_of(training, context.recipe)
    if text is None or text.endswith(".npy"):
        return rows_as_sequences(context.tokens(), training, context.device)
    stream, first = tokens_of(text, checkpoint.path, context.notes.append)
    count = sequences_needed(training)
    return Sequences(stream.to(context.device), training.sequence_len, count, training.seed, first), training


def rows_as_sequences(rows: torch.Tensor, training: Kind, device: str) -> tuple[Sequences, Kind]:
    """Ready sequences [n, T], whole, in another order every epoch; those of sequence_len at most."""
    training = replace(training, sequence_len=min(rows.shape[1], training.sequence_len))
    stream = rows[:, : training.sequence_len].reshape(-1).to(device)
    count = sequences_needed(training)
    return Sequences(stream, training.sequence_len, count, training.seed, shifted=False), training
