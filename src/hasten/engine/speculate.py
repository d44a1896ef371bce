"""Speculation: guess the next tokens from what a sequence has said before, and how many guesses are worth running.

Knows nothing of devices. Drafting is n-gram (prompt) lookup (Saxena 2023; Yang et al. 2023, "Inference with
Reference"). Verification is shared by all drafters and is in engine.py: a drafted token stays only where the token
drawn at its position equals it, so speculation changes the time and never the tokens. How deep to draft is decided by
measurement.
"""

from hasten.engine.request import Sequence

_SIZES = (4, 3, 2)  # n-grams tried, longest first


class NgramIndex:
    """Where each n-gram of one growing token list was last followed by something."""

    __slots__ = ("_last", "_num_indexed", "accepted", "rejected")

    def __init__(self) -> None:
        self._last: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token that followed it last
        self._num_indexed = 0
        # Decayed counts of drafts that were right and wrong, begun at even odds.
        self.accepted, self.rejected = 1.0, 1.0

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """Up to `most` tokens that followed the last earlier occurrence of the longest n-gram that ends `tokens`. Where
        the match overlaps the end, the repetition is continued."""
        last = self._last
        for at in range(max(self._num_indexed, 1), len(tokens)):
            for size in _SIZES:
                if at >= size:
                    last[tuple(tokens[at - size : at])] = at
        self._num_indexed = len(tokens)
        for size in _SIZES:
            start = last.get(tuple(tokens[-size:])) if len(tokens) >= size else None
            if start is not None:
                found = tokens[start : start + most]
                while len(found) < most:
                    found += found[: most - len(found)]
                return found
        return []

    def record(self, num_drafted: int, num_accepted: int) -> None:
        """Outcome of one verification."""
        self.accepted = 0.9 * self.accepted + num_accepted
        self.rejected = 0.9 * self.rejected + (num_accepted < num_drafted)

    @property
    def acceptance(self) -> float:
        """Estimated chance that a drafted token is right, given that those before it are."""
        return self.accepted / (self.accepted + self.rejected)


class StepCost:
    """Seconds of a decoding step as a + b * tokens, fitted by least squares over recent steps, old ones fading."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def record(self, num_tokens: int, seconds: float) -> None:
        keep = 0.98
        self._weight = keep * self._weight + 1
        self._x = keep * self._x + num_tokens
        self._y = keep * self._y + seconds
        self._xx = keep * self._xx + num_tokens * num_tokens
        self._xy = keep * self._xy + num_tokens * seconds

    def of_one_more(self, num_tokens: int) -> float:
        """Cost of one more token, relative to a step of `num_tokens`. A guess until steps of two sizes were seen."""
        if self._weight == 0:
            return 0.1 / num_tokens
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x * mean_x
        if spread < 0.01 or mean_y <= 0:
            return 0.1 / num_tokens
        slope = (self._xy / self._weight - mean_x * mean_y) / spread
        whole = mean_y + slope * (num_tokens - mean_x)
        return max(slope, 0.0) / max(whole, 0.1 * mean_y)


def best_depth(acceptance: float, relative_cost: float, most: int) -> int:
    """The number k of drafts that gives the most tokens per time: (1 + p + .. + p^k) / (1 + k * cost). 0: do not
    draft."""
    best, best_rate = 0, 1.0
    expected, chance = 1.0, 1.0
    for depth in range(1, most + 1):
        chance *= acceptance
        expected += chance
        rate = expected / (1 + depth * relative_cost)
        if rate > best_rate:
            best, best_rate = depth, rate
    return best


class Speculator:
    """Drafts for sequences that decode, as deep as measurement says it pays; now and then one draft where it does not,
    to notice when that changes."""

    def __init__(self, max_depth: int = 8, probe_every: int = 32) -> None:
        self.max_depth = max_depth
        self.probe_every = probe_every
        self.cost = StepCost()
        self._num_skipped = 0

    def draft(self, running: list[Sequence]) -> None:
        """Set `drafts` on the sequences that have one token to run."""
        decoding = [s for s in running if s.num_computed + 1 == len(s.tokens)]
        if not decoding:
            return
        # A token more in a step of n sequences must bring n times what it would bring alone.
        relative_cost = self.cost.of_one_more(len(decoding)) * len(decoding)
        for sequence in decoding:
            index = sequence.ngrams
            if index is None:
                index = sequence.ngrams = NgramIndex()
            depth = best_depth(index.acceptance, relative_cost, self.max_depth)
            if depth == 0:
                self._num_skipped += 1
                depth = int(self._num_skipped % self.probe_every == 0)
            depth = min(depth, sequence.limit - len(sequence.tokens) - 1)  # the step itself gives one token
            sequence.drafts = index.propose(sequence.tokens, depth) if depth > 0 else []
