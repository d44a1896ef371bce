"""Formats in numpy: rounding, packing, sizes, and products with rounded activations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hasten.errors import ModelError, RecipeError
from hasten.model import formats
from hasten.model.formats import Format, Weight, dequantize, quantize

INTEGER = [
    Format(kind, group, symmetric)
    for kind in ("int8", "int4")
    for group in (0, 32, 64, 128)
    for symmetric in (True, False)
    if symmetric or kind == "int4"
]


def random(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, columns)) * np.exp(rng.standard_normal((rows, 1)))).astype(np.float32)


@given(hnp.arrays(np.uint32, st.integers(1, 200)))
@settings(max_examples=50, deadline=None)
def test_bf16_rounds_as_torch_does(bits: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    values = bits.view(np.float32)
    want = torch.from_numpy(values.copy()).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(formats.from_bf16(formats.to_bf16(values)), want)


def test_nibbles() -> None:
    values = np.random.default_rng(0).integers(0, 16, (5, 12)).astype(np.uint8)
    packed = formats.pack_nibbles(values)
    assert packed.shape == (5, 6)
    assert packed[2, 3] == values[2, 6] + 16 * values[2, 7]
    np.testing.assert_array_equal(formats.unpack_nibbles(packed), values)


@pytest.mark.parametrize("scale_dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("fmt", INTEGER, ids=str)
def test_error_is_at_most_half_a_step(fmt: Format, scale_dtype: formats.ScaleDtype) -> None:
    values = random(20, 256)
    weight = quantize(values, fmt, scale_dtype)
    group = fmt.group_size or 256
    assert weight.scales is not None
    assert weight.scales.shape == (20, 256 // group)
    np.testing.assert_array_equal(formats.round_to(weight.scales, scale_dtype), weight.scales)
    step = np.repeat(weight.scales, group, axis=1)
    slack = 1.05 if fmt.kind == "int4" and fmt.symmetric else 0.55  # symmetric int4 clips half a step on one side
    if not fmt.symmetric:
        slack = 1.05  # the rounded zero point shifts the range by up to half a step
    assert (np.abs(dequantize(weight) - values) <= slack * step).all()


@pytest.mark.parametrize("fmt", INTEGER, ids=str)
def test_what_is_representable_is_kept(fmt: Format) -> None:
    weight = quantize(random(8, 128), fmt, "fp32")
    again = quantize(dequantize(weight), fmt, "fp32")
    np.testing.assert_allclose(
        dequantize(again), dequantize(weight), rtol=0.1, atol=0.08 * np.abs(random(8, 128)).max()
    )


def test_search_never_makes_it_worse() -> None:
    values = random(64, 256)
    for fmt in INTEGER:
        plain, searched = (np.square(dequantize(quantize(values, fmt, search=s)) - values).sum() for s in (False, True))
        assert searched <= plain
    assert searched < plain


def test_zeros_and_constants() -> None:
    for fmt in INTEGER:
        values = np.zeros((2, 128), np.float32)
        np.testing.assert_array_equal(dequantize(quantize(values, fmt)), values)
        values[:] = 3.0
        np.testing.assert_allclose(dequantize(quantize(values, fmt, "fp32")), values, rtol=0.08)


def test_sizes() -> None:
    assert formats.bytes_of(Format("bf16"), (10, 128)) == 2560
    assert formats.bytes_of(Format("fp32"), (10, 128)) == 5120
    assert formats.bytes_of(Format("int8"), (10, 128)) == 1280 + 20
    assert formats.bytes_of(Format("int4", 32), (10, 128)) == 640 + 80
    assert formats.bytes_of(Format("int4", 32, symmetric=False), (10, 128)) == 640 + 120


@pytest.mark.parametrize(
    ("fmt", "columns", "message"),
    [
        (Format("int4", 32), 172, "32 does not divide 172"),
        (Format("int8", 128), 72, "128 does not divide 72"),
        (Format("int8", 48), 96, "group size 48 is not supported; supported: 32, 64, 128, or 0"),
        (Format("int4", -32), 64, "group size -32 is not supported"),
        (Format("int4"), 7, "an even number"),
        (Format("int8", 0, symmetric=False), 64, "always symmetric"),
    ],
)
def test_shapes_that_do_not_fit(fmt: Format, columns: int, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        quantize(np.ones((4, columns), np.float32), fmt)


def test_numbers_that_cannot_be_stored() -> None:
    values = random(4, 64)
    values[1, 5] = np.nan
    with pytest.raises(ModelError, match="NaN"):
        quantize(values, Format("int8"))
    with pytest.raises(ModelError, match="overflows fp16"):
        quantize(random(4, 64) * 1e8, Format("int8"), "fp16")


@pytest.mark.parametrize("fmt", INTEGER, ids=str)
def test_product_is_that_of_the_rounded_numbers(fmt: Format) -> None:
    x, weight = random(5, 384, 1), quantize(random(24, 384), fmt, "fp16")
    size = formats.activation_group(fmt)
    q, scales = formats.quantize_activations(x, size)
    rounded = q * np.repeat(scales, size, axis=1)[:, :384]
    assert np.abs(rounded - x).max() <= 0.51 * scales.max()
    want = rounded.astype(np.float64) @ dequantize(weight).astype(np.float64).T
    np.testing.assert_allclose(formats.product(x, weight), want, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(formats.product(x, weight, input_bits=None), x @ dequantize(weight).T, rtol=1e-6)
    exact = x @ dequantize(weight).T
    assert np.abs(formats.product(x, weight) - exact).max() < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("group", [0, 32])
def test_activations_of_16_bits(group: int) -> None:
    x, weight = random(5, 256, 1), quantize(random(24, 256), Format("int8", group))
    exact = x.astype(np.float64) @ dequantize(weight).astype(np.float64).T
    assert np.abs(formats.product(x, weight, 16) - exact).max() < 1e-4 * np.abs(exact).max()


def test_which_products_take_activations_of_16_bits() -> None:
    def bits(name: str, kind: formats.Kind = "int8", hidden_size: int = 256) -> int:
        return formats.activation_bits(Format(kind), name, hidden_size)

    assert {bits(name) for name in ("layers.0.o", "layers.3.down", "head", "embed")} == {16}
    assert {bits(name) for name in ("layers.0.q", "layers.0.k", "layers.0.v", "layers.0.gate", "layers.0.up")} == {8}
    assert bits("layers.0.q", hidden_size=128) == 16
    assert bits("head", "int4") == bits("head", hidden_size=288) == 8


def test_a_group_that_is_cut_short_and_a_row_of_zeros() -> None:
    weight = quantize(random(8, 200), Format("int8"), "fp32")  # activation groups of 128 and 72
    x = random(3, 200, 2)
    x[1] = 0
    y = formats.product(x, weight)
    assert not y[1].any()
    assert np.abs(y - x @ dequantize(weight).T).max() < 0.02 * np.abs(y).max()


def test_permuted_columns() -> None:
    plain = quantize(random(8, 64), Format("int4", 32), "fp32")
    perm = np.random.default_rng(5).permutation(64).astype(np.int32)
    moved = Weight(plain.format, plain.shape, plain.data, plain.scales, None, perm)
    np.testing.assert_array_equal(dequantize(moved)[:, perm], dequantize(plain))
    x = random(2, 64, 3)
    for bits in (8, 16, None):
        want = formats.product(x[:, perm], plain, bits)
        np.testing.assert_allclose(formats.product(x, moved, bits), want, rtol=1e-5, atol=1e-5)
