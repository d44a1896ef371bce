"""The compiled core's products with 2:4 int8 and bf16 weights: the bits of the dense product, on every instruction set
of this machine that multiplies them, and what numpy says. Whole models: test_cpu_formats.py."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from hasten.model.formats import Format, Weight, densify, dequantize, from_bf16, product, sparsify, to_bf16

_core = pytest.importorskip("hasten._core", reason="the compiled core is not built")

# Rows no multiple of 16 or of a panel's 64, columns no multiple of 8 or 64, a last group that is short.
SHAPES = [(7, 36), (33, 64), (37, 172), (100, 1024), (145, 288)]
ROWS = (1, 2, 3, 8, 13, 64)


@cache
def _pool() -> object:
    return _core.Pool(2)


def _isas(kind: str = "int8") -> list[str]:
    """Skips where there are none: models are then loaded whole."""
    isas = [isa for isa in _core.isas() if _core.takes(f"{kind}-2of4", isa)]
    return isas or pytest.skip("no instruction set of this CPU multiplies 2:4 weights as they are")


def test_others_refuse() -> None:
    for kind, weight in (("int8", _weight(0, (7, 36))), ("bf16", _bf16((7, 36)))):
        linear = _core.Linear(_pool(), [weight])
        for isa in _core.isas():
            if not _core.takes(f"{kind}-2of4", isa):
                with pytest.raises(ValueError, match="do not multiply weights of this format"):
                    linear.product(np.zeros((1, 36), np.float32), isa=isa)
    with pytest.raises(ValueError, match="format 'int4-2of4' is not supported"):
        _core.takes("int4-2of4")


def _weight(group: int, shape: tuple[int, int], seed: int = 0, perm: bool = False) -> Weight:
    """Any two of four are kept, some of them zeros; numbers over the whole range."""
    rng = np.random.default_rng(seed)
    n, k = shape
    values = rng.integers(-128, 128, (n, k)).astype(np.int8)
    dropped = rng.random((n, k // 4, 4)).argsort(axis=2) < 2
    values.reshape(n, -1, 4)[dropped] = 0
    values[rng.random((n, k)) < 0.05] = 0
    groups = -(-k // group) if group else 1
    scales = (rng.integers(128, 256, (n, groups)) / 2.0**14).astype(np.float32)
    order = rng.permutation(k).astype(np.int32) if perm else None
    # sparsify() wants whole groups, the kernels do not.
    kept = sparsify(Weight(Format("int8"), shape, values, scales[:, :1], None, order))
    return replace(kept, format=Format("int8", group, sparse24=True), scales=scales)


def _bf16(shape: tuple[int, int]) -> Weight:
    """As _weight, in bf16: every bit pattern but infinities and NaN, subnormal numbers too."""
    rng = np.random.default_rng(3)
    n, k = shape
    bits = rng.integers(0, 1 << 16, (n, k), np.uint16)
    bits[(bits & 0x7F80) >= 0x4380] &= 0x3FFF  # nothing so large that a sum could overflow
    bits.reshape(n, -1, 4)[rng.random((n, k // 4, 4)).argsort(axis=2) < 2] = 0
    return sparsify(Weight(Format("bf16"), shape, bits))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_bits_of_the_dense_product(shape: tuple[int, int]) -> None:
    weight = _bf16(shape)
    sparse, dense = _core.Linear(_pool(), [weight]), _core.Linear(_pool(), [densify(weight)])
    x = (np.random.default_rng(1).standard_normal((max(ROWS), shape[1])) * 3).astype(np.float32)
    exact = from_bf16(to_bf16(x)).astype(np.float64) @ dequantize(weight).T.astype(np.float64)
    for isa in _isas("bf16"):
        for rows in ROWS:
            found = sparse.product(x[:rows], isa=isa)
            assert np.array_equal(found.view(np.uint32), dense.product(x[:rows], isa=isa).view(np.uint32)), (isa, rows)
            assert np.abs(found - exact[:rows]).max() <= 1e-5 * np.abs(exact).max()
        for index in (0, shape[0] - 1):
            assert np.array_equal(sparse.row(index, scale=2.0, isa=isa), 2 * dequantize(weight)[index])


@pytest.mark.parametrize("fine", [False, True], ids=["a8", "a16"])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_the_dense_product(shape: tuple[int, int], group: int, fine: bool) -> None:
    weight = _weight(group, shape)
    sparse = _core.Linear(_pool(), [weight], fine_inputs=fine)
    dense = _core.Linear(_pool(), [densify(weight)], fine_inputs=fine)
    x = (np.random.default_rng(1).standard_normal((max(ROWS), shape[1])) * 3).astype(np.float32)
    expected = product(x, weight, 16 if fine else 8)
    for isa in _core.isas() if fine else _isas():
        for rows in ROWS:
            found = sparse.product(x[:rows], isa=isa)
            assert np.array_equal(found.view(np.uint32), dense.product(x[:rows], isa=isa).view(np.uint32)), (isa, rows)
            assert np.abs(found - expected[:rows]).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("perm", [False, True])
def test_stacked_bias_scale_residual_and_order(perm: bool) -> None:
    weights = [_weight(32, (n, 172), seed=0 if perm else n, perm=perm) for n in ((68,) if perm else (20, 45, 3))]
    rng = np.random.default_rng(2)
    bias, x = rng.standard_normal(68).astype(np.float32), rng.standard_normal((40, 172)).astype(np.float32)
    onto = rng.standard_normal((40, 68)).astype(np.float32)
    sparse = _core.Linear(_pool(), weights, bias)
    dense = _core.Linear(_pool(), [densify(weight) for weight in weights], bias)
    for isa in _isas():
        for rows in (1, 40):
            found, want = (linear.product(x[:rows], isa=isa, scale=2.5, onto=onto[:rows]) for linear in (sparse, dense))
            assert np.array_equal(found, want)


@pytest.mark.parametrize("group", [0, 32])
def test_row_of_a_table(group: int) -> None:
    weight = _weight(group, (37, 172))
    table, numbers = _core.Linear(_pool(), [weight]), dequantize(weight)
    for isa in _core.isas():
        for index in (0, 15, 16, 36):
            np.testing.assert_allclose(table.row(index, scale=2.0, isa=isa), 2.0 * numbers[index], rtol=1e-6)


def test_masks_that_the_kernels_cannot_read_are_refused() -> None:
    weight = _weight(0, (16, 172))
    assert weight.mask is not None
    for column in (3, 21):  # the last byte holds four columns
        bad = weight.mask.copy()
        bad[5, column] ^= 1
        with pytest.raises(ValueError, match="does not keep two of each four"):
            _core.Linear(_pool(), [replace(weight, mask=bad)])
    with pytest.raises(ValueError, match="mask does not fit its shape"):
        _core.Linear(_pool(), [replace(weight, mask=weight.mask[:, :-1].copy())])
    with pytest.raises(ValueError, match="only int8 and bf16 can be 2:4"):
        _core.Linear(_pool(), [replace(weight, format=Format("fp16", sparse24=True))])
