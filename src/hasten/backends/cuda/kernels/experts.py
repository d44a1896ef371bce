"""An MLP of which a router runs some experts, for few rows: `route` chooses, the products of linear.py compute the rows
of `gate` and `up` that were chosen, and `gemv_columns` (or linear.skinny) reads those columns of `down`.

What is chosen stays on the device: grids are as large as if the most experts that can were running.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hasten.backends.cuda.kernels.linear import as_float32


@triton.jit
def route(
    x, router, norm, scores, running, taken, counters, T, E, K, active, eps,
    NORM: tl.constexpr, EP: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """taken int8 [T, E] = whether the expert's score, router [E, K] times x [T, K] (rms-normed), is among the `active`
    largest of its row, the first ones where scores are equal. running [1 + E] = how many experts any row has taken, and
    which, in their order. Program (expert, row); the last one chooses, BT rows at a time. scores: float32 [T, E].
    """
    expert, row = tl.program_id(0), tl.program_id(1)
    cols = tl.arange(0, BK)
    inside = cols < K
    weights = tl.load(router + expert * K + cols, mask=inside, other=0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    xs = tl.load(x + row * K + cols, mask=inside, other=0).to(tl.float32)
    inverse = 1.0
    if NORM:
        inverse = tl.rsqrt(tl.sum(xs * xs) / K + eps)
        xs *= tl.load(norm + cols, mask=inside, other=0).to(tl.float32)
    tl.store(scores + row * E + expert, tl.sum(weights * xs) * inverse)
    tl.debug_barrier()
    arrived = tl.atomic_add(counters, 1, sem="acq_rel")
    if arrived != E * T - 1:
        return
    tl.store(counters, 0)
    ids = tl.arange(0, EP)
    wanted = tl.zeros([EP], tl.int32)
    for first in tl.range(0, T, BT, num_stages=1):
        rows = first + tl.arange(0, BT)
        mask = (rows < T)[:, None] & (ids < E)[None, :]
        at = rows[:, None] * E + ids[None, :]
        mine = tl.load(scores + at, mask=mask, other=float("-inf"), cache_modifier=".cg")
        # Padding of a graph's step may hold anything; a row of NaN would have all run, more than grids are made for.
        mine = tl.where(mine == mine, mine, float("-inf"))
        better = mine[:, None, :] > mine[:, :, None]
        before = (mine[:, None, :] == mine[:, :, None]) & (ids[None, None, :] < ids[None, :, None])
        rank = tl.sum((better | before).to(tl.int32), 2)
        runs = ((rank < active) & mask).to(tl.int32)
        tl.store(taken + at, runs.to(tl.int8), mask=mask)
        wanted = tl.maximum(wanted, tl.max(runs, 0))
    slot = tl.cumsum(wanted, 0) - wanted
    tl.store(running + 1 + slot, ids, mask=wanted > 0)
    tl.store(running, tl.sum(wanted))


@triton.jit
def gemv_columns(
    x, w, scales, bias, residual, y, running, active, size, N, K, out_scale,
    SCALED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [N] = out_scale * (W [N, K] x [K] + bias) + residual over the columns of `active` experts, `size` of each.

    W is dense, or fp8 or int8 with scales float32 [N] (SCALED).
    """
    out_rows = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.minimum(out_rows, N - 1)
    cols = tl.arange(0, BK)
    pointers = w + rows[:, None].to(tl.int64) * K + cols[None, :]
    per_expert = tl.cdiv(size, BK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros([BN, BK], tl.float32)
    for step in tl.range(0, active * per_expert, num_stages=STAGES):
        within = step % per_expert * BK
        k = tl.load(running + 1 + step // per_expert) * size + within
        inside = within + cols < size
        xs = tl.load(x + k + cols, mask=None if EVEN else inside, other=None if EVEN else 0.0).to(tl.float32)
        mask = None if EVEN else inside[None, :]
        tile = tl.load(pointers + k, mask=mask, other=None if EVEN else 0.0, cache_modifier=".cg")
        acc += as_float32(tile) * xs[None, :]
    out = tl.sum(acc, 1)
    if SCALED:
        out *= tl.load(scales + rows)
    if BIAS:
        out += tl.load(bias + rows).to(tl.float32)
    out *= out_scale
    if RESIDUAL:
        out += tl.load(residual + rows).to(tl.float32)
    tl.store(y + out_rows, out.to(y.dtype.element_ty), mask=out_rows < N)
