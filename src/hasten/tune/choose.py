"""Which candidate to use: pure decisions on measured numbers, with their reasons in words."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from hasten.goals import Goal
from hasten.receipt import Candidate, Measurement, Prediction, Quality

SPEEDS = ("latency", "throughput")  # goals that are a speed
# Speeds this near the best count as equal: there the smaller loss wins.
_NEAR = 0.97
# What a way of running (KV cache, speculation, threads) must bring before it is used.
WORTHWHILE = 1.03
# Fewer rounds give no interval of 95 %: their lowest and highest are only a hint.
_ROUNDS = 6


def sizes(candidate: Candidate) -> list[str]:
    """Numbers of streams that were timed, smallest first."""
    return sorted((key for key in candidate.ratio if key.isdecimal()), key=int)


def figure(candidate: Candidate, goal: Goal, prefix: str = "") -> Measurement:
    """The ratio that a goal is about. prefix "gain ": to the same weights run plainly."""
    return candidate.ratio[prefix + _key(candidate.ratio, goal)]


def _key(known: Iterable[str], goal: Goal) -> str:
    """Of what is timed by number of streams, that which a goal is about: one stream, or the most."""
    streams = sorted((key for key in known if key.isdecimal()), key=int)
    return {"latency": streams[0], "throughput": streams[-1]}.get(goal, goal)


def within(quality: Quality, max_loss: float) -> bool:
    """Whether the loss stays within the limit at its interval's upper end. No loss allowed means exactly none."""
    assert quality.loss is not None
    return quality.loss.high <= max_loss


def score(candidate: Candidate, goal: Goal) -> float:
    """How good for the goal against the original; more than 1 is better than it."""
    return figure(candidate, goal).median


def worthwhile(candidate: Candidate, goal: Goal) -> bool:
    """Whether a way of running brings enough over the same weights without it, by its interval, and costs nothing at
    what else is timed."""
    gain = figure(candidate, goal, "gain ")
    return gain.median >= WORTHWHILE and gain.low >= 1 and (goal == "memory" or not slower_at(candidate, "gain "))


def judge(candidate: Candidate, goal: Goal, max_loss: float) -> Candidate:
    """The candidate with its verdict and reason: "rejected" by quality; "slower" for the goal, or, where the goal is a
    speed, at anything that is timed; else "accepted"."""
    quality = candidate.search
    assert quality is not None
    assert quality.loss is not None
    loss = f"loss {quality.loss.median:+.2%}, up to {quality.loss.high:+.2%}"
    if not within(quality, max_loss):
        return replace(candidate, verdict="rejected", reason=f"{loss}, more than the {max_loss:.2%} allowed")
    if score(candidate, goal) <= 1:
        return replace(candidate, verdict="slower", reason=f"{words(candidate, goal)}; {loss}")
    if goal in SPEEDS and (slower := slower_at(candidate)):
        reason = f"{words(candidate, goal)}, but {in_words(candidate, slower)}; {loss}"
        return replace(candidate, verdict="slower", reason=reason)
    return replace(candidate, verdict="accepted", reason=f"{words(candidate, goal)}; {loss}")


def confirm(candidate: Candidate, goal: Goal) -> Candidate:
    """The verdict on a candidate whose loss is allowed, from rounds that had no part in its being picked: "chosen", or
    "slower" where its interval for the goal reaches the original's speed, or it is slower at anything that is timed."""
    found = figure(candidate, goal)
    if found.low <= 1:
        reason = f"{words(candidate, goal)} when timed again ({found.low:.2f} .. {found.high:.2f}): not surely faster"
        return replace(candidate, verdict="slower", reason=reason)
    if goal in SPEEDS and (slower := slower_at(candidate)):
        reason = f"{words(candidate, goal)} when timed again, but {in_words(candidate, slower)}"
        return replace(candidate, verdict="slower", reason=reason)
    return replace(candidate, verdict="chosen")


