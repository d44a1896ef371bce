"""Tile sizes by kind of kernel and shape, as measured on an H200 and an H100; any choice gives right results. What
tuner.py has measured on a GPU itself is in Device.tiles and goes before these."""

from dataclasses import dataclass

from hasten.backends.cuda.kernels.linear import DENSE, FP8, INT4, INT8


@dataclass(frozen=True, slots=True)
class Tile:
    """rows and columns of weights that a program takes at a time, parts that K is cut into, warps, pipeline stages."""

    rows: int
    columns: int
    splits: int = 1
    warps: int = 4
    stages: int = 3


# Up to how many rows of x weights are unpacked by the kernel that multiplies them, by how they are stored; for more of
# them once, for cuBLAS. What tuner.py has measured goes before it.
FEW_ROWS = {DENSE.value: 64, FP8.value: 64, INT8.value: 256, INT4.value: 128}
SPARSE_ROWS = 64  # of 2:4
# Up to how many rows experts that none of them has taken are neither computed nor read; 0: all always are. At most 64.
EXPERT_ROWS = 64
# Kinds of 2:4 matrices that stay packed; others are loaded with their zeros.
SPARSE_KINDS = ("bf16", "fp16", "int8", "fp8")
INT8_ROWS = 33  # from so many on W8A8 matrices are multiplied by int8; fewer read inputs of 16 bits


def tile_key(kernel: str, kind: int, group: int, rows: int, n: int, k: int, gated: bool) -> str:
    """Which tile: the kernel, how weights are stored, padded rows of x, and the shape of the product."""
    return f"{kernel} {kind} {group} {rows} {n} {k}{' gated' if gated else ''}"


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
    # Small ones as measured in a whole step of Qwen3-0.6B: what is fastest alone may crowd out the kernel beside it.
    if gated:
        return (4, 1024, 4, 4) if k >= 2048 else (4, 512, 1, 3)
    if k < 2048:
        return 8, 1024, 2, 3
    if k < 4096:
        return (4, 2048, 8, 3) if k <= 2048 else (4, 2048, 4, 3)
    if k > 8192:
        return 8, 1024, 4, 3
    return (8, 512, 4, 3) if n > 4096 else (4, 2048, 4, 3)


def columns_tile(itemsize: int, n: int, size: int) -> Tile:
    """One row times the columns of some experts, `size` of each. itemsize: bytes of a weight."""
    columns = divisor(size, 256)
    rows = 4096 // (columns * itemsize)
    while rows > 4 and n // rows < 512:  # two for every processor
        rows //= 2
    return Tile(rows, columns, 1, 2, 6)


def divisor(size: int, columns: int) -> int:
    """The largest power of two up to `columns` that divides size, but no less than 64, beyond which there are masks."""
    return min(columns, max(64, size & -size))


