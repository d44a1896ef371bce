"""Receipt: measured numbers, their conditions, the hashes of what they were measured on, and the recipe behind them.

Plain frozen data, to and from JSON. Knows nothing of how anything is measured.
"""

import dataclasses
import hashlib
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hasten.errors import HastenError
from hasten.recipe import Recipe

SCHEMA = 1

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Measurement:
    """The median of n rounds with the ends of its interval, the lowest and highest of few (a speed, a time), or an
    estimate with the ends of its interval over n blocks of text (a loss, a divergence). `unit` says of what."""

    median: float
    low: float
    high: float
    n: int
    unit: str


@dataclass(frozen=True, slots=True)
class Quality:
    """A model on held-out text, against the original on the same text; intervals are over blocks of text, paired.

    loss: relative rise of bits per byte over the original's. divergence: KL(original || model), nats a token.
    top1_agreement: share of positions where both have the same likeliest token. flips: where exactly one of them has
    the right one (Dutta et al. 2024): broken, where that was the original; mended, where it is the model. These need
    an original.
    confidence: of the intervals. In a proof, 0.95 for what is tried first, more for each that is tried after it.
    """

    bits_per_byte: Measurement
    perplexity: Measurement
    num_tokens: int
    num_bytes: int
    num_blocks: int
    loss: Measurement | None = None
    divergence: Measurement | None = None
    top1_agreement: Measurement | None = None
    flips: Measurement | None = None
    broken: Measurement | None = None
    mended: Measurement | None = None
    confidence: float = 0.95


@dataclass(frozen=True, slots=True)
class TaskScore:
    """A model on the questions of a task; intervals are over questions, paired where against the original.

    kind: "choice" (one of several, the likeliest for its length) or "word" (the last word, written greedily). chance:
    the accuracy of guessing. change: accuracy less the original's. changed: share of answers that differ from the
    original's. flips: of those that went from right to wrong (broken) or from wrong to right (mended).
    """

    kind: str
    num_questions: int
    chance: float
    accuracy: Measurement
    original: Measurement | None = None
    change: Measurement | None = None
    changed: Measurement | None = None
    flips: Measurement | None = None
    broken: Measurement | None = None
    mended: Measurement | None = None


