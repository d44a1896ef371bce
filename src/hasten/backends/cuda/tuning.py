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
    rows, columns, warps, stages = _fp8_gemv(n, k, gated) if itemsize == 1 else _dense_gemv(n, k, gated)
    return Tile(rows, min(columns, _power_of_two(k)), 1, warps, stages)


def _fp8_gemv(n: int, k: int, gated: bool) -> tuple[int, int, int, int]:
    if gated:
        return 16, 256, 2, 4
    if k > 4096:
        return 8, 1024, 4, 3
    return (16, 512, 4, 3) if n > 4096 else (4, 1024, 2, 4)


def _dense_gemv(n: int, k: int, gated: bool) -> tuple[int, int, int, int]:
    if n > 32768:  # the head
        return (8, 1024, 4, 3) if k >= 2048 else (8, 512, 4, 3)
    if gated:
        return (4, 1024, 4, 4) if k >= 2048 else (4, 512, 1, 3)
    # Smaller programs are faster alone, but crowd out the kernel that is launched beside them.
    if k < 2048:
        return 8, 512, 4, 3
    if k < 4096:
        return 4, 1024, 2, 3
    if k > 8192:
        return 8, 1024, 4, 3
    return (8, 512, 4, 3) if n > 4096 else (4, 2048, 4, 3)


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
    rows, stages = 64, 4
    weights = columns * rows * itemsize * (2 if gated else 1)
    while stages > 2 and stages * (weights + columns * parts * m * x_itemsize) > _SHARED:
        stages -= 1
    steps = -(-k // (columns * parts))
    tiles = -(-n // rows) * (2 if gated else 1)
    target = processors
    if kind == INT4.value:  # unpacking wants more programs at work
        target *= 4 if steps > 16 else 3
    splits = 1
    while splits < 16 and 2 * splits * tiles <= target and steps // (2 * splits) >= 2:
        splits *= 2
    return Tile(rows, columns, splits, 4, stages)


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """Decode attention: keys of a tile; whether the first tile is fetched before the query is there; partial results
    that are merged at once."""

    keys: int
    early: bool
    at_once: int
    warps: int = 4
    stages: int = 2


def decode_tile(sequences: int) -> DecodeTile:
    """Early keys pay where latency is all; they take the registers of a second program."""
    return DecodeTile(64, True, 8) if sequences <= 8 else DecodeTile(64, False, 4, warps=2, stages=3)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
