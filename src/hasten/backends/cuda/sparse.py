"""2:4 matrices on the device: packed as kernels/sparse.py reads them, and the launches of its kernels. linear.py knows
when."""

import torch
import triton

from hasten.backends.cuda.device import Device
from hasten.backends.cuda.kernels import sparse as kernels
from hasten.backends.cuda.matrix import Matrix, Norm
from hasten.backends.cuda.tuning import Tile, tile_key

_SHARED = 200 << 10  # bytes of shared memory that tiles in flight may take


def units(k: int) -> int:
    """Of a row of k columns: each is four groups of four columns, a quarter of the (padded) row apart."""
    found: int = max(16, triton.next_power_of_2(-(-k // 16)))
    return found


def packed_mask(mask: torch.Tensor, k: int) -> torch.Tensor:
    """uint8 [N, ceil(K / 8)], a bit a column, low bit first -> int16 [N, units], see kernels/sparse.py."""
    width = units(k)
    nibbles = torch.stack((mask & 15, mask >> 4), dim=2).view(len(mask), -1)[:, : k // 4]
    planes = torch.nn.functional.pad(nibbles, (0, 4 * width - k // 4)).view(len(mask), 4, width).to(torch.int32)
    return (planes[:, 0] | planes[:, 1] << 4 | planes[:, 2] << 8 | planes[:, 3] << 12).to(torch.int16)


def keyed_tile(matrix: Matrix, rows: int, n: int, gated: bool, one: bool, device: Device) -> tuple[str, Tile]:
    """As Linear.tile_of: splits are programs a processor where there is one row."""
    width, itemsize = units(matrix.k), matrix.data.itemsize
    key = tile_key("gemv24" if one else "skinny24", matrix.kind, 0, rows, n, matrix.k, gated)
    if one:
        # As many programs as have room: x, a block's weights and the next one's are in 90 to 150 registers of a thread.
        warps = min(8, max(1, width // 64))
        if width > 64 * warps:
            return key, Tile(1, width, 2, warps, 1)
        return key, Tile(2 if gated else 4, width, max(1, 12 // warps), warps, 1)
    columns, stages = min(64, width), 4
    while True:
        stage = columns * (64 * (2 if gated else 1) * (4 * 2 * itemsize + 2) + 4 * 8 * rows)
        if stages * stage <= min(_SHARED, device.shared) or (columns == 16 and stages == 2):
            break
        columns, stages = (columns // 2, 4) if stages == 2 else (columns, stages - 1)
    splits, tiles = 1, -(-n // 64)
    while splits < 8 and 2 * splits * tiles <= device.num_processors and width // columns >= 4 * splits:
        splits *= 2
    return key, Tile(64, columns, splits, 4, stages)


def gemv(
    device: Device,
    tile: Tile,
    x: torch.Tensor,
    matrix: Matrix,
    n: int,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    norm: Norm | None,
    residual: torch.Tensor | None,
    scale: float,
    activation: int,
    gated: bool,
) -> None:
    """One row."""
    words, width = matrix.data.view(pairs(matrix)), units(matrix.k)
    blocks = -(-n // tile.rows)
    device.launch(
        kernels.gemv24, (min(blocks, tile.splits * device.num_processors),),
        x.view(torch.int64), words, matrix.mask, x if matrix.scales is None else matrix.scales,
        norm.weight.view(torch.int64) if norm else x.view(torch.int64), x if bias is None else bias,
        x if residual is None else residual, out, n, matrix.k, norm.eps if norm else 0.0, scale, blocks,
        KIND=matrix.kind, FLOAT16=x.dtype == torch.float16, NORM=norm is not None, BIAS=bias is not None,
        RESIDUAL=residual is not None, GATED=gated, ACT=activation, BN=tile.rows, BU=width,
        EVEN=matrix.k == 16 * width, ASM=device.asm, num_warps=tile.warps,
    )  # fmt: skip


def skinny(
    device: Device,
    tile: Tile,
    width: int,
    splits: int,
    x: torch.Tensor,
    matrix: Matrix,
    n: int,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    residual: torch.Tensor | None,
    scale: float,
    activation: int,
    gated: bool,
) -> None:
    """Few rows, `width` of them a program."""
    words = x.view(torch.int64)
    nothing = device.counters
    device.launch(
        kernels.skinny24, (-(-n // tile.rows), splits, -(-len(x) // width)),
        words, matrix.data.view(pairs(matrix)), matrix.mask, nothing if matrix.scales is None else matrix.scales,
        nothing if bias is None else bias, nothing if residual is None else residual, out, device.workspace,
        device.counters, len(x), n, matrix.k, words.stride(0), out.stride(0), splits, scale, KIND=matrix.kind,
        FLOAT16=x.dtype == torch.float16, BIAS=bias is not None, RESIDUAL=residual is not None, GATED=gated,
        ACT=activation, BM=width, BN=tile.rows, BG=tile.columns, BU=units(matrix.k), SPLIT=splits > 1,
        STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip


def expanded(device: Device, matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
    """The matrix's numbers with its zeros, dense [N, K]."""
    out = torch.empty((matrix.n, matrix.k), dtype=dtype, device=device.handle)
    width = units(matrix.k)
    columns = min(128, width)
    device.launch(
        kernels.expand24, (-(-matrix.n // 16), width // columns),
        matrix.data.view(pairs(matrix)), matrix.mask, out if matrix.scales is None else matrix.scales,
        out.view(torch.int64), matrix.n, matrix.k, KIND=matrix.kind, FLOAT16=dtype == torch.float16, BN=16,
        BG=columns, BU=width,
    )  # fmt: skip
    return out


def pairs(matrix: Matrix) -> torch.dtype:
    """Two kept numbers as one integer."""
    return torch.int32 if matrix.data.itemsize == 2 else torch.int16