@dataclass(frozen=True, slots=True)
class Speed:
    """decode: tokens/s by number of streams; ratio: to the original in the same rounds. memory: bytes of the weights,
    and the peak resident set of a fresh process where that was measured."""

    decode: dict[str, Measurement]
    ratio: dict[str, Measurement]
    memory: dict[str, int]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What was expected before measuring: tokens/s by streams ("1", "8") and for prefill, and bytes.

    decode and prefill are upper limits set by measured read bandwidth and arithmetic, not estimates of overhead."""

    decode: dict[str, float]
    prefill: float
    weight_bytes: int
    token_bytes: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run the model. verdict: "chosen", "accepted", "rejected" (quality), "slower" (than the original, for
    the goal), or "reference" (what others are compared with). reason says why, in a sentence.

    decode: tokens/s by number of streams. ratio: to the original in the same rounds, by "1", "8", "prefill" and
    "memory"; "gain ..." is to the same weights run plainly. Where there is a `final` quality and the loss was allowed,
    speeds are of new rounds after that proof, from the folder as it is written; those of the search are not in it.
    prefill tokens/s; ttft seconds; memory: bytes of weights and KV cache, and peak resident set where measured.
    bandwidth_fraction: bytes a token times tokens/s over the read bandwidth measured in the same run.
    search: quality on the text the search used. final: on text that it did not use.
    """

    name: str
    recipe: Recipe
    weight_bytes: int
    verdict: str
    reason: str
    predicted: Prediction | None = None
    decode: dict[str, Measurement] = field(default_factory=dict)
    ratio: dict[str, Measurement] = field(default_factory=dict)
    prefill: Measurement | None = None
    ttft: Measurement | None = None
    memory: dict[str, int] = field(default_factory=dict)
    bandwidth_fraction: float | None = None
    energy: dict[str, float] | None = None
    search: Quality | None = None
    final: Quality | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """What one model says to a prompt, greedily, from a clean start."""

    model: str
    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class UsedText:
    """Text that took part in making a model, in one recipe. calibration: the facts of its sequences, with their sha256.
    named: files, folders and data sets that the recipe and its steps name."""

    calibration: dict[str, Any]
    named: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Receipt:
    """Everything that compress, tune or evaluate found out. `what` is which of the three made it.

    inputs: sha256 by file name, of weights and of text. original: the model as it is, run by hasten; reference: run by
    Transformers, where that is installed. choice: the name of the chosen candidate. by_batch: what to run
    at each number of streams so that nothing is slower than the original. quality: on the first text; texts: on each,
    by name. tasks: by name. speed: of "model", and of "against". notes: what was left out or fell back. made_from: the
    texts that made the model which this one was made from, oldest first.
    """

    what: str
    model: str
    created: str
    versions: dict[str, str]
    hardware: dict[str, Any]
    conditions: dict[str, Any]
    inputs: dict[str, str]
    recipe: Recipe | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    original: Candidate | None = None
    reference: Candidate | None = None
    candidates: tuple[Candidate, ...] = ()
    choice: str | None = None
    reason: str = ""
    by_batch: dict[str, str] = field(default_factory=dict)
    quality: Quality | None = None
    texts: dict[str, Quality] = field(default_factory=dict)
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    speed: dict[str, Speed] = field(default_factory=dict)
    sensitivity: dict[str, Measurement] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    made_from: tuple[UsedText, ...] = ()
    notes: tuple[str, ...] = ()
    schema: int = SCHEMA

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that was chosen: the original itself where nothing beat it."""
        known = (*self.candidates, *((self.original,) if self.original else ()))
        return next((candidate for candidate in known if candidate.name == self.choice), None)

    def to_json(self) -> str:
        return json.dumps(plain(self), indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> "Receipt":
        """Raises HastenError where the text is not a receipt of this version."""
        return build(Receipt, _checked(text))

    def save(self, path: str | Path) -> None:
        """Write receipt.json; a reader sees the old file or the new one, never half."""
        write_text(Path(path), self.to_json())

    @staticmethod
    def load(path: str | Path) -> "Receipt":
        path = Path(path)
        path = path / "receipt.json" if path.is_dir() else path
        if not path.is_file():
            raise HastenError(f"no receipt at {path}")
        return Receipt.from_json(path.read_text(encoding="utf-8"))


def used_texts(folder: Path) -> tuple[UsedText, ...]:
    """The texts that made the model in `folder`, oldest first, as far as it has a receipt. HastenError where that
    cannot be read. Its recipe need not be one that would be taken now."""
    file = folder / "receipt.json"
    if not file.is_file():
        return ()
    data = _checked(file.read_text(encoding="utf-8"))
    before = build(tuple[UsedText, ...], data.get("made_from") or [])
    calibration: dict[str, Any] = (data.get("settings") or {}).get("calibration") or {}
    recipe = data.get("recipe") or {}
    named = [calibration.get("text"), (recipe.get("calibration") or {}).get("text")]
    for step in recipe.get("steps") or []:
        named += [(fields or {}).get("text") for fields in step.values()]
    own = UsedText(calibration, tuple(dict.fromkeys(text for text in named if text)))
    return (*before, own) if own.calibration or own.named else before


def _checked(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise HastenError(f"receipt is not JSON: {error}") from None
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise HastenError(f"receipt has schema {found!r}, expected {SCHEMA}: read it with the hasten that wrote it")
    return dict(data)


def plain(value: Any) -> Any:
    """Dataclasses, tuples and recipes as what JSON has. Empty optional fields stay: a receipt hides nothing."""
    if isinstance(value, Recipe):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def build(kind: type[T], data: Any) -> T:
    """The dataclass `kind` from plain data, following its type hints. HastenError names a key that does not fit."""
    return typing.cast(T, _build(kind, data, kind.__name__))


def _build(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if data is None else _build(next(a for a in arguments if a is not type(None)), data, where)
    if origin is tuple:
        return tuple(_build(arguments[0], item, where) for item in data)
    if origin is dict:
        return {key: _build(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    if kind is Recipe:
        return Recipe.from_dict(data)
    if not dataclasses.is_dataclass(kind):
        return data
    hints = typing.get_type_hints(kind)
    if not isinstance(data, Mapping) or set(data) - set(hints):
        raise HastenError(f"receipt: {where} does not fit this version of hasten")
    try:
        return kind(**{key: _build(hints[key], item, f"{where}.{key}") for key, item in data.items()})  # type: ignore[operator]
    except TypeError as error:
        raise HastenError(f"receipt: {where}: {error}") from None


def sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
