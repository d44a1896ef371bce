"""Held-out text -> windows of tokens that know how many bytes they spell. Knows no model beyond its tokenizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hasten.errors import HastenError, RequestError

# Held-out English of the demo model's training texts; ships with the package.
BUNDLED = Path(__file__).parents[1] / "demo" / "heldout.txt"

Encode = Callable[[str], Sequence[int]]

_MIN_WINDOWS = 4  # below this an interval says nothing


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A run of text on its own. tokens int32 [T]; the first is given, the T - 1 after it are predicted and spell
    num_bytes bytes of UTF-8."""

    tokens: NDArray[np.int32]
    num_bytes: int


def make_windows(
    text: str, encode: Encode, bos: int | None, length: int, most: int | None = None, least: int = _MIN_WINDOWS
) -> tuple[Window, ...]:
    """Cut `text` into pieces of at most `length` tokens, at white space where there is some, each tokenised on its own.

    encode: text -> tokens without special ones. bos: starts each window where the model has one; else a window's first
    token is only given, and its bytes are not counted. most: as many windows at most, evenly spread over the text.
    HastenError where the whole text gives fewer than `least`, RequestError where such a window has no room for two
    tokens.
    """
    room = length - (bos is not None)
    if length < 2:
        raise RequestError(f"windows are to have {length} tokens, expected at least 2: one is given, one predicted")
    pieces = [piece for piece in _pieces(text, encode, room) if len(piece[1]) + (bos is not None) > 1]
    if len(pieces) < least:
        raise HastenError(
            f"the text gives {len(pieces)} windows of {length} tokens, at least {least} are needed: give more"
        )
    if most is not None and len(pieces) > most:
        pieces = [pieces[index * len(pieces) // most] for index in range(most)]
    windows = []
    for piece, tokens in pieces:
        if bos is not None:
            ids, skipped = [bos, *tokens], 0
        else:
            ids, skipped = list(tokens), _bytes_of_first(piece, tokens, encode)
        windows.append(Window(np.array(ids, np.int32), len(piece.encode()) - skipped))
    return tuple(windows)


class Encoder(Protocol):
    """What is needed of a tokenizer (model/tokenizer.py)."""

    bos_token_id: int | None

    def encode(self, text: str) -> list[int]: ...

    def encode_plain(self, text: str) -> list[int]: ...


def first_token(tokenizer: Encoder) -> int | None:
    """The token that the model expects before every text; None where it was trained without one."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer.encode("a")[:1] == [bos] else None


def split(windows: Sequence[Window]) -> tuple[tuple[Window, ...], tuple[Window, ...]]:
    """Windows to search on, and windows to prove on: every other one, so that both see the whole text."""
    return tuple(windows[::2]), tuple(windows[1::2])


def read_text(path: str | Path) -> str:
    """A UTF-8 file. HastenError where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HastenError(f"cannot read text {path}: {error}") from None


def _pieces(text: str, encode: Encode, room: int) -> list[tuple[str, Sequence[int]]]:
    """Consecutive pieces of about `room` tokens, never more."""
    sample = text[:4096]
    chars_per_token = max(1.0, len(sample) / max(1, len(encode(sample))))
    pieces: list[tuple[str, Sequence[int]]] = []
    size = max(1, int(0.9 * room * chars_per_token))
    start = 0
    while start < len(text):
        end = _cut(text, start, min(start + size, len(text)))
        tokens = encode(text[start:end])
        while len(tokens) > room:
            if end == start + 1:
                raise RequestError(
                    f"a window has room for {room} tokens of text, and {text[start]!r} takes {len(tokens)}: lengthen it"
                )
            end = _cut(text, start, start + max(1, int((end - start) * 0.9 * room / len(tokens))))
            tokens = encode(text[start:end])
        if tokens:
            pieces.append((text[start:end], tokens))
        start = end
    if len(pieces) > 1 and len(pieces[-1][1]) < room // 2:
        pieces.pop()  # a short tail would count as much as a whole block
    return pieces


def _cut(text: str, start: int, end: int) -> int:
    """The last end of a line or word in the last quarter of text[start:end], or `end` itself. White space stays with
    what follows, as tokenizers take it."""
    if end >= len(text):
        return len(text)
    for mark in ("\n", " "):
        at = text.rfind(mark, (start + 3 * end) // 4 + 1, end)
        if at > start:
            return at
    return end


def _bytes_of_first(piece: str, tokens: Sequence[int], encode: Encode) -> int:
    """Bytes that the first token spells: of the longest beginning of the piece that is this one token."""
    for length in range(min(len(piece), 64), 0, -1):
        if list(encode(piece[:length])) == [tokens[0]]:
            return len(piece[:length].encode())
    return 1
