"""Rows in which two of each four successive numbers are kept: the mask, and the kept numbers side by side.

mask: uint8 [N, ceil(K / 8)], one bit a column, low bit first, exactly two of each four columns. Where fewer than two
are not zero, zeros are kept. Knows no formats.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def mask_of(nonzero: NDArray[np.bool_]) -> NDArray[np.uint8] | None:
    """The mask of a matrix [N, K], K a multiple of 4; None where four successive numbers hold more than two."""
    columns = nonzero.shape[1]
    bits = np.packbits(nonzero, axis=1, bitorder="little")
    kept = _KEPT[bits]
    if (kept == 0).any():
        return None
    if columns % 8:
        kept[:, -1] &= 0x0F
    return kept


def take(values: NDArray[Any], mask: NDArray[np.uint8]) -> NDArray[Any]:
    """The kept numbers [N, K / 2] of [N, K]."""
    rows, columns = values.shape
    return np.ascontiguousarray(values[columns_of(mask, columns)].reshape(rows, columns // 2))


def spread(kept: NDArray[Any], mask: NDArray[np.uint8]) -> NDArray[Any]:
    """[N, K] with the kept numbers [N, K / 2] in their places and zeros elsewhere."""
    rows, half = kept.shape
    values = np.zeros((rows, 2 * half), kept.dtype)
    values[columns_of(mask, 2 * half)] = kept.reshape(-1)
    return values


def columns_of(mask: NDArray[np.uint8], columns: int) -> NDArray[np.bool_]:
    """The mask as booleans [N, K]."""
    return np.unpackbits(mask, axis=1, bitorder="little", count=columns).astype(np.bool_)


def _table() -> NDArray[np.uint8]:
    """Which columns to keep, for each byte of columns that are not zero; 0 where four hold more than two."""

    def four(bits: int) -> int:
        while bits.bit_count() < 2:
            bits |= ~bits & (bits + 1)  # the lowest column that is free
        return bits if bits.bit_count() == 2 else 0

    pairs = [(four(byte & 15), four(byte >> 4)) for byte in range(256)]
    return np.array([low | (high << 4) if low and high else 0 for low, high in pairs], np.uint8)


_KEPT = _table()
