"""Round to nearest: never worse than the slow reference, whatever the threads, and honest about damaged weights."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hasten.compress import rtn
from hasten.errors import ModelError
from hasten.model import formats
from hasten.model.formats import Format, Weight

FORMATS = [
    Format("int8"),
    Format("int8", 32),
    Format("int4"),
    Format("int4", 32),
    Format("int4", 128),
    Format("int4", 32, False),
    Format("int4", 64, False),
]


def matrix(seed: int = 0, shape: tuple[int, int] = (200, 384)) -> np.ndarray:
    """Heavier tails than a normal distribution, rows of different size, as trained weights have them."""
    random = np.random.default_rng(seed)
    rows = np.exp(random.standard_normal((shape[0], 1)))
    return (0.02 * rows * random.standard_t(5, shape)).astype(np.float32)


def error(weight: Weight, values: np.ndarray) -> float:
    return float(np.square(formats.dequantize(weight) - values).mean())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_error_is_below_the_reference_search(fmt: Format) -> None:
    values = matrix()
    found = rtn.quantize("w", formats.dense_weight(values), fmt)
    assert found.format == fmt
    assert error(found, values) <= 1.005 * error(formats.quantize(values, fmt, search=True), values)
    assert error(found, values) < error(formats.quantize(values, fmt), values)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_threads_and_chunks_change_nothing(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = formats.dense_weight(matrix(), "bf16")
    alone = rtn.quantize("w", weight, fmt)
    monkeypatch.setattr(rtn, "_CHUNK", 1000)
    with ThreadPoolExecutor(3) as pool:
        shared = rtn.quantize("w", weight, fmt, pool)
    for one, other in zip(
        (alone.data, alone.scales, alone.zeros), (shared.data, shared.scales, shared.zeros), strict=True
    ):
        assert (one is None and other is None) or np.array_equal(one, other)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_scales_survive_a_checkpoint(fmt: Format) -> None:
    found = rtn.quantize("w", formats.dense_weight(matrix()), fmt)
    assert np.array_equal(found.scales, formats.round_to(found.scales, "bf16"))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_source_is_left_alone(fmt: Format) -> None:
    values = matrix()
    values.setflags(write=False)
    rtn.quantize("w", formats.dense_weight(values), fmt)
    assert np.array_equal(values, matrix())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_zeros_constants_and_tiny_groups(fmt: Format) -> None:
    values = matrix(shape=(4, 128))
    values[0] = 0
    values[1] = 0.25
    values[2] = -1e-6
    found = formats.dequantize(rtn.quantize("w", formats.dense_weight(values), fmt))
    assert np.array_equal(found[0], values[0])
    np.testing.assert_allclose(found[1:3], values[1:3], rtol=0.01)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_damaged_weights_are_named(bad: float) -> None:
    values = matrix()
    values[7, 9] = bad
    with pytest.raises(ModelError, match=r"layers.3.down holds NaN or infinity"):
        rtn.quantize("layers.3.down", formats.dense_weight(values), Format("int4", 32))


def test_quantised_and_permuted_sources() -> None:
    """A matrix that is already quantised starts from the numbers it stands for, in the order of the inputs."""
    values = matrix(shape=(16, 64))
    order = np.random.default_rng(1).permutation(64).astype(np.int32)
    source = formats.quantize(values, Format("int4", 32))
    source = Weight(source.format, source.shape, source.data, source.scales, source.zeros, order)
    found = rtn.quantize("w", source, Format("int8", 32))
    assert found.perm is None
    stands_for = formats.dequantize(source)
    assert error(found, stands_for) < 1e-4 * np.square(stands_for).mean()


def test_dense_formats() -> None:
    values = matrix()
    found = rtn.quantize("w", formats.dense_weight(values), Format("bf16"))
    assert np.array_equal(found.data, formats.to_bf16(values))
