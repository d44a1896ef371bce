"""Attention of single tokens, keys cut into parts (flash decoding, Dao et al. 2023); rotates the query and stores the
new key and value on the way."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hasten.backends.cuda.kernels.attention import angles_of, cached, capped, fold, rotated


@triton.jit
def work_of(work, program):
    """A row of inputs.decode_work, of inputs.WORK numbers: token, start of the block table, position, slot, length,
    programs, the first of them."""
    at = work + program * 8
    token, table_start, position, slot = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3).to(tl.int64)
    return token, table_start, position, slot, tl.load(at + 4), tl.load(at + 5), tl.load(at + 6)


@triton.jit
def part_of(position, last, split, splits, window, BN: tl.constexpr):
    """Of the cached keys up to `last`: the first that is seen, first and end of a part in whole tiles of BN, and how
    many parts there are."""
    first = tl.where(window > 0, tl.maximum(0, position + 1 - window), 0)
    share = tl.cdiv(tl.cdiv(last - first, splits), BN) * BN
    active = tl.maximum(1, tl.cdiv(last - first, tl.maximum(share, 1)))
    start = first + split * share
    return first, start, tl.minimum(start + share, last), active


@triton.jit
def merge_last(
    parts, counters, to, first_program, kv_head, active, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    GQ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The program that comes last of `active` ones puts together what they have left in `parts`, in their order,
    AT_ONCE at a time. A thread has its numbers of every part, so that nothing is exchanged: 3 * AT_ONCE * GQ * DP of
    them in all threads together."""
    tl.debug_barrier()
    counter = counters + first_program * KV_HEADS + kv_head
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    if arrived == active - 1:
        tl.store(counter, 0)
        columns = tl.arange(0, GQ * DP)
        head, dim = columns // DP, columns % DP
        real = head < GROUP
        m = tl.full([GQ * DP], float("-inf"), tl.float32)
        total = tl.zeros([GQ * DP], tl.float32)
        acc = tl.zeros([GQ * DP], tl.float32)
        for first in tl.range(0, active, AT_ONCE, num_stages=1):
            ms, totals, accs = (), (), ()
            top = m
            for i in tl.static_range(AT_ONCE):
                there = real & (first + i < active)
                base = parts + ((first_program + first + i) * KV_HEADS + kv_head) * (GQ * (DP + 2))
                ms += (tl.load(base + GQ * DP + head, mask=there, other=float("-inf"), cache_modifier=".cg"),)
                totals += (tl.load(base + GQ * DP + GQ + head, mask=there, other=0.0, cache_modifier=".cg"),)
                accs += (tl.load(base + columns, mask=there, other=0.0, cache_modifier=".cg"),)
            for i in tl.static_range(AT_ONCE):
                top = tl.maximum(top, ms[i])
            top_or_0 = tl.where(real, top, 0.0)
            shrink = tl.exp2(m - top_or_0)
            total, acc = total * shrink, acc * shrink
            for i in tl.static_range(AT_ONCE):
                grow = tl.exp2(ms[i] - top_or_0)
                total += totals[i] * grow
                acc += accs[i] * grow
            m = top
        where = to + (kv_head * GROUP + head) * D + dim
        tl.store(where, (acc / tl.where(real, total, 1.0)).to(to.dtype.element_ty), mask=real & (dim < D))


