"""Speculation: how many guesses at the next tokens are worth running; guesses from what a sequence has said before.

Knows nothing of devices. The drafter here is n-gram (prompt) lookup (Saxena 2023; Yang et al. 2023, "Inference with
Reference"); draft_model.py has another. Verification is shared by all and is in engine.py: a drafted token stays only
where the token drawn at its position equals it, so speculation changes the time and never the tokens. How deep to draft
is decided by measurement.
"""

import math
import time
from typing import Protocol

import numpy as np

from hasten.engine.request import Sequence
from hasten.engine.scheduler import Scheduler

_MOST_DRAFTS = 15  # with the token that they follow a tile's 16 rows
_BITS = 21  # of a token in an n-gram: three fit the 63 that numpy has
_FORGET = 0.15  # weight of the last token in an n-gram's luck
_CATCH_UP = 8  # tokens, the last ones, that are indexed after more have passed unseen
_OUTLIER = 4.0  # times what is expected


class NgramIndex:
    """Where each n-gram of one growing token list was last followed by something, and how often that would have been
    right lately, whether or not it was used: `luck`, begun at even odds. An n-gram is one number, its tokens' bits."""

    __slots__ = ("_fours", "_num_indexed", "_threes", "_twos", "luck")

    def __init__(self) -> None:
        self._fours: dict[int, int] = {}  # n-gram -> index of the token that followed it last
        self._threes: dict[int, int] = {}
        self._twos: dict[int, int] = {}
        self._num_indexed = 0
        self.luck = 0.5

    def extend(self, tokens: list[int]) -> None:
        """Index the tokens that are new and known, or the last of them. What comes first, a prompt, is indexed whole
        and says nothing of luck."""
        end = len(tokens)
        while end and tokens[end - 1] < 0:
            end -= 1
        if self._num_indexed < 4:
            self._index(tokens, end)
        else:
            twos, threes, fours = self._twos, self._threes, self._fours
            for at in range(max(self._num_indexed, end - _CATCH_UP), end):
                fourth, third, second, first = tokens[at - 4 : at]
                two = second << _BITS | first
                three = third << 2 * _BITS | two
                four = fourth << 3 * _BITS | three
                start = twos.get(two)
                if start is not None:  # else no longer one is known either
                    start = fours.get(four) or threes.get(three) or start
                self.luck += _FORGET * ((start is not None and tokens[start] == tokens[at]) - self.luck)
                twos[two] = threes[three] = fours[four] = at
        self._num_indexed = max(self._num_indexed, end)

    def _index(self, tokens: list[int], end: int) -> None:
        """All at once."""
        known = np.array(tokens[:end], np.int64)
        twos = known[:-1] << _BITS | known[1:]
        threes = known[:-2] << 2 * _BITS | twos[1:]
        self._twos = dict(zip(twos[:-1].tolist(), range(2, end), strict=True))
        listed = threes[:-1].tolist()
        self._threes = dict(zip(listed, range(3, end), strict=True))
        fours = (token << 3 * _BITS | three for token, three in zip(tokens, listed[1:], strict=False))
        self._fours = dict(zip(fours, range(4, end), strict=True))

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """Up to `most` tokens that followed the last earlier occurrence of the longest n-gram that ends `tokens`. Where
        the match overlaps the end, the repetition is continued."""
        self.extend(tokens)
        start = self._match(tokens)
        if start is None:
            return []
        found = tokens[start : start + most]
        while len(found) < most:
            found += found[: most - len(found)]
        return found

    def _match(self, tokens: list[int]) -> int | None:
        """Where what followed the longest known n-gram that ends `tokens` begins."""
        gram, found = tokens[-1], None
        for size, known in enumerate((self._twos, self._threes, self._fours), 2):
            if size > len(tokens):
                break
            gram |= tokens[-size] << (size - 1) * _BITS
            found = known.get(gram, found)
        return found


