"""Whether a text took part in making a model: what a folder's receipt and recipe say of calibration and training text,
against the text that quality is to be measured on.

A text counts as used where the calibration sequences made from it have the hash that the receipt keeps, or where most
of its runs of thirteen words are in a text that was used and is still there. Knows nothing of what a model was trained
on before it came to hasten.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hasten.errors import HastenError
from hasten.receipt import Receipt
from hasten.recipe import Calibration

RUN = 13  # words; what chance does not repeat (Brown et al. 2020, appendix C)
_SAME = 0.5  # of a text's runs: then it is the text that was used
_LARGEST = 1 << 26  # bytes of a text that is looked through


def check_unseen(name: str, path: Path, text: str, folder: Path) -> tuple[float | None, str | None]:
    """The share of the text's runs of words that are in a text which made the model in `folder`, None where no such
    text is known; and a note where there are some. HastenError where it is such a text itself."""
    receipt = _receipt(folder)
    if receipt is None:
        return None, None
    if _was_calibrated_on(path, folder, receipt):
        raise HastenError(f"text {name} is what {folder} was calibrated on: give text that it has not seen")
    used = [file for file in _used(receipt) if file.is_file() and file.stat().st_size < _LARGEST]
    if not used:
        return None, None
    share = max(shared_runs(text, file.read_text(encoding="utf-8", errors="ignore")) for file in used)
    if share > _SAME:
        raise HastenError(
            f"text {name} is in what {folder} was made with ({share:.0%} of its runs of {RUN} words): "
            "give text that it has not seen"
        )
    note = f"text {name}: {share:.2%} of its runs of {RUN} words are in a text that {folder.name} was made with"
    return share, note if share > 0 else None


def shared_runs(text: str, other: str) -> float:
    """The share of the runs of RUN words of `text` that are in `other` too."""
    wanted = set(_runs(text))
    if not wanted:
        return 0.0
    return len(wanted.intersection(_runs(other))) / len(wanted)


def _runs(text: str) -> Iterator[int]:
    words = re.findall(r"\w+", text.lower())
    return (hash(tuple(words[start : start + RUN])) for start in range(len(words) - RUN + 1))


def _receipt(folder: Path) -> Receipt | None:
    return Receipt.load(folder) if (folder / "receipt.json").is_file() else None


def _was_calibrated_on(path: Path, folder: Path, receipt: Receipt) -> bool:
    """By the hash of the sequences, which `path` gives again if it is the same text, wherever it lies now."""
    about: dict[str, Any] = receipt.settings.get("calibration") or {}
    if not about.get("text") or "sha256" not in about:
        return False
    from hasten.compress.calibration import calibration_tokens, digest

    known = {key: about[key] for key in ("num_sequences", "sequence_len", "seed") if key in about}
    try:
        tokens = calibration_tokens(Calibration(text=str(path), **known), folder)
    except HastenError:  # too short to have been it
        return False
    return bool(digest(tokens) == about["sha256"])


def _used(receipt: Receipt) -> Iterator[Path]:
    """Files of text that the receipt and its recipe name."""
    about: dict[str, Any] = receipt.settings.get("calibration") or {}
    named = [about.get("text")]
    if receipt.recipe is not None:
        named += [receipt.recipe.calibration.text, *(getattr(step, "text", None) for step in receipt.recipe.steps)]
    for text in dict.fromkeys(text for text in named if text):
        path = Path(text)
        yield from sorted(path.rglob("*.txt")) if path.is_dir() else [path]
