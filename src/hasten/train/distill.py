"""Distill: the student learns the teacher's next-token distributions, and what goes on inside it, on some text.

    loss = (1 - weight) text's own + weight T^2 D(teacher || student) + hidden ... + attention ...

With weight 0.5 that is (student + teacher) / 2. Which text is learned from is samples: the given one; one that the
teacher wrote (sequence-level, Kim & Rush 2016); or what the student writes just then (on-policy, GKD, Agarwal et al.
2023), of which the teacher's opinion alone counts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.backends.torch.load import load_torch
from hasten.compress.calibration import generate, write_on
from hasten.compress.stage import Context, run_step
from hasten.model.checkpoint import Checkpoint, open_checkpoint
from hasten.model.hub import resolve
from hasten.recipe import Calibration
from hasten.steps import Distill
from hasten.train.finetune import train
from hasten.train.folder import frozen_dtype, open_folder, write_folder
from hasten.train.losses import mixed_loss
from hasten.train.match import attention_loss, hidden_loss, like_depth, projection
from hasten.train.student import student_of
from hasten.train.teacher import check_teacher
from hasten.train.text import rows_as_sequences, sequences_of
from hasten.train.trainer import sequences_needed

_MOST_WRITTEN = 2048  # sequences that a teacher writes at most; a longer training sees them again
_PROMPT_SHARE = 4  # of a sequence that is given, where a model goes on with it: one part in so many


@run_step.register
def _(step: Distill, source: Path, target: Path, context: Context) -> None:
    teacher_folder = context.original if step.teacher is None else resolve(step.teacher)
    student_folder = student_of(step, source, context.work)
    vocab = check_teacher(teacher_folder, student_folder)
    checkpoint = open_checkpoint(student_folder)
    if step.samples == "teacher":  # before the two models fill the device
        rows = written_by(teacher_folder, checkpoint, step, vocab, context.part(0, 1 / 2))
        context = context.part(1 / 2, 1)
        sequences, training = rows_as_sequences(rows, step, context.device)
    else:
        sequences, training = sequences_of(step, checkpoint, context)
    opened = open_folder(student_folder, context.device)
    teacher = load_teacher(teacher_folder, context.device)
    student = opened.model
    if step.attention:
        plain_attention(student)
        plain_attention(teacher)
    project = projection(student.config.hidden_size, teacher.config.hidden_size, step.seed).to(context.device)
    if step.hidden:
        student.projection_to_teacher = project  # a part of the student while it learns: trained and saved with it
    lesson = Lesson(step, teacher, project, vocab)
    train(step, training, opened, sequences, context, lesson, lesson.kind if step.samples == "student" else None)
    write_folder(opened, target)


def load_teacher(folder: Path, device: str) -> Any:
    model = load_torch(folder, frozen_dtype(folder, device), device)
    return model.requires_grad_(False)


def plain_attention(model: Any) -> None:
    """Transformers' attention that gives its weights, the others do not."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"


@dataclass(eq=False)
class Lesson:
    """The loss of one batch. vocab: tokens that both models know; their matrices may have more rows."""

    step: Distill
    teacher: Any
    project: nn.Module
    vocab: int

    def __call__(self, student: nn.Module, tokens: Tensor, number: int) -> Tensor:
        step, start = self.step, 0
        if step.samples == "student" and self.kind(number) == "written":
            start = max(1, tokens.shape[1] // _PROMPT_SHARE)
            tokens = go_on(student, tokens[:, :start], tokens.shape[1] - start, self.vocab)
        wanted = {"output_hidden_states": step.hidden > 0, "output_attentions": step.attention > 0, "use_cache": False}
        wanted = {key: value for key, value in wanted.items() if value or key == "use_cache"}
        out = student(input_ids=tokens, **wanted)
        with torch.no_grad():
            known = self.teacher(input_ids=tokens, **wanted)
        first = max(start - 1, 0)  # of the positions whose next token counts
        total = mixed_loss(
            out.logits, known.logits[:, first:-1, : self.vocab], None if start or step.weight == 1 else tokens[:, 1:],
            step.loss, step.temperature, step.beta, step.weight, first,
        )  # fmt: skip
        return total + self._inside(out, known)

    def _inside(self, out: Any, known: Any) -> Tensor | float:
        total: Tensor | float = 0.0
        if self.step.hidden:
            states, wanted = out.hidden_states, known.hidden_states
            layers = self.step.layer_map or like_depth(len(states) - 1, len(wanted) - 1)
            total = total + self.step.hidden * hidden_loss(states, wanted, layers, self.project)
        if self.step.attention:
            layers = self.step.layer_map or like_depth(len(out.attentions), len(known.attentions))
            total = total + self.step.attention * attention_loss(out.attentions, known.attentions, layers)
        return total

    def kind(self, number: int) -> str:
        """Whether the batch of this step is "given" or "written" by the student: by the seed and the step's number
        alone."""
        draw = np.random.default_rng((self.step.seed, number)).random()
        return "written" if draw < self.step.student_share else "given"


@torch.no_grad()
def go_on(model: nn.Module, tokens: Tensor, count: int, vocab: int) -> Tensor:
    """`tokens` [b, n] with `count` more each, of the first `vocab` ones, drawn from the model at temperature 1."""
    was_training = model.training
    model.eval()
    new, past = tokens, None
    for _ in range(count):
        out: Any = model(input_ids=new, past_key_values=past, use_cache=True)
        past = out.past_key_values
        new = torch.multinomial(out.logits[:, -1, :vocab].float().softmax(-1), 1)
        tokens = torch.cat([tokens, new], dim=1)
    model.train(was_training)
    return tokens


def written_by(teacher: Path, student: Checkpoint, step: Distill, vocab: int, context: Context) -> Tensor:
    """Sequences [n, T] that the teacher wrote at temperature 1, kept for a run that goes on. It goes on with the
    beginnings of the text's sequences; where the recipe names no text, it writes all."""
    file = context.work / "written.npy"
    if not file.is_file():
        count = min(sequences_needed(step), _MOST_WRITTEN)

        def tell(done: int) -> None:
            context.tell(done / count, f"distill: the teacher writes, {done} of {count} sequences")

        if step.text is None and context.recipe.calibration.text is None:
            rows = generate(Calibration(None, count, step.sequence_len, step.seed), teacher, context.device, tell)
        else:
            sequences, step = sequences_of(step, student, context)
            start = max(1, step.sequence_len // _PROMPT_SHARE)
            starts = sequences.__getitems__(list(range(count)))["input_ids"][:, :start]
            rows = write_on(starts.tolist(), step.sequence_len, step.seed, teacher, context.device, tell)
        rows = rows.clip(max=vocab - 1)  # a matrix may have rows, hardly ever drawn, that stand for no token
        partial = file.with_suffix(".partial")
        with open(partial, "wb") as stream:
            np.save(stream, rows)
        partial.rename(file)
    return torch.from_numpy(np.load(file).astype(np.int64))
