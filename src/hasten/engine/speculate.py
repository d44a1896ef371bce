"""Speculation: how many guesses at the next tokens are worth running; guesses from what a sequence has said before.

Knows nothing of devices. The drafter here is n-gram (prompt) lookup (Saxena 2023; Yang et al. 2023, "Inference with
Reference"); draft_model.py has another. Verification is shared by all and is in engine.py: a drafted token stays only
where the token drawn at its position equals it, so speculation changes the time and never the tokens. How deep to draft
is decided by measurement.
"""

import time
from typing import Protocol

from hasten.engine.request import Sequence
from hasten.engine.scheduler import Scheduler

_SIZES = (4, 3, 2)  # n-grams tried, longest first


class NgramIndex:
    """Where each n-gram of one growing token list was last followed by something."""

    __slots__ = ("_last", "_num_indexed", "num_misses")

    def __init__(self) -> None:
        self._last: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token that followed it last
        self._num_indexed = 0
        self.num_misses = 0  # times in a row that nothing was found

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
                self.num_misses = 0
                found = tokens[start : start + most]
                while len(found) < most:
                    found += found[: most - len(found)]
                return found
        self.num_misses += 1
        return []


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

    def seconds(self, num_tokens: int) -> float | None:
        """Of a step of so many tokens; None until a step was seen."""
        if self._weight == 0:
            return None
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        return max(mean_y + (self._slope() or 0.0) * (num_tokens - mean_x), 0.1 * mean_y)

    def of_one_more(self, num_tokens: int) -> float:
        """Cost of one more token, relative to a step of `num_tokens`. A guess until steps of two sizes were seen."""
        slope, whole = self._slope(), self.seconds(num_tokens)
        if slope is None or not whole:
            return 0.1 / num_tokens
        return max(slope, 0.0) / whole

    def _slope(self) -> float | None:
        """Seconds a token; None until steps of two sizes were seen."""
        if self._weight == 0:
            return None
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x * mean_x
        return (self._xy / self._weight - mean_x * mean_y) / spread if spread >= 0.01 else None


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


class Drafter(Protocol):
    """Proposes tokens."""

    def propose(self, wanted: list[tuple[Sequence, int]], scheduler: Scheduler) -> None:
        """Set `drafts` on each sequence, at most so many. All its tokens are known."""

    def seconds(self, num_sequences: int) -> float | None:
        """What one draft for each of so many sequences takes; None where it is not known yet."""

    def is_dry(self, sequence: Sequence) -> bool:
        """Whether nothing is likely to be proposed. Asked where drafting means waiting for tokens."""


class NgramDrafter:
    """Looks back in the text."""

    def propose(self, wanted: list[tuple[Sequence, int]], scheduler: Scheduler) -> None:
        for sequence, depth in wanted:
            if sequence.ngrams is None:
                sequence.ngrams = NgramIndex()
            sequence.drafts = sequence.ngrams.propose(sequence.tokens, depth)

    def seconds(self, num_sequences: int) -> float | None:
        return 0.0

    def is_dry(self, sequence: Sequence) -> bool:
        return sequence.ngrams is not None and sequence.ngrams.num_misses >= 8


class Speculator:
    """Drafts for sequences that decode, as deep as measurement says it pays. Where it does not, one draft now and then,
    to notice when that changes: no more often than every `probe_every` steps, nor than costs a fiftieth of the time;
    and not where even drafts that are always right would lose."""

    def __init__(self, drafter: Drafter | None = None, max_depth: int = 8, probe_every: int = 32) -> None:
        self.drafter = drafter or NgramDrafter()
        self.max_depth = max_depth
        self.probe_every = probe_every
        self.cost = StepCost()
        self._num_steps = 0
        self._next_probe = probe_every
        self._num_probes = 0

    def draft(self, scheduler: Scheduler) -> None:
        """Set `drafts` on the sequences that have one token to run."""
        self._num_steps += 1
        depths = self._depths(scheduler.running)
        if not depths:
            return
        probes = self._may_probe(len(depths))
        resting = [sequence for sequence, depth in depths if depth == 0]
        probed = resting[self._num_probes % len(resting)] if resting and probes else None
        wanted = []
        for sequence, depth in depths:
            sequence.drafts = []
            # The step itself gives one token.
            depth = min(max(depth, int(sequence is probed)), sequence.limit - len(sequence.tokens) - 1)
            if depth > 0:
                wanted.append((sequence, depth))
        start = time.perf_counter()
        if wanted:
            self.drafter.propose(wanted, scheduler)
        if probes:
            self._num_probes += 1
            step = self.cost.seconds(len(depths))
            steps = _PROBE_SHARE * (time.perf_counter() - start) / step if step else 0
            self._next_probe = self._num_steps + max(self.probe_every, int(steps))

    def rests(self, running: list[Sequence]) -> bool:
        """Whether draft() would do nothing now, so that the next step need not wait for tokens. Counts as a step."""
        depths = self._depths(running)
        if any(depth and not self.drafter.is_dry(sequence) for sequence, depth in depths):
            return False
        self._num_steps += 1
        return not (depths and self._may_probe(len(depths)))

    def _may_probe(self, num_decoding: int) -> bool:
        if self._num_steps < self._next_probe:
            return False
        return self.drafter.seconds(num_decoding) == 0 or best_depth(1.0, self._relative_cost(num_decoding), 1) > 0

    def _depths(self, running: list[Sequence]) -> list[tuple[Sequence, int]]:
        """How deep to draft for each sequence that decodes."""
        decoding = [s for s in running if s.num_computed + 1 == len(s.tokens)]
        if not decoding:
            return []
        cost = self._relative_cost(len(decoding))
        return [(s, best_depth(s.acceptance.rate, cost, self.max_depth)) for s in decoding]

    def _relative_cost(self, num_sequences: int) -> float:
        """Time that one more draft for each sequence takes, relative to a step without any. A token more in a step of n
        sequences must bring n times what it would bring alone."""
        drafting, step = self.drafter.seconds(num_sequences), self.cost.seconds(num_sequences)
        if drafting != 0.0:
            drafting = _GUESS if drafting is None or not step else drafting / step
        return self.cost.of_one_more(num_sequences) * num_sequences + drafting


# Time of a draft relative to a step, until both were measured.
_GUESS = 0.1
# Times that a probe's seconds pass before the next.
_PROBE_SHARE = 50