class StepCost:
    """Seconds of a decoding step as a + b * tokens, fitted by least squares over recent steps, old ones fading.

    A device may compile or record something when a step is the first of its size. So a time far above what is expected
    counts only where several come in a row, and one far below drops what was seen before."""

    def __init__(self) -> None:
        self._num_outliers = 0
        self._forget()

    def _forget(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def record(self, num_tokens: float, seconds: float, most: float = math.inf, outlier: float = _OUTLIER) -> None:
        """Take one step. most: seconds above which it is an outlier where none were seen yet; afterwards, so many times
        what is expected."""
        expected = self.seconds(num_tokens)
        if expected is not None:
            most = outlier * expected
            if seconds * outlier < expected:
                self._forget()
        self._num_outliers = self._num_outliers + 1 if seconds > most else 0
        if 0 < self._num_outliers <= outlier:
            return
        keep = 0.98
        self._weight = keep * self._weight + 1
        self._x = keep * self._x + num_tokens
        self._y = keep * self._y + seconds
        self._xx = keep * self._xx + num_tokens * num_tokens
        self._xy = keep * self._xy + num_tokens * seconds

    def seconds(self, num_tokens: float) -> float | None:
        """Of a step of so many tokens; None until a step was seen."""
        if self._weight == 0:
            return None
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        return max(mean_y + (self.slope() or 0.0) * (num_tokens - mean_x), 0.1 * mean_y)

    def of_one_more(self, num_tokens: int) -> float:
        """Cost of one more token, relative to a step of `num_tokens`. A guess until steps of two sizes were seen."""
        slope, whole = self.slope(), self.seconds(num_tokens)
        if slope is None or not whole:
            return 0.1 / num_tokens
        return max(slope, 0.0) / whole

    def slope(self) -> float | None:
        """Seconds a token; None until steps of two sizes were seen."""
        if self._weight == 0:
            return None
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x * mean_x
        return (self._xy / self._weight - mean_x * mean_y) / spread if spread >= 0.01 else None


def best_depths(chances: list[float], each: float, most: int, waiting: float = 0.0, drafting: float = 0.0) -> list[int]:
    """How many tokens to draft for each of n sequences, that are right with these chances, for the most tokens per
    time: (n + the sum of p + .. + p^d) / (1 + waiting + each * the sum of d + drafting * the largest d), in steps
    without drafts. All 0: do not draft, nor wait. What waiting costs all of them must pay, be it for one, and little is
    not worth it: it is known roughly, and paid once more when drafting ends.

    A ratio is largest where tokens - rate * time is (Dinkelbach 1967), and there a draft is worth its chance."""
    num = len(chances)
    best, rate = [0] * num, num * (_WORTH_WAITING if waiting else 1.0)
    for deepest in range(1, most + 1) if drafting else (most,):
        fixed = 1 + waiting + drafting * deepest
        while True:
            depths = [_depth(chance, rate * each, deepest) for chance in chances]
            right = sum(_expected(chance, depth) for chance, depth in zip(chances, depths, strict=True) if depth)
            found = (num + right) / (fixed + each * sum(depths))
            if found <= rate * (1 + 1e-9):
                break
            best, rate = depths, found
    return best


def _depth(chance: float, least: float, most: int) -> int:
    """The largest d up to `most` with chance^d >= least."""
    if chance < least or chance <= 0:
        return 0
    return most if chance >= 1 or least <= 0 else min(most, int(math.log(least) / math.log(chance)))


def _expected(chance: float, depth: int) -> float:
    """chance + .. + chance^depth"""
    return depth if chance >= 1 else chance * (1 - chance**depth) / (1 - chance)


class Drafter(Protocol):
    """Proposes tokens."""

    def propose(self, wanted: list[tuple[Sequence, int]], scheduler: Scheduler, usual: float | None) -> None:
        """Set `drafts` on each sequence, at most so many. All its tokens are known. usual: seconds of a step without
        drafts, where they are known."""

    def seconds(self, num_sequences: int) -> float | None:
        """What one draft for each of so many sequences takes; None where it is not known yet."""

    def rate(self, sequence: Sequence) -> float:
        """Chance that a draft is right, given that those before it are. Asked at every step."""

    def learns(self, sequence: Sequence) -> bool:
        """Whether trying a draft where none pays would tell something new."""

    def verified(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        """Take note of what became of drafts."""


class NgramDrafter:
    """Looks back in the text."""

    def propose(self, wanted: list[tuple[Sequence, int]], scheduler: Scheduler, usual: float | None) -> None:
        for sequence, depth in wanted:
            sequence.drafts = self._index(sequence).propose(sequence.tokens, depth)

    def seconds(self, num_sequences: int) -> float | None:
        return 0.0

    def rate(self, sequence: Sequence) -> float:
        return self._index(sequence).luck

    def learns(self, sequence: Sequence) -> bool:
        """Luck is known without drafting; where it is good, what stands against drafting is its cost."""
        return self._index(sequence).luck > _GOOD

    def verified(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        """Whether they were right is known without."""

    def _index(self, sequence: Sequence) -> NgramIndex:
        if sequence.ngrams is None:
            sequence.ngrams = NgramIndex()
        sequence.ngrams.extend(sequence.tokens)
        return sequence.ngrams


class _Stretch:
    """Steps launched ahead, one after the other: sums over them."""

    __slots__ = ("idle", "longest", "seconds", "steps", "tokens")

    def __init__(self) -> None:
        self.steps = self.tokens = 0
        self.seconds = self.idle = self.longest = 0.0


class Speculator:
    """Drafts for sequences that decode, as deep as measurement says it pays. Where it does not, one draft each now and
    then, to notice when that changes: no more often than every `probe_every` steps, nor than costs a hundredth of the
    time. To ask whether a draft would pay takes time as well, much where a step takes a fraction of a millisecond:
    while the answer is no, and the host has no time to spare, it is asked that seldom too.

    On a device that works by itself a step with drafts is waited for, and the next one launched when it is done. What
    that costs beside a step that was launched ahead is measured too (`waited`). So nothing is drafted before it is
    known what those take, nor now and then while that is measured anew."""

    def __init__(self, drafter: Drafter | None = None, max_depth: int = _MOST_DRAFTS, probe_every: int = 32) -> None:
        self.drafter = drafter or NgramDrafter()
        self.max_depth = max_depth
        self.probe_every = probe_every
        self.cost = StepCost()
        self.waited = StepCost()
        self.overlaps = False  # set by the engine: steps are launched ahead where nothing is drafted
        self._stretch = _Stretch()
        self._idle = 0.0
        self._next_stretch, self._until_stretch = 0, _FIRST_STRETCH
        self._drafting = 0.0  # seconds of the step under way that are the drafter's own
        self._num_steps = 0
        self._num_running = 0
        self._next_look = 0
        self._next_probe = probe_every
        self._num_probes = 0
        self._last_probe = math.inf

    def record(self, num_tokens: int, seconds: float, waited: bool, idle: float = 0.0) -> None:
        """Take the time of a step in which every token was sampled from. waited: it began when the one before was
        done, on a device where it need not. idle: seconds in which the host had nothing to do. Of steps launched ahead
        the mean of several counts: where the host is late for one, the next seems to take no time."""
        seconds, self._drafting = seconds - self._drafting, 0.0
        if waited:
            self._stretch = _Stretch()
            usual = self.cost.seconds(num_tokens)
            self.waited.record(num_tokens, seconds, _OUTLIER * usual if usual else math.inf)
        elif not self.overlaps:
            self.cost.record(num_tokens, seconds)
        else:
            stretch = self._stretch
            stretch.steps += 1
            stretch.tokens += num_tokens
            stretch.seconds += seconds
            stretch.idle += idle
            if seconds > stretch.longest:
                stretch.longest = seconds
            if stretch.steps == _STRETCH:
                self._stretch = _Stretch()
                self._take(stretch)

    def _take(self, stretch: _Stretch) -> None:
        if stretch.longest > stretch.seconds / 2:
            return  # something was compiled, or recorded
        self.cost.record(stretch.tokens / _STRETCH, stretch.seconds / _STRETCH, outlier=_CHANGE)
        self._idle = max(0.0, stretch.idle - _ASKING * stretch.seconds) / _STRETCH
        self._next_stretch = self._num_steps + self._until_stretch
        self._until_stretch = min(2 * self._until_stretch, _LATER_STRETCH)

    def draft(self, scheduler: Scheduler) -> None:
        """Set `drafts` on the sequences that have one token to run."""
        self._num_steps += 1
        self._drafting = 0.0
        running = scheduler.running
        if self._is_early(running, self._num_steps):
            return
        start, is_first = time.perf_counter(), _any_new(running)
        depths = self._depths(running)
        if not depths:
            return
        probed = self._probed(depths)
        wanted = []
        for sequence, depth in depths:
            sequence.drafts = []
            # The step itself gives one token.
            depth = min(max(depth, int(sequence in probed)), sequence.limit - len(sequence.tokens) - 1)
            if depth > 0:
                wanted.append((sequence, depth))
        if not wanted:
            self._rest(running, self._num_steps, start, is_first)
            return
        step = self.cost.seconds(len(depths))
        start = time.perf_counter()
        self.drafter.propose(wanted, scheduler, step)
        taken = time.perf_counter() - start
        if self.drafter.seconds(len(depths)) != 0:
            self._drafting = taken  # is reckoned by itself
        if probed:
            self._plan_probe(taken, len(depths), len(probed))

    def _plan_probe(self, taken: float, num_sequences: int, num_probed: int) -> None:
        """When to try again, after drafts that took so many seconds. What may have been compiled on the way does not
        count: in the first tries, or in one alone."""
        self._num_probes += 1
        taken, self._last_probe = min(taken, self._last_probe), taken
        waiting, each, drafting = self._costs(num_sequences)
        if not (drafting and self._num_probes <= _OUTLIER):
            step = self.cost.seconds(num_sequences)
            drafting = taken / step if step else 0
        lost = waiting + each * num_probed + drafting
        self._next_probe = self._num_steps + max(self.probe_every, int(_PROBE_SHARE * lost))

    def rests(self, running: list[Sequence]) -> bool:
        """Whether draft() would do nothing now, so that the next step need not wait for tokens. Counts as a step."""
        step = self._num_steps + 1
        if not self._is_early(running, step):
            start, is_first = time.perf_counter(), _any_new(running)
            depths = self._depths(running)
            if any(depth for _, depth in depths) or self._probed(depths, ahead=1):
                return False
            self._rest(running, step, start, is_first)
        self._num_steps = step
        self._drafting = 0.0
        return True

    def _is_early(self, running: list[Sequence], step: int) -> bool:
        """Whether it was asked lately if drafts would pay, of no fewer sequences."""
        return step < self._next_look and len(running) <= self._num_running

    def _rest(self, running: list[Sequence], step: int, start: float, is_first: bool) -> None:
        """Ask again when what it took since `start`, beyond what the host waits for the device anyhow, will be a
        hundredth of the time. is_first: prompts were indexed, which says nothing."""
        self._num_running = len(running)
        usual = self.cost.seconds(len(running))
        if usual and not is_first:
            lost = max(0.0, time.perf_counter() - start - self._idle) / usual
            self._next_look = step + 1 + min(_LONGEST_REST, int(_PROBE_SHARE * lost))

    def _probed(self, depths: list[tuple[Sequence, int]], ahead: int = 0) -> set[Sequence]:
        """Sequences that rest and should try a draft in this step, all at once: what drafting costs depends on how many
        do."""
        if self._num_steps + ahead < self._next_probe or not depths or self._measures(len(depths)):
            return set()
        return {sequence for sequence, depth in depths if depth == 0 and self.drafter.learns(sequence)}

    def _measures(self, num_sequences: int) -> bool:
        """Whether steps launched ahead are to be timed now."""
        return self.overlaps and (self._num_steps >= self._next_stretch or self.cost.seconds(num_sequences) is None)

    def _depths(self, running: list[Sequence]) -> list[tuple[Sequence, int]]:
        """How deep to draft for each sequence that decodes."""
        decoding = [s for s in running if s.num_computed + 1 == len(s.tokens)]
        if not decoding:
            return []
        if self._measures(len(decoding)):
            for sequence in decoding:
                if sequence.ngrams is None:
                    self.drafter.rate(sequence)  # beside a step with prompts there is time to index them
            return [(sequence, 0) for sequence in decoding]
        chances = [self.drafter.rate(sequence) for sequence in decoding]
        waiting, each, drafting = self._costs(len(decoding))
        return list(zip(decoding, best_depths(chances, each, self.max_depth, waiting, drafting), strict=True))

    def _costs(self, num_sequences: int) -> tuple[float, float, float]:
        """Time lost by waiting, of one token more, and of one draft for each sequence, relative to a step without."""
        drafting, step = self.drafter.seconds(num_sequences), self.cost.seconds(num_sequences)
        if drafting != 0.0:
            drafting = _GUESS if drafting is None or not step else drafting / step
        waited = self.waited.seconds(num_sequences)
        if waited is None or not step:
            return 0.0, self.cost.of_one_more(num_sequences), drafting
        return max(waited / step - 1, 0.0), max(self.waited.slope() or 0.0, 0.0) / step, drafting


# Time of a draft relative to a step, until both were measured.
_GUESS = 0.1
# Tokens per time, over none drafted, for which steps are not launched ahead.
_WORTH_WAITING = 1.1
# Steps launched ahead that are timed together; steps until the next of them, at first and later; what a change is.
_STRETCH = 8
_FIRST_STRETCH, _LATER_STRETCH = 32, 512
_CHANGE = 1.5
_ASKING = 0.5  # share of a step that the host may take to ask for a result that is there: no idleness
# Times that a probe's or a look's seconds pass before the next; steps without a look at most.
_PROBE_SHARE = 100
_LONGEST_REST = 64
_GOOD = 0.5  # luck of an n-gram index at which drafts may come to pay


def _any_new(running: list[Sequence]) -> bool:
    """Whether there are sequences of which nothing was indexed yet."""
    return any(sequence.ngrams is None for sequence in running)
