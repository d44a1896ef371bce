"""Calibration text: a file, a folder, a data set of the Hugging Face hub, or what the model itself writes -> tokens.

A .npy file of token ids [n, T] is taken as it is.

Knows no method. Sequences start with the model's beginning-of-sequence token where it has one; none spans what lies
apart in the text.
"""

import codecs
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hasten.errors import HastenError, RecipeError, ResourceError
from hasten.model.checkpoint import open_checkpoint
from hasten.model.jsonfile import read_kept
from hasten.model.tokenizer import Tokenizer
from hasten.receipt import write_text
from hasten.recipe import Calibration

if TYPE_CHECKING:
    import torch

Int32 = NDArray[np.int32]
Note = Callable[[str], None]  # is told of text that is too long to be read whole

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
_PIECE = 1 << 16  # characters that are made into tokens at a time
_WRITTEN_AT_ONCE = 256  # sequences
_MOST = 1 << 28  # bytes of a file that are read at most
_PARTS = 1 << 12  # evenly spread over a longer one
_MOST_OF_A_DATA_SET = 1 << 25  # characters: what is behind them would have to be fetched
_AMPLE = 64  # characters for each token that is wanted: more are not looked at
_BEGINNING = 1 << 16  # bytes of a file that are looked at before the work


def calibration_tokens(
    calibration: Calibration, folder: Path, device: str = "cpu", note: Note = lambda line: None
) -> Int32:
    """The sequences [num_sequences, sequence_len] for the model in `folder`. RecipeError where the text is too short or
    sequences too long for the model, HastenError where it cannot be read."""
    spec = open_checkpoint(folder).spec
    if calibration.sequence_len > spec.max_position:
        raise RecipeError(
            f"calibration sequences have {calibration.sequence_len} tokens, the model at most {spec.max_position}: "
            "lower sequence_len"
        )
    if calibration.text is None:
        return generate(calibration, folder, device)
    if calibration.text.endswith(".npy"):
        tokens = _ready(calibration, calibration.text)
    else:
        tokens = _cut(calibration, calibration.text, folder, note)
    if tokens.min() < 0 or tokens.max() >= spec.vocab_size:
        raise RecipeError(
            f"calibration text {calibration.text} has tokens from {tokens.min()} to {tokens.max()}, "
            f"the model knows 0 to {spec.vocab_size - 1}: it is of another tokenizer"
        )
    return tokens


