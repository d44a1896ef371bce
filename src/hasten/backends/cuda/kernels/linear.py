"""Products of few rows with weights that are read once: bound by memory, so made to keep many bytes in flight.

`gemv` is one row by fused multiply-adds; `skinny` 1 to 64 rows on the tensor cores, the weights as the left operand, so
that packed formats are unpacked in registers and never written back. K is cut into splits; the program that comes last
adds the parts up in their order, so that a result does not depend on which that is.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hasten.backends.cuda.kernels.words import fetch_ahead

DENSE, FP8, INT8, INT4 = (tl.constexpr(kind) for kind in range(4))
NO_ACTIVATION, SILU, GELU, GELU_TANH = (tl.constexpr(kind) for kind in range(4))
# Which experts a product is of (experts.route): all that there are, runs of its rows, runs of its columns.
NO_EXPERTS, EXPERT_ROWS, EXPERT_COLUMNS = (tl.constexpr(kind) for kind in range(3))

# Two int16 of four nibbles each -> four pairs of bfloat16: a nibble n under the exponent of 128 reads 128 + n.
_UNPACK_INT4 = tl.constexpr("""
{
.reg .b32 t, one, offset;
mov.b32 one, 0x3F803F80;
mov.b32 offset, 0xC308C308;
lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
shr.b32 t, $4, 4;
lop3.b32 $1, t, 0x000F000F, 0x43004300, 0xEA;
shr.b32 t, $4, 8;
lop3.b32 $2, t, 0x000F000F, 0x43004300, 0xEA;
shr.b32 t, $4, 12;
lop3.b32 $3, t, 0x000F000F, 0x43004300, 0xEA;
fma.rn.bf16x2 $0, $0, one, offset;
fma.rn.bf16x2 $1, $1, one, offset;
fma.rn.bf16x2 $2, $2, one, offset;
fma.rn.bf16x2 $3, $3, one, offset;
}
""")

# Four fp8 (e4m3) -> two pairs of bfloat16: the bits moved into place read 2^-120 times the number, subnormals too.
_UNPACK_FP8 = tl.constexpr("""
{
.reg .b32 a, b, t, u, factor, zero;
mov.b32 factor, 0x7B807B80;
mov.b32 zero, 0x80008000;
prmt.b32 a, $2, 0, 0x1404;
prmt.b32 b, $2, 0, 0x3424;
shr.b32 t, a, 4;
shr.b32 u, b, 4;
and.b32 t, t, 0x07F007F0;
and.b32 u, u, 0x07F007F0;
lop3.b32 t, a, 0x80008000, t, 0xEA;
lop3.b32 u, b, 0x80008000, u, 0xEA;
fma.rn.bf16x2 $0, t, factor, zero;
fma.rn.bf16x2 $1, u, factor, zero;
}
""")


@triton.jit
def activate(x, KIND: tl.constexpr):
    """SiLU, exact GELU, GELU's tanh approximation; x float32."""
    if KIND == SILU:
        x = x * tl.sigmoid(x)
    elif KIND == GELU:
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif KIND == GELU_TANH:
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def _finish(out, up, rows, bias, N, out_scale, BIAS: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr):
    """Bias, activation, gate; `rows` broadcasts against `out`."""
    if BIAS:
        out += tl.load(bias + rows).to(tl.float32)
    out = activate(out * out_scale, ACT)
    if GATED:
        if BIAS:
            up += tl.load(bias + N + rows).to(tl.float32)
        out = out * up
    return out