def int4_tile(n: int, k: int, gated: bool) -> Tile:
    """One row of int4. splits: programs a processor, which share the rows."""
    if k > 8192:
        return Tile(2, k, 2, min(16, _power_of_two(k) // 2048), 1)
    warps = max(1, _power_of_two(k) // 1024)
    return Tile(4 if gated else 8, k, 3 if warps >= 4 else 6, min(4, warps), 1)


def skinny_tile(
    kind: int,
    itemsize: int,
    x_itemsize: int,
    m: int,
    n: int,
    k: int,
    group: int,
    gated: bool,
    processors: int,
    shared: int,
) -> Tile:
    """Few rows on the tensor cores; m is padded to a power of two. itemsize: bytes of what w is stored in. shared:
    bytes of shared memory that a program may have."""
    if kind == INT4.value:
        columns, parts = (32 if group == 32 else 64), 4
    elif itemsize == 4:
        columns, parts = 32, 1
    else:
        columns, parts = (128 if gated or m > 16 else 256), 1
        columns = min(columns, group) if group else columns
    rows, stages, warps = 64, 4, 4
    if kind == INT4.value and m > 32:  # a tile of x serves twice the weights
        rows, warps = 128, 8
    room, both = min(_SHARED, shared), 2 if gated else 1
    while stages > 1 and stages * columns * (rows * itemsize * both + parts * m * x_itemsize) > room:
        rows, stages = (rows // 2, stages) if stages == 2 and rows > 16 else (rows, stages - 1)
    steps = -(-k // (columns * parts))
    tiles = -(-n // rows) * (2 if gated else 1)
    target = processors
    if kind == INT4.value:  # unpacking wants more programs at work
        target *= 4 if steps > 16 else 3
    splits = 1
    while splits < 16 and 2 * splits * tiles <= target and steps // (2 * splits) >= 2:
        splits *= 2
    return Tile(rows, columns, splits, warps, stages)


def int8_tile(m: int, n: int, processors: int, shared: int) -> Tile:
    """int8 by int8: rows of x and columns of the result that a program makes; smaller until each processor has one."""
    rows, columns = (128, 256) if m > 64 else (64, 256)
    while columns > 64 and -(-m // rows) * -(-n // columns) < processors:
        columns //= 2
    stages = min(3 if columns > 128 else 4, max(1, min(_SHARED, shared) // (128 * (rows + columns))))
    return Tile(rows, columns, 1, 8 if columns > 128 else 4, stages)


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """Decode attention: keys of a tile; whether the first tile is fetched before the query is there; partial results
    that are merged at once."""

    keys: int
    early: bool
    at_once: int
    warps: int = 4
    stages: int = 2


# Decode attention without tensor cores: of up to so many sequences, which together have up to so many keys; a key
# counts as often as programs read it, each for one or two of a KV head's query heads.
FEW_SEQUENCES, FEW_KEYS = 8, 2048


def few_tile(dims: int) -> DecodeTile:
    """dims: of a key, padded."""
    return DecodeTile(32 if dims <= 128 else 16, True, 8, warps=2)


def share_quantum(sequences: int) -> int:
    """A program's share of a sequence's keys is a multiple of this, which kernels round up to their tile."""
    return 32 if sequences <= FEW_SEQUENCES else 64


_TILE = 64 << 10  # bytes of a tile's keys and values in shared memory; small GPUs have 99 KB of it


def decode_tile(sequences: int, dims: int, itemsize: int, group: int) -> DecodeTile:
    """dims: of a key, padded; itemsize: bytes of one of its numbers; group: query heads of a KV head, padded. Early
    keys pay where latency is all; they take the registers of a second program."""
    keys = min(64, _TILE // (2 * dims * itemsize))
    if sequences <= FEW_SEQUENCES:
        warps, stages, early = 4, 2, True
    elif dims > 128 or itemsize > 2 or group > 16:  # more would not fit the registers of fewer warps
        warps, stages, early = 4, 2, False
    elif sequences <= 64:
        warps, stages, early = 2, 3, False
    else:
        keys, warps, stages, early = min(keys, 32), 1, 4, False
    return DecodeTile(keys, early, max(1, min(8, 1024 * warps // (group * dims))), warps, stages)


def prefill_rows(query_bytes: int) -> int:
    """Rows of a tile, tokens times query heads; query_bytes: of one of them, padded."""
    return 64 if query_bytes <= 512 else 32


def prefill_tile(rows: int, dims: int, query_size: int, key_size: int, shared: int) -> tuple[int, int]:
    """Keys of a tile and pipeline stages. rows: of its queries; dims: of a head, padded; bytes of a number of queries
    and of keys; shared: bytes of shared memory that a program may have. Two programs a multiprocessor come first, then
    a third stage. Keys of another type are there once more as queries are."""
    widest = max(query_size, key_size)
    most = 64 if widest * dims <= (512 if widest == 2 else 256) else 32 if widest * dims <= 512 else 16
    for keys in (most, most // 2, most // 4):
        if keys < 16:
            break
        for programs, stages in ((2, 3), (2, 2), (1, 3), (1, 2)):
            again = 0 if key_size == query_size else query_size
            if programs * dims * (rows * query_size + 2 * keys * (stages * key_size + again)) <= shared:
                return keys, stages
    return 16, 1


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
