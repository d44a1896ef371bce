"""One row times int4 weights: `gemv_int4`, by paired float16 multiply-adds, unpacking by three instructions a pair.

Weights are as `linear.skinny` takes them, read as int32: nibble i of the low and of the high half of a word are two
successive columns, so a word is four pairs, and a pair under the exponent of 1024 is two float16. Rows of x are scaled
by a power of two to stay below 256, four products of float16 are added up at most, then float32 takes over.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hasten.backends.cuda.kernels.linear import _finish
from hasten.backends.cuda.kernels.words import fetched, high_of, low_of


def _dot_asm(parts: int) -> str:
    """Four words of eight nibbles times sixteen pairs of x -> `parts` float32: sums over the pairs of 4 / parts
    neighbouring nibbles. Operands: parts, words 0 .. 3, then word by word for nibble 0, 1, 2, 3 the pairs of x."""
    lines = [".reg .b32 s, n0, n1, n2, n3, a0, a1, a2, a3, low, high, bias, off, part;", ".reg .b16 l, h;"]
    lines += [".reg .f32 f, g;", "mov.b32 low, 0x000F000F;", "mov.b32 high, 0x00F000F0;", "mov.b32 bias, 0x64086408;"]
    lines += ["mov.b32 part, 0x2C002C00;", "mov.b32 off, 0xD480D480;"]
    for j in range(4):
        q = f"${parts + j}"
        lines += [
            f"lop3.b32 n0, {q}, low, 0x64006400, 0xEA;",  # 1024 + n
            f"lop3.b32 n1, {q}, high, 0x64006400, 0xEA;",  # 1024 + 16 n
            f"shr.b32 s, {q}, 8;",
            "lop3.b32 n2, s, low, 0x64006400, 0xEA;",
            "lop3.b32 n3, s, high, 0x64006400, 0xEA;",
            "sub.f16x2 n0, n0, bias;",
            "fma.rn.f16x2 n1, n1, part, off;",
            "sub.f16x2 n2, n2, bias;",
            "fma.rn.f16x2 n3, n3, part, off;",
        ]
        for i in range(4):
            x = f"${parts + 4 + 4 * i + j}"
            lines.append(f"mul.rn.f16x2 a{i}, n{i}, {x};" if j == 0 else f"fma.rn.f16x2 a{i}, n{i}, {x}, a{i};")
    if parts <= 2:
        lines += ["add.f16x2 a0, a0, a1;", "add.f16x2 a2, a2, a3;"]
    if parts == 1:
        lines.append("add.f16x2 a0, a0, a2;")
    for part in range(parts):
        name = f"a{4 // parts * part}"
        lines += [f"mov.b32 {{l, h}}, {name};", "cvt.f32.f16 f, l;", "cvt.f32.f16 g, h;", f"add.f32 ${part}, f, g;"]
    return "{\n" + "\n".join(lines) + "\n}"


_DOT_1, _DOT_2, _DOT_4 = (tl.constexpr(_dot_asm(parts)) for parts in (1, 2, 4))
_USES_1, _USES_2, _USES_4 = (tl.constexpr(",".join(["=&f"] * parts + ["r"] * 20)) for parts in (1, 2, 4))

# Two bfloat16 times a float32 -> two float16.
_HALVES = tl.constexpr("""
{
.reg .b32 l, h;
.reg .f32 f, g;
shl.b32 l, $1, 16;
and.b32 h, $1, 0xFFFF0000;
mov.b32 f, l;
mov.b32 g, h;
mul.f32 f, f, $2;
mul.f32 g, g, $2;
cvt.rn.f16x2.f32 $0, g, f;
}
""")

# The same, times two bfloat16 more.
_NORMED_HALVES = tl.constexpr("""
{
.reg .b32 l, h, u, v;
.reg .f32 f, g, a, b;
shl.b32 l, $1, 16;
and.b32 h, $1, 0xFFFF0000;
shl.b32 u, $3, 16;
and.b32 v, $3, 0xFFFF0000;
mov.b32 f, l;
mov.b32 g, h;
mov.b32 a, u;
mov.b32 b, v;
mul.f32 f, f, $2;
mul.f32 g, g, $2;
mul.f32 f, f, a;
mul.f32 g, g, b;
cvt.rn.f16x2.f32 $0, g, f;
}
""")


@triton.jit
def _halves(word, weight, factor, NORM: tl.constexpr, ASM: tl.constexpr):
    """Two bfloat16 (times two more) times factor, as two float16 in an int32."""
    if ASM:
        if NORM:
            return tl.inline_asm_elementwise(
                _NORMED_HALVES, "=r,r,f,r", [word, factor, weight], dtype=tl.int32, is_pure=True, pack=1
            )
        return tl.inline_asm_elementwise(_HALVES, "=r,r,f", [word, factor], dtype=tl.int32, is_pure=True, pack=1)
    low, high = low_of(word) * factor, high_of(word) * factor
    if NORM:
        low *= low_of(weight)
        high *= high_of(weight)
    low = low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16


@triton.jit
def _plain_dot(q, x0, x1, x2, x3):
    """What one word adds to each of four nibbles' sums, in float32."""
    p0 = _plain_pair(q, x0, 0)
    p1 = _plain_pair(q, x1, 4)
    p2 = _plain_pair(q, x2, 8)
    p3 = _plain_pair(q, x3, 12)
    return p0, p1, p2, p3


