"""Which candidate to use: pure decisions on measured numbers, with their reasons in words."""

from collections.abc import Sequence
from dataclasses import replace

from hasten.goals import Goal
from hasten.receipt import Candidate, Prediction, Quality

SIZES = ("1", "8")  # streams
STREAMS = {"latency": "1", "throughput": "8"}
# Speeds this near the best count as equal: there the smaller loss wins.
_NEAR = 0.97
# What a way of running (KV cache, speculation, threads) must bring before it is used.
WORTHWHILE = 1.03


def within(quality: Quality, max_loss: float) -> bool:
    """Whether the loss stays within the limit at its interval's upper end. No loss allowed means exactly none."""
    assert quality.loss is not None
    return quality.loss.high <= max_loss


def score(candidate: Candidate, goal: Goal) -> float:
    """How good for the goal against the original; more than 1 is better than it."""
    return candidate.ratio[STREAMS.get(goal, goal)].median


def worthwhile(candidate: Candidate, goal: Goal) -> bool:
    """Whether a way of running brings enough over the same weights without it, in every round, and costs nothing at
    another number of streams."""
    gain = candidate.ratio[f"gain {STREAMS.get(goal, goal)}"]
    others = [candidate.ratio[f"gain {size}"].median for size in SIZES] if goal in STREAMS else []
    return gain.median >= WORTHWHILE and gain.low >= 1 and all(other >= 1 for other in others)


def judge(candidate: Candidate, goal: Goal, max_loss: float) -> Candidate:
    """The candidate with its verdict and reason: "rejected" by quality; "slower" for the goal, or, where the goal is a
    speed, at any number of streams; else "accepted"."""
    quality = candidate.search
    assert quality is not None
    assert quality.loss is not None
    loss = f"loss {quality.loss.median:+.2%}, up to {quality.loss.high:+.2%}"
    if not within(quality, max_loss):
        return replace(candidate, verdict="rejected", reason=f"{loss}, more than the {max_loss:.2%} allowed")
    if score(candidate, goal) <= 1:
        return replace(candidate, verdict="slower", reason=f"{words(candidate, goal)}; {loss}")
    if goal in STREAMS and (slower := slower_at(candidate)):
        beside = "; ".join(f"only {candidate.ratio[size].median:.2f}x with {size}" for size in slower)
        return replace(candidate, verdict="slower", reason=f"{words(candidate, goal)}, but {beside}; {loss}")
    return replace(candidate, verdict="accepted", reason=f"{words(candidate, goal)}; {loss}")


def slower_at(candidate: Candidate) -> list[str]:
    """The numbers of streams at which the original was measured faster."""
    return [size for size in SIZES if candidate.ratio[size].median < 1]


def words(candidate: Candidate, goal: Goal) -> str:
    """The candidate's figure for the goal in words."""
    value = score(candidate, goal)
    if goal == "memory":
        return f"{1 / value:.2f}x the memory of the original"
    streams = STREAMS[goal]
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


def by_batch(chosen: Candidate | None, original: str) -> dict[str, str]:
    """What to run at each number of streams so that nothing is slower than the original. The goals "latency" and
    "throughput" choose nothing that is slower at any; for "memory" the original may be the faster one."""
    if chosen is None:
        return dict.fromkeys(SIZES, original)
    slower = slower_at(chosen)
    return {size: original if size in slower else chosen.name for size in SIZES}


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
    return prediction.decode[STREAMS[goal]] / original.decode[STREAMS[goal]]
