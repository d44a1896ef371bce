"""Cutting text into windows ends, whatever the text and the window."""

from collections.abc import Sequence

import pytest

from hasten.errors import HastenError, RequestError
from hasten.measure.text import make_windows


def of_bytes(text: str) -> Sequence[int]:
    return list(text.encode())


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize("length", [-3, 0, 1])
def test_a_window_without_room_is_refused(length: int, bos: int | None) -> None:
    with pytest.raises(RequestError, match=f"windows are to have {length} tokens, expected at least 2"):
        make_windows("a tale of two cities", of_bytes, bos, length)


def test_a_character_that_fills_more_than_a_window_is_named() -> None:
    with pytest.raises(RequestError, match=r"room for 3 tokens of text, and '😀' takes 4"):
        make_windows("one two three 😀 four", of_bytes, 1, 4)


@pytest.mark.parametrize(("length", "bos"), [(2, 1), (3, 1), (5, 1), (17, 1), (3, None), (5, None), (17, None)])
def test_every_window_keeps_to_its_length_and_counts_its_bytes(length: int, bos: int | None) -> None:
    text = "It was the best of times, it was the worst of times. " * 3
    windows = make_windows(text, of_bytes, bos, length)
    assert max(len(window.tokens) for window in windows) <= length
    for window in windows:
        assert window.num_bytes == len(window.tokens) - 1
    if bos is not None and length < 4:  # no short tail is left out
        assert b"".join(bytes(window.tokens[1:].tolist()) for window in windows) == text.encode()


def test_too_short_a_text_says_what_it_gives() -> None:
    with pytest.raises(HastenError, match="the text gives 1 windows of 512 tokens, at least 4"):
        make_windows("short", of_bytes, 1, 512)
