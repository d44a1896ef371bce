"""The small kernels between products: embedding, norms with the residual, activation, quantising rows, argmax."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hasten.backends.cuda.kernels.linear import activate


@triton.jit
def embed(
    table, position_table, tokens, sources, sampled, positions, out, H, scale,
    LEARNED: tl.constexpr, B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [T, H] = scale * table[token] (+ position_table[position]); program (token, piece of H).

    Where sources[t] >= 0 the token is sampled[sources[t]], what the step before chose.
    """
    row = tl.program_id(0)
    cols = tl.program_id(1) * B + tl.arange(0, B)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    source = tl.load(sources + row)
    token = tl.load(tokens + row)
    if source >= 0:
        token = tl.load(sampled + source)
    token = tl.maximum(token, 0)  # -1: the step before gave NaN, and its result says so
    mask = cols < H
    x = tl.load(table + token.to(tl.int64) * H + cols, mask=mask, other=0).to(tl.float32) * scale
    if LEARNED:
        position = tl.load(positions + row).to(tl.int64)
        x += tl.load(position_table + position * H + cols, mask=mask, other=0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * H + cols, x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _normed(x, weight, bias, cols, H, eps, LAYER: tl.constexpr):
    """RMS norm, or layer norm (LAYER), of a row that is zero beyond H."""
    mask = cols < H
    w = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    if LAYER:
        centred = tl.where(mask, x - tl.sum(x) / H, 0)
        return centred * tl.rsqrt(tl.sum(centred * centred) / H + eps) * w + tl.load(bias + cols, mask=mask, other=0)
    return x * tl.rsqrt(tl.sum(x * x) / H + eps) * w


@triton.jit
def _stored(v, T: tl.constexpr):
    """float32 as T, rounded to nearest; int8 by the bits that are left of a number beside 1.5 * 2^23."""
    if tl.int8 == T:
        return (v + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    return v.to(T)


@triton.jit
def add_norm(
    x, delta, added, out, scales, post, post_bias, pre, pre_bias, H, ldx, ldo, eps, scale,
    ADD: tl.constexpr, POST: tl.constexpr, PRE: tl.constexpr, LAYER: tl.constexpr, LARGEST: tl.constexpr,
    B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """added = x + scale * delta (POST: * norm(delta)); out = norm(added) (PRE); one row a program, float32 inside.

    LARGEST: out has 8 bits, each row divided by scales[row], so that its largest number becomes LARGEST.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, B)
    mask = cols < H
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    v = tl.load(x + row * ldx + cols, mask=mask, other=0).to(tl.float32)
    if ADD:
        d = tl.load(delta + row * H + cols, mask=mask, other=0).to(tl.float32)
        if POST:
            d = _normed(d, post, post_bias, cols, H, eps, LAYER)
        rounded = (v + scale * d).to(added.dtype.element_ty)
        tl.store(added + row * H + cols, rounded, mask=mask)
        v = rounded.to(tl.float32)
    if PRE:
        n = _normed(v, pre, pre_bias, cols, H, eps, LAYER)
        if LARGEST:
            n = n.to(added.dtype.element_ty).to(tl.float32)
            scale_out = tl.maximum(tl.max(tl.abs(n)), 1e-12) / LARGEST
            tl.store(scales + row, scale_out)
            n = n / scale_out
        tl.store(out + row * ldo + cols, _stored(n, out.dtype.element_ty), mask=mask)


@triton.jit
def activate_rows(
    x, out, scales, N, GATED: tl.constexpr, ACT: tl.constexpr, LARGEST: tl.constexpr, B: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [T, N] = activation(x[:, :N]) * x[:, N:] (GATED), else activation(x [T, N]); program (row, piece of N).

    LARGEST: out has 8 bits, with scales[row] as above, and one program takes a whole row (B >= N).
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * B + tl.arange(0, B)
    mask = cols < N
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    at = x + row * (2 * N if GATED else N) + cols
    v = activate(tl.load(at, mask=mask, other=0).to(tl.float32), ACT)
    if GATED:
        v *= tl.load(at + N, mask=mask, other=0).to(tl.float32)
    if LARGEST:
        scale_out = tl.maximum(tl.max(tl.abs(v)), 1e-12) / LARGEST
        tl.store(scales + row, scale_out)
        v = v / scale_out
    tl.store(out + row * N + cols, _stored(v, out.dtype.element_ty), mask=mask)


@triton.jit
def argmax(
    logits, sampled, best, best_ids, counters, V, PIECES: tl.constexpr, B: tl.constexpr, ROUNDS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """sampled [R] = the lowest id of the largest logit, -1 where one is NaN; program (row, piece of ROUNDS * B ids).

    best, best_ids: [R, PIECES]. counters: zeros [R], and zeros again afterwards.
    """
    row, piece = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    top = float("-inf")
    top_id = V
    for i in tl.range(0, ROUNDS):
        ids = (piece * ROUNDS + i) * B + tl.arange(0, B)
        x = tl.load(logits + row.to(tl.int64) * V + ids, mask=ids < V, other=float("-inf"))
        bad = x != x
        x = tl.where(bad, float("inf"), x)
        ids = tl.where(bad, -1, tl.where(ids < V, ids, V))
        its_top = tl.max(x)
        its_id = tl.min(tl.where(x == its_top, ids, V))
        top_id = tl.where(its_top > top, its_id, tl.where(its_top == top, tl.minimum(its_id, top_id), top_id))
        top = tl.maximum(top, its_top)
    tl.store(best + row * PIECES + piece, top)
    tl.store(best_ids + row * PIECES + piece, top_id)
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + row, 1, sem="acq_rel")
    if arrived == PIECES - 1:
        tl.store(counters + row, 0)
        pieces = tl.arange(0, triton.next_power_of_2(PIECES))
        tops = tl.load(best + row * PIECES + pieces, mask=pieces < PIECES, other=float("-inf"), cache_modifier=".cg")
        ids = tl.load(best_ids + row * PIECES + pieces, mask=pieces < PIECES, other=V, cache_modifier=".cg")
        tl.store(sampled + row, tl.min(tl.where(tops == tl.max(tops), ids, V)))