@triton.jit
def decode(
    qkv, k_cache, v_cache, out, rope, q_norm, k_norm, parts, counters, work, tables, ldq, original_max, num_positions,
    scale, softcap, window, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GP: tl.constexpr, GQ: tl.constexpr,
    ROT: tl.constexpr, LONG: tl.constexpr, NORM: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
    BN: tl.constexpr, FUSED: tl.constexpr, EARLY: tl.constexpr, AT_ONCE: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [T, heads * D]: attention of single tokens; program (kv_head, part of a sequence's keys).

    work [programs, inputs.WORK]: see inputs.decode_work.
    FUSED (needed for EARLY): qkv is as the projection left it, and the new key and value are stored here; else
    rope_and_store ran before. EARLY: the first tile of keys is fetched before the kernel that makes qkv is done.
    parts: float32 [programs, kv_heads, GQ * (DP + 2)], GQ the group's heads rounded up to a power of two: weighted
    values, maxima, sums; written where a sequence has several programs. counters: zeros [programs, kv_heads], zeros
    again afterwards.
    """
    kv_head, program = tl.program_id(0), tl.program_id(1)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    T: tl.constexpr = qkv.dtype.element_ty
    dims, group, keys = tl.arange(0, DP), tl.arange(0, GP), tl.arange(0, BN)
    # The step's inputs and older keys and values are there before the kernel that makes qkv is done.
    token, table_start, position, slot, length, splits, first_program = work_of(work, program)
    last = position if FUSED else position + 1  # cached keys are first .. last - 1
    split = program - first_program
    first, start, stop, active = part_of(position, last, split, splits, window, BN)
    # One branch, and on all that addresses depend on, or the loads that follow it would wait for those before.
    if (token < 0) | (table_start < 0) | (split >= active):
        # Of a step of prompts no program has a token, and the next kernel waits for this one alone.
        if PDL and not FUSED:
            gdc_wait()
            gdc_launch_dependents()
        return
    table = tables + table_start
    if PDL and not EARLY:
        gdc_wait()
        gdc_launch_dependents()
    if EARLY:
        inside = start + keys < stop
        safe = tl.where(inside, start + keys, first)
        mask = inside[:, None] & (dims < D)[None, :]
        early_k = cached(k_cache, table, safe, kv_head, dims, mask, KV_HEADS, D, BLOCK, T)
        early_v = cached(v_cache, table, safe, kv_head, dims, mask, KV_HEADS, D, BLOCK, T)
    if PDL and EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = qkv + token.to(tl.int64) * ldq
    valid = (group < GROUP)[:, None] & (dims < D)[None, :]
    heads = ((kv_head * GROUP + group) * D)[:, None]
    if FUSED:
        angles = angles_of(rope, position, length, original_max, num_positions, ROT, LONG)
        q = rotated(row, heads, q_norm, angles, dims, valid, eps, D, ROT, NORM, T)
    else:
        q = tl.load(row + heads + dims[None, :], mask=valid, other=0)
    m = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, DP], tl.float32)
    if EARLY:
        s, unit = capped(tl.dot(q, tl.trans(early_k), input_precision="ieee"), scale, softcap, CAPPED)
        m, total, acc = fold(tl.where(inside[None, :], s, float("-inf")), unit, early_v, m, total, acc)
        start += BN
    for at in tl.range(start, stop, BN, num_stages=STAGES):
        inside = at + keys < stop
        safe = tl.where(inside, at + keys, first)
        mask = inside[:, None] & (dims < D)[None, :]
        k = cached(k_cache, table, safe, kv_head, dims, mask, KV_HEADS, D, BLOCK, T)
        v = cached(v_cache, table, safe, kv_head, dims, mask, KV_HEADS, D, BLOCK, T)
        s, unit = capped(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, CAPPED)
        m, total, acc = fold(tl.where(inside[None, :], s, float("-inf")), unit, v, m, total, acc)
    if FUSED and split == 0:
        one = tl.zeros([1, 1], tl.int32)
        there = (dims < D)[None, :]
        new_k = rotated(row + (HEADS + kv_head) * D, one, k_norm, angles, dims, there, eps, D, ROT, NORM, T)
        new_v = tl.load(row + (HEADS + KV_HEADS + kv_head) * D + dims[None, :], mask=there, other=0)
        kept_k, kept_v = new_k.to(k_cache.dtype.element_ty), new_v.to(v_cache.dtype.element_ty)
        place = (((slot // BLOCK) * KV_HEADS + kv_head) * BLOCK + slot % BLOCK) * D + dims[None, :]
        tl.store(k_cache + place, kept_k, mask=there)
        tl.store(v_cache + place, kept_v, mask=there)
        new, its_unit = capped(tl.sum(q.to(tl.float32) * kept_k.to(tl.float32), 1), scale, softcap, CAPPED)
        top = tl.maximum(m, new * its_unit)
        shrink, p = tl.exp2(m - top), tl.exp2(new * its_unit - top)
        total = total * shrink + p
        acc = acc * shrink[:, None] + p[:, None] * kept_v.to(tl.float32)
        m = top
    to = out + token.to(tl.int64) * (HEADS * D)
    if active > 1:
        base = parts + (program * KV_HEADS + kv_head) * (GQ * (DP + 2))
        real = group < GROUP
        tl.store(base + group[:, None] * DP + dims[None, :], acc, mask=real[:, None])
        tl.store(base + GQ * DP + group, m, mask=real)
        tl.store(base + GQ * DP + GQ + group, total, mask=real)
        merge_last(parts, counters, to, first_program, kv_head, active, KV_HEADS, GROUP, GQ, D, DP, AT_ONCE)
    else:
        tl.store(to + heads + dims[None, :], (acc / total[:, None]).to(T), mask=valid)
