"""Products with 2:4 weights that are kept packed: of each four successive columns two numbers, and four bits that say
which. `gemv24` is one row, which picks the numbers of x that are wanted; `skinny24` a few rows, the weights put back in
their places in registers for the tensor cores; `expand24` writes them out for more.

w holds pairs of kept numbers, [N or 2N, K / 4]: int32 of two 16-bit floats (as x is), or int16 of two int8 or fp8. mask
int16 [N or 2N, BU]: the four bits of plane i are those of group i * BU + j, i = 0 .. 3, for unit j; BU a power of two.
x is read as int64 of four 16-bit floats. scales float32 [N or 2N], where numbers have 8 bits.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hasten.backends.cuda.kernels.linear import DENSE, FP8, _finish
from hasten.backends.cuda.kernels.words import high_of, low_of, two_bfloat16

# Sixteen bits of four planes and of each plane four numbers of x, two a word -> of each plane the two numbers that are
# wanted. Three of a plane's bits tell its pattern: byte by byte they look up where in x the numbers are, which is what
# the last byte permutations go by.
_PICK = tl.constexpr("""
{
.reg .b32 m, l, h, f, s, p, q;
and.b32 m, $4, 0x7777;
mov.b32 l, 0x10321010;
mov.b32 h, 0x10321054;
prmt.b32 f, l, h, m;
mov.b32 l, 0x32767632;
mov.b32 h, 0x32545476;
prmt.b32 s, l, h, m;
prmt.b32 p, f, s, 0x5140;
prmt.b32 q, f, s, 0x7362;
prmt.b32 $0, $5, $6, p;
shr.u32 p, p, 16;
prmt.b32 $1, $7, $8, p;
prmt.b32 $2, $9, $10, q;
shr.u32 q, q, 16;
prmt.b32 $3, $11, $12, q;
}
""")

# Two fp8 (e4m3) -> two float16.
_TWO_FP8 = tl.constexpr("""
{
.reg .b16 t;
cvt.u16.u32 t, $1;
cvt.rn.f16x2.e4m3x2 $0, t;
}
""")


@triton.jit
def _half(bits, FLOAT16: tl.constexpr):
    """The 16-bit float in the low bits of integers."""
    bits = bits.to(tl.int16)
    return bits.to(tl.float16, bitcast=True) if FLOAT16 else bits.to(tl.bfloat16, bitcast=True)


@triton.jit
def _floats(words, FLOAT16: tl.constexpr):
    """The two 16-bit floats of each int32, as float32."""
    if FLOAT16:
        return _half(words, True).to(tl.float32), _half(words >> 16, True).to(tl.float32)
    return low_of(words), high_of(words)


@triton.jit
def _eight(bits, KIND: tl.constexpr):
    """The int8 or fp8 in the low bits of int32, as float32."""
    if KIND == FP8:
        return (bits & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    # Under the exponent of 2^23 it reads 2^23 + 128 + the number; conversions take four times as long.
    return (((bits & 255) ^ 128) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def _pair(words, KIND: tl.constexpr, FLOAT16: tl.constexpr, ASM: tl.constexpr):
    """The first and the second number that a group keeps, float32."""
    wide = words.to(tl.int32)
    if KIND == DENSE:
        return _floats(wide, FLOAT16)
    if KIND == FP8 and ASM:
        both = tl.inline_asm_elementwise(_TWO_FP8, "=r,r", [wide], dtype=tl.int32, is_pure=True, pack=1)
        return _floats(both, True)
    return _eight(wide, KIND), _eight(wide >> 8, KIND)


@triton.jit
def _inputs(x, norm, groups, count, NORM: tl.constexpr, FLOAT16: tl.constexpr):
    """A plane of x (times norm, rounded), two numbers a word [1, BU], and the sum of squares before that."""
    words = tl.load(x + groups, mask=groups < count, other=0)
    low, high = words.to(tl.int32), (words >> 32).to(tl.int32)
    squares = 0.0
    if NORM:
        x0, x1 = _floats(low, FLOAT16)
        x2, x3 = _floats(high, FLOAT16)
        squares = tl.sum(x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3)
        scale = tl.load(norm + groups, mask=groups < count, other=0)
        n0, n1 = _floats(scale.to(tl.int32), False)
        n2, n3 = _floats((scale >> 32).to(tl.int32), False)
        low, high = two_bfloat16(x0 * n0, x1 * n1), two_bfloat16(x2 * n2, x3 * n3)
    return low[None, :], high[None, :], squares


@triton.jit
def _planes(w, mask, rows, units, count, BU: tl.constexpr, EVEN: tl.constexpr):
    """Pairs of the four planes, and their bits, of some rows."""
    at = w + rows.to(tl.int64) * count + units
    w0 = tl.load(at, mask=None if EVEN else units < count, other=None if EVEN else 0)
    w1 = tl.load(at + BU, mask=None if EVEN else units + BU < count, other=None if EVEN else 0)
    w2 = tl.load(at + 2 * BU, mask=None if EVEN else units + 2 * BU < count, other=None if EVEN else 0)
    w3 = tl.load(at + 3 * BU, mask=None if EVEN else units + 3 * BU < count, other=None if EVEN else 0)
    return w0, w1, w2, w3, tl.load(mask + rows.to(tl.int64) * BU + units)


@triton.jit
def _picked(bits, low, high, PLANE: tl.constexpr):
    """What _PICK gives for one plane."""
    B: tl.constexpr = 1 << (4 * PLANE)
    x0, x1, x2, x3 = low & 0xFFFF, (low >> 16) & 0xFFFF, high & 0xFFFF, (high >> 16) & 0xFFFF
    first = tl.where((bits & B) != 0, x0, tl.where((bits & (2 * B)) != 0, x1, x2))
    return first | tl.where((bits & (8 * B)) != 0, x3, tl.where((bits & (4 * B)) != 0, x2, x1)) << 16


@triton.jit
def _products(acc, words, picked, KIND: tl.constexpr, FLOAT16: tl.constexpr, ASM: tl.constexpr):
    """acc + kept numbers times the numbers of x in their columns."""
    first, second = _pair(words, KIND, FLOAT16, ASM)
    x_first, x_second = _floats(picked, FLOAT16)
    return acc + first * x_first + second * x_second


@triton.jit
def _rows_times(
    tiles, l0, h0, l1, h1, l2, h2, l3, h3, BN: tl.constexpr, BU: tl.constexpr, KIND: tl.constexpr,
    FLOAT16: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """[BN]: products of rows with x."""
    bits = tiles[4].to(tl.int32)
    if ASM:
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            _PICK, "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r", [bits, l0, h0, l1, h1, l2, h2, l3, h3],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        p0, p1 = _picked(bits, l0, h0, 0), _picked(bits, l1, h1, 1)
        p2, p3 = _picked(bits, l2, h2, 2), _picked(bits, l3, h3, 3)
    acc = tl.zeros([BN, BU], tl.float32)
    acc = _products(acc, tiles[0], p0, KIND, FLOAT16, ASM)
    acc = _products(acc, tiles[1], p1, KIND, FLOAT16, ASM)
    acc = _products(acc, tiles[2], p2, KIND, FLOAT16, ASM)
    acc = _products(acc, tiles[3], p3, KIND, FLOAT16, ASM)
    return tl.sum(acc, 1)


@triton.jit
def gemv24(
    x, w, mask, scales, norm, bias, residual, y, N, K, eps, out_scale, blocks,
    KIND: tl.constexpr, FLOAT16: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    GATED: tl.constexpr, ACT: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr, EVEN: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [N] = activation(out_scale * (W [N, K] (rms-normed) x [K] + bias)) (* up) + residual.

    x stays in registers while a program goes through its blocks of BN rows, every
    num_programs-th of `blocks`; the next one's weights are fetched while one is multiplied. norm: bfloat16 as int64.
    """
    units = tl.arange(0, BU)
    count = K // 4
    block = tl.program_id(0)
    rows = tl.minimum(block * BN + tl.arange(0, BN), N - 1)[:, None]
    # The first weights are on their way before the kernel that makes x is done.
    tiles = _planes(w, mask, rows, units[None, :], count, BU, EVEN)
    up_tiles = tiles
    if GATED:
        up_tiles = _planes(w, mask, rows + N, units[None, :], count, BU, EVEN)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    l0, h0, squares0 = _inputs(x, norm, units, count, NORM, FLOAT16)
    l1, h1, squares1 = _inputs(x, norm, units + BU, count, NORM, FLOAT16)
    l2, h2, squares2 = _inputs(x, norm, units + 2 * BU, count, NORM, FLOAT16)
    l3, h3, squares3 = _inputs(x, norm, units + 3 * BU, count, NORM, FLOAT16)
    inverse = 1.0
    if NORM:
        inverse = tl.rsqrt((squares0 + squares1 + squares2 + squares3) / K + eps)
    while block < blocks:
        now, now_up = tiles, up_tiles
        out_rows = block * BN + tl.arange(0, BN)
        block += tl.num_programs(0)
        if block < blocks:
            rows = tl.minimum(block * BN + tl.arange(0, BN), N - 1)[:, None]
            tiles = _planes(w, mask, rows, units[None, :], count, BU, EVEN)
            if GATED:
                up_tiles = _planes(w, mask, rows + N, units[None, :], count, BU, EVEN)
        safe = tl.minimum(out_rows, N - 1)
        out = _rows_times(now, l0, h0, l1, h1, l2, h2, l3, h3, BN, BU, KIND, FLOAT16, ASM) * inverse
        up = out
        if GATED:
            up = _rows_times(now_up, l0, h0, l1, h1, l2, h2, l3, h3, BN, BU, KIND, FLOAT16, ASM) * inverse
        if KIND != DENSE:
            out *= tl.load(scales + safe)
            if GATED:
                up *= tl.load(scales + N + safe)
        out = _finish(out, up, safe, bias, N, out_scale, BIAS, GATED, ACT)
        if RESIDUAL:
            out += tl.load(residual + safe).to(tl.float32)
        tl.store(y + out_rows, out.to(y.dtype.element_ty), mask=out_rows < N)


