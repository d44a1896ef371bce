"""`evaluate`: how well a model predicts texts and answers questions, how far it is from another one in both, and how
fast it is beside it."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from hasten.backends import choose_device, open_backend
from hasten.compress.folder import ProgressCallback, hashes
from hasten.errors import HastenError, ModelError
from hasten.hardware import conditions, cpu_model, usable_threads, versions
from hasten.measure.memory import peak_memory
from hasten.measure.overlap import check_unseen
from hasten.measure.quality import Model, score, summarize
from hasten.measure.rounding import notes_on_rounding
from hasten.measure.speed import (
    Timing,
    Workload,
    interleave,
    make_engine,
    notes_on_format,
    prompts_from,
    time_workload,
)
from hasten.measure.statistics import ratio_of_rounds, spread
from hasten.measure.task_files import Task, read_task
from hasten.measure.tasks import STREAMS, answer, make_prompts, summarize_task
from hasten.measure.text import BUNDLED, Window, first_token, make_windows, read_text
from hasten.model.checkpoint import Checkpoint, open_checkpoint
from hasten.model.formats import bytes_of
from hasten.model.hub import resolve
from hasten.model.settings import default_kv_cache, stated_run
from hasten.model.tokenizer import Tokenizer
from hasten.receipt import Measurement, Quality, Receipt, Speed, TaskScore
from hasten.recipe import Run

SPEED_STREAMS = (1, 8)
_PROMPT, _WRITTEN = 16, 64  # tokens of a stream when speed is measured
_ROUNDS = 6  # the fewest for which the ends of the spread are a 95 % interval
_COMPARED = 20_000  # characters of a text that two tokenizers must cut alike
_SECONDS = 0.3  # of a measurement at least

Files = str | Path | Mapping[str, str | Path]


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """A text as it is measured on. name: in the receipt."""

    name: str
    path: Path
    content: str
    windows: tuple[Window, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A model on its device, with its KV cache's type."""

    checkpoint: Checkpoint
    model: Model


