"""Medians with their spread, and intervals over blocks of text. Pure functions of numbers."""

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist, median

import numpy as np
from numpy.typing import NDArray

from hasten.receipt import Measurement

Float64 = NDArray[np.float64]

_RUNS = 8  # at least, where there are blocks enough for it: with fewer, an interval is mostly its own uncertainty
_RUN_BLOCKS = 3  # in a run at least, before there are _RUNS of them: what neighbours share has faded over three
_FEW_RUNS = 4  # so many where that leaves fewer: the interval is wide, as it should be


def spread(values: Sequence[float], unit: str, confidence: float = 0.95) -> Measurement:
    """Median of rounds with the ends of its interval, for which no distribution is assumed (order statistics; Conover,
    Practical Nonparametric Statistics, 1999, ch. 3): from nine rounds on, a disturbed one is not an end. Too few rounds
    for the confidence, fewer than six for 95 %: the lowest and the highest.
    """
    ordered = sorted(values)
    outside = 0  # rounds beyond either end
    while _binomial(len(ordered), outside) <= (1 - confidence) / 2:
        outside += 1
    outside = max(0, outside - 1)
    return Measurement(
        float(median(ordered)), float(ordered[outside]), float(ordered[-1 - outside]), len(ordered), unit
    )


def _binomial(count: int, most: int) -> float:
    """The chance that at most so many of `count` fall below the median."""
    return float(sum(math.comb(count, index) for index in range(most + 1)) / 2**count)


def ratio_of_rounds(values: Sequence[float], reference: Sequence[float], confidence: float = 0.95) -> Measurement:
    """Median of value / reference, each pair from the same round, so that what slows both cancels."""
    return spread([value / base for value, base in zip(values, reference, strict=True)], "times", confidence)


def ratio_interval(
    numerator: Float64, denominator: Float64, unit: str, confidence: float = 0.95, related: bool = True
) -> Measurement:
    """sum(numerator) / sum(denominator) over blocks [B] in the order of the text, with a t interval.

    The classical ratio estimator (Cochran, Sampling Techniques, 1977, ch. 6): its error is that of the sum of
    numerator - ratio * denominator, part by part. Neighbouring blocks of a text resemble each other, so the parts that
    are taken as independent are runs of blocks (batch means; Law & Kelton, Simulation Modeling and Analysis, ch. 9):
    few runs where there are few blocks. Not related: each block by itself, such as a question. One block: the ends are
    infinitely far.
    """
    count, total = len(numerator), float(denominator.sum())
    estimate = float(numerator.sum()) / total
    if count < 2:
        return Measurement(estimate, -math.inf, math.inf, count, unit)
    residual = numerator - estimate * denominator
    fewest = min(_RUNS, max(_FEW_RUNS, count // _RUN_BLOCKS))
    runs = min(count, max(fewest, round(math.sqrt(count)))) if related else count
    sums = np.array([part.sum() for part in np.array_split(residual, runs)])
    error = math.sqrt(runs / (runs - 1) * float(sums @ sums)) / total
    half = t_quantile(0.5 + confidence / 2, runs - 1) * error
    return Measurement(estimate, estimate - half, estimate + half, count, unit)


def share_interval(
    hits: Float64, totals: Float64, unit: str, confidence: float = 0.95, related: bool = True
) -> Measurement:
    """sum(hits) / sum(totals) over blocks, within [0, 1]. All hits, or none, show no spread: there the open
    end is where that would still happen by chance (the rule of three; Hanley & Lippman-Hand 1983)."""
    found = ratio_interval(hits, totals, unit, confidence, related)
    low, high = max(0.0, found.low), min(1.0, found.high)
    margin = -math.log((1 - confidence) / 2) / float(totals.sum())
    if found.median == 1:
        low = max(0.0, 1 - margin)
    if found.median == 0:
        high = min(1.0, margin)
    return Measurement(found.median, low, high, found.n, unit)


@lru_cache(maxsize=256)
def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution: bisection on its distribution function."""
    if freedom > 10_000:
        return NormalDist().inv_cdf(probability)
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while _t_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, freedom: int) -> float:
    """P(T <= t), t >= 0, by the finite series for whole degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    cosine = math.cos(angle)
    term, total = (1.0, 0.0) if freedom % 2 == 0 else (cosine, 0.0)
    first = 0 if freedom % 2 == 0 else 1
    for power in range(first, freedom - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    inside = math.sin(angle) * total
    return 0.5 + (inside / 2 if freedom % 2 == 0 else (angle + inside) / math.pi)
