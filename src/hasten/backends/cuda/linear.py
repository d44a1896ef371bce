"""A layer's matrices on the device and their products with T rows, by the kernel that suits T.

One row of dense, fp8 or int8 weights: `gemv`; of int4: `gemv_int4`. Few rows: `skinny`. 2:4: sparse.py. Many: cuBLAS,
on numbers expanded first where the format is packed, or fp8 products where the device has them. `Linear` is what one
input is multiplied with at once: q, k and v, or gate and up.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
import triton

from hasten.backends.cuda import sparse
from hasten.backends.cuda.device import Device
from hasten.backends.cuda.kernels import linear as kernels
from hasten.backends.cuda.kernels.experts import gemv_columns
from hasten.backends.cuda.kernels.int4 import gemv_int4
from hasten.backends.cuda.kernels.int8 import product8
from hasten.backends.cuda.matrix import COLUMNS, DENSE, FP8, INT4, INT8, ROWS, Matrix, Norm, Running
from hasten.backends.cuda.ops import FP8_DTYPE, Ops
from hasten.backends.cuda.tuning import (
    EXPERT_ROWS,
    FEW_ROWS,
    INT8_ROWS,
    SPARSE_ROWS,
    Tile,
    columns_tile,
    divisor,
    gemv_tile,
    int4_tile,
    int8_tile,
    skinny_tile,
    tile_key,
)

MAX_SKINNY = 64  # rows of x in a program
ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}


class Linear:
    """Matrices [N_i, K] whose outputs lie side by side. gated: the first half of the rows gates the second. up_x: where
    that is not 0, the second half multiplies other K columns of x, which begin there; or, where `segment` is not 0,
    each run of so many rows does, up_x columns after those of the run before. running: experts, of which some run where
    rows are few; with many rows all do."""

    def __init__(
        self,
        device: Device,
        ops: Ops,
        matrices: list[Matrix],
        bias: torch.Tensor | None,
        gated: bool,
        fixed: bool,
        *,
        up_x: int = 0,
        segment: int = 0,
        running: Running | None = None,
    ) -> None:
        self.device = device
        self.ops = ops
        self.matrices = matrices
        self.bias = bias
        self.gated = gated
        self.fixed = fixed
        self.up_x = up_x
        self.segment = segment
        self.running = running
        self.n = sum(matrix.n for matrix in matrices)
        self.k = matrices[0].k
        self.few_rows: Mapping[str, int] = {}  # by Matrix.stored; goes before FEW_ROWS, see Decoder.limit_rows
        self._by_row: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self.is_whole = len(matrices) == 1 and matrices[0].perm is None

    def fuses_norm(self, rows: int, dtype: torch.dtype, weight: torch.Tensor) -> bool:
        """Whether `rows` rows of this dtype may be given unnormed, with this norm's weight."""
        if not self.is_whole or not self._one_row(self.matrices[0], rows, dtype):
            return False
        matrix = self.matrices[0]
        if matrix.mask is not None and dtype != torch.bfloat16:
            return False  # it would be rounded to bfloat16
        return (matrix.kind != INT4 and matrix.mask is None) or weight.dtype == torch.bfloat16

    @property
    def num_weights(self) -> int:
        """Numbers in its matrices."""
        return self.n * self.k

    def _one_row(self, matrix: Matrix, rows: int, dtype: torch.dtype) -> bool:
        """Whether a kernel for one row runs."""
        if rows != 1 or self.fixed:
            return False
        if matrix.mask is not None:
            return True
        if matrix.kind in (FP8, INT8) and (matrix.group or matrix.zeros is not None):
            return False
        if matrix.kind == INT4:
            return dtype == torch.bfloat16 and not self.up_x and self.experts(1) is None
        return True

    def experts(self, rows: int) -> Running | None:
        """Which experts run, where a product of so many rows leaves out others."""
        return self.running if rows <= EXPERT_ROWS else None

    def _reads_parts(self, rows: int) -> bool:
        """Whether columns of x that nobody reads may hold anything."""
        running = self.experts(rows)
        return running is not None and running.side == COLUMNS

    def fuses_residual(self, rows: int) -> bool:
        """Whether a residual is added without a pass of its own."""
        return all(self._few(matrix, rows) for matrix in self.matrices)

    def takes_eight(self, rows: int) -> torch.dtype | None:
        """Which 8 bits rows may be given in, with scales: what a preceding kernel can make in passing."""
        matrix = self.matrices[0]
        if not self.is_whole:
            return None
        if matrix.kind == FP8 and (rows > 1 or self.fixed) and self._has_fp8_product(matrix):
            return FP8_DTYPE
        return torch.int8 if self._has_int8_product(matrix, rows) else None

    def _has_int8_product(self, matrix: Matrix, rows: int) -> bool:
        plain = matrix.kind == INT8 and matrix.group == 0 and matrix.zeros is None and matrix.mask is None
        return matrix.int8_inputs and plain and not self.fixed and rows >= INT8_ROWS and self.experts(rows) is None

    def __call__(
        self,
        x: torch.Tensor,
        *,
        x_scales: torch.Tensor | None = None,
        norm: Norm | None = None,
        residual: torch.Tensor | None = None,
        scale: float = 1.0,
        activation: str = "none",
        dtype: torch.dtype | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """scale * (x [T, K] W.T + bias) -> [T, N]; activated, and gated [T, N / 2]. residual (only where
        fuses_residual) is added. x has 8 bits and x_scales float32 [T] only where takes_eight. The result has `dtype`,
        or that of x; it is `out` where that is given, which may be columns of something wider, as may x."""
        dtype = dtype or (torch.bfloat16 if x_scales is not None else x.dtype)
        rows = len(x)
        matrix = self.matrices[0]
        if self.is_whole and self._few(matrix, rows):
            n = self.n // 2 if self.gated else self.n
            out = torch.empty((rows, n), dtype=dtype, device=x.device) if out is None else out
            self._run_few(x, x_scales, matrix, 0, out, norm, residual, scale, ACTIVATIONS[activation], self.gated)
            return out
        found = self._unfused(x, x_scales, residual, scale, activation, dtype)
        return found if out is None else out.copy_(found)

    def _unfused(
        self,
        x: torch.Tensor,
        x_scales: torch.Tensor | None,
        residual: torch.Tensor | None,
        scale: float,
        activation: str,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """What takes more than one kernel."""
        matrix = self.matrices[0]
        if len(self.matrices) == 1 and not self._few(matrix, len(x)):
            out = self._run_many(x, x_scales, matrix, dtype)
            self._add_bias(out, 0, scale)
        else:
            out = self._side_by_side(x, x_scales, residual, scale, dtype)
        if activation != "none":
            return self.ops.activate(out, ACTIVATIONS[activation], self.gated)
        return out

    def _side_by_side(
        self,
        x: torch.Tensor,
        x_scales: torch.Tensor | None,
        residual: torch.Tensor | None,
        scale: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Matrix by matrix, each into its columns."""
        rows, first = len(x), 0
        out = torch.empty((rows, self.n), dtype=dtype, device=x.device)
        for matrix in self.matrices:
            part = out[:, first : first + matrix.n]
            if self._few(matrix, rows):
                its_residual = None if residual is None else residual[:, first : first + matrix.n]
                self._run_few(x, None, matrix, first, part, None, its_residual, scale, 0, False)
            else:
                part.copy_(self._run_many(x, x_scales, matrix, dtype))
                self._add_bias(part, first, scale)
            first += matrix.n
        return out

    def _few(self, matrix: Matrix, rows: int) -> bool:
        """Whether a kernel of ours unpacks, multiplies and adds a residual at once."""
        if self.fixed or self.experts(rows) is not None:
            return True
        usual = FEW_ROWS[matrix.kind] if matrix.mask is None else SPARSE_ROWS
        return rows <= self.few_rows.get(matrix.stored, usual) and not self._has_int8_product(matrix, rows)

    def _add_bias(self, out: torch.Tensor, first: int, scale: float) -> None:
        if self.bias is not None:
            out += self.bias[first : first + out.shape[1]].to(out.dtype)
        if scale != 1:
            out *= scale

    def _run_few(
        self,
        x: torch.Tensor,
        x_scales: torch.Tensor | None,
        matrix: Matrix,
        first: int,
        out: torch.Tensor,
        norm: Norm | None,
        residual: torch.Tensor | None,
        scale: float,
        activation: int,
        gated: bool,
    ) -> None:
        bias = None if self.bias is None else self.bias[first:]
        n = matrix.n // 2 if gated else matrix.n
        if matrix.perm is not None:
            x = x[:, matrix.perm].contiguous()
        if matrix.mask is not None:
            self._sparse(x, matrix, n, bias, out, norm, residual, scale, activation, gated)
            return
        if self._one_row(matrix, len(x), x.dtype):
            run = self._gemv_int4 if matrix.kind == INT4 else self._gemv
            run(x, matrix, n, bias, out, norm, residual, scale, activation, gated)
            return
        assert norm is None, "only kernels for one row norm their input"
        if matrix.kind == FP8 and x_scales is None and self._has_fp8_product(matrix) and not self._reads_parts(len(x)):
            x, x_scales = self.ops.quantize_rows(x.contiguous(), FP8_DTYPE)
        self._skinny(x, x_scales, matrix, n, bias, out, residual, scale, activation, gated)

    def _sparse(
        self,
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
        """Few rows, 2:4."""
        one = self._one_row(matrix, len(x), x.dtype)
        width = 1 if one else self._width(len(x))
        tile = self._tile(matrix, width, n, x.itemsize, gated, one)
        if one:
            sparse.gemv(self.device, tile, x, matrix, n, bias, out, norm, residual, scale, activation, gated)
            return
        assert norm is None, "only kernels for one row norm their input"
        splits = self._splits(tile, len(x), width, n, gated)
        sparse.skinny(self.device, tile, width, splits, x, matrix, n, bias, out, residual, scale, activation, gated)

    def has_tile(self, rows: int) -> bool:
        """Whether tiles of `rows` bfloat16 rows may be tuned."""
        return self._few(self.matrices[0], rows)

    def tile_of(self, rows: int) -> tuple[str, Tile]:
        """By which key the tile for `rows` bfloat16 rows is found, and which it is where none was measured."""
        matrix = self.matrices[0]
        n = matrix.n // 2 if self.gated else matrix.n
        one = self._one_row(matrix, rows, torch.bfloat16)
        itemsize = 1 if matrix.kind == FP8 and self._has_fp8_product(matrix) else 2
        return self._keyed_tile(matrix, 1 if one else self._width(rows), n, itemsize, self.gated, one)

    def _tile(self, matrix: Matrix, rows: int, n: int, x_itemsize: int, gated: bool, one: bool) -> Tile:
        key, default = self._keyed_tile(matrix, rows, n, x_itemsize, gated, one)
        return self.device.tiles.get(key, default)

    def _keyed_tile(
        self, matrix: Matrix, rows: int, n: int, x_itemsize: int, gated: bool, one: bool
    ) -> tuple[str, Tile]:
        if matrix.mask is not None:
            return sparse.keyed_tile(matrix, rows, n, gated, one, self.device)
        kind, group, _, k, _ = matrix.layout
        kernel = "gemv" if one else "skinny"
        running = self.experts(rows)
        if running is not None:
            n, k = running.shape(n, k, rows)
            kernel += f"-experts{running.size}"
        key = tile_key(kernel, kind, group, rows, n, k, gated)
        columns = running.size if running is not None and running.side == COLUMNS else 0  # of an expert
        if one and columns:
            return key, columns_tile(matrix.data.itemsize, n, columns)
        if one and kind == INT4:
            return key, int4_tile(n, k, gated)
        if one:
            return key, gemv_tile(matrix.data.itemsize, n, k, gated)
        device = self.device
        tile = skinny_tile(
            kind, matrix.data.itemsize, x_itemsize, rows, n, k, group, gated, device.num_processors, device.shared
        )
        if columns and kind != INT4:
            tile = replace(tile, columns=divisor(columns, tile.columns))
        return key, tile

    def _width(self, rows: int) -> int:
        """Rows of a program of `skinny`."""
        return MAX_SKINNY if self.fixed else min(MAX_SKINNY, max(16, int(triton.next_power_of_2(rows))))

    def _splits(self, tile: Tile, rows: int, width: int, n: int, gated: bool) -> int:
        """Parts that K is cut into: no more than the workspace has room for."""
        splits = 1 if self.fixed else tile.splits
        each = -(-rows // width) * width * n * (2 if gated else 1)  # partial sums of a part
        while splits > 1 and splits * each > self.device.workspace.numel():
            splits //= 2
        return splits

    def _gemv(
        self,
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
        tile, running = self._tile(matrix, 1, n, x.itemsize, gated, True), self.experts(1)
        scales, biases = x if matrix.scales is None else matrix.scales, x if bias is None else bias
        added = x if residual is None else residual
        if running is not None and running.side == COLUMNS:
            assert norm is None, "a norm is over all columns"
            assert activation == 0, "what is read by experts is not activated"
            self.device.launch(
                gemv_columns, (-(-n // tile.rows),),
                x, matrix.data, scales, biases, added, out, running.experts, running.active, running.size, n,
                matrix.k, scale, SCALED=matrix.scales is not None, BIAS=bias is not None,
                RESIDUAL=residual is not None, BN=tile.rows, BK=tile.columns, STAGES=tile.stages,
                EVEN=running.size % tile.columns == 0, num_warps=tile.warps,
            )  # fmt: skip
            return
        blocks = -(-n // tile.rows) if running is None else running.active * -(-running.size // tile.rows)
        self.device.launch(
            kernels.gemv, (blocks,),
            x, matrix.data, scales, norm.weight if norm else x, biases, added, out,
            self.device.counters if running is None else running.experts, n, matrix.k, self.up_x,
            0 if running is None else running.size, norm.eps if norm else 0.0, scale,
            SCALED=matrix.scales is not None, NORM=norm is not None, BIAS=bias is not None,
            RESIDUAL=residual is not None, GATED=gated, ACT=activation, APART=gated and self.up_x > 0,
            SEGMENT=self.segment, EXPERTS=0 if running is None else running.side, BN=tile.rows, BK=tile.columns,
            STAGES=tile.stages, EVEN=matrix.k % tile.columns == 0, num_warps=tile.warps,
        )  # fmt: skip

    def _gemv_int4(
        self,
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
        words, scales, zeros = matrix.data.view(torch.int32), *self._row_scales(matrix)
        per_row, width = words.shape[1], 32 if matrix.group == 32 else 64
        units: int = triton.next_power_of_2(per_row // 4)
        tile = self._tile(matrix, 1, n, x.itemsize, gated, True)
        blocks = -(-n // tile.rows)
        self.device.launch(
            gemv_int4, (min(blocks, tile.splits * self.device.num_processors),),
            x.view(torch.int32), words, scales, scales if zeros is None else zeros,
            norm.weight.view(torch.int32) if norm else words, words if bias is None else bias,
            words if residual is None else residual, out, n, matrix.k, per_row, scales.shape[1],
            norm.eps if norm else 0.0, scale, blocks, GROUP=matrix.group, WIDTH=width,
            PARTS=1 if matrix.group == 0 else max(1, 4 * width // matrix.group), ZEROS=zeros is not None,
            NORM=norm is not None, BIAS=bias is not None, RESIDUAL=residual is not None, GATED=gated, ACT=activation,
            BN=tile.rows, BU=units, EVEN=per_row == 4 * units, ASM=self.device.asm,
            num_warps=tile.warps,
        )  # fmt: skip

    def _row_scales(self, matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and zero points of int4, those of a row side by side; made when they are first asked for, the scales
        in half the bytes where nothing is lost."""
        key = id(matrix)
        if key not in self._by_row:
            assert matrix.scales is not None
            scales = matrix.scales.t().contiguous()
            for dtype in (torch.bfloat16, torch.float16):
                if torch.equal(scales.to(dtype).float(), scales):
                    scales = scales.to(dtype)
                    break
            self._by_row[key] = scales, None if matrix.zeros is None else matrix.zeros.t().contiguous()
        return self._by_row[key]

    def _skinny(
        self,
        x: torch.Tensor,
        x_scales: torch.Tensor | None,
        matrix: Matrix,
        n: int,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        residual: torch.Tensor | None,
        scale: float,
        activation: int,
        gated: bool,
    ) -> None:
        rows, device = len(x), self.device
        width = self._width(rows)
        tile = self._tile(matrix, width, n, x.itemsize, gated, False)
        splits = self._splits(tile, rows, width, n, gated)
        step = tile.columns * (4 if matrix.kind == INT4 else 1)
        nothing, running = device.counters, self.experts(rows)
        blocks, columns = -(-n // tile.rows), matrix.k
        if running is not None and running.side == ROWS:
            blocks = -(-running.size // tile.rows) * min(running.taken.shape[1], rows * running.active)
        elif running is not None:
            columns = running.size
        device.launch(
            kernels.skinny, (blocks, splits, -(-rows // width)),
            x, nothing if x_scales is None else x_scales, matrix.data,
            nothing if matrix.scales is None else matrix.scales, nothing if matrix.zeros is None else matrix.zeros,
            nothing if bias is None else bias, nothing if residual is None else residual, out, device.workspace,
            device.counters, nothing if running is None else running.experts,
            nothing if running is None else running.taken, rows, n, matrix.k, x.stride(0), matrix.data.stride(0),
            out.stride(0), self.up_x, 0 if matrix.scales is None else len(matrix.scales) - 1, splits,
            0 if running is None else running.size, 0 if running is None else running.taken.shape[1], scale,
            KIND=matrix.kind, GROUP=matrix.group, ZEROS=matrix.zeros is not None, SCALED=matrix.scales is not None,
            BIAS=bias is not None, RESIDUAL=residual is not None, GATED=gated, ACT=activation,
            APART=gated and self.up_x > 0, SEGMENT=self.segment, EXPERTS=0 if running is None else running.side,
            BM=width, BN=tile.rows, BK=tile.columns, SPLIT=splits > 1, STAGES=tile.stages, EVEN=columns % step == 0,
            ASM=device.asm, num_warps=tile.warps,
        )  # fmt: skip

    def _has_fp8_product(self, matrix: Matrix) -> bool:
        return (
            self.device.fp8_products
            and matrix.group == 0
            and matrix.mask is None
            and matrix.k % 16 == 0
            and matrix.n % 16 == 0
        )

    def _run_many(
        self, x: torch.Tensor, x_scales: torch.Tensor | None, matrix: Matrix, dtype: torch.dtype
    ) -> torch.Tensor:
        if matrix.perm is not None:
            x = x[:, matrix.perm]
        if matrix.kind == DENSE and matrix.mask is None:
            return _product(x, matrix.data, dtype)
        if matrix.kind == FP8 and self._has_fp8_product(matrix):
            if x_scales is None:
                x, x_scales = self.ops.quantize_rows(x.contiguous(), FP8_DTYPE)
            assert matrix.scales is not None
            product: torch.Tensor = torch._scaled_mm(
                x, matrix.data.t(), x_scales[:, None], matrix.scales, out_dtype=torch.bfloat16, use_fast_accum=True
            )
            return product.to(dtype)
        if self._has_int8_product(matrix, len(x)):
            if x_scales is None:
                x, x_scales = self.ops.quantize_rows(x.contiguous(), torch.int8)
            return self._product8(x, x_scales, matrix, dtype)
        return _product(x, self.expanded(matrix, x.dtype), dtype)

    def _product8(self, x: torch.Tensor, x_scales: torch.Tensor, matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
        rows, device = len(x), self.device
        out = torch.empty((rows, matrix.n), dtype=dtype, device=device.handle)
        tile = int8_tile(rows, matrix.n, device.num_processors, device.shared)
        assert matrix.scales is not None
        device.launch(
            product8, (-(-rows // tile.rows) * -(-matrix.n // tile.columns),),
            x, x_scales, matrix.data, matrix.scales, out, rows, matrix.n, matrix.k, BM=tile.rows,
            BN=tile.columns, BK=128, TALL=8, STAGES=tile.stages, EVEN=matrix.k % 128 == 0,
            num_warps=tile.warps,
        )  # fmt: skip
        return out

    def expanded(self, matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
        """The matrix's numbers, dense [N, K]."""
        if matrix.mask is not None:
            return sparse.expanded(self.device, matrix, dtype)
        out = torch.empty((matrix.n, matrix.k), dtype=dtype, device=self.device.handle)
        columns = 32 if matrix.group == 32 else 64
        width = matrix.data.stride(0)
        assert matrix.scales is not None
        self.device.launch(
            kernels.expand, (-(-matrix.n // 32), -(-width // columns)),
            matrix.data, matrix.scales, matrix.scales if matrix.zeros is None else matrix.zeros, out, matrix.n,
            matrix.k, width, len(matrix.scales) - 1, KIND=matrix.kind, GROUP=matrix.group,
            ZEROS=matrix.zeros is not None, BN=32, BK=columns,
        )  # fmt: skip
        return out


def _product(x: torch.Tensor, w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x W.T by cuBLAS; float32 from half-precision inputs without rounding in between where asked for."""
    if dtype != x.dtype and x.is_cuda:
        return torch.mm(x, w.t(), out_dtype=dtype)
    return torch.nn.functional.linear(x, w).to(dtype)