@triton.jit
def _spread(words, bits, PLANE: tl.constexpr, KIND: tl.constexpr, FLOAT16: tl.constexpr):
    """The numbers of the four columns of each group of a plane, zeros among them, in 16 bits."""
    wide = words.to(tl.int32)
    if KIND == DENSE:
        first, second = _half(wide, FLOAT16), _half(wide >> 16, FLOAT16)
    else:
        T: tl.constexpr = tl.float16 if FLOAT16 else tl.bfloat16
        first, second = _eight(wide, KIND).to(T), _eight(wide >> 8, KIND).to(T)
    B: tl.constexpr = 1 << (4 * PLANE)
    zero = tl.zeros_like(first)
    b0, b3 = (bits & B) != 0, (bits & (8 * B)) != 0
    e0, e3 = tl.where(b0, first, zero), tl.where(b3, second, zero)
    e1 = tl.where((bits & (2 * B)) != 0, tl.where(b0, second, first), zero)
    e2 = tl.where((bits & (4 * B)) != 0, tl.where(b3, first, second), zero)
    return e0, e1, e2, e3


@triton.jit
def _plane_step(
    acc, words, bits, xs, PLANE: tl.constexpr, KIND: tl.constexpr, FLOAT16: tl.constexpr
):  # fmt: skip
    """acc + a plane's weights [BN, BG] times x, int64 [BG, BM]."""
    e0, e1, e2, e3 = _spread(words, bits, PLANE, KIND, FLOAT16)
    acc = tl.dot(e0, _half(xs, FLOAT16), acc)
    acc = tl.dot(e1, _half(xs >> 16, FLOAT16), acc)
    acc = tl.dot(e2, _half(xs >> 32, FLOAT16), acc)
    return tl.dot(e3, _half(xs >> 48, FLOAT16), acc)