def _cut(calibration: Calibration, text: str, folder: Path, note: Note) -> Int32:
    tokenizer = Tokenizer(folder)
    bos = tokenizer.bos_token_id
    first = [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []
    length = calibration.sequence_len - len(first)
    pieces: list[list[int]] = []
    for part in (span for whole in read(text, note) for span in _spans(whole, calibration)):
        ids = encode(tokenizer, part)
        pieces += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    wanted = calibration.num_sequences
    if len(pieces) < wanted:
        raise RecipeError(
            f"calibration text {text} gives {len(pieces)} sequences of {calibration.sequence_len} tokens, "
            f"{wanted} are asked for: give more text, or lower num_sequences or sequence_len"
        )
    chosen = [first + pieces[index * len(pieces) // wanted] for index in range(wanted)]
    return np.array(chosen, np.int32)


def _spans(text: str, calibration: Calibration) -> list[str]:
    """The text, or where it is far longer than is needed, parts of it, evenly: a million tokens take a second."""
    count, length = calibration.num_sequences, _AMPLE * calibration.sequence_len
    if len(text) <= count * length:
        return [text]
    starts = [(len(text) - length) * index // max(count - 1, 1) for index in range(count)]
    return [text[start : start + length] for start in starts]


def _ready(calibration: Calibration, file: str) -> Int32:
    try:
        found = np.load(os.path.expanduser(file))
    except (OSError, ValueError, EOFError) as error:
        raise HastenError(f"cannot read calibration tokens {file}: {error}") from None
    if not isinstance(found, np.ndarray):
        raise HastenError(f"calibration tokens {file} are an archive of arrays, expected one array")
    wanted = (calibration.num_sequences, calibration.sequence_len)
    if found.ndim != 2 or found.dtype.kind not in "iu" or len(found) < wanted[0] or found.shape[1] < wanted[1]:
        raise RecipeError(
            f"calibration tokens {file} are {found.dtype} {list(found.shape)}, expected integers {list(wanted)} or more"
        )
    return np.ascontiguousarray(found[: wanted[0], : wanted[1]], np.int32)


def read(text: str, note: Note = lambda line: None) -> Iterator[str]:
    """The texts that `text` names: one of a file, one a file of a folder, all of a data set as one."""
    if files := _files(text):
        yield from (_file(file, note) for file in files)
    else:
        yield _data_set(os.path.expanduser(text), note)


def check_text(text: str, folder: Path, least: int = 0) -> None:
    """HastenError where it is seen at once that `text` cannot be read, is empty, or has less than `least` tokens for
    the model in `folder`: that is to be said before the work, not in the middle of it. Of a file, the beginning."""
    files = _files(text)
    if not files:
        _check_data_sets(text)
    elif text.endswith(".npy"):
        return  # whether these are tokens is seen where they are read, which is before the work, too
    elif not sum(_has_text(file) for file in files):  # each is looked at
        raise HastenError(f"calibration text {text} is empty: give text")
    elif least and sum(file.stat().st_size for file in files) < least * _AMPLE:
        tokenizer = Tokenizer(folder)
        found = sum(len(encode(tokenizer, part)) for part in read(text))
        if found + len(files) < least - 1:  # a token may be added before and behind each
            raise RecipeError(
                f"the training text {text} has {found} tokens, a sequence has {least}: give more text, or lower "
                "sequence_len"
            )


def fingerprint(text: str) -> str | None:
    """sha256 of all that would be read of the files that `text` names; None for a data set of the hub."""
    files = _files(text)
    if files is None:
        return None
    root = Path(os.path.expanduser(text))
    total = hashlib.sha256()
    try:
        for path in files or sorted(file for file in root.rglob("*") if file.is_file()):
            size = path.stat().st_size
            total.update(f"{path.relative_to(root)} {size}\n".encode())
            with open(path, "rb") as file:
                for start, length in _parts(size):
                    file.seek(start)
                    total.update(file.read(length))
    except OSError as error:
        raise _unreadable(path, error) from None
    return total.hexdigest()


def _files(text: str) -> list[Path] | None:
    """The files that `text` names, sorted: one, or those of a folder that are text. None is a data set of the hub, none
    a folder that is one. HastenError where it is nothing of these."""
    path = Path(os.path.expanduser(text))
    if os.path.isfile(path):  # which is False for a name that the system does not take, too
        return [path]
    if os.path.isdir(path):
        return sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
    if "/" in text.removeprefix("./") and (text.startswith((".", "/", "~")) or text.count("/") > 2):
        raise HastenError(f"no calibration text at {text}: expected a file, a folder or a data set's name")
    if path.suffix in TEXT_SUFFIXES or path.suffix == ".npy":
        raise HastenError(f"no calibration text at {text}: there is no such file")
    if "/" not in text:  # the hub is not asked about every misspelt file
        raise HastenError(
            f"no calibration text at {text}: there is no such file or folder, and data sets are named OWNER/NAME"
        )
    return None


def generate(
    calibration: Calibration, folder: Path, device: str = "cpu", tell: Callable[[int], None] = lambda done: None
) -> Int32:
    """Sequences that the model writes itself at temperature 1, without data as in LLM-QAT (Liu et al. 2023): from its
    beginning-of-sequence token, or from a random one where it has none. tell: how many are done."""
    bos = open_checkpoint(folder).spec.bos_token_id
    random = np.random.default_rng(calibration.seed)
    first = random.integers(Tokenizer(folder).vocab_size, size=calibration.num_sequences).tolist()
    starts = [[token if bos is None else bos] for token in first]
    return write_on(starts, calibration.sequence_len, calibration.seed, folder, device, tell)


def write_on(
    starts: Sequence[Sequence[int]],
    length: int,
    seed: int,
    folder: Path,
    device: str,
    tell: Callable[[int], None] = lambda done: None,
) -> Int32:
    """Beginnings of sequences, continued to `length` tokens by the model in `folder` at temperature 1. tell: how many
    are done."""
    from hasten.engine.llm import LLM
    from hasten.engine.request import SamplingParams

    rows: list[list[int]] = []
    with LLM(folder, device="cuda" if device.startswith("cuda") else "cpu", max_len=length) as llm:
        for first in range(0, len(starts), _WRITTEN_AT_ONCE):
            tell(first)
            some = starts[first : first + _WRITTEN_AT_ONCE]
            params = [
                SamplingParams(
                    max_tokens=length - len(start), temperature=1.0, top_p=1.0, top_k=0, min_p=0.0,
                    repetition_penalty=1.0, ignore_eos=True, seed=seed + index,
                )
                for index, start in enumerate(some, first)
            ]  # fmt: skip
            found = llm.generate([list(start) for start in some], params)
            rows += [[*start, *out.outputs[0].token_ids] for start, out in zip(some, found, strict=True)]
    return np.array(rows, np.int32)


class Sequences:
    """The calibration sequences, made when they are first asked for, and kept in `file` for a run that goes on.

    held_out: an eighth more is made, evenly over the text, that calibration does not see.
    """

    def __init__(self, calibration: Calibration, folder: Path, file: Path, device: str, held_out: bool = False) -> None:
        extra = max(4, calibration.num_sequences // 8) if held_out else 0
        self._wanted = replace(calibration, num_sequences=calibration.num_sequences + extra)
        self._folder, self._file, self._device = folder, file, device
        self._extra = np.linspace(0, self._wanted.num_sequences - 1, extra).astype(int)
        self._found: Int32 | None = None

    def __call__(self) -> "torch.Tensor":
        """[n, T] int64."""
        return _tensor(np.delete(self._all(), self._extra, axis=0))

    def held_out(self) -> "torch.Tensor":
        """[m, T] int64, none of which is among those above."""
        return _tensor(self._all()[self._extra])

    def about(self) -> dict[str, object]:
        """For the receipt; empty where nothing asked for text."""
        if self._found is None and self._kept() is None:
            return {}
        return {**asdict(self._wanted), "sha256": digest(self._all()), **({"notes": self.notes} if self.notes else {})}

    @property
    def notes(self) -> list[str]:
        """What of the text was not read."""
        return read_kept(self._file.with_suffix(".json"), list) or []

    def _all(self) -> Int32:
        if self._found is None:
            self._found = self._kept()
        if self._found is None:
            notes: list[str] = []
            self._found = calibration_tokens(self._wanted, self._folder, self._device, notes.append)
            if notes:
                write_text(self._file.with_suffix(".json"), json.dumps(notes))
            with open(self._file.with_suffix(".partial"), "wb") as file:
                np.save(file, self._found)
            os.replace(file.name, self._file)
        return self._found

    def _kept(self) -> Int32 | None:
        """What an earlier run left, if that is whole: a power cut may leave an empty file."""
        try:
            return np.asarray(np.load(self._file), np.int32)
        except (OSError, ValueError, EOFError):
            return None


def _tensor(tokens: Int32) -> "torch.Tensor":
    import torch  # not above: whether a text was used is asked without torch, too

    return torch.from_numpy(tokens.astype(np.int64))


def digest(tokens: Int32) -> str:
    """sha256 of the sequences."""
    return hashlib.sha256(np.ascontiguousarray(tokens, "<i4").tobytes()).hexdigest()


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a long text, piece by piece, cut at white space."""
    ids: list[int] = []
    start = 0
    while start < len(text):
        end = min(start + _PIECE, len(text))
        cut = text.rfind(" ", start + 1, end) if end < len(text) else end
        end = cut if cut > start else end
        ids += tokenizer.encode_plain(text[start:end])
        start = end
    return ids


def _file(path: Path, note: Note) -> str:
    """A file's text; of one that is too long for memory, parts of it, evenly."""
    try:
        size = path.stat().st_size
        if size <= _MOST:
            return path.read_text(encoding="utf-8")
        note(f"text {path} has {size:,} bytes: {_MOST:,} of them were read, evenly over it")
        with open(path, "rb") as file:
            return "\n".join(_part(file, start, length) for start, length in _parts(size))
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _has_text(path: Path) -> bool:
    """Whether a file's beginning, which must be UTF-8, is more than white space."""
    try:
        with open(path, "rb") as file:
            found = _part(file, 0, _BEGINNING)
        return bool(found.strip()) or path.stat().st_size > _BEGINNING
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> HastenError:
    wanted = ": expected text in UTF-8" if isinstance(error, UnicodeDecodeError) else ""
    return HastenError(f"cannot read calibration text {path}: {error}{wanted}")


def _parts(size: int) -> list[tuple[int, int]]:
    """Where the bytes begin that are read of a file, and how many they are."""
    if size <= _MOST:
        return [(0, size)]
    length = _MOST // _PARTS
    return [((size - length) * index // (_PARTS - 1), length) for index in range(_PARTS)]


def _part(file: BinaryIO, start: int, length: int) -> str:
    """The characters that lie whole in so many bytes of a file in UTF-8."""
    file.seek(start)
    found = file.read(length)
    if start:
        found = found.lstrip(bytes(range(0x80, 0xC0)))  # the end of a character that began before
    return codecs.getincrementaldecoder("utf-8")().decode(found)


def _check_data_sets(name: str) -> None:
    if importlib.util.find_spec("datasets") is None:
        raise ResourceError(
            f"calibration text {name} is no file and no folder, and data sets need the package datasets: "
            "pip install datasets, or give a file"
        )


def _data_set(name: str, note: Note) -> str:
    """The texts of a data set's training part, from its column `text` or else its first of strings. OWNER/NAME or
    OWNER/NAME:CONFIGURATION."""
    _check_data_sets(name)
    import datasets
    from huggingface_hub import HfApi

    dataset, _, configuration = name.partition(":")
    try:
        if not Path(name).is_dir():
            HfApi().dataset_info(dataset, timeout=10)  # asks once: load_dataset asks for half a minute, and logs it
        found = datasets.load_dataset(dataset, configuration or None, streaming=True)
        rows = found["train"] if "train" in found else next(iter(found.values()))
        texts, size = [], 0
        for row in rows:
            strings = [value for value in row.values() if isinstance(value, str)]
            texts.append(row["text"] if isinstance(row.get("text"), str) else strings[0] if strings else "")
            size += len(texts[-1])
            if size > _MOST_OF_A_DATA_SET:
                note(f"data set {name}: its first {size:,} characters were read, and no more")
                break
    except Exception as error:  # the package raises what its many sources raise
        reason = " ".join(str(error).split())
        raise HastenError(f"data set {name} cannot be read: {reason:.200}: check its name, or give a file") from None
    return "\n".join(texts)
