"""Which candidate to use: pure decisions on measured numbers, with their reasons in words."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from hasten.receipt import Candidate, Quality

Goal = Literal["latency", "throughput", "memory"]

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
    """Whether a way of running brings enough over the same weights without it, and did so in every round."""
    gain = candidate.ratio[f"gain {STREAMS.get(goal, goal)}"]
    return gain.median >= WORTHWHILE and gain.low >= 1


def judge(candidate: Candidate, goal: Goal, max_loss: float) -> Candidate:
    """The candidate with its verdict and reason: "rejected" by quality, "slower" for the goal, else "accepted"."""
    quality = candidate.search
    assert quality is not None
    assert quality.loss is not None
    loss = f"loss {quality.loss.median:+.2%}, up to {quality.loss.high:+.2%}"
    if not within(quality, max_loss):
        return replace(candidate, verdict="rejected", reason=f"{loss}, more than the {max_loss:.2%} allowed")
    if score(candidate, goal) <= 1:
        return replace(candidate, verdict="slower", reason=f"{words(candidate, goal)}; {loss}")
    return replace(candidate, verdict="accepted", reason=f"{words(candidate, goal)}; {loss}")


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


def by_batch(chosen: Candidate | None, original: str, sizes: Sequence[str] = ("1", "8")) -> dict[str, str]:
    """What to run at each number of streams so that nothing is slower than the original."""
    if chosen is None:
        return dict.fromkeys(sizes, original)
    return {size: chosen.name if chosen.ratio[size].median >= 1 else original for size in sizes}