@triton.jit
def as_float32(w):
    """Weights as float32: int8 not by conversions, which take four times as long as other instructions, but under the
    exponent of 2^23, where they read 2^23 + 128 + w."""
    if w.dtype == tl.int8:
        return (((w.to(tl.int32) & 255) ^ 128) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    return w.to(tl.float32)


@triton.jit
def gemv(
    x, w, scales, norm, bias, residual, y, running, N, K, up_x, size, eps, out_scale,
    SCALED: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    ACT: tl.constexpr, APART: tl.constexpr, SEGMENT: tl.constexpr, EXPERTS: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [N] = activation(out_scale * (W [N, K] (rms-normed) x [K] + bias)) (* up) + residual.

    W is dense, or fp8 or int8 with scales float32 [N] (SCALED). GATED: W is [2N, K], the gate's rows first; APART: up's
    multiply the K numbers of x from up_x on. SEGMENT: each run of so many rows does, up_x numbers after the run before.
    EXPERT_ROWS: only the rows of the experts that `running` lists, `size` of each; the others of y are left as they
    are.
    """
    cols = tl.arange(0, BK)
    block = tl.program_id(0)
    end = N
    if EXPERTS == EXPERT_ROWS:
        if PDL:
            gdc_wait()
        tiles = tl.cdiv(size, BN)
        expert = tl.load(running + 1 + block // tiles)
        end = expert * size + size
        out_rows = expert * size + block % tiles * BN + tl.arange(0, BN)
    else:
        out_rows = block * BN + tl.arange(0, BN)
    if SEGMENT:
        x += block * BN // SEGMENT * up_x
    rows = tl.minimum(out_rows, end - 1)
    pointers = w + rows[:, None].to(tl.int64) * K + cols[None, :]
    gap = N.to(tl.int64) * K
    inside = cols < K
    # The first tile of weights is on its way before the kernel that makes x is done.
    first = tl.load(pointers, mask=None if EVEN else inside[None, :], cache_modifier=".cg")
    if GATED:
        first_up = tl.load(pointers + gap, mask=None if EVEN else inside[None, :], cache_modifier=".cg")
    if PDL:
        if EXPERTS == NO_EXPERTS:
            gdc_wait()
        gdc_launch_dependents()
    xs = tl.load(x + cols, mask=None if EVEN else inside, other=None if EVEN else 0.0).to(tl.float32)
    squares = xs * xs
    if NORM:
        xs = xs * tl.load(norm + cols, mask=None if EVEN else inside, other=None if EVEN else 0.0).to(tl.float32)
    us = xs
    if APART:
        us = tl.load(x + up_x + cols, mask=None if EVEN else inside, other=None if EVEN else 0.0).to(tl.float32)
    if EVEN:
        acc = as_float32(first) * xs[None, :]
        if GATED:
            acc_up = as_float32(first_up) * us[None, :]
    else:
        acc = tl.where(inside[None, :], as_float32(first), 0) * xs[None, :]
        if GATED:
            acc_up = tl.where(inside[None, :], as_float32(first_up), 0) * us[None, :]
    for k in tl.range(BK, K, BK, num_stages=STAGES):
        inside = k + cols < K
        mask = None if EVEN else inside
        other = None if EVEN else 0.0
        xs = tl.load(x + k + cols, mask=mask, other=other).to(tl.float32)
        if NORM:
            squares += xs * xs
            xs = xs * tl.load(norm + k + cols, mask=mask, other=other).to(tl.float32)
        us = xs
        if APART:
            us = tl.load(x + up_x + k + cols, mask=mask, other=other).to(tl.float32)
        mask = None if EVEN else inside[None, :]
        acc += as_float32(tl.load(pointers + k, mask=mask, other=other, cache_modifier=".cg")) * xs[None, :]
        if GATED:
            up = tl.load(pointers + gap + k, mask=mask, other=other, cache_modifier=".cg")
            acc_up += as_float32(up) * us[None, :]
    out = tl.sum(acc, 1)
    up_sum = out
    if GATED:
        up_sum = tl.sum(acc_up, 1)
    if NORM:
        inverse = tl.rsqrt(tl.sum(squares) / K + eps)
        out *= inverse
        up_sum *= inverse
    if SCALED:
        out *= tl.load(scales + rows)
        if GATED:
            up_sum *= tl.load(scales + N + rows)
    out = _finish(out, up_sum, rows, bias, N, out_scale, BIAS, GATED, ACT)
    if RESIDUAL:
        out += tl.load(residual + rows).to(tl.float32)
    tl.store(y + out_rows, out.to(y.dtype.element_ty), mask=out_rows < end)


@triton.jit
def _tile(w, KIND: tl.constexpr, ASM: tl.constexpr, T: tl.constexpr):
    """A loaded tile of dense, fp8 or int8 weights as T."""
    if KIND == FP8 and ASM:
        bits = w.to(tl.uint8, bitcast=True)
        w = tl.inline_asm_elementwise(_UNPACK_FP8, "=&r,=&r,r", [bits], dtype=tl.bfloat16, is_pure=True, pack=4)
    elif KIND == FP8:
        w = w.to(tl.float32)
    return w.to(T)


@triton.jit
def _nibbles(q, ASM: tl.constexpr, T: tl.constexpr):
    """int16 of four nibbles -> four tiles of T, each number less 8."""
    if ASM:
        a, b, c, d = tl.inline_asm_elementwise(
            _UNPACK_INT4, "=&r,=&r,=&r,=&r,r", [q],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        wide = q.to(tl.int32)
        a, b = (wide & 15) - 8, ((wide >> 4) & 15) - 8
        c, d = ((wide >> 8) & 15) - 8, ((wide >> 12) & 15) - 8
    return a.to(T), b.to(T), c.to(T), d.to(T)


@triton.jit
def _columns(x, k, rows, cols, M, ldx, end, EVEN: tl.constexpr):
    """x[:, k : k + BK] transposed [BK, BM]; zero outside x, and from column `end` on."""
    at = k + cols[:, None]
    mask = (rows[None, :] < M) if EVEN else (rows[None, :] < M) & (at < end)
    return tl.load(x + rows[None, :] * ldx + at, mask=mask, other=0.0)


@triton.jit
def _quarter(acc, tile, xs, scales, zeros, rows, group, last_group, NT, GROUPED: tl.constexpr, ZEROS: tl.constexpr):
    """acc + scale * (tile + 8 - zero) @ xs for columns of one group."""
    if GROUPED:
        part = tl.dot(tile, xs, input_precision="ieee")
        at = tl.minimum(group, last_group) * NT + rows
        if ZEROS:
            part += (8 - tl.load(zeros + at).to(tl.float32))[:, None] * tl.sum(xs.to(tl.float32), 0)[None, :]
        return acc + part * tl.load(scales + at).to(tl.float32)[:, None]
    return tl.dot(tile, xs, acc, input_precision="ieee")


@triton.jit
def _int4_step(
    acc, q, x0, x1, x2, x3, scales, zeros, rows, k, last_group, NT, BK: tl.constexpr, GROUP: tl.constexpr,
    ZEROS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    t0, t1, t2, t3 = _nibbles(q, ASM, x0.dtype)
    G: tl.constexpr = GROUP if GROUP else 1
    acc = _quarter(acc, t0, x0, scales, zeros, rows, k // G, last_group, NT, GROUP > 0, ZEROS)
    acc = _quarter(acc, t1, x1, scales, zeros, rows, (k + BK) // G, last_group, NT, GROUP > 0, ZEROS)
    acc = _quarter(acc, t2, x2, scales, zeros, rows, (k + 2 * BK) // G, last_group, NT, GROUP > 0, ZEROS)
    return _quarter(acc, t3, x3, scales, zeros, rows, (k + 3 * BK) // G, last_group, NT, GROUP > 0, ZEROS)


@triton.jit
def _dense_step(
    acc, w, xs, scales, rows, k, NT, KIND: tl.constexpr, GROUP: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    if KIND == FP8 and xs.dtype == tl.float8e4nv:
        return tl.dot(w, xs, acc, max_num_imprecise_acc=128)
    tile = _tile(w, KIND, ASM, xs.dtype)
    if GROUP:
        scale = tl.load(scales + (k // GROUP) * NT + rows).to(tl.float32)
        return acc + tl.dot(tile, xs, input_precision="ieee") * scale[:, None]
    return tl.dot(tile, xs, acc, input_precision="ieee")


@triton.jit
def skinny(
    x, x_scales, w, scales, zeros, bias, residual, y, parts, counters, running, taken, M, N, K, ldx, ldw, ldy, up_x,
    last_group, splits, size, experts, out_scale, KIND: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    SCALED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr,
    APART: tl.constexpr, SEGMENT: tl.constexpr, EXPERTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y [M, N] = activation(out_scale * (x [M, K] W.T + bias)) (* up) + residual.

    Program (rows of W, part of K, BM rows of x).
    w [N or 2N, ldw]: dense, fp8 or int8 [.., K]; int4 as int16 [.., K / 4] of which column j of the chunk c of BK holds
    columns (4c + i) * BK + j, i = 0 .. 3, from the lowest nibble up. scales [groups, N or 2N] (SCALED, and one a
    row where GROUP is 0); zeros uint8 likewise. x may be fp8 where w is, with x_scales float32 [M].
    parts: where SPLIT, float32 [M / BM, splits, N or 2N, BM]; counters: zeros, and zeros again after. ldx, ldy:
    elements between rows of x; of y and of residual. APART, SEGMENT, up_x: see gemv.
    EXPERTS: `running` says how many run and which, `size` rows or columns of W each. EXPERT_ROWS: their rows are
    computed, zero for rows of x that have not `taken` [M, experts] them. EXPERT_COLUMNS: their columns are read.
    """
    split = tl.program_id(1)
    ms = tl.program_id(2) * BM + tl.arange(0, BM)
    block = tl.program_id(0)
    tile = tl.program_id(2) * tl.num_programs(0) + block
    cols = tl.arange(0, BK)
    WIDTH: tl.constexpr = 4 * BK if KIND == INT4 else BK  # columns of x that a step takes
    if PDL and ASM and EXPERTS == NO_EXPERTS and BM >= 32:  # with 16 rows it costs what it gains
        # The first weights are on their way before the kernel that makes x is done.
        ITEM: tl.constexpr = w.dtype.element_ty.primitive_bitwidth // 8
        LINES: tl.constexpr = max(1, BK * ITEM // 128)
        first = split * tl.cdiv(tl.cdiv(K, WIDTH), splits) * BK
        its_rows = tl.minimum(block * BN + tl.arange(0, BN), N - 1).to(tl.int64)
        for stage in tl.static_range(STAGES):
            at = tl.minimum(first + stage * BK + tl.arange(0, LINES) * (128 // ITEM), ldw - 1)
            ahead = w + its_rows[:, None] * ldw + at[None, :]
            fetch_ahead(ahead)
            if GATED:
                fetch_ahead(ahead + N.to(tl.int64) * ldw)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    end = N
    expert = 0
    if EXPERTS == EXPERT_ROWS:
        tiles = tl.cdiv(size, BN)
        if block // tiles >= tl.load(running):
            return
        expert = tl.load(running + 1 + block // tiles)
        end = expert * size + size
        out_rows = expert * size + block % tiles * BN + tl.arange(0, BN)
    else:
        out_rows = block * BN + tl.arange(0, BN)
    if SEGMENT:
        x += block * BN // SEGMENT * up_x
    rows = tl.minimum(out_rows, end - 1)
    NT = 2 * N if GATED else N
    last = K
    per_expert = tl.cdiv(size, WIDTH)
    steps = tl.load(running) * per_expert if EXPERTS == EXPERT_COLUMNS else tl.cdiv(K, WIDTH)
    share = tl.cdiv(steps, splits)
    pointers = w + rows[:, None].to(tl.int64) * ldw + cols[None, :]
    gap = N.to(tl.int64) * ldw
    acc = tl.zeros([BN, BM], tl.float32)
    up = tl.zeros([BN, BM], tl.float32) if GATED else acc
    for step in tl.range(split * share, tl.minimum(split * share + share, steps), num_stages=STAGES):
        k = step * WIDTH
        words = step * BK
        if EXPERTS == EXPERT_COLUMNS:
            expert = tl.load(running + 1 + step // per_expert)
            last = expert * size + size
            k = expert * size + step % per_expert * WIDTH
            words = (expert * per_expert + step % per_expert) * BK
        if KIND == INT4:
            q = tl.load(pointers + words)
            x0 = _columns(x, k, ms, cols, M, ldx, last, EVEN)
            x1 = _columns(x, k + BK, ms, cols, M, ldx, last, EVEN)
            x2 = _columns(x, k + 2 * BK, ms, cols, M, ldx, last, EVEN)
            x3 = _columns(x, k + 3 * BK, ms, cols, M, ldx, last, EVEN)
            acc = _int4_step(acc, q, x0, x1, x2, x3, scales, zeros, rows, k, last_group, NT, BK, GROUP, ZEROS, ASM)
            if GATED:
                q = tl.load(pointers + gap + words)
                if APART:
                    x0 = _columns(x + up_x, k, ms, cols, M, ldx, last, EVEN)
                    x1 = _columns(x + up_x, k + BK, ms, cols, M, ldx, last, EVEN)
                    x2 = _columns(x + up_x, k + 2 * BK, ms, cols, M, ldx, last, EVEN)
                    x3 = _columns(x + up_x, k + 3 * BK, ms, cols, M, ldx, last, EVEN)
                up = _int4_step(
                    up, q, x0, x1, x2, x3, scales + N, zeros + N, rows, k, last_group, NT, BK, GROUP, ZEROS, ASM
                )
        else:
            mask = None if EVEN else (k + cols < last)[None, :]
            xs = _columns(x, k, ms, cols, M, ldx, last, EVEN)
            w_tile = tl.load(pointers + k, mask=mask, other=None if EVEN else 0.0)
            acc = _dense_step(acc, w_tile, xs, scales, rows, k, NT, KIND, GROUP, ASM)
            if GATED:
                if APART:
                    xs = _columns(x + up_x, k, ms, cols, M, ldx, last, EVEN)
                w_tile = tl.load(pointers + gap + k, mask=mask, other=None if EVEN else 0.0)
                up = _dense_step(up, w_tile, xs, scales + N, rows, k, NT, KIND, GROUP, ASM)
    if SPLIT:
        stride = NT * BM
        at = tl.program_id(2) * splits * stride + rows[:, None] * BM + tl.arange(0, BM)[None, :]
        tl.store(parts + split * stride + at, acc, mask=(out_rows < end)[:, None])
        if GATED:
            tl.store(parts + split * stride + N * BM + at, up, mask=(out_rows < end)[:, None])
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if arrived != splits - 1:
            return
        tl.store(counters + tile, 0)
        acc = tl.zeros([BN, BM], tl.float32)
        up = tl.zeros([BN, BM], tl.float32) if GATED else acc
        for part in tl.range(0, splits, num_stages=1):
            acc += tl.load(parts + part * stride + at, cache_modifier=".cg")
            if GATED:
                up += tl.load(parts + part * stride + N * BM + at, cache_modifier=".cg")
    if SCALED and GROUP == 0:
        acc *= tl.load(scales + rows).to(tl.float32)[:, None]
        if GATED:
            up *= tl.load(scales + N + rows).to(tl.float32)[:, None]
    if x.dtype.element_ty == tl.float8e4nv:
        x_scale = tl.load(x_scales + ms, mask=ms < M, other=0.0)[None, :]
        acc *= x_scale
        if GATED:
            up *= x_scale
    if ZEROS and GROUP == 0:
        tl.static_assert(False, "zero points come with groups")
    out = _finish(acc, up, rows[:, None], bias, N, out_scale, BIAS, GATED, ACT)
    if EXPERTS == EXPERT_ROWS:
        out *= tl.load(taken + ms * experts + expert, mask=ms < M, other=0).to(tl.float32)[None, :]
    at = ms[None, :] * ldy + rows[:, None]
    mask = (ms[None, :] < M) & (out_rows < end)[:, None]
    if RESIDUAL:
        out += tl.load(residual + at, mask=mask, other=0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def expand(
    w, scales, zeros, out, N, K, ldw, last_group,
    KIND: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [N, K] = the numbers that fp8, int8 or int4 weights (as `skinny` takes them) stand for."""
    out_rows = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.minimum(out_rows, N - 1)
    cols = tl.arange(0, BK)
    step = tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    PARTS: tl.constexpr = 4 if KIND == INT4 else 1
    at = rows[:, None].to(tl.int64) * ldw + step * BK + cols[None, :]
    q = tl.load(w + at, mask=(step * BK + cols < ldw)[None, :], other=0.0 if KIND == FP8 else 0)
    for part in tl.static_range(PARTS):
        k = (step * PARTS + part) * BK
        group = tl.minimum(k // GROUP, last_group) if GROUP else 0
        if KIND == INT4:
            number = ((q.to(tl.int32) >> (4 * part)) & 15).to(tl.float32)
            if ZEROS:
                number -= tl.load(zeros + group * N + rows).to(tl.float32)[:, None]
            else:
                number -= 8
        else:
            number = q.to(tl.float32)
        number *= tl.load(scales + group * N + rows).to(tl.float32)[:, None]
        mask = (out_rows < N)[:, None] & (k + cols < K)[None, :]
        tl.store(out + rows[:, None].to(tl.int64) * K + k + cols[None, :], number.to(out.dtype.element_ty), mask=mask)