def evaluate(
    model: str | Path,
    against: str | Path | None = None,
    data: Files | None = None,
    *,
    tasks: Files | None = None,
    num_shots: int = 0,
    max_questions: int | None = 500,
    speed: bool = False,
    max_windows: int | None = 128,
    window: int = 512,
    kv_cache: str | None = None,
    format: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> Receipt:
    """Bits per byte and perplexity of `model` on held-out text, and its accuracy on tasks, with 95 % intervals; with
    `against`, also the loss, KL divergence, top-1 agreement and flips relative to that model.

    data: a UTF-8 file, or several by name, such as text of the calibration's domain and of another one; by default the
    English that ships with the demo model. Each is cut into windows of at most `window` tokens, of which max_windows
    are used, evenly spread (None: all). tasks: files as measure/task_files.py reads them, of whose questions
    max_questions are asked and the first num_shots are shown as examples. speed: tokens/s with one stream and eight,
    and memory.
    kv_cache: of `model`; None is its folder's own setting, else as LLM does. format, of `model`, and device: as
    LLM's, by name.
    Raises ModelError where the two models do not share a vocabulary, HastenError where a text or a task cannot be used,
    such as text that the model was calibrated on.
    """
    checkpoint, original = _open_both(model, against)
    longest = min(window, checkpoint.spec.max_position, *([original.spec.max_position] if original else []))
    texts = [_text(name, path, checkpoint, longest, max_windows) for name, path in _named(data, BUNDLED).items()]
    if original is not None:
        _check_tokens(texts, checkpoint, original)
    asked = {
        name: read_task(path, max_questions, num_shots) for name, path in _named(tasks, None).items()
    }  # before a weight is loaded
    overlap, notes = _overlaps(texts, checkpoint.path)
    threads = threads or stated_run(checkpoint).threads or usable_threads()
    device = choose_device(device)
    models = {} if original is None else {"against": _load(original, device, threads, None)}
    models["model"] = _load(checkpoint, device, threads, kv_cache, format)  # after the one compared with
    found = {text.name: _quality(models, text.windows, threads, progress) for text in texts}
    scores = {name: _task(models, task, progress) for name, task in asked.items()}
    notes += notes_on_rounding(checkpoint, device, models["model"].model[1])
    if any(len(text.windows) == 1 for text in texts):
        notes += ("one window of text gives no intervals: take more windows",)
    speeds = _speed(models, texts[0].content, device, threads) if speed else {}
    if speed:
        ratios = speeds["model"].ratio
        notes += notes_on_format(
            models["model"].model[0], device, measure=True, ratios=ratios, against=Path(str(against)).name
        )
    return Receipt(
        what="evaluate",
        model=str(model),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        versions=versions(),
        hardware={"device": device, "cpu": cpu_model(), "threads": threads},
        conditions=conditions(),
        inputs={**hashes(checkpoint), **{_key(text, texts): _sha256(text.content) for text in texts}},
        settings={
            "against": None if against is None else str(against),
            "window": longest,
            "num_windows": len(texts[0].windows),
            "overlap": overlap,
            **({"format": format} if format else {}),
            **({"num_shots": num_shots} if asked else {}),
        },
        quality=found[texts[0].name],
        texts=found,
        tasks=scores,
        speed=speeds,
        notes=notes,
    )


def _named(files: Files | None, default: Path | None) -> dict[str, Path]:
    """By name, that of a file alone being its own without the suffix."""
    if files is None:
        return {} if default is None else {default.stem: default}
    if isinstance(files, Mapping):
        return {name: Path(path) for name, path in files.items()}
    return {Path(files).stem: Path(files)}


def _open_both(model: str | Path, against: str | Path | None) -> tuple[Checkpoint, Checkpoint | None]:
    """The checkpoints of both; ModelError where they cannot be compared."""
    checkpoint = open_checkpoint(resolve(str(model)))
    if against is None:
        return checkpoint, None
    original = open_checkpoint(resolve(str(against)))
    if original.spec.vocab_size != checkpoint.spec.vocab_size:
        sizes = f"{checkpoint.spec.vocab_size} and {original.spec.vocab_size}"
        raise ModelError(f"the models have vocabularies of {sizes} tokens: only models that share one can be compared")
    return checkpoint, original


def _text(name: str, path: Path, checkpoint: Checkpoint, length: int, most: int | None) -> Text:
    content = read_text(path)
    if not content.strip():
        raise HastenError(f"text {path} is empty: give text that the model has not seen")
    tokenizer = Tokenizer(checkpoint.path)
    try:
        windows = make_windows(content, tokenizer.encode_plain, first_token(tokenizer), length, most)
    except HastenError as error:
        raise type(error)(f"{path}: {error}") from None
    return Text(name, path, content, windows)


def _check_tokens(texts: Sequence[Text], checkpoint: Checkpoint, original: Checkpoint) -> None:
    """ModelError where the two models do not read a text as the same tokens: predictions would differ in kind."""
    one, other = (Tokenizer(folder.path) for folder in (checkpoint, original))
    for text in texts:
        beginning = text.content[:_COMPARED]
        if one.encode_plain(beginning) != other.encode_plain(beginning):
            raise ModelError(
                f"{checkpoint.path} and {original.path} read text {text.name} as other tokens: only models that share "
                "a tokenizer can be compared"
            )


def _overlaps(texts: Sequence[Text], folder: Path) -> tuple[dict[str, float | None], tuple[str, ...]]:
    """By text, how much of it the model's folder was made with."""
    found = {text.name: check_unseen(text.name, text.path, text.content, folder) for text in texts}
    notes = tuple(note for _, note in found.values() if note is not None)
    return {name: share for name, (share, _) in found.items()}, notes


def _key(text: Text, texts: Sequence[Text]) -> str:
    """A text's name among the receipt's hashes."""
    return "text" if len(texts) == 1 else f"text {text.name}"


def _sha256(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _load(checkpoint: Checkpoint, device: str, threads: int, kv_cache: str | None, format: str | None = None) -> Loaded:
    """Loaded, with the KV cache asked for, else what the folder says (tune writes it), else LLM's default."""
    backend = open_backend(device, threads=threads, format=format)
    kv_cache = kv_cache or default_kv_cache(checkpoint.spec, backend.kv_dtypes, stated_run(checkpoint).kv_cache)
    backend.load(checkpoint.spec, checkpoint.weights())
    return Loaded(checkpoint, (backend, kv_cache))


def _quality(
    models: Mapping[str, Loaded], windows: Sequence[Window], threads: int, progress: ProgressCallback | None
) -> Quality:
    vocab_size = models["model"].checkpoint.spec.vocab_size
    scores = score({name: loaded.model for name, loaded in models.items()}, windows, vocab_size, progress, threads)
    return _without_endless(summarize(scores["model"], scores.get("against")))


def _task(models: Mapping[str, Loaded], task: Task, progress: ProgressCallback | None) -> TaskScore:
    """Each model with its own tokenizer, one after the other."""
    found = {}
    for name, loaded in models.items():
        spec, (backend, kv_cache) = loaded.checkpoint.spec, loaded.model
        tokenizer = Tokenizer(loaded.checkpoint.path)
        prompts = make_prompts(task, tokenizer.encode_plain, first_token(tokenizer), spec.max_position)
        longest = max(len(prompt.tokens) for choices in prompts for prompt in choices)
        engine = make_engine(spec, backend, Run(kv_cache=kv_cache), STREAMS, longest)
        found[name] = answer(engine, task, prompts, progress)
    return summarize_task(task, found["model"], found.get("against"))


def _without_endless(found: Quality) -> Quality:
    """Of one window the figures stand for their own ends, as one round's does: no interval is known, and JSON has no
    infinity."""
    values = {item.name: getattr(found, item.name) for item in fields(found)}
    alone: dict[str, Any] = {
        name: replace(value, low=value.median, high=value.median)
        for name, value in values.items()
        if isinstance(value, Measurement) and value.n == 1
    }
    return replace(found, **alone)


def _speed(models: Mapping[str, Loaded], text: str, device: str, threads: int) -> dict[str, Speed]:
    """Each model with one stream and with eight, all in turn."""
    runs = {}
    for name, loaded in models.items():
        spec, (backend, kv_cache) = loaded.checkpoint.spec, loaded.model
        engine = make_engine(spec, backend, Run(kv_cache=kv_cache), max(SPEED_STREAMS), _PROMPT + _WRITTEN)
        tokens = Tokenizer(loaded.checkpoint.path).encode_plain(text[:20_000])
        for streams in SPEED_STREAMS:
            work = Workload(prompts_from(tokens, streams, _PROMPT), _WRITTEN, min_seconds=_SECONDS)
            runs[name, streams] = partial(time_workload, engine, work)
    timings = interleave(runs, _ROUNDS)
    return {
        name: Speed(
            decode={str(n): spread(_decode(timings[name, n]), "tokens/s") for n in SPEED_STREAMS},
            ratio={
                str(n): ratio_of_rounds(_decode(timings[name, n]), _decode(timings["against", n]))
                for n in SPEED_STREAMS
                if "against" in models
            },
            memory=_memory(loaded, text, device, threads),
        )
        for name, loaded in models.items()
    }


def _decode(timings: Sequence[Timing]) -> list[float]:
    return [timing.decode for timing in timings]


def _memory(loaded: Loaded, text: str, device: str, threads: int) -> dict[str, int]:
    checkpoint = loaded.checkpoint
    found = {"weights": sum(bytes_of(fmt, shape) for _, shape, fmt in checkpoint.matrices())}
    if device == "cpu":
        prompt = Tokenizer(checkpoint.path).encode_plain(text[:2_000])[:_PROMPT]
        found["peak"] = peak_memory(checkpoint.path, prompt, threads, loaded.model[1])
    return found