def proven(candidate: Candidate, goal: Goal, max_loss: float) -> str:
    """Why the chosen one was chosen, by the figures of its proof."""
    final, ratio = candidate.final, figure(candidate, goal)
    assert final is not None
    assert final.loss is not None
    again = "" if goal == "memory" else f" ({ratio.low:.2f} .. {ratio.high:.2f} in {ratio.n} rounds after the search)"
    return (
        f"{words(candidate, goal)}{again}; loss {final.loss.median:+.2%} (up to {final.loss.high:+.2%} at "
        f"{final.confidence:.1%} confidence, {max_loss:.2%} allowed) on text kept for the proof"
    )


def slower_at(candidate: Candidate, prefix: str = "") -> list[str]:
    """Where the original was measured faster: numbers of streams, and "prefill". Beyond noise, or by more than noise is
    allowed to hide. prefix "gain ": what the same weights do plainly, instead of the original."""
    return [key for key in (*sizes(candidate), "prefill") if _slower(candidate.ratio[prefix + key])]


def _slower(ratio: Measurement) -> bool:
    return ratio.median < _NEAR or (ratio.n >= _ROUNDS and ratio.high < 1)


def in_words(candidate: Candidate, slower: Sequence[str]) -> str:
    """Where a candidate is slower, and by how much."""
    named = {"1": "with 1 stream", "prefill": "at reading a prompt"}
    return "; ".join(
        f"only {candidate.ratio[key].median:.2f}x {named.get(key, f'with {key} streams')}" for key in slower
    )


def confidence(tries: int) -> float:
    """Of the interval that the k-th candidate tried is judged by. A bad one passes its one end in 0.05 / (k (k + 1)) of
    trials: in 1 of 40 the first, and in less than 0.05 any of them, however many are tried."""
    return 1 - 0.1 / (tries * (tries + 1))


def words(candidate: Candidate, goal: Goal) -> str:
    """The candidate's figure for the goal in words."""
    value = score(candidate, goal)
    if goal == "memory":
        return f"{1 / value:.2f}x the memory of the original"
    streams = _key(candidate.ratio, goal)
    return f"{value:.2f}x the original's decode with {streams} stream{'s' * (streams != '1')}"


def rank(candidates: Sequence[Candidate], goal: Goal) -> list[Candidate]:
    """Accepted candidates, best first: by the goal, and of those about as good as the best the one that loses least."""
    left = sorted((c for c in candidates if c.verdict == "accepted"), key=lambda c: -score(c, goal))
    ranked: list[Candidate] = []
    while left:
        near = [c for c in left if score(c, goal) >= _NEAR * score(left[0], goal)]
        best = min(near, key=lambda c: c.search.loss.high if c.search and c.search.loss else 0.0)
        ranked.append(best)
        left.remove(best)
    return ranked


def by_batch(chosen: Candidate | None, original: Candidate) -> dict[str, str]:
    """What to run at each number of streams so that nothing is slower than the original. The goals "latency" and
    "throughput" choose nothing that is slower at any; for "memory" the original may be the faster one."""
    slower = sizes(original) if chosen is None else slower_at(chosen)
    return {size: original.name if chosen is None or size in slower else chosen.name for size in sizes(original)}


def expected(prediction: Prediction, original: Prediction, tried: Sequence[Candidate], goal: Goal) -> float:
    """What score to expect of a candidate that was not measured: its predicted one, corrected by what the candidate
    nearest in bytes reached of its own. Memory needs no measurement."""
    found = _predicted(prediction, original, goal)
    measured = [c for c in tried if c.predicted is not None and c.ratio]
    if goal == "memory" or not measured:
        return found
    near = min(measured, key=lambda c: abs(c.weight_bytes - prediction.weight_bytes))
    assert near.predicted is not None
    return found * score(near, goal) / _predicted(near.predicted, original, goal)


def _predicted(prediction: Prediction, original: Prediction, goal: Goal) -> float:
    if goal == "memory":
        return original.weight_bytes / prediction.weight_bytes
    key = _key(original.decode, goal)
    return prediction.decode[key] / original.decode[key]
