"""The compiled core's products, on every instruction set of this machine, against numpy; each row against its batch."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hasten.model.formats import (
    Format,
    Weight,
    activation_group,
    centred,
    dense_weight,
    dequantize,
    pack_nibbles,
    quantize_activations,
)

_core = pytest.importorskip("hasten._core", reason="the compiled core is not built")

Array = NDArray[np.float32]
MAX_ROWS = 40
FORMATS = [
    Format("fp32"),
    Format("fp16"),
    Format("bf16"),
    Format("int8"),
    *(Format("int8", group) for group in (32, 64, 128)),
    *(Format("int4", group, symmetric) for group in (0, 32, 64, 128) for symmetric in (True, False)),
]
# With the bits of an activation.
CASES = [(format, 8) for format in FORMATS] + [(format, 16) for format in FORMATS if format.kind == "int8"]
# Rows no multiple of 16, columns no multiple of 64, a last group that is short, more than one panel of row blocks.
SHAPES = [(100, 172), (7, 130), (33, 64), (288, 288), (144, 1024)]


def _name(value: Format | tuple[int, int] | int) -> str:
    if isinstance(value, int):
        return f"a{value}"
    if isinstance(value, tuple):
        return f"{value[0]}x{value[1]}"
    return f"{value.kind}g{value.group_size}" + ("" if value.symmetric else "z")


@cache
def _pool() -> object:
    return _core.Pool(2)


def _weight(format: Format, shape: tuple[int, int], rng: np.random.Generator, perm: bool = False) -> Weight:
    """Random weights over the whole range of their kind, the scales of a row decades apart."""
    n, k = shape
    if format.kind in ("fp32", "fp16", "bf16"):
        return dense_weight((rng.standard_normal(shape) * 0.05).astype(np.float32), format.kind)
    groups = -(-k // format.group_size) if format.group_size else 1
    scales = (rng.integers(128, 256, (n, groups)) / 2.0 ** rng.integers(9, 20, (n, groups))).astype(np.float32)
    order = rng.permutation(k).astype(np.int32) if perm else None
    if format.kind == "int8":
        return Weight(format, shape, rng.integers(-128, 128, shape).astype(np.int8), scales, None, order)
    zeros = None if format.symmetric else rng.integers(0, 16, (n, groups)).astype(np.uint8)
    return Weight(format, shape, pack_nibbles(rng.integers(0, 16, shape).astype(np.uint8)), scales, zeros, order)


def _bf16(x: Array) -> NDArray[np.float64]:
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


def _reference(x: Array, weight: Weight, bits: int = 8) -> NDArray[np.float64]:
    """Integer sums exact, everything else in float64."""
    if weight.scales is None:
        inputs = _bf16(x) if weight.format.kind == "bf16" else x.astype(np.float64)
        return inputs @ dequantize(weight).astype(np.float64).T
    if weight.perm is not None:
        x = np.ascontiguousarray(x[:, weight.perm])
    k, group = weight.shape[1], activation_group(weight.format)
    values = centred(weight).astype(np.int64)
    quantized, scales = quantize_activations(x, group, bits)
    y = np.zeros((len(x), weight.shape[0]))
    for g, first in enumerate(range(0, k, group)):
        part = slice(first, min(first + group, k))
        sums = quantized[:, part].astype(np.int64) @ values[:, part].T
        weight_scales = weight.scales[:, first // (weight.format.group_size or k)]
        y += sums * scales[:, g : g + 1].astype(np.float64) * weight_scales.astype(np.float64)
    return y


def _inputs(k: int, rng: np.random.Generator) -> Array:
    x = (rng.standard_normal((MAX_ROWS, k)) * 3).astype(np.float32)
    x[3] = 0.0
    x[5, 1:] = 0.0
    return x


def _assert_close(y: Array, expected: NDArray[np.float64]) -> None:
    assert np.abs(y - expected).max() <= 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize(("format", "bits"), CASES, ids=_name)
@pytest.mark.parametrize("shape", SHAPES, ids=_name)
def test_product_against_numpy_and_batches(format: Format, bits: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape[1])
    weight = _weight(format, shape, rng)
    linear = _core.Linear(_pool(), [weight], fine_inputs=bits == 16)
    x = _inputs(shape[1], rng)
    expected = _reference(x, weight, bits)
    alone: dict[str, Array] = {}
    for isa in _core.isas():
        alone[isa] = np.concatenate([linear.product(x[i : i + 1], isa=isa) for i in range(MAX_ROWS)])
        _assert_close(alone[isa], expected)
        for rows in range(2, MAX_ROWS + 1):
            batch = linear.product(x[:rows], isa=isa)
            assert np.array_equal(batch.view(np.uint32), alone[isa][:rows].view(np.uint32)), f"{isa}, batch of {rows}"
    if weight.scales is not None:  # the same integers, and all but the portable path have fused multiply-adds
        fused = [y for isa, y in alone.items() if isa != "portable"]
        assert all(np.array_equal(y.view(np.uint32), fused[0].view(np.uint32)) for y in fused)


@pytest.mark.parametrize(("format", "bits"), CASES, ids=_name)
def test_stacked_parts_bias_scale_and_residual(format: Format, bits: int) -> None:
    rng = np.random.default_rng(0)
    parts = [_weight(format, (n, 172), rng) for n in (20, 45, 3)]
    x = _inputs(172, rng)[:9]
    bias = rng.standard_normal(68).astype(np.float32)
    onto = rng.standard_normal((9, 68)).astype(np.float32)
    linear = _core.Linear(_pool(), parts, bias, bits == 16)
    expected = onto + 2.5 * (np.concatenate([_reference(x, part, bits) for part in parts], axis=1) + bias)
    for isa in _core.isas():
        _assert_close(linear.product(x, isa=isa, scale=2.5, onto=onto), expected)


@pytest.mark.parametrize(("format", "bits"), [case for case in CASES if case[0].kind in ("int4", "int8")], ids=_name)
def test_permuted_columns(format: Format, bits: int) -> None:
    rng = np.random.default_rng(1)
    weight = _weight(format, (48, 172), rng, perm=True)
    x = _inputs(172, rng)[:13]
    linear = _core.Linear(_pool(), [weight], fine_inputs=bits == 16)
    for isa in _core.isas():
        _assert_close(linear.product(x, isa=isa), _reference(x, weight, bits))


@pytest.mark.parametrize("perm", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=_name)
def test_row_is_what_the_format_says(format: Format, perm: bool) -> None:
    rng = np.random.default_rng(2)
    weight = _weight(format, (37, 172), rng)
    numbers = dequantize(weight)
    if perm:  # stored column j is input order[j]
        order = rng.permutation(172).astype(np.int32)
        weight, stored = replace(weight, perm=order), numbers
        numbers = np.empty_like(stored)
        numbers[:, order] = stored
    linear = _core.Linear(_pool(), [weight])
    for isa in _core.isas():
        for index in (0, 15, 16, 36):
            np.testing.assert_allclose(linear.row(index, scale=2.0, isa=isa), 2.0 * numbers[index], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": Format("int8", 48)}, "group_size is not 0, 32, 64 or 128"),
        ({"format": Format("int8", -32)}, "group_size is not"),
        ({"format": Format("int8", 256)}, "group_size is not"),
        ({"perm": np.arange(1, 173, dtype=np.int32)}, "perm does not name every column once"),
        ({"perm": np.zeros(172, np.int32)}, "perm does not name every column once"),
        ({"perm": np.zeros(171, np.int32)}, "perm does not have an entry a column"),
    ],
)
def test_what_the_kernels_cannot_read_is_refused(changes: dict[str, Any], message: str) -> None:
    weight = _weight(Format("int8", 32), (16, 172), np.random.default_rng(5))
    with pytest.raises(ValueError, match=message):
        _core.Linear(_pool(), [replace(weight, **changes)])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(("format", "bits"), CASES, ids=_name)
def test_what_is_not_finite_stays_in_its_row(format: Format, bits: int, bad: float) -> None:
    rng = np.random.default_rng(3)
    linear = _core.Linear(_pool(), [_weight(format, (32, 172), rng)], fine_inputs=bits == 16)
    x = _inputs(172, rng)[:6]
    for isa in _core.isas():
        clean = linear.product(x, isa=isa)
        spoilt = x.copy()
        spoilt[2, 150] = bad
        y = linear.product(spoilt, isa=isa)
        assert not np.isfinite(y[2]).any()
        kept = [0, 1, 3, 4, 5]
        assert np.array_equal(y[kept], clean[kept])
