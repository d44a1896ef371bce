"""`evaluate`: how well a model predicts a text, and how far it is from another one on it."""

import hashlib
import time
from pathlib import Path

from hasten.backends import choose_device, open_backend
from hasten.compress.folder import ProgressCallback, hashes
from hasten.errors import ModelError
from hasten.hardware import conditions, cpu_model, usable_threads, versions
from hasten.measure.quality import Model, score, summarize
from hasten.measure.text import BUNDLED, Window, first_token, make_windows, read_text
from hasten.model.checkpoint import Checkpoint, open_checkpoint
from hasten.model.hub import resolve
from hasten.model.settings import default_kv_cache, stated_run
from hasten.model.tokenizer import Tokenizer
from hasten.receipt import Receipt


def evaluate(
    model: str | Path,
    against: str | Path | None = None,
    data: str | Path | None = None,
    *,
    max_windows: int | None = 128,
    window: int = 512,
    kv_cache: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> Receipt:
    """Bits per byte and perplexity of `model` on held-out text, with 95 % intervals over windows of text; with
    `against`, also the loss, KL divergence and top-1 agreement relative to that model, in Receipt.quality.

    data: a UTF-8 file; by default the English that ships with the demo model. The text is cut into windows of at most
    `window` tokens, of which max_windows are used, evenly spread (None: all). kv_cache: of `model`; None is its
    folder's own setting, else as LLM does. device: as LLM's, by name.
    Raises ModelError where the two models do not share a vocabulary.
    """
    checkpoint, original = _open_both(model, against)
    text = read_text(data if data is not None else BUNDLED)
    longest = min(window, checkpoint.spec.max_position, *([original.spec.max_position] if original else []))
    windows = _windows(checkpoint, text, longest, max_windows)
    threads = threads or stated_run(checkpoint).threads or usable_threads()
    device = choose_device(device)
    models = {} if original is None else {"against": _load(original, device, threads, None)}
    models["model"] = _load(checkpoint, device, threads, kv_cache)  # after the one compared with
    scores = score(models, windows, checkpoint.spec.vocab_size, progress, threads)
    return Receipt(
        what="evaluate",
        model=str(model),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        versions=versions(),
        hardware={"device": device, "cpu": cpu_model(), "threads": threads},
        conditions=conditions(),
        inputs={**hashes(checkpoint), "text": hashlib.sha256(text.encode()).hexdigest()},
        settings={"against": None if against is None else str(against), "window": longest, "num_windows": len(windows)},
        quality=summarize(scores["model"], scores.get("against")),
    )


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


def _windows(checkpoint: Checkpoint, text: str, length: int, most: int | None) -> tuple[Window, ...]:
    tokenizer = Tokenizer(checkpoint.path)
    return make_windows(text, tokenizer.encode_plain, first_token(tokenizer), length, most)


def _load(checkpoint: Checkpoint, device: str, threads: int, kv_cache: str | None) -> Model:
    """Loaded, with the KV cache asked for, else what the folder says (tune writes it), else LLM's default."""
    backend = open_backend(device, threads=threads)
    kv_cache = kv_cache or default_kv_cache(checkpoint.spec, backend.kv_dtypes, stated_run(checkpoint).kv_cache)
    backend.load(checkpoint.spec, checkpoint.weights())
    return backend, kv_cache
