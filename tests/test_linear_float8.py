"""The compiled core's products with 8-bit floats (e4m3), on every instruction set of this machine that multiplies them:
all codes, subnormal ones too, and the bits of the bf16 product where a row has one scale."""

from functools import cache

import numpy as np
import pytest

from hasten.model.formats import Format, Weight, dense_weight, dequantize, from_bf16, to_bf16
from hasten.model.fp8 import NAN, from_fp8

_core = pytest.importorskip("hasten._core", reason="the compiled core is not built")

# Rows no multiple of 16 or of a panel's 64, columns no multiple of 4 or 64, a last group that is short.
SHAPES = [(7, 36), (33, 64), (37, 173), (145, 288)]
ROWS = (1, 2, 3, 8, 13, 40)


@cache
def _pool() -> object:
    return _core.Pool(2)


def _isas() -> list[str]:
    """Skips where there are none: models are then loaded in bf16."""
    isas = [isa for isa in _core.isas() if _core.takes("fp8", isa)]
    return isas or pytest.skip("no instruction set of this CPU multiplies 8-bit floats")


def _weight(group: int, shape: tuple[int, int]) -> Weight:
    """Every code but NaN's, and scales that 16 bits hold."""
    rng = np.random.default_rng(0)
    n, k = shape
    codes = (rng.permutation(n * k) % NAN).astype(np.uint8).reshape(shape) | rng.choice(np.uint8([0, 128]), shape)
    scales = (rng.integers(128, 256, (n, -(-k // group) if group else 1)) / 2.0**14).astype(np.float32)
    return Weight(Format("fp8", group), shape, codes, scales)


@pytest.mark.parametrize("group", [0, 32, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_and_rows(shape: tuple[int, int], group: int) -> None:
    weight = _weight(group, shape)
    assert weight.scales is not None
    numbers = dequantize(weight)
    x = np.random.default_rng(1).standard_normal((max(ROWS), shape[1])).astype(np.float32)
    exact = from_bf16(to_bf16(x)).astype(np.float64) @ numbers.T.astype(np.float64)
    linear = _core.Linear(_pool(), [weight])
    same = _core.Linear(_pool(), [dense_weight(from_fp8(weight.data), "bf16")])
    for isa in _isas():
        for rows in ROWS:
            found = linear.product(x[:rows], isa=isa)
            assert np.abs(found - exact[:rows]).max() <= 1e-5 * np.abs(exact).max(), (isa, rows)
            if not group:
                assert np.array_equal(found, same.product(x[:rows], isa=isa) * weight.scales[:, 0]), (isa, rows)
        for index in (0, shape[0] - 1):
            assert np.array_equal(linear.row(index, scale=2.0, isa=isa), 2 * numbers[index])


def test_nan_stays_in_its_row() -> None:
    weight = _weight(0, (33, 64))
    weight.data[5, 9] = NAN | 128
    x = np.ones((3, 64), np.float32)
    linear = _core.Linear(_pool(), [weight])
    for isa in _isas():
        assert [*np.isnan(linear.product(x, isa=isa)).any(axis=0).nonzero()[0]] == [5]


def test_others_refuse() -> None:
    linear = _core.Linear(_pool(), [_weight(0, (7, 36))])
    for isa in _core.isas():
        if not _core.takes("fp8", isa):
            with pytest.raises(ValueError, match="do not multiply weights of this format"):
                linear.product(np.zeros((1, 36), np.float32), isa=isa)
