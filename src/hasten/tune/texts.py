"""Which held-out text a model is judged on, cut into windows to search on and windows to prove on.

The user's file; else the English that ships with the demo model, if this model predicts it well enough to have learnt
English; else text that the model writes itself, sampled at temperature 1. On its own text a model's divergence is what
it is in use, in whatever language it speaks (data-free calibration in LLM-QAT, Liu et al. 2023, rests on the same).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hasten.engine.request import SamplingParams
from hasten.measure.quality import BLOCK_SIZE, kv_blocks, score, summarize
from hasten.measure.speed import Workload, make_engine, prompts_from
from hasten.measure.text import BUNDLED, Window, first_token, make_windows, read_text, split
from hasten.model.tokenizer import Tokenizer
from hasten.receipt import Prediction
from hasten.recipe import Recipe, Run
from hasten.tune.lab import ORIGINAL, Lab

WINDOW = 256  # tokens
FITS = 2.2  # bits a byte; models that have not learnt a text's language need 3 and more
_SECONDS = 6.0  # of reading at the predicted speed, for each of the two parts
_RUN_SECONDS = 0.12  # of one timing, so that a moment's disturbance is not all of it
_WINDOWS = (8, 64)  # of each part, at least and at most


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """Windows for the search and for the proof, where they are from, and the sha256 of what they were made of."""

    search: tuple[Window, ...]
    final: tuple[Window, ...]
    source: str
    sha256: str

    @property
    def tokens(self) -> list[int]:
        """The search part's tokens in a row, to prompt with."""
        return [int(token) for window in self.search for token in window.tokens]


def held_out(lab: Lab, tokenizer: Tokenizer, data: str | Path | None) -> HeldOut:
    """The text for a model. HastenError where `data` cannot be read or is too short."""
    length = min(WINDOW, lab.spec.max_position)
    count = 2 * num_windows(lab.predict(Recipe()), length)
    if data is not None:
        return _from_text(read_text(data), Path(data).name, tokenizer, length, count)
    if BUNDLED.is_file():
        bundled = _from_text(read_text(BUNDLED), "held-out text of the demo model", tokenizer, length, count)
        if bits_per_byte(lab, bundled.search[:4]) <= FITS:
            return bundled
    return _written_by_model(lab, tokenizer, length, min(count, 64))


def num_windows(prediction: Prediction, length: int) -> int:
    """Windows of each part, by how fast the model reads."""
    least, most = _WINDOWS
    return max(least, min(most, int(_SECONDS * 0.4 * prediction.prefill / length)))


def bits_per_byte(lab: Lab, windows: Sequence[Window]) -> float:
    """Of the original."""
    lab.original.allocate(kv_blocks(windows), BLOCK_SIZE, lab.kv_cache(Recipe()))
    scores = score({ORIGINAL: lab.original}, windows, lab.spec.vocab_size)
    return summarize(scores[ORIGINAL]).bits_per_byte.median


def workloads(tokens: Sequence[int], prediction: Prediction, max_position: int, sampled: bool) -> dict[str, Workload]:
    """What is timed: decoding with 1 and 8 streams, and a long prompt. sampled: draw at temperature 1 rather than take
    the likeliest, as small models soon repeat themselves when they do, which would flatter speculation."""
    start = min(16, max_position // 4)
    steps = max(16, min(128, int(0.2 * prediction.decode["1"]), max_position - start - 1))
    found = {
        size: Workload(prompts_from(tokens, int(size), start), max(8, steps // share), float(sampled), _RUN_SECONDS)
        for size, share in (("1", 1), ("8", 2))
    }
    found["prefill"] = Workload(prompts_from(tokens, 1, min(512, max_position - 1)), 1, min_seconds=_RUN_SECONDS)
    return found


def _from_text(text: str, source: str, tokenizer: Tokenizer, length: int, count: int) -> HeldOut:
    windows = make_windows(text, tokenizer.encode_plain, first_token(tokenizer), length, count)
    search, final = split(windows)
    return HeldOut(search, final, source, hashlib.sha256(text.encode()).hexdigest())


def _written_by_model(lab: Lab, tokenizer: Tokenizer, length: int, count: int) -> HeldOut:
    first = first_token(tokenizer)
    if first is None:
        first = tokenizer.eos_token_ids[0] if tokenizer.eos_token_ids else 0
    engine = make_engine(lab.spec, lab.original, Run(), 16, length)
    for seed in range(count):
        params = SamplingParams(max_tokens=length - 1, ignore_eos=True, temperature=1.0, top_k=0, top_p=1.0, seed=seed)
        engine.add([first], params)
    outputs = []
    while engine.num_unfinished:
        outputs += [delta.output for delta in engine.step() if delta.output is not None]
    windows = []
    for output in sorted(outputs, key=lambda output: int(output.request_id)):
        tokens = output.outputs[0].token_ids
        num_bytes = max(1, len(tokenizer.decode(tokens).encode()))
        windows.append(Window(np.array([first, *tokens], np.int32), num_bytes))
    digest = hashlib.sha256(b"".join(window.tokens.tobytes() for window in windows)).hexdigest()
    search, final = split(windows)
    return HeldOut(search, final, f"{count} passages that the model wrote, sampled at temperature 1", digest)
