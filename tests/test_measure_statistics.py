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


@pytest.mark.parametrize("blocks", [6, 24, 96])
def test_ratio_interval_covers_the_true_ratio(blocks: int) -> None:
    """Paired blocks of unequal difficulty: 95 % intervals hold the true relative loss in 95 % of trials."""
    random, truth, trials, hits = np.random.default_rng(7), 0.01, 2000, 0
    for _ in range(trials):
        base = random.gamma(40, 1 / 40, blocks)
        change = base * (truth + 0.02 * random.standard_normal(blocks))
        found = ratio_interval(change, base, "share")
        hits += found.low <= truth <= found.high
    assert 0.93 < hits / trials < 0.97


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


def test_rounds_are_compared_round_by_round() -> None:
    assert ratio_of_rounds([10, 40, 30], [5, 20, 10]).median == 2
    found = spread([3.0, 1.0, 2.0], "tokens/s")
    assert (found.median, found.low, found.high, found.n) == (2, 1, 3, 3)
