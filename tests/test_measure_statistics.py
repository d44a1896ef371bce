"""Intervals hold what they promise on data whose truth is known."""

import math

import numpy as np
import pytest

from hasten.measure.statistics import ratio_interval, ratio_of_rounds, share_interval, spread, t_quantile


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    # Tables of Student's t (Abramowitz & Stegun, table 26.10).
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 5, 2.571),
        (0.975, 10, 2.228),
        (0.975, 30, 2.042),
        (0.95, 7, 1.895),
    ],
)
def test_t_quantile_matches_tables(probability: float, freedom: int, expected: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(expected, abs=6e-4)
    assert t_quantile(1 - probability, freedom) == pytest.approx(-expected, abs=6e-4)


def test_t_quantile_nears_the_normal() -> None:
    assert t_quantile(0.975, 9_999) == pytest.approx(t_quantile(0.975, 10_001), abs=1e-3)


LIMIT = 0.01


def losses(random: np.random.Generator, blocks: int, kind: str) -> np.ndarray:
    """Relative losses of blocks whose expectation is LIMIT: independent, alike from one to the next as those of a text
    are (correlation 0.25), or skewed as sums of rare large losses are (skewness 0.5)."""
    if kind == "skewed":
        return LIMIT * random.gamma(16, 1 / 16, blocks)
    noise = random.standard_normal(blocks)
    if kind == "alike":
        for index in range(1, blocks):
            noise[index] = 0.25 * noise[index - 1] + math.sqrt(1 - 0.25**2) * noise[index]
    return LIMIT + 0.02 * noise


@pytest.mark.parametrize(
    ("kind", "blocks"),
    [(kind, n) for kind in ("independent", "skewed", "alike") for n in (8, 24, 96)],
)
def test_what_loses_more_than_the_limit_is_seldom_let_through(kind: str, blocks: int) -> None:
    """With a true loss of exactly the limit, its interval ends below the limit in 2.5 % of trials, each block's loss
    being relative to a difficulty of its own; both ends together miss the truth in 5 %."""
    random, trials, below, above = np.random.default_rng(7), 2000, 0, 0
    for _ in range(trials):
        base = random.gamma(40, 1 / 40, blocks)
        found = ratio_interval(base * losses(random, blocks, kind), base, "share")
        below += found.high < LIMIT
        above += found.low > LIMIT
    # Eight neighbours that resemble each other are four runs of two, which resemble each other a little: 7.8 %.
    few = 0.01 if (kind, blocks) == ("alike", 8) else 0.0
    assert 0.005 < below / trials < 0.045 + few
    assert 0.02 < (below + above) / trials < 0.075 + few


def test_neighbours_that_resemble_each_other_widen_the_interval() -> None:
    base = np.ones(64)
    shuffled = np.random.default_rng(1).permutation(np.resize([0.0, 1.0], 64))
    runs = np.resize([0.0] * 8 + [1.0] * 8, 64)
    one, other = (ratio_interval(numbers, base, "share") for numbers in (shuffled, runs))
    assert one.median == other.median == 0.5
    assert other.high - other.low > 1.5 * (one.high - one.low)


def test_pairing_removes_what_both_share() -> None:
    random = np.random.default_rng(3)
    base = random.gamma(4, 1, 50)
    found = ratio_interval(base * 1.01 - base, base, "share")
    assert found.median == pytest.approx(0.01)
    assert found.high - found.low < 1e-12


def test_one_block_has_no_interval() -> None:
    found = ratio_interval(np.array([1.0]), np.array([2.0]), "share")
    assert (found.median, found.low, found.high) == (0.5, -math.inf, math.inf)


def test_share_interval_stays_within_and_is_open_where_nothing_varied() -> None:
    totals = np.full(10, 100.0)
    perfect = share_interval(totals, totals, "share")
    assert perfect.median == perfect.high == 1
    assert 0.995 < perfect.low < 1
    some = share_interval(totals - np.arange(10) % 2, totals, "share")
    assert 0 <= some.low < some.median < some.high <= 1


@pytest.mark.parametrize(("rounds", "confidence", "ends"), [(5, 0.95, (0, 4)), (8, 0.95, (0, 7)), (9, 0.95, (1, 7)),
    (12, 0.95, (2, 9)), (9, 0.98, (0, 8))])  # fmt: skip
def test_a_disturbed_round_is_no_end_of_nine(rounds: int, confidence: float, ends: tuple[int, int]) -> None:
    """Order statistics of the binomial with one half (Conover 1999, table A3)."""
    found = spread([float(number) for number in np.random.default_rng(1).permutation(rounds)], "x", confidence)
    assert (found.low, found.high) == ends
    paused = [0.001, *[2.0] * (rounds - 1)]
    assert (spread(paused, "times", confidence).low == 2) == (ends[0] > 0)


def test_the_interval_of_nine_rounds_holds_the_median() -> None:
    random, missed = np.random.default_rng(2), 0
    for _ in range(4000):
        found = spread(list(np.exp(random.standard_cauchy(9).clip(-20, 20))), "x")
        missed += not found.low <= 1 <= found.high
    assert 0.03 < missed / 4000 < 0.05  # 3.9 %


def test_rounds_are_compared_round_by_round() -> None:
    assert ratio_of_rounds([10, 40, 30], [5, 20, 10]).median == 2
    found = spread([3.0, 1.0, 2.0], "tokens/s")
    assert (found.median, found.low, found.high, found.n) == (2, 1, 3, 3)