@triton.jit
def skinny24(
    x, w, mask, scales, bias, residual, y, parts, counters, M, N, K, ldx, ldy, splits, out_scale,
    KIND: tl.constexpr, FLOAT16: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    ACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr, BU: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [M, N] = activation(out_scale * (x [M, K] W.T + bias)) (* up) + residual.

    Program (rows of W, part of K, BM rows of x). parts, counters, ldy: see linear.skinny. ldx: int64 between rows of x.
    """
    split = tl.program_id(1)
    ms = tl.program_id(2) * BM + tl.arange(0, BM)
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    cols = tl.arange(0, BG)
    out_rows = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.minimum(out_rows, N - 1)
    NT = 2 * N if GATED else N
    count = K // 4
    share = tl.cdiv(BU // BG, splits)
    pointers = w + rows[:, None].to(tl.int64) * count + cols[None, :]
    gap = N.to(tl.int64) * count
    masks = mask + rows[:, None].to(tl.int64) * BU + cols[None, :]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros([BN, BM], tl.float32)
    up = tl.zeros([BN, BM], tl.float32) if GATED else acc
    for step in tl.range(split * share, tl.minimum(split * share + share, BU // BG), num_stages=STAGES):
        bits = tl.load(masks + step * BG).to(tl.int32)
        up_bits = tl.load(masks + N.to(tl.int64) * BU + step * BG).to(tl.int32) if GATED else bits
        for plane in tl.static_range(4):
            first = plane * BU + step * BG
            inside = first + cols < count
            at = x + ms[None, :] * ldx + (first + cols)[:, None]
            xs = tl.load(at, mask=(ms < M)[None, :] & inside[:, None], other=0)
            words = tl.load(pointers + first, mask=inside[None, :], other=0)
            acc = _plane_step(acc, words, bits, xs, plane, KIND, FLOAT16)
            if GATED:
                words = tl.load(pointers + gap + first, mask=inside[None, :], other=0)
                up = _plane_step(up, words, up_bits, xs, plane, KIND, FLOAT16)
    if SPLIT:
        stride = NT * BM
        at = tl.program_id(2) * splits * stride + rows[:, None] * BM + tl.arange(0, BM)[None, :]
        tl.store(parts + split * stride + at, acc, mask=(out_rows < N)[:, None])
        if GATED:
            tl.store(parts + split * stride + N * BM + at, up, mask=(out_rows < N)[:, None])
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
    if KIND != DENSE:
        acc *= tl.load(scales + rows)[:, None]
        if GATED:
            up *= tl.load(scales + N + rows)[:, None]
    out = _finish(acc, up, rows[:, None], bias, N, out_scale, BIAS, GATED, ACT)
    at = ms[None, :] * ldy + rows[:, None]
    inside = (ms[None, :] < M) & (out_rows < N)[:, None]
    if RESIDUAL:
        out += tl.load(residual + at, mask=inside, other=0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def expand24(
    w, mask, scales, out, N, K, KIND: tl.constexpr, FLOAT16: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr,
    BU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = the numbers with their zeros, int64 [N, K / 4] of four 16-bit floats; program (rows, units)."""
    out_rows = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.minimum(out_rows, N - 1)
    units = tl.program_id(1) * BG + tl.arange(0, BG)
    count = K // 4
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    bits = tl.load(mask + rows[:, None].to(tl.int64) * BU + units[None, :]).to(tl.int32)
    scale = tl.load(scales + rows)[:, None] if KIND != DENSE else 1.0
    for plane in tl.static_range(4):
        at = rows[:, None].to(tl.int64) * count + (plane * BU + units)[None, :]
        inside = (out_rows < N)[:, None] & (plane * BU + units < count)[None, :]
        e0, e1, e2, e3 = _spread(tl.load(w + at, mask=inside, other=0), bits, plane, KIND, FLOAT16)
        if KIND != DENSE:
            e0, e1, e2, e3 = _scaled(e0, scale), _scaled(e1, scale), _scaled(e2, scale), _scaled(e3, scale)
        word = _bits(e0) | _bits(e1) << 16 | _bits(e2) << 32 | _bits(e3) << 48
        tl.store(out + at, word, mask=inside)


@triton.jit
def _scaled(number, scale):
    return (number.to(tl.float32) * scale).to(number.dtype)


@triton.jit
def _bits(number):
    return number.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
