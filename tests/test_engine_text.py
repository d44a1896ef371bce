"""Stop strings over a stream of pieces, against a search of the whole text."""

import random

import pytest

from hasten.engine.text import TextStream, overlap


class Pieces:
    """Token i is a fixed piece; the last is only given by finish()."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self.pieces, self.rest = pieces, rest

    def push(self, token: int) -> str:
        return self.pieces[token]

    def finish(self) -> str:
        return self.rest


@pytest.mark.parametrize("seed", range(300))
def test_equals_a_search_of_the_whole_text(seed: int) -> None:
    rng = random.Random(seed)
    pieces = ["".join(rng.choices("ab", k=rng.randrange(4))) for _ in range(12)]
    rest = "".join(rng.choices("ab", k=rng.randrange(3)))
    stops = ["".join(rng.choices("ab", k=rng.randrange(2, 6))) for _ in range(rng.randrange(1, 4))]
    include = rng.random() < 0.5
    stream = TextStream(Pieces(pieces, rest), stops, include)
    out = []
    for token in range(len(pieces)):
        out.append(stream.push(token))
        if stream.stopped_by:
            break
        assert "".join(pieces[: token + 1]).startswith("".join(out))
    else:
        out.append(stream.finish())
    whole = "".join(pieces) + rest
    ends = [(whole.index(s) + len(s), whole.index(s), s) for s in stops if s in whole]
    if not ends:
        assert stream.stopped_by is None
        assert "".join(out) == whole == stream.emitted
        return
    assert stream.stopped_by in stops
    at = whole.index(stream.stopped_by)
    assert "".join(out) == stream.emitted == whole[: at + len(stream.stopped_by) if include else at]
    # A piece may complete two stop strings: the one that ends first counts.
    assert at + len(stream.stopped_by) == min(ends)[0]


def test_only_what_could_begin_a_stop_string_is_withheld() -> None:
    stream = TextStream(Pieces(["hello EN", "Dless", " END"]), ["END."], False)
    assert [stream.push(i) for i in range(3)] == ["hello ", "ENDless", " "]
    assert stream.finish() == "END"


def test_stop_strings_wait_for_min_tokens() -> None:
    stream = TextStream(Pieces(["a", "b", "ab"]), ["ab"], False)
    assert [stream.push(0, False), stream.push(1, False), stream.push(2)] == ["a", "b", ""]
    assert stream.stopped_by == "ab"


def test_overlap() -> None:
    assert [overlap("xab", "abab"), overlap("xabab", "abab"), overlap("x", "ab"), overlap("", "ab")] == [2, 2, 0, 0]
