"""Sampled tokens -> text, cut at the first stop string. Knows no tokenizer: it is handed a decoder of one token at a
time.

Text that could be the beginning of a stop string is withheld until it cannot be any more, so what is once given out is
never taken back.
"""

from collections.abc import Sequence
from typing import Protocol


class TokenDecoder(Protocol):
    """Incremental detokenisation of one sequence (model/tokenizer.py)."""

    def push(self, token: int) -> str:
        """The text that is certain now that `token` has come; "" while a character is incomplete."""

    def finish(self) -> str:
        """What is left, incomplete characters replaced."""


class TextStream:
    """The text of one sequence. `emitted` is all that has been given out."""

    __slots__ = ("_decoder", "_include", "_stops", "_withheld", "emitted", "stopped_by")

    def __init__(self, decoder: TokenDecoder, stops: Sequence[str], include_stop: bool) -> None:
        self._decoder = decoder
        self._stops = tuple(stops)
        self._include = include_stop
        self._withheld = ""
        self.emitted = ""
        self.stopped_by: str | None = None

    def push(self, token: int, may_stop: bool = True) -> str:
        """New text to give out. Where a stop string is complete, `stopped_by` is set and nothing more must be
        pushed."""
        piece = self._decoder.push(token)
        if self._stops or self._withheld:
            return self._take(piece, may_stop)
        self.emitted += piece
        return piece

    def finish(self) -> str:
        """The rest, when the sequence has ended for another reason than a stop string."""
        text = self._take(self._decoder.finish(), True)
        if self.stopped_by is None:
            text += self._withheld
            self.emitted += self._withheld
        self._withheld = ""
        return text

    def _take(self, piece: str, may_stop: bool) -> str:
        if self._stops and may_stop:
            piece = self._cut(self._withheld + piece)
        elif self._withheld:
            piece, self._withheld = self._withheld + piece, ""
        self.emitted += piece
        return piece

    def _cut(self, text: str) -> str:
        """The part of `text` that can be given out; the earliest completed stop string wins, the longest of equals."""
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            end, start, self.stopped_by = min(ends)
            self._withheld = ""
            return text[: end if self._include else start]
        keep = max(overlap(text, stop) for stop in self._stops)
        self._withheld = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