@triton.jit
def _plain_pair(q, x, SHIFT: tl.constexpr):
    low = (x & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    high = ((x >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return ((q >> SHIFT & 15) - 8).to(tl.float32) * low + ((q >> SHIFT + 16 & 15) - 8).to(tl.float32) * high


@triton.jit
def _four(tile, A: tl.constexpr, B: tl.constexpr):
    """[A, 4 B] -> four [A, B], or with A = 0 [4 B] -> four [B]: number j of each successive four."""
    if A:
        even, odd = tl.split(tl.reshape(tile, [A, B, 2, 2]))
    else:
        even, odd = tl.split(tl.reshape(tile, [B, 2, 2]))
    t0, t2 = tl.split(even)
    t1, t3 = tl.split(odd)
    return t0, t1, t2, t3


@triton.jit
def _measured(words, weight, largest, squares, NORM: tl.constexpr):
    """The largest of numbers (times weight) and the sum of their squares, with those so far."""
    low, high = low_of(words), high_of(words)
    squares += low * low + high * high
    if NORM:
        low *= low_of(weight)
        high *= high_of(weight)
    return tl.maximum(largest, tl.maximum(tl.abs(low), tl.abs(high))), squares


@triton.jit
def _joined(largest, squares, other_largest, other_squares):
    return tl.maximum(largest, other_largest), squares + other_squares


@triton.jit
def _pairs(words, weight, factor, BU: tl.constexpr, NORM: tl.constexpr, ASM: tl.constexpr):
    """The words of a plane as float16 pairs, four words of each unit."""
    w0, w1, w2, w3 = _four(_halves(words, weight, factor, NORM, ASM), 0, BU)
    return w0[None, :], w1[None, :], w2[None, :], w3[None, :]


@triton.jit
def _part(acc, part, sums, scale, zeros, ZEROS: tl.constexpr):
    """acc + scale * (part + (8 - zero) * sums)."""
    if ZEROS:
        part += (8 - zeros.to(tl.float32)) * sums
    return acc + part * scale.to(tl.float32)


@triton.jit
def _sum_of(x):
    """The sum of the two float16 in each int32."""
    low = (x & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low + ((x >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _sums(xs, ZEROS: tl.constexpr):
    """What zero points multiply: the sums of each plane's numbers [1, BU], 0 where there are none."""
    s0, s1, s2, s3 = 0.0, 0.0, 0.0, 0.0
    if ZEROS:
        s0 = _sum_of(xs[0]) + _sum_of(xs[1]) + _sum_of(xs[2]) + _sum_of(xs[3])
        s1 = _sum_of(xs[4]) + _sum_of(xs[5]) + _sum_of(xs[6]) + _sum_of(xs[7])
        s2 = _sum_of(xs[8]) + _sum_of(xs[9]) + _sum_of(xs[10]) + _sum_of(xs[11])
        s3 = _sum_of(xs[12]) + _sum_of(xs[13]) + _sum_of(xs[14]) + _sum_of(xs[15])
    return s0, s1, s2, s3


@triton.jit
def _grouped(
    at, group, last_group, PARTS: tl.constexpr, STEP: tl.constexpr, G: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """Numbers of PARTS successive groups (beyond the last one, its): scales or zeros [BN, BU]."""
    g0 = fetched(at + tl.minimum(group // G, last_group)[None, :], ASM)
    g1, g2, g3 = g0, g0, g0
    if PARTS >= 2:
        g1 = fetched(at + tl.minimum((group + STEP) // G, last_group)[None, :], ASM)
    if PARTS == 4:
        g2 = fetched(at + tl.minimum((group + 2 * STEP) // G, last_group)[None, :], ASM)
        g3 = fetched(at + tl.minimum((group + 3 * STEP) // G, last_group)[None, :], ASM)
    return g0, g1, g2, g3


@triton.jit
def _rows_times(
    q, xs, sums, scale, zero, BN: tl.constexpr, BU: tl.constexpr, PARTS: tl.constexpr, ZEROS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """[BN]: the products of rows of words with x."""
    q0, q1, q2, q3 = _four(q, BN, BU)
    s0, s1, s2, s3 = sums
    words = [q0, q1, q2, q3, xs[0], xs[1], xs[2], xs[3], xs[4], xs[5], xs[6], xs[7], xs[8], xs[9], xs[10], xs[11],
             xs[12], xs[13], xs[14], xs[15]]  # fmt: skip
    if not ASM:
        a0, a1, a2, a3 = _plain_dot(q0, xs[0], xs[4], xs[8], xs[12])
        b0, b1, b2, b3 = _plain_dot(q1, xs[1], xs[5], xs[9], xs[13])
        c0, c1, c2, c3 = _plain_dot(q2, xs[2], xs[6], xs[10], xs[14])
        d0, d1, d2, d3 = _plain_dot(q3, xs[3], xs[7], xs[11], xs[15])
        a0, a1, a2, a3 = a0 + b0 + c0 + d0, a1 + b1 + c1 + d1, a2 + b2 + c2 + d2, a3 + b3 + c3 + d3
    acc = tl.zeros([BN, BU], tl.float32)
    if PARTS == 1:
        if ASM:
            a0 = tl.inline_asm_elementwise(_DOT_1, _USES_1, words, dtype=tl.float32, is_pure=True, pack=1)
        else:
            a0 = a0 + a1 + a2 + a3
        acc = _part(acc, a0, s0 + s1 + s2 + s3, scale[0], zero[0], ZEROS)
    elif PARTS == 2:
        if ASM:
            a0, a2 = tl.inline_asm_elementwise(
                _DOT_2, _USES_2, words, dtype=(tl.float32, tl.float32), is_pure=True, pack=1
            )
        else:
            a0, a2 = a0 + a1, a2 + a3
        acc = _part(acc, a0, s0 + s1, scale[0], zero[0], ZEROS)
        acc = _part(acc, a2, s2 + s3, scale[1], zero[1], ZEROS)
    else:
        if ASM:
            a0, a1, a2, a3 = tl.inline_asm_elementwise(
                _DOT_4, _USES_4, words, dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1
            )
        acc = _part(acc, a0, s0, scale[0], zero[0], ZEROS)
        acc = _part(acc, a1, s1, scale[1], zero[1], ZEROS)
        acc = _part(acc, a2, s2, scale[2], zero[2], ZEROS)
        acc = _part(acc, a3, s3, scale[3], zero[3], ZEROS)
    return tl.sum(acc, 1)


@triton.jit
def gemv_int4(
    x, w, scales, zeros, norm, bias, residual, y, N, K, ldw, num_groups, eps, out_scale, blocks,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, ZEROS: tl.constexpr, NORM: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, BN: tl.constexpr,
    BU: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [N] = activation(out_scale * (W [N, K] (rms-normed) x [K] + bias)) (* up) + residual.

    x, norm: bfloat16 as int32 [K / 2]. w: int32 [N or 2N, ldw], chunks of 4 * WIDTH columns. scales, zeros uint8:
    [N or 2N, num_groups]. A unit is four words of a row: BU, a power of two, is at least a row's, so x is unpacked once
    and stays in registers while a program goes through its blocks of BN rows, every num_programs-th of `blocks`. The
    next block's weights are fetched while one is multiplied. PARTS: groups in a chunk, at most 4; STEP columns each.
    """
    units, columns = tl.arange(0, BU), tl.arange(0, 4 * BU)
    HALF: tl.constexpr = WIDTH // 2  # words of x in a plane
    STEP: tl.constexpr = 4 * WIDTH // PARTS
    G: tl.constexpr = GROUP if GROUP else 1 << 30
    gap = N.to(tl.int64) * ldw
    up_groups = N.to(tl.int64) * num_groups
    inside = columns[None, :] < ldw
    group = units // (WIDTH // 8) * (4 * WIDTH)
    block = tl.program_id(0)
    rows = tl.minimum(block * BN + tl.arange(0, BN), N - 1).to(tl.int64)[:, None]
    # The first weights are on their way before the kernel that makes x is done.
    at = w + rows * ldw + columns[None, :]
    q = tl.load(at, mask=None if EVEN else inside, other=None if EVEN else 0)
    q_up = tl.load(at + gap, mask=None if EVEN else inside, other=None if EVEN else 0) if GATED else q
    scale = _grouped(scales + rows * num_groups, group, num_groups - 1, PARTS, STEP, G, ASM)
    zero = _grouped(zeros + rows * num_groups, group, num_groups - 1, PARTS, STEP, G, ASM) if ZEROS else scale
    scale_up = scale
    zero_up = zero
    if GATED:
        scale_up = _grouped(scales + up_groups + rows * num_groups, group, num_groups - 1, PARTS, STEP, G, ASM)
        if ZEROS:
            zero_up = _grouped(zeros + up_groups + rows * num_groups, group, num_groups - 1, PARTS, STEP, G, ASM)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    place = columns // HALF * (4 * HALF) + columns % HALF
    x0 = tl.load(x + place, mask=2 * place < K, other=0)
    x1 = tl.load(x + place + HALF, mask=2 * (place + HALF) < K, other=0)
    x2 = tl.load(x + place + 2 * HALF, mask=2 * (place + 2 * HALF) < K, other=0)
    x3 = tl.load(x + place + 3 * HALF, mask=2 * (place + 3 * HALF) < K, other=0)
    n0, n1, n2, n3 = x0, x1, x2, x3
    if NORM:
        n0 = tl.load(norm + place, mask=2 * place < K, other=0)
        n1 = tl.load(norm + place + HALF, mask=2 * (place + HALF) < K, other=0)
        n2 = tl.load(norm + place + 2 * HALF, mask=2 * (place + 2 * HALF) < K, other=0)
        n3 = tl.load(norm + place + 3 * HALF, mask=2 * (place + 3 * HALF) < K, other=0)
    largest, squares = tl.zeros([4 * BU], tl.float32), tl.zeros([4 * BU], tl.float32)
    largest, squares = _measured(x0, n0, largest, squares, NORM)
    largest, squares = _measured(x1, n1, largest, squares, NORM)
    largest, squares = _measured(x2, n2, largest, squares, NORM)
    largest, squares = _measured(x3, n3, largest, squares, NORM)
    inverse = 1.0
    if NORM:
        largest, squares = tl.reduce((largest, squares), 0, _joined)
        inverse = tl.rsqrt(squares / K + eps)
    else:
        largest = tl.max(largest)
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 8)
    factor = ((261 - exponent) << 23).to(tl.float32, bitcast=True)  # the largest becomes at most 256
    inverse *= ((exponent - 7) << 23).to(tl.float32, bitcast=True)
    p0 = _pairs(x0, n0, factor, BU, NORM, ASM)
    p1 = _pairs(x1, n1, factor, BU, NORM, ASM)
    p2 = _pairs(x2, n2, factor, BU, NORM, ASM)
    p3 = _pairs(x3, n3, factor, BU, NORM, ASM)
    xs = p0 + p1 + p2 + p3
    sums = _sums(xs, ZEROS)
    while block < blocks:
        now, now_up, now_scale, now_zero, now_scale_up, now_zero_up = q, q_up, scale, zero, scale_up, zero_up
        out_rows = block * BN + tl.arange(0, BN)
        block += tl.num_programs(0)
        if block < blocks:
            rows = tl.minimum(block * BN + tl.arange(0, BN), N - 1).to(tl.int64)[:, None]
            at = w + rows * ldw + columns[None, :]
            q = tl.load(at, mask=None if EVEN else inside, other=None if EVEN else 0)
            scale = _grouped(scales + rows * num_groups, group, num_groups - 1, PARTS, STEP, G, ASM)
            if ZEROS:
                zero = _grouped(zeros + rows * num_groups, group, num_groups - 1, PARTS, STEP, G, ASM)
            if GATED:
                q_up = tl.load(at + gap, mask=None if EVEN else inside, other=None if EVEN else 0)
                scale_up = _grouped(scales + up_groups + rows * num_groups, group, num_groups - 1, PARTS, STEP, G, ASM)
                if ZEROS:
                    zero_up = _grouped(
                        zeros + up_groups + rows * num_groups, group, num_groups - 1, PARTS, STEP, G, ASM
                    )
        out = _rows_times(now, xs, sums, now_scale, now_zero, BN, BU, PARTS, ZEROS, ASM) * inverse
        up = out
        if GATED:
            up = _rows_times(now_up, xs, sums, now_scale_up, now_zero_up, BN, BU, PARTS, ZEROS, ASM) * inverse
        safe = tl.minimum(out_rows, N - 1)
        out = _finish(out, up, safe, bias, N, out_scale, BIAS, GATED, ACT)
        if RESIDUAL:
            out += tl.load(residual + safe).to(tl.float32)
        tl.store(y + safe, out.to(y.dtype.element_ty), mask=out_rows < N)
