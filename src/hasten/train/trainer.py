"""One training: a model, sequences and settings into Transformers' Trainer, which does the rest.

What is ours: which sequences come when (data.py), the loss where it is not the text's own (Loss), what holds weights at
zero (After), and going on from the last whole checkpoint. Knows no recipe and no folder format.
"""

import importlib.util
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers.trainer_callback import PrinterCallback
from transformers.utils import WEIGHTS_NAME, logging

from hasten.errors import ResourceError
from hasten.steps import Training
from hasten.train.data import Sequences

Loss = Callable[[nn.Module, Tensor, int], Tensor]  # model, tokens [b, T], number of the step -> mean loss
After = Callable[[int], None]  # the number of steps that are done; called before the first one too
Tell = Callable[[float, str], None]
Kind = Callable[[int], str]  # number of the step -> the kind of text that it learns from

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
_LOGS = 50  # entries of the curve
_OF_KIND = "loss of "  # before the kind, in the history
_END = 10  # either end of it is one part in so many
_ROSE, _ROSE_NATS = 1.1, 0.05  # by more than this times and nats the end is clearly above the beginning


@dataclass(frozen=True)
class Trained:
    """What came of a training. curve: (step, mean loss since the entry before). kinds: the same of each kind of text,
    where there are several. seconds: of this run, which may have gone on from a checkpoint, without its first step,
    which sets everything up; tokens: of these seconds."""

    curve: tuple[tuple[int, float], ...]
    seconds: float
    tokens: int
    kinds: tuple[tuple[tuple[int, float], ...], ...] = ()

    def ends(self) -> tuple[float, float] | None:
        """The mean loss of the first tenth and of the last, each the mean over the kinds of text; None of no training.
        One entry alone may be of another kind than the one that it is compared with."""
        curves = [[loss for _, loss in curve] for curve in self.kinds or (self.curve,) if curve]
        if not curves:
            return None
        parts = [(curve[: max(1, len(curve) // _END)], curve[-max(1, len(curve) // _END) :]) for curve in curves]
        first, last = zip(*parts, strict=True)
        return fmean(map(fmean, first)), fmean(map(fmean, last))

    @property
    def rose(self) -> bool:
        """Whether the loss is clearly higher at the end."""
        first, last = self.ends() or (0.0, 0.0)
        return last > max(_ROSE * first, first + _ROSE_NATS)

    def facts(self) -> dict[str, Any]:
        """For the receipt."""
        return {
            "loss": [[step, round(loss, 5)] for step, loss in self.curve],
            "ends": [round(loss, 5) for loss in self.ends() or ()],
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens / max(self.seconds, 1e-9)),
        }


@dataclass(frozen=True)
class Around:
    """What a training has beside the model. work: where checkpoints lie; a training finds them again there. loss: None
    is the text's own. after: holds weights in their place. saves: how often a checkpoint is written. kind: where steps
    learn from texts of several kinds.
    """

    work: Path
    loss: Loss | None = None
    after: After | None = None
    tell: Tell | None = None
    compile: bool = False
    saves: int = 5
    kind: Kind | None = None


def text_loss(model: nn.Module, tokens: Tensor, step: int) -> Tensor:
    """The text's own loss: nats of each next token, their mean."""
    loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss


def fit(model: Any, sequences: Sequences, training: Training, around: Around) -> Trained:
    """Train what of `model` takes gradients, in place, in float32 (under bfloat16 autocast on a GPU), on the device
    that it is on. The rest stays in its own dtype."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    device = next(model.parameters()).device
    if is_tight(model, training, free_memory(device)):
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    watcher = _Watcher(training.steps, around)
    trainer = _Trainer(
        model=model,
        args=_arguments(training, around, device),
        train_dataset=sequences,
        data_collator=_as_it_is,
        callbacks=[watcher, *_tensorboard(training)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.loss = around.loss or text_loss
    trainer.kind, trainer.since_log = around.kind, {}
    trainer.model_accepts_loss_kwargs = False  # the loss is a mean over a batch: Trainer divides by the number of them
    before = _last_checkpoint(around.work)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(40)  # errors alone: what else it says, users cannot act on
    try:
        trainer.train(resume_from_checkpoint=None if before is None else str(before))
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch.save names its file
            raise
        raise ResourceError(f"checkpoints cannot be written to {around.work}: is the disk full?") from None
    finally:
        logging.set_verbosity(verbosity)
        for name in ("forward", "_original_forward"):  # Trainer's autocast: through it the model would hold itself
            vars(model).pop(name, None)
    model.eval()
    history = trainer.state.log_history
    curve = _curve(history, "loss")
    kinds = sorted({key for entry in history for key in entry if key.startswith(_OF_KIND)})
    batch = training.batch_size * training.gradient_accumulation * training.sequence_len
    seen = max(watcher.ran - 1, 0) * batch
    return Trained(curve, watcher.seconds(), seen, tuple(_curve(history, key) for key in kinds))


def _curve(history: list[dict[str, float]], key: str) -> tuple[tuple[int, float], ...]:
    return tuple((int(entry["step"]), entry[key]) for entry in history if key in entry)


def sequences_needed(training: Training) -> int:
    return training.steps * training.batch_size * training.gradient_accumulation


def is_tight(model: Any, training: Training, free: float) -> bool:
    """Whether a step does not fit `free` bytes unless layers are run again for the backward pass, which takes a third
    more time (Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost).

    By estimate: gradients and Adam's moments, 12 bytes for each number that trains; for each token some 64 bytes times
    the width of each layer (34 without a gated MLP: Korthikanti et al. 2022), and 16 for each logit.
    """
    config = model.config
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    a_token = 64 * config.hidden_size * config.num_hidden_layers + 16 * config.vocab_size
    return bool(12 * trained + training.batch_size * training.sequence_len * a_token > 0.8 * free)


def free_memory(device: torch.device) -> float:
    """Bytes of a GPU that nobody has; a CPU's are not counted."""
    if device.type != "cuda":
        return math.inf
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _arguments(training: Training, around: Around, device: torch.device) -> transformers.TrainingArguments:
    on_gpu = device.type == "cuda"
    arguments = transformers.TrainingArguments(
        output_dir=str(around.work),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=_SCHEDULES[training.schedule],
        warmup_steps=math.ceil(training.warmup * training.steps),
        weight_decay=training.weight_decay,
        adam_beta2=0.95,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        bf16=on_gpu,
        use_cpu=not on_gpu,
        torch_compile=around.compile,
        seed=training.seed,
        logging_steps=max(1, training.steps // _LOGS),
        logging_nan_inf_filter=False,  # would wait for the device at every step
        save_strategy="steps" if around.saves else "no",
        save_steps=max(1, training.steps // max(around.saves, 1)),
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # where there are several: Trainer would multiply the batch by them
    return arguments


def _tensorboard(training: Training) -> list[transformers.TrainerCallback]:
    if training.logs is None:
        return []
    if importlib.util.find_spec("tensorboard") is None:
        raise ResourceError("logs needs the package tensorboard: pip install 'hasten[compress]', or remove logs")
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    try:
        writer: Any = SummaryWriter(log_dir=training.logs)
    except OSError as error:
        raise ResourceError(f"logs is {training.logs}, which cannot be written: {error.strerror or error}") from None
    return [TensorBoardCallback(writer)]  # type: ignore[no-untyped-call]


def _last_checkpoint(work: Path) -> Path | None:
    """The newest checkpoint that was written whole: its state comes last."""
    whole = [path.parent for path in work.glob("checkpoint-*/trainer_state.json") if _is_whole(path)]
    return max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


def _is_whole(state: Path) -> bool:
    try:
        json.loads(state.read_text())
    except ValueError:
        return False
    return True


def _as_it_is(batch: Any) -> Any:
    """Sequences are a whole batch already."""
    return batch


class _Trainer(transformers.Trainer):
    loss: Loss = staticmethod(text_loss)
    kind: Kind | None = None
    since_log: dict[str, list[Tensor]]  # losses by kind

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, *_: Any, **__: Any) -> Any:
        number = self.state.global_step
        loss = self.loss(model, inputs["input_ids"], number)
        if self.kind is not None:
            self.since_log.setdefault(self.kind(number), []).append(loss.detach())
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
        """Into the history, which checkpoints keep, go the losses of each kind of text, too."""
        if "loss" in logs:
            logs |= {_OF_KIND + kind: float(torch.stack(losses).mean()) for kind, losses in self.since_log.items()}
            self.since_log.clear()
        super().log(logs, *arguments, **named)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The bare numbers of what trains: Transformers' own way knows its own modules only."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        model: Any = self.model
        numbers = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
        torch.save(numbers, folder / WEIGHTS_NAME)

    def _get_train_sampler(self, *_: Any) -> Sampler[int]:
        sequences: Any = self.train_dataset
        return SequentialSampler(sequences)


class _Watcher(transformers.TrainerCallback):
    """After each step: weights held in their place, and how far the training is."""

    def __init__(self, steps: int, around: Around) -> None:
        self.steps, self.around, self.loss = steps, around, math.nan
        self.ran, self.first, self.last = 0, 0.0, 0.0

    def seconds(self) -> float:
        return self.last - self.first if self.ran else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.around.after is not None:
            self.around.after(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ran += 1
        self.last = time.perf_counter()
        self.first = self.first or self.last
        if self.around.after is not None:
            self.around.after(state.global_step)
        if state.global_step >= self.steps:
            control.should_log = True  # the last loss is told, whatever the interval
        if self.around.tell is not None:
            known = "" if math.isnan(self.loss) else f", loss {self.loss:.3f}"
            self.around.tell(state.global_step / self.steps, f"step {state.global_step}{known}")

    def on_log(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.last = time.perf_counter()  # the device was waited for
        self.loss = named["logs"].get("loss", self.loss)
        if not math.isfinite(named["logs"].get("loss", 0.0)):
            control.should_training_stop = True  # from here on every number is lost
