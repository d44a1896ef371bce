"""Attention of few single tokens, where latency is all: `decode_few`.

What the kernel that makes qkv has no part in is fetched while that still runs. Numbers stay with the threads that fetch
them, words of two bfloat16, and are multiplied there: on tensor cores each tensor would travel through shared memory,
one wait after the other. Code runs once and is fetched as it runs, so there is little of it: programs have two warps
and one or two of a KV head's query heads, whose others read the same keys from the L2 cache.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hasten.backends.cuda.kernels.attention import angles_of, capped
from hasten.backends.cuda.kernels.decode import merge_last, part_of, work_of
from hasten.backends.cuda.kernels.words import fetched, high_of, low_of, two_bfloat16


@triton.jit
def _max2(a0, a1, b0, b1):
    return tl.maximum(a0, b0), tl.maximum(a1, b1)


@triton.jit
def _sum2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _sum3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _sum4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _largest(x):
    """The largest of each of 1 or 2 tensors along axis 0, with one exchange between warps."""
    if len(x) == 1:
        found = (tl.max(x[0], 0),)
    else:
        found = tl.reduce(x, 0, _max2)
    return found


@triton.jit
def _sums(x):
    """Likewise the sum, of 1 to 4."""
    if len(x) == 1:
        found = (tl.sum(x[0], 0),)
    elif len(x) == 2:
        found = tl.reduce(x, 0, _sum2)
    elif len(x) == 3:
        found = tl.reduce(x, 0, _sum3)
    else:
        found = tl.reduce(x, 0, _sum4)
    return found


@triton.jit
def _angles(rope_row, words, ROT: tl.constexpr):
    """Cosines and signed sines of the two numbers of each word."""
    H: tl.constexpr = ROT // 4  # words of half the turned numbers
    turned, sign = words < 2 * H, tl.where(words < H, -1.0, 1.0)
    at = rope_row + 2 * tl.where(words < H, words, words - H)
    return (
        tl.load(at, mask=turned, other=1), tl.load(at + 1, mask=turned, other=1),
        tl.load(at + ROT // 2, mask=turned, other=0) * sign, tl.load(at + ROT // 2 + 1, mask=turned, other=0) * sign,
    )  # fmt: skip


@triton.jit
def _factors(angles, norm, words, partner, there, ROT: tl.constexpr, NORM: tl.constexpr):
    """What the two numbers of each word, and those of its partner, are multiplied with: norm weights times cosines, and
    times sines."""
    factors = angles
    if NORM:
        low, high = tl.load(norm + 2 * words, mask=there, other=0), tl.load(norm + 2 * words + 1, mask=there, other=0)
        if ROT:
            other_low = tl.load(norm + 2 * partner, mask=there, other=0)
            other_high = tl.load(norm + 2 * partner + 1, mask=there, other=0)
            factors = (low * angles[0], high * angles[1], other_low * angles[2], other_high * angles[3])
        else:
            factors = (low, high)
    return factors


@triton.jit
def _turned(word, other, inverse, factors, ROT: tl.constexpr, NORM: tl.constexpr):
    """Words of a head, RMS-normed and turned, [1, WP]; `other`: their partners."""
    low, high = low_of(word), high_of(word)
    if ROT:
        low = low * factors[0] + low_of(other) * factors[2]
        high = high * factors[1] + high_of(other) * factors[3]
    elif NORM:
        low, high = low * factors[0], high * factors[1]
    if NORM:
        low, high = low * inverse, high * inverse
    return two_bfloat16(low, high)[None, :]


@triton.jit
def _tile(
    cache, table, at, stop, keys, words, kv_head, KV_HEADS: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Words [BN, WP] of keys or values of a sequence from `at` on, 0 from `stop` on."""
    inside = at + keys < stop
    safe = tl.where(inside, at + keys, 0)
    block = fetched(table + safe // BLOCK, ASM).to(tl.int64)
    row = ((block * KV_HEADS + kv_head) * BLOCK + safe % BLOCK) * W
    return tl.load(cache + row[:, None] + words[None, :], mask=inside[:, None] & (words < W)[None, :], other=0)


@triton.jit
def _folded(k, v, inside, q, tops, totals, accs, scale, softcap, PART: tl.constexpr, CAPPED: tl.constexpr):
    """One tile of keys and values [BN, WP] into the running softmax of each query head: maximum, sum, weighted values
    of the first and of the second numbers of words."""
    low, high = low_of(k), high_of(k)
    s = ()
    for g in tl.static_range(PART):
        x, unit = capped(tl.sum(low * low_of(q[g]) + high * high_of(q[g]), 1), scale, softcap, CAPPED)
        s += (tl.where(inside, x * unit, float("-inf")),)
    low, high = low_of(v), high_of(v)
    largest = _largest(s)
    p, weighted, new_tops = (), (), ()
    for g in tl.static_range(PART):
        new_tops += (tl.maximum(tops[g], largest[g]),)
        p += (tl.exp2(s[g] - new_tops[g]),)
        weighted += (p[g][:, None] * low, p[g][:, None] * high)
    added, sums = _sums(p), _sums(weighted)
    new_totals, new_accs = (), ()
    for g in tl.static_range(PART):
        shrink = tl.exp2(tops[g] - new_tops[g])
        new_totals += (totals[g] * shrink + added[g],)
        new_accs += (accs[2 * g] * shrink + sums[2 * g], accs[2 * g + 1] * shrink + sums[2 * g + 1])
    return new_tops, new_totals, new_accs


@triton.jit
def decode_few(
    qkv, k_cache, v_cache, out, rope, q_norm, k_norm, parts, counters, work, tables, ldq, original_max, num_positions,
    scale, softcap, window, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PART: tl.constexpr, D: tl.constexpr, WP: tl.constexpr,
    ROT: tl.constexpr, LONG: tl.constexpr, NORM: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
    BN: tl.constexpr, AT_ONCE: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As decode.decode with FUSED, for PART query heads, 1 or 2, of a KV head; program (which heads, part of a
    sequence's keys). D and ROT are multiples of 4.

    qkv, k_cache, v_cache, out: bfloat16 as int32; ldq: words. WP: words of a head as a power of two. parts: float32
    [programs, HEADS / PART, PART * (2 WP + 2)]; counters: zeros [programs, HEADS / PART].
    """
    heads, program = tl.program_id(0), tl.program_id(1)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head = heads * PART // GROUP
    W: tl.constexpr = D // 2
    words, keys = tl.arange(0, WP), tl.arange(0, BN)
    there = words < W
    token, table_start, position, slot, length, splits, first_program = work_of(work, program)
    split = program - first_program
    _, at, stop, active = part_of(position, position + 1, split, splits, window, BN)
    # One branch, and on all that addresses depend on, or the loads that follow it would wait for those before.
    if (token < 0) | (table_start < 0) | (split >= active):
        return
    table = tables + table_start
    old = tl.minimum(stop, position)
    next_k = _tile(k_cache, table, at, old, keys, words, kv_head, KV_HEADS, W, BLOCK, ASM)
    next_v = _tile(v_cache, table, at, old, keys, words, kv_head, KV_HEADS, W, BLOCK, ASM)
    H: tl.constexpr = ROT // 4
    partner = tl.where(words < H, words + H, tl.where(words < 2 * H, words - H, words))
    angles = ()
    if ROT:
        angles = _angles(angles_of(rope, position, length, original_max, num_positions, ROT, LONG), words, ROT)
    q_factors = _factors(angles, q_norm, words, partner, there, ROT, NORM)
    k_factors = _factors(angles, k_norm, words, partner, there, ROT, NORM)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = qkv + token.to(tl.int64) * ldq
    raw, others, squares, inverses = (), (), (), ()
    for g in tl.static_range(PART + 1):
        head = row + (heads * PART + g if g < PART else HEADS + kv_head) * W
        raw += (tl.load(head + words, mask=there, other=0),)
        others += (tl.load(head + partner, mask=there, other=0),)
    new_v = tl.load(row + (HEADS + KV_HEADS + kv_head) * W + words, mask=there, other=0)
    for g in tl.static_range(PART + 1):
        squares += (low_of(raw[g]) * low_of(raw[g]) + high_of(raw[g]) * high_of(raw[g]),)
    if NORM:
        squares = _sums(squares)
    for g in tl.static_range(PART + 1):
        inverses += (tl.rsqrt(squares[g] / D + eps) if NORM else 1.0,)
    new_k = _turned(raw[PART], others[PART], inverses[PART], k_factors, ROT, NORM)
    new_v = new_v[None, :]
    q, tops, totals, accs = (), (), (), ()
    for g in tl.static_range(PART):
        q += (_turned(raw[g], others[g], inverses[g], q_factors, ROT, NORM),)
        tops += (float("-inf"),)
        totals += (0.0,)
        accs += (tl.zeros([WP], tl.float32), tl.zeros([WP], tl.float32))
    if (stop > position) & (heads * PART % GROUP == 0):
        place = (((slot // BLOCK) * KV_HEADS + kv_head) * BLOCK + slot % BLOCK) * W + words
        tl.store(k_cache + place[None, :], new_k, mask=there[None, :])
        tl.store(v_cache + place[None, :], new_v, mask=there[None, :])
    while at < stop:
        is_new = (at + keys == position)[:, None]
        now_k, now_v = tl.where(is_new, new_k, next_k), tl.where(is_new, new_v, next_v)
        inside = at + keys < stop
        at += BN
        if at < stop:
            next_k = _tile(k_cache, table, at, old, keys, words, kv_head, KV_HEADS, W, BLOCK, ASM)
            next_v = _tile(v_cache, table, at, old, keys, words, kv_head, KV_HEADS, W, BLOCK, ASM)
        tops, totals, accs = _folded(now_k, now_v, inside, q, tops, totals, accs, scale, softcap, PART, CAPPED)
    to = out + token.to(tl.int64) * (HEADS * W)
    if active > 1:
        base = parts + (program * (HEADS // PART) + heads) * (PART * (2 * WP + 2))
        for g in tl.static_range(PART):
            tl.store(base + (2 * g * WP + 2 * words), accs[2 * g])
            tl.store(base + (2 * g * WP + 2 * words + 1), accs[2 * g + 1])
            tl.store(base + 2 * PART * WP + g, tops[g])
            tl.store(base + 2 * PART * WP + PART + g, totals[g])
        halves = to.to(tl.pointer_type(tl.bfloat16))
        merge_last(parts, counters, halves, first_program, heads, active, HEADS // PART, PART, PART, D, 2 * WP, AT_ONCE)
    else:
        for g in tl.static_range(PART):
            word = two_bfloat16(accs[2 * g] / totals[g], accs[2 * g + 1] / totals[g])
            tl.store(to + (heads * PART + g) * W + words, word, mask=there)
