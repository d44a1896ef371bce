"""Eight-bit floats (e4m3: 4 bits of exponent, 3 of mantissa, largest 448, no infinity) as bits, in numpy."""

import numpy as np
from numpy.typing import NDArray

LARGEST = 448.0
NAN = 0x7F

_SMALLEST_NORMAL = np.float32(2**-6)
_REBIAS = (127 - 7) << 3


def to_fp8(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """float32 -> bits of the nearest, ties to even; beyond the largest, the largest. NaN stays NaN."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    size = np.abs(values)
    # Adding just under half of the last place that stays, and its own last bit, rounds to nearest even.
    normal = ((size.view(np.uint32) + np.uint32(0x7FFFF) + ((bits >> 20) & 1)) >> 20).astype(np.int32) - _REBIAS
    with np.errstate(invalid="ignore"):
        tiny = np.rint(np.minimum(size, _SMALLEST_NORMAL) * np.float32(512)).astype(np.int32)
    codes = np.minimum(np.where(size < _SMALLEST_NORMAL, tiny, normal), NAN - 1)
    codes = np.where(np.isnan(values), NAN, codes)
    return (codes.astype(np.uint32) | ((bits >> 24) & 0x80)).astype(np.uint8)


def from_fp8(bits: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Bits -> float32, exactly."""
    values: NDArray[np.float32] = _VALUES[bits]
    return values


def _values() -> NDArray[np.float32]:
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    positive = np.where(exponent == 0, mantissa / 512, normal)
    positive[NAN] = np.nan
    both: NDArray[np.float32] = np.concatenate((positive, -positive)).astype(np.float32)
    return both


_VALUES: NDArray[np.float32] = _values()
