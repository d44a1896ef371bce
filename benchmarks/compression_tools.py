"""Parts of benchmarks/compression.py: texts, models to start from, quality and speed of a folder."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import hasten
from hasten.backends import open_backend
from hasten.errors import HastenError
from hasten.hardware import usable_threads
from hasten.measure.speed import Timing, Workload, interleave, make_engine, prompts_from, time_workload
from hasten.measure.text import BUNDLED, Window, first_token, make_windows, read_text
from hasten.model.checkpoint import open_checkpoint
from hasten.model.formats import Weight, dense_weight, dequantize
from hasten.model.spec import config_of_text
from hasten.model.tokenizer import Tokenizer
from hasten.model.writer import write_checkpoint
from hasten.recipe import Run

ROOT = Path(__file__).parents[1]
OUTLIER = 64.0  # a power of two: planting is exact in bf16
PROMPT, WRITTEN = 16, 64  # tokens of a stream when speed is measured


@dataclass(frozen=True)
class Texts:
    """train: for calibration and training. heldout: of the same kind, unseen. other: of another kind, or None."""

    train: str
    heldout: str
    other: str | None


def texts_for(model: Path, data: Path, train: Path | None, heldout: Path | None) -> Texts:
    """The files that are given, else those in the model's folder (calibration.txt, heldout.txt), else what
    examples/demo makes of the books in `data`; for stories260K the slice of stories, whose last eighth is held out of
    calibration (the model itself may have seen it)."""
    wikitext = data / "wikitext-2" / "test.txt"
    other = read_text(wikitext) if wikitext.is_file() else None
    train = train or _if_there(model / "calibration.txt")
    heldout = heldout or _if_there(model / "heldout.txt")
    if train and heldout:
        return Texts(read_text(train), read_text(heldout), other)
    if model.name == "stories260K":
        stories = read_text(data / "tinystories-slice" / "tinystories_slice.txt")
        cut = stories.index("\n", len(stories) * 7 // 8)
        return Texts(stories[:cut], stories[cut:], other)
    sys.path.insert(0, str(ROOT / "examples" / "demo"))
    from texts import split_books

    split = split_books(data)
    return Texts("\n\n".join(split.train), read_text(heldout or BUNDLED), other)


def slices(text: str, count: int = 32, length: int = 1 << 15) -> str:
    """Pieces evenly over a long text, enough to calibrate on."""
    if len(text) <= count * length:
        return text
    return "\n\n".join(text[start : start + length] for start in range(0, len(text) - length, len(text) // count))


def _if_there(path: Path) -> Path | None:
    return path if path.is_file() else None


def windows_of(model: Path, text: str, length: int, most: int) -> tuple[Window, ...]:
    tokenizer = Tokenizer(model)
    return make_windows(text, tokenizer.encode_plain, first_token(tokenizer), length, most)


def plant_outliers(model: Path, out: Path) -> None:
    """The same function with a few input channels of q, k, v and gate, up made OUTLIER times as large, as large models
    have them by themselves: up in the norm, down in the columns that read it. Exact but for norms that store their
    weights less one."""
    checkpoint = open_checkpoint(model)
    size = checkpoint.spec.hidden_size
    channels = np.random.default_rng(0).choice(size, max(2, size // 64), replace=False)
    offset = checkpoint.spec.norm_offset

    def changed() -> Iterator[tuple[str, Weight]]:
        for name, weight in checkpoint.weights():
            role = name.rsplit(".", 1)[-1]
            if role not in ("attn_norm", "mlp_norm", "q", "k", "v", "gate", "up"):
                yield name, weight
                continue
            values = np.array(dequantize(weight))
            if role.endswith("norm"):
                values[channels] = (values[channels] + offset) * OUTLIER - offset
            else:
                values[:, channels] /= OUTLIER
            yield name, dense_weight(values, weight.format.kind)

    write_checkpoint(out, config_of_text(checkpoint.config), changed(), model)


def nll_of(folder: Path, texts: Sequence[Sequence[Window]], device: str, int8_inputs: bool) -> list[np.ndarray]:
    """Nats of each window of each text under the model in `folder`, in float32 with torch."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = hasten.load_torch(folder, dtype=torch.float32, device=device).eval()
    if int8_inputs:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and not name.endswith(("lm_head", "embed_out")):
                module.register_forward_pre_hook(lambda _, inputs: (round_to_int8(inputs[0]), *inputs[1:]))
    with torch.inference_mode():
        return [_nll(model, windows, device) for windows in texts]


def round_to_int8(x: Any) -> Any:
    """To the nearest of 255 levels, one scale a token, as integer products take their inputs."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round() * scale


def _nll(model: Any, windows: Sequence[Window], device: str) -> np.ndarray:
    import torch

    at_once = 32 if device.startswith("cuda") else 4
    sums = np.zeros(len(windows))
    for start in range(0, len(windows), at_once):
        part = windows[start : start + at_once]
        longest = max(len(window.tokens) for window in part)
        tokens = torch.zeros((len(part), longest), dtype=torch.int64)
        known = torch.zeros((len(part), longest - 1), dtype=torch.bool)
        for row, window in enumerate(part):
            tokens[row, : len(window.tokens)] = torch.from_numpy(window.tokens.astype(np.int64))
            known[row, : len(window.tokens) - 1] = True
        tokens = tokens.to(device)
        logits = model(tokens, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        sums[start : start + len(part)] = (losses.cpu().double() * known).sum(1).numpy()
    return sums


def speeds_of(
    folders: dict[str, Path], device: str, text: str, rounds: int, say: Callable[[str], None]
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    """Tokens/s of each folder with one stream and with eight, a figure a round, all in turn in one run; and why a
    folder does not run."""
    runs: dict[tuple[str, int], Callable[[], Timing]] = {}
    reasons: dict[str, str] = {}
    for name, folder in folders.items():
        say(f"speed: loading {name}")
        try:
            runs |= {(name, streams): run for streams, run in _workloads(folder, device, text).items()}
        except HastenError as error:
            reasons[name] = str(error)
    found: dict[str, dict[str, list[float]]] = {}
    if runs:
        say(f"speed: {len(runs)} measurements, {rounds} rounds")
        for (name, streams), timings in interleave(runs, rounds).items():
            found.setdefault(name, {})[str(streams)] = [timing.decode for timing in timings]
    return found, reasons


def _workloads(folder: Path, device: str, text: str) -> dict[int, Callable[[], Timing]]:
    checkpoint = open_checkpoint(folder)
    backend = open_backend(device, threads=usable_threads())
    backend.load(checkpoint.spec, checkpoint.weights())
    engine = make_engine(checkpoint.spec, backend, Run(), 8, PROMPT + WRITTEN)
    tokens = Tokenizer(folder).encode_plain(text[:20_000])
    return {
        streams: partial(
            time_workload, engine, Workload(prompts_from(tokens, streams, PROMPT), WRITTEN, min_seconds=0.2)
        )
        for streams in (1, 8)
    }


def middle(values: Sequence[float]) -> float:
    return float(median(values))
