"""Tile sizes by kind of kernel and shape. Measured on an H200; any choice gives right results."""

from dataclasses import dataclass

from hasten.backends.cuda.kernels.linear import INT4


@dataclass(frozen=True, slots=True)
class Tile:
    """rows and columns of weights that a program takes at a time, parts that K is cut into, warps, pipeline stages."""

    rows: int
    columns: int
    splits: int = 1
    warps: int = 4
    stages: int = 3


_SHARED = 164 << 10  # bytes of shared memory that tiles in flight may take, of the 228 KB of a multiprocessor


def gemv_tile(itemsize: int, n: int, k: int, gated: bool) -> Tile:
    """One row. itemsize: bytes of a weight."""
    if itemsize == 1:
        if gated:
            return Tile(8, min(512, _power_of_two(k)), 1, 2, 4)
        if k <= 4096 and n > 4096:
            return Tile(16, min(512, _power_of_two(k)), 1, 4, 3)
        return Tile(8 if k > 4096 else 4, min(1024, _power_of_two(k)), 1, 4 if k > 4096 else 2, 3)
    if k < 2048:
        return Tile(4 if gated else 8, min(512, _power_of_two(k)), 1, 1 if gated else 4, 3)
    rows = 8 if n * (2 if gated else 1) > 6144 or k > 8192 else 4
    if gated:
        return Tile(4, 1024 if k >= 4096 else 512, 1, 4 if k >= 4096 else 1, 4)
    return Tile(rows, 1024, 1, 4 if rows == 8 else 2, 3)


def skinny_tile(
    kind: int, itemsize: int, x_itemsize: int, m: int, n: int, k: int, group: int, gated: bool, processors: int
) -> Tile:
    """Few rows on the tensor cores; m is padded to a power of two. itemsize: bytes of what w is stored in."""
    if kind == INT4.value:
        columns, parts = (32 if group == 32 else 64), 4
    elif itemsize == 4:
        columns, parts = 32, 1
    else:
        columns, parts = (128 if gated or m > 16 else 256), 1
        columns = min(columns, group) if group else columns
    wide = kind == INT4.value and gated and m <= 16
    rows, warps, stages = (128, 8, 4) if wide else (64, 4, 4)
    weights = columns * rows * itemsize * (2 if gated else 1)
    while stages > 2 and stages * (weights + columns * parts * m * x_itemsize) > _SHARED:
        stages -= 1
    steps = -(-k // (columns * parts))
    tiles = -(-n // 64) * (2 if gated else 1)
    target = processors if kind != INT4.value else 4 * processors
    splits = 1
    while splits < 16 and 2 * splits * tiles <= target and steps // (2 * splits) >= 2:
        splits *= 2
    return Tile(rows, columns, splits, warps, stages)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
