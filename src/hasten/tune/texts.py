"""Which held-out text a model is judged on, cut into windows to search on and windows to prove on.

The user's file; else the English that ships with the demo model, if this model predicts it well enough to have learnt
English; else text that the model writes itself, sampled at temperature 1. On its own text a model's divergence is what
it is in use, in whatever language it speaks (data-free calibration in LLM-QAT, Liu et al. 2023, rests on the same).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hasten.engine.request import RequestOutput, SamplingParams
from hasten.errors import HastenError
from hasten.measure.quality import summarize
from hasten.measure.speed import Workload, make_engine, prompts_from
from hasten.measure.text import BUNDLED, Window, first_token, make_windows, read_text, split
from hasten.model.tokenizer import Tokenizer
from hasten.receipt import Prediction
from hasten.recipe import Recipe, Run
from hasten.tune.lab import ORIGINAL, Lab

WINDOW = 256  # tokens
FITS = 2.2  # bits a byte; models that have not learnt a text's language need 3 and more
_TICK = 256  # tokens between two words on how far writing is
_LOOK = 4  # windows of the first look at a text
_RUN_SECONDS = 0.12  # of one timing, so that a moment's disturbance is not all of it
_WINDOWS = (8, 64)  # of each part, at least and at most
_PASSES = 14  # of one model over one part, about as many as a search makes without layers
_SHARE = 0.35  # of the time allowed that these may take


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

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a run that is resumed; `from_dict` gives the same text back."""
        parts = {
            name: [[window.tokens.tolist(), window.num_bytes] for window in windows]
            for name, windows in (("search", self.search), ("final", self.final))
        }
        return {**parts, "source": self.source, "sha256": self.sha256}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "HeldOut":
        search, final = (
            tuple(Window(np.array(tokens, np.int32), num_bytes) for tokens, num_bytes in data[name])
            for name in ("search", "final")
        )
        return HeldOut(search, final, data["source"], data["sha256"])


def held_out(lab: Lab, tokenizer: Tokenizer, seconds: float, name: str = "", given: str | None = None) -> HeldOut:
    """The text for a model, as much of it as it reads in its share of `seconds`: the one `given`, called `name`, or one
    that suits it. HastenError where the text is too short."""
    length = min(WINDOW, lab.spec.max_position)

    def windows_of(text: str, most: int) -> tuple[Window, ...]:
        least = 2 * _WINDOWS[0]  # half to search on, half to prove on
        try:
            return make_windows(text, tokenizer.encode_plain, first_token(tokenizer), length, most, least)
        except HastenError as error:
            raise type(error)(f"{name}: {error}" if name else str(error)) from None

    text = read_text(BUNDLED) if given is None else given
    bits = bits_per_byte(lab, windows_of(text, _LOOK))
    lab.tick("a first look at the text")
    count = num_windows(lab, seconds)
    if given is None and bits > FITS:
        return _written_by_model(lab, tokenizer, length, 2 * min(count, 32))
    search, final = split(windows_of(text, 2 * count))
    source = "held-out text of the demo model" if given is None else name
    return HeldOut(search, final, source, hashlib.sha256(text.encode()).hexdigest())


def num_windows(lab: Lab, seconds: float) -> int:
    """Windows of each part."""
    least, most = _WINDOWS
    return max(least, min(most, int(_SHARE * seconds / (_PASSES * lab.pace.window))))


def bits_per_byte(lab: Lab, windows: Sequence[Window]) -> float:
    """Of the original. Compared with itself read twice, so that the pace is that of comparing."""
    scores = lab.quality({"first look": Recipe()}, windows)
    return summarize(scores[ORIGINAL]).bits_per_byte.median


def workload_sizes(prediction: Prediction, max_position: int) -> dict[str, int]:
    """Tokens of what is timed, by how fast the model is said to be: "start" of a stream, "steps" that it goes on, and
    "prompt" of the prefill."""
    start = min(16, max_position // 4)
    steps = max(16, min(128, int(0.2 * prediction.decode["1"]), max_position - start - 1))
    prompt = min(512, max(128, int(0.5 * prediction.prefill)), max_position - 1)
    return {"start": start, "steps": steps, "prompt": prompt}


def workloads(
    tokens: Sequence[int], sizes: Mapping[str, int], sampled: bool, streams: Sequence[int] = (1, 8)
) -> dict[str, Workload]:
    """What is timed: decoding with some numbers of streams, and a long prompt. sampled: draw at temperature 1 rather
    than take the likeliest, as small models soon repeat themselves when they do, which would flatter speculation."""
    start, steps = sizes["start"], sizes["steps"]
    found = {
        str(num): Workload(
            prompts_from(tokens, num, start), max(8, steps if num == 1 else steps // 2), float(sampled), _RUN_SECONDS
        )
        for num in streams
    }
    found["prefill"] = Workload(prompts_from(tokens, 1, sizes["prompt"]), 1, min_seconds=_RUN_SECONDS)
    return found


def _written_by_model(lab: Lab, tokenizer: Tokenizer, length: int, count: int) -> HeldOut:
    first = first_token(tokenizer)
    if first is None:
        first = tokenizer.eos_token_ids[0] if tokenizer.eos_token_ids else 0
    engine, done = make_engine(lab.spec, lab.original, Run(), 16, length), 0
    for seed in range(count):
        params = SamplingParams(max_tokens=length - 1, ignore_eos=True, temperature=1.0, top_k=0, top_p=1.0, seed=seed)
        engine.add([first], params)
    outputs: list[RequestOutput] = []
    while engine.num_unfinished:
        deltas = engine.step()
        outputs += [delta.output for delta in deltas if delta.output is not None]
        done += len(deltas)
        if done // _TICK > (done - len(deltas)) // _TICK:
            lab.tick(f"the model writes the text it is judged on: {done} of {count * (length - 1)} tokens")
    windows = []
    for output in sorted(outputs, key=lambda output: int(output.request_id)):
        tokens = output.outputs[0].token_ids
        num_bytes = max(1, len(tokenizer.decode(tokens).encode()))
        windows.append(Window(np.array([first, *tokens], np.int32), num_bytes))
    digest = hashlib.sha256(b"".join(window.tokens.tobytes() for window in windows)).hexdigest()
    search, final = split(windows)
    return HeldOut(search, final, f"{count} passages that the model wrote, sampled at temperature 1", digest)
