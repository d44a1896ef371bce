"""Token ids -> text, one token at a time: each token spells bytes, and a character is given out when it is whole.

Knows the two ways in which the supported models spell (byte-level, and SentencePiece with byte fallback); a tokenizer
with another decoder decodes the last few tokens anew at each step. For text that is valid UTF-8 the pieces together are
exactly what decoding all ids at once gives; for byte-level tokenizers always.
"""

import codecs
import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

_WINDOW = 8  # tokens that are kept of a text that is decoded anew
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Pieces:
    """What each token of a tokenizer spells."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._kind, self.strip = _kind_of(tokenizer)
        self.known: dict[int, bytes] = {}  # what was spelt before

    @property
    def incremental(self) -> bool:
        return self._kind != ""

    def spell(self, token_id: int) -> bytes:
        """The bytes of one token; none for an id that the tokenizer does not have."""
        found = self.known.get(token_id)
        if found is None:
            found = self.known[token_id] = self._spell(self.tokenizer.id_to_token(token_id))
        return found

    def _spell(self, token: str | None) -> bytes:
        if token is None:
            return b""
        if self._kind == "byte-level":
            octets = [_byte_of_character().get(character) for character in token]
            return token.encode() if None in octets else bytes(octet for octet in octets if octet is not None)
        match = _BYTE_TOKEN.fullmatch(token)
        return bytes([int(match[1], 16)]) if match else token.replace("▁", " ").encode()


class Detokenizer:
    """Incremental decoding of one sequence that follows `prompt_ids`; constant work a token."""

    __slots__ = ("_at_start", "_decoder", "_emitted", "_hidden", "_ids", "_next_cut", "_pieces", "_skip")

    def __init__(self, pieces: Pieces, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._pieces = pieces
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._hidden: set[int] = pieces.special if skip_special_tokens else set()
        self._at_start = all(token in self._hidden for token in prompt_ids)
        self._ids: list[int] = []
        self._emitted = 0
        self._next_cut = 4 * _WINDOW

    def push(self, token: int) -> str:
        """The text that is certain now that `token` has come; "" while a character is incomplete."""
        if token in self._hidden and self._pieces.incremental:
            return ""
        known = self._pieces.known.get(token)
        if known is not None and not self._at_start:
            return self._decoder.decode(known)
        if not self._pieces.incremental:
            return self._decode_anew(token)
        return self._stripped(self._decoder.decode(self._pieces.spell(token)))

    def finish(self) -> str:
        """What is left, incomplete characters replaced."""
        if not self._pieces.incremental:
            text = self._text()
            rest, self._emitted = text[self._emitted :], len(text)
            return rest
        return self._stripped(self._decoder.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        """A text of its own loses the space that SentencePiece puts before it; one that follows a prompt keeps it."""
        if text and self._at_start:
            self._at_start = False
            if self._pieces.strip and text[0] == " ":
                return text[1:]
        return text

    def _decode_anew(self, token: int) -> str:
        self._ids.append(token)
        text = self._text()
        if text.endswith("\ufffd"):
            return ""
        new, self._emitted = text[self._emitted :], len(text)
        if len(self._ids) >= self._next_cut:
            self._forget(text)
        return new

    def _forget(self, text: str) -> None:
        """Keep only the last tokens, where they alone spell the end of the text: work stays constant a token."""
        last = self._ids[-_WINDOW:]
        tail = str(self._pieces.tokenizer.decode(last, skip_special_tokens=self._skip))
        if tail and text.endswith(tail):
            self._ids, self._emitted = last, len(tail)
        self._next_cut = max(4 * _WINDOW, len(self._ids) + _WINDOW)

    def _text(self) -> str:
        return str(self._pieces.tokenizer.decode(self._ids, skip_special_tokens=self._skip))


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019): printable Latin-1 stands for itself, the
    other bytes are counted up from U+0100."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [octet for octet in range(256) if octet not in own]
    return {chr(octet): octet for octet in own} | {chr(256 + index): octet for index, octet in enumerate(others)}


def _kind_of(tokenizer: Any) -> tuple[str, bool]:
    """("byte-level" | "sentencepiece" | "" for another, whether a text's first space is not its own)."""
    decoder = tokenizer.decoder
    state = json.loads(decoder.__getstate__()) if decoder is not None else {}
    steps = state.get("decoders", [state])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return "byte-level", False
    spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0] == spaces:
        if len(steps) == 3:
            return "sentencepiece", False
        if steps[3:] == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
            return "sentencepiece", True
    return "", False
