"""Whether a text took part in making a model: what a folder's receipt says of calibration and training text, its own
and that of the folders it was made from, against the text that quality is to be measured on.

A text counts as used where the calibration sequences made from it have the hash that the receipt keeps, or where most
of its runs of thirteen words are in a text that was used and is still there. Knows nothing of what a model was trained
on before it came to hasten.
"""

import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hasten.compress.calibration import TEXT_SUFFIXES, calibration_tokens, digest
from hasten.errors import HastenError
from hasten.receipt import UsedText, used_texts
from hasten.recipe import Calibration

RUN = 13  # words; what chance does not repeat (Brown et al. 2020, appendix C)
_SAME = 0.5  # of a text's runs: then it is the text that was used
_PIECE = 1 << 24  # characters that are looked through at a time
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd and without pattern: sums of other words do not meet


def check_unseen(name: str, path: Path, text: str, folder: Path) -> tuple[float | None, str | None]:
    """The share of the text's runs of words that are in texts which made the model in `folder`, None where no such
    text is known; and a note where there are some, or where such a text is not here. HastenError where it is such a
    text itself."""
    known = used_texts(folder)
    if any(_was_calibrated_on(path, folder, used) for used in known):
        raise HastenError(f"text {name} is what {folder} was calibrated on: give text that it has not seen")
    used = list(dict.fromkeys(chain.from_iterable(map(_files, known))))
    missing = [str(file) for file in used if not file.is_file()]
    note = f"text {name} was not compared with {', '.join(missing)}, which made {folder.name}: it is not here"
    if len(missing) == len(used):
        return None, note if missing else None
    share = shared_runs(text, chain.from_iterable(_pieces(file) for file in used if file.is_file()))
    if share > _SAME:
        raise HastenError(
            f"text {name} is in what {folder} was made with ({share:.0%} of its runs of {RUN} words): "
            "give text that it has not seen"
        )
    if share > 0:
        note = f"text {name}: {share:.2%} of its runs of {RUN} words are in a text that {folder.name} was made with"
    return share, note if missing or share > 0 else None


def shared_runs(text: str, others: Iterable[str]) -> float:
    """The share of the runs of RUN words of `text` that are in one of the others."""
    wanted = np.unique(_runs(text))
    found = np.zeros(len(wanted), bool)
    for other in others:
        found |= np.isin(wanted, _runs(other))
    return float(found.mean()) if len(wanted) else 0.0


def _pieces(file: Path) -> Iterator[str]:
    """A file some words at a time; few of its runs lie across a border."""
    with open(file, encoding="utf-8", errors="ignore") as handle:
        while piece := handle.read(_PIECE):
            yield piece


def _runs(text: str) -> NDArray[np.uint64]:
    """A number for each run of RUN words: equal ones for equal runs, in this process."""
    words = np.array([hash(word) for word in re.findall(r"\w+", text.lower())], np.int64).view(np.uint64)
    runs = np.zeros(max(0, len(words) - RUN + 1), np.uint64)
    for place in range(RUN):
        runs = runs * _MULTIPLIER + words[place : place + len(runs)]
    return runs


def _was_calibrated_on(path: Path, folder: Path, used: UsedText) -> bool:
    """By the hash of the sequences, which `path` gives again if it is the same text, wherever it lies now. Every folder
    takes its tokenizer from the one that it is made from, so this folder's is that of all before it."""
    about = used.calibration
    if not about.get("text") or "sha256" not in about:
        return False
    known = {key: about[key] for key in ("num_sequences", "sequence_len", "seed") if key in about}
    try:
        tokens = calibration_tokens(Calibration(text=str(path), **known), folder)
    except HastenError:  # too short to have been it
        return False
    return bool(digest(tokens) == about["sha256"])


def _files(used: UsedText) -> Iterator[Path]:
    """Files of text that a recipe names."""
    for text in used.named:
        path = Path(os.path.expanduser(text))
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES)
        elif path.suffix != ".npy":
            yield path
