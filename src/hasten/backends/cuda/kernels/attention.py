"""Attention over the paged KV cache, online softmax (Milakov and Gimelshein 2018; Dao et al. 2022).

The cache of a layer is [blocks, kv_heads, block_size, head_dim], one tensor for keys and one for values. A program
works for all query heads that share a KV head. `decode` is one token a sequence, keys cut into splits (flash decoding,
Dao et al. 2023), and rotates the query and stores the new key and value on the way; `prefill` is tiles of tokens.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def rotated(
    pointers, offsets, weight, angles, dims, valid, eps,
    D: tl.constexpr, ROT: tl.constexpr, NORM: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Rows of heads [R, DP] from `pointers + offsets` (RMS norm over the head, then rotary), float32 rounded to T.

    angles: a row of the rope table, ROT / 2 cosines and as many sines. valid: which of [R, DP] exist.
    """
    half: tl.constexpr = ROT // 2
    x = tl.load(pointers + offsets + dims[None, :], mask=valid, other=0).to(tl.float32)
    if NORM:
        inverse = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x = x * inverse * tl.load(weight + dims, mask=dims < D, other=0)[None, :]
    if ROT:
        turned = dims < ROT
        partner = tl.where(dims < half, dims + half, dims - half)
        partner = tl.where(turned, partner, dims)
        other = tl.load(pointers + offsets + partner[None, :], mask=valid & turned[None, :], other=0).to(tl.float32)
        if NORM:
            other = other * inverse * tl.load(weight + partner, mask=dims < D, other=0)[None, :]
        index = tl.where(dims < half, dims, dims - half)
        cosine = tl.load(angles + index, mask=turned, other=1)
        sine = tl.load(angles + half + index, mask=turned, other=0)
        sine = tl.where(dims < half, -sine, sine)
        x = x * cosine[None, :] + other * sine[None, :]
    return x.to(T)


@triton.jit
def angles_of(rope, position, length, original_max, num_positions, ROT: tl.constexpr, LONG: tl.constexpr):
    """The row of the rope table for a position; the second half of the table is for sequences beyond original_max."""
    row = position
    if LONG:
        row += tl.where(length > original_max, num_positions, 0)
    return rope + row.to(tl.int64) * ROT


@triton.jit
def rope_and_store(
    qkv, k_cache, v_cache, rope, q_norm, k_norm, positions, slots, lengths, ldq, original_max, num_positions, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GP: tl.constexpr,
    ROT: tl.constexpr, LONG: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rotate queries in place, rotate and store keys, store values: of one token and one KV head. Slot -1: no store."""
    token, kv_head = tl.program_id(0), tl.program_id(1)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    dims = tl.arange(0, DP)
    group = tl.arange(0, GP)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = qkv + token.to(tl.int64) * ldq
    position = tl.load(positions + token)
    length = tl.load(lengths + token) if LONG else position
    angles = angles_of(rope, position, length, original_max, num_positions, ROT, LONG)
    T: tl.constexpr = qkv.dtype.element_ty
    if ROT > 0 or NORM:
        valid = (group < GROUP)[:, None] & (dims < D)[None, :]
        heads = ((kv_head * GROUP + group) * D)[:, None]
        q = rotated(row, heads, q_norm, angles, dims, valid, eps, D, ROT, NORM, T)
        tl.debug_barrier()  # partners are read before they are overwritten
        tl.store(row + heads + dims[None, :], q, mask=valid)
    slot = tl.load(slots + token).to(tl.int64)
    at = (((slot // BLOCK) * KV_HEADS + kv_head) * BLOCK + slot % BLOCK) * D + dims[None, :]
    one = tl.zeros([1, 1], tl.int32)
    valid = (dims < D)[None, :] & (slot >= 0)
    k = rotated(row + (HEADS + kv_head) * D, one, k_norm, angles, dims, valid, eps, D, ROT, NORM, T)
    tl.store(k_cache + at, k.to(k_cache.dtype.element_ty), mask=valid)
    v = tl.load(row + (HEADS + KV_HEADS + kv_head) * D + dims[None, :], mask=valid, other=0)
    tl.store(v_cache + at, v.to(v_cache.dtype.element_ty), mask=valid)


@triton.jit
def _scores(s, scale, softcap, CAPPED: tl.constexpr):
    """Products -> scores in units of log2."""
    if CAPPED:
        s = softcap * (2 * tl.sigmoid(2 * s * scale / softcap) - 1)
        return s * LOG2E
    return s * (scale * LOG2E)


@triton.jit
def _fold(q, k, v, keep, m, total, acc, scale, softcap, CAPPED: tl.constexpr, MASK: tl.constexpr):
    """One tile of keys and values [BN, DP] into the running softmax: maximum m, sum total, weighted values acc."""
    s = _scores(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, CAPPED)
    if MASK:
        s = tl.where(keep, s, float("-inf"))
    top = tl.maximum(m, tl.max(s, 1))
    base = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(m - base)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return top, total, acc


@triton.jit
def _cached(cache, table, positions, kv_head, dims, valid, KV_HEADS: tl.constexpr, D: tl.constexpr,
            BLOCK: tl.constexpr, T: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """Keys or values [BN, DP] at `positions` of a sequence, as T; zero where not `valid` [BN, DP] (without MASK all
    are)."""
    block = tl.load(table + positions // BLOCK).to(tl.int64)
    at = ((block * KV_HEADS + kv_head) * BLOCK + positions % BLOCK) * D
    if MASK:
        x = tl.load(cache + at[:, None] + dims[None, :], mask=valid, other=0.0)
    else:
        x = tl.load(cache + at[:, None] + dims[None, :])
    return x.to(T)


@triton.jit
def decode(
    qkv, k_cache, v_cache, out, rope, q_norm, k_norm, parts, counters, owners, firsts, rows, sequences, positions,
    slots, lengths, tables, table_width, ldq, original_max, num_positions, scale, softcap, window, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GP: tl.constexpr, GQ: tl.constexpr,
    ROT: tl.constexpr, LONG: tl.constexpr, NORM: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
    BN: tl.constexpr, FUSED: tl.constexpr, EARLY: tl.constexpr, AT_ONCE: tl.constexpr, INDIRECT: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [T, heads * D]: attention of single tokens; program (part of an entry's keys, kv_head).

    owners [programs]: each one's entry, or -1. firsts [entries + 1]: the first program of each entry, see
    inputs.share_keys. rows, sequences: the token, and the row of `tables`, of each entry (INDIRECT; else both are the
    entry itself).
    FUSED (needed for EARLY): qkv is as the projection left it, and the new key and value are stored here; else
    rope_and_store ran before.
    table_width: a device number, elements between rows of tables. parts: float32 [programs, kv_heads, GQ, DP + 2], GQ
    the group's heads rounded up to a power of two; written where an entry has several programs. counters: zeros
    [entries, kv_heads], zeros again afterwards.
    """
    program, kv_head = tl.program_id(0), tl.program_id(1)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    T: tl.constexpr = qkv.dtype.element_ty
    dims, group, keys = tl.arange(0, DP), tl.arange(0, GP), tl.arange(0, BN)
    # EARLY: the step's inputs and older keys and values are there before the kernel that makes qkv is done.
    if PDL and not EARLY:
        gdc_wait()
        gdc_launch_dependents()
    entry = tl.load(owners + program)
    if entry < 0:
        if PDL and EARLY:
            gdc_wait()
            gdc_launch_dependents()
        return
    split = program - tl.load(firsts + entry)
    splits = tl.load(firsts + entry + 1) - tl.load(firsts + entry)
    token = tl.load(rows + entry) if INDIRECT else entry
    sequence = tl.load(sequences + entry) if INDIRECT else entry
    position, slot = tl.load(positions + token), tl.load(slots + token).to(tl.int64)
    table = tables + sequence.to(tl.int64) * tl.load(table_width)
    first = tl.where(window > 0, tl.maximum(0, position + 1 - window), 0)
    last = position if FUSED else position + 1  # cached keys are first .. last - 1
    share = tl.cdiv(tl.cdiv(last - first, splits), BN) * BN
    active = tl.maximum(1, tl.cdiv(last - first, tl.maximum(share, 1)))
    if split >= active:
        if PDL and EARLY:
            gdc_wait()
            gdc_launch_dependents()
        return
    start = first + split * share
    stop = tl.minimum(start + share, last)
    if EARLY:
        inside = start + keys < stop
        safe = tl.where(inside, start + keys, first)
        mask = inside[:, None] & (dims < D)[None, :]
        early_k = _cached(k_cache, table, safe, kv_head, dims, mask, KV_HEADS, D, BLOCK, T, True)
        early_v = _cached(v_cache, table, safe, kv_head, dims, mask, KV_HEADS, D, BLOCK, T, True)
    if PDL and EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = qkv + token.to(tl.int64) * ldq
    valid = (group < GROUP)[:, None] & (dims < D)[None, :]
    heads = ((kv_head * GROUP + group) * D)[:, None]
    if FUSED:
        length = tl.load(lengths + token) if LONG else position
        angles = angles_of(rope, position, length, original_max, num_positions, ROT, LONG)
        q = rotated(row, heads, q_norm, angles, dims, valid, eps, D, ROT, NORM, T)
    else:
        q = tl.load(row + heads + dims[None, :], mask=valid, other=0)
    m = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, DP], tl.float32)
    if EARLY:
        m, total, acc = _fold(q, early_k, early_v, inside[None, :], m, total, acc, scale, softcap, CAPPED, True)
        start += BN
    for at in tl.range(start, stop, BN, num_stages=STAGES):
        inside = at + keys < stop
        safe = tl.where(inside, at + keys, first)
        mask = inside[:, None] & (dims < D)[None, :]
        k = _cached(k_cache, table, safe, kv_head, dims, mask, KV_HEADS, D, BLOCK, T, True)
        v = _cached(v_cache, table, safe, kv_head, dims, mask, KV_HEADS, D, BLOCK, T, True)
        m, total, acc = _fold(q, k, v, inside[None, :], m, total, acc, scale, softcap, CAPPED, True)
    if FUSED and split == 0:
        one = tl.zeros([1, 1], tl.int32)
        there = (dims < D)[None, :]
        new_k = rotated(row + (HEADS + kv_head) * D, one, k_norm, angles, dims, there, eps, D, ROT, NORM, T)
        new_v = tl.load(row + (HEADS + KV_HEADS + kv_head) * D + dims[None, :], mask=there, other=0)
        kept_k, kept_v = new_k.to(k_cache.dtype.element_ty), new_v.to(v_cache.dtype.element_ty)
        place = (((slot // BLOCK) * KV_HEADS + kv_head) * BLOCK + slot % BLOCK) * D + dims[None, :]
        tl.store(k_cache + place, kept_k, mask=there)
        tl.store(v_cache + place, kept_v, mask=there)
        s = _scores(tl.sum(q.to(tl.float32) * kept_k.to(tl.float32), 1), scale, softcap, CAPPED)
        top = tl.maximum(m, s)
        shrink, p = tl.exp2(m - top), tl.exp2(s - top)
        total = total * shrink + p
        acc = acc * shrink[:, None] + p[:, None] * kept_v.to(tl.float32)
        m = top
    to = out + token.to(tl.int64) * (HEADS * D)
    if active > 1:
        WIDTH: tl.constexpr = DP + 2
        pair = entry * KV_HEADS + kv_head
        base = parts + ((program * KV_HEADS + kv_head) * GQ + group) * WIDTH
        real = group < GROUP
        tl.store(base[:, None] + dims[None, :], acc, mask=real[:, None])
        tl.store(base + DP, m, mask=real)
        tl.store(base + DP + 1, total, mask=real)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + pair, 1, sem="acq_rel")
        if arrived == active - 1:
            tl.store(counters + pair, 0)
            its = parts + ((program - split) * KV_HEADS + kv_head) * GQ * WIDTH
            _merge(its, to, kv_head, active, KV_HEADS * GQ * WIDTH, GROUP, GQ, D, DP, AT_ONCE)
    else:
        tl.store(to + heads + dims[None, :], (acc / total[:, None]).to(T), mask=valid)


@triton.jit
def _merge(
    parts, to, kv_head, active, gap, GROUP: tl.constexpr, GQ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The attention of one KV head's queries from `active` partial results, `gap` numbers apart, in their order,
    AT_ONCE at a time."""
    WIDTH: tl.constexpr = DP + 2
    heads, dims, ahead = tl.arange(0, GQ), tl.arange(0, DP), tl.arange(0, AT_ONCE)
    m = tl.full([GQ], float("-inf"), tl.float32)
    total = tl.zeros([GQ], tl.float32)
    acc = tl.zeros([GQ, DP], tl.float32)
    for first in tl.range(0, active, AT_ONCE, num_stages=1):
        there = ((first + ahead) < active)[:, None] & (heads < GROUP)[None, :]
        base = parts + (first + ahead)[:, None] * gap + heads[None, :] * WIDTH
        its_m = tl.load(base + DP, mask=there, other=float("-inf"), cache_modifier=".cg")
        its_total = tl.load(base + DP + 1, mask=there, other=0.0, cache_modifier=".cg")
        its_acc = tl.load(
            base[:, :, None] + dims[None, None, :], mask=there[:, :, None], other=0.0, cache_modifier=".cg"
        )
        top = tl.maximum(m, tl.max(its_m, 0))
        base_m = tl.where(top == float("-inf"), 0.0, top)
        shrink, grow = tl.exp2(m - base_m), tl.exp2(its_m - base_m[None, :])
        total = total * shrink + tl.sum(its_total * grow, 0)
        acc = acc * shrink[:, None] + tl.sum(its_acc * grow[:, :, None], 0)
        m = top
    valid = (heads < GROUP)[:, None] & (dims < D)[None, :]
    where = to + ((kv_head * GROUP + heads) * D)[:, None] + dims[None, :]
    tl.store(where, (acc / total[:, None]).to(to.dtype.element_ty), mask=valid)


@triton.jit
def prefill(
    qkv, k_cache, v_cache, out, tile_tokens, tile_counts, tile_sequences, positions, tables, table_width, ldq,
    scale, softcap, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GP: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [T, heads * D]: attention of tiles of up to BM / GP successive tokens; program (tile, kv_head).

    Tile i is tile_counts[i] (0: nothing to do) tokens from tile_tokens[i] on, of the sequence in row tile_sequences[i]
    of `tables`. Row r
    of the tile is token r // GP and query head r % GP of the group. Keys and values are in the cache already.
    """
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    T: tl.constexpr = qkv.dtype.element_ty
    dims, rows, keys = tl.arange(0, DP), tl.arange(0, BM), tl.arange(0, BN)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token, count = tl.load(tile_tokens + tile), tl.load(tile_counts + tile)
    if count == 0:
        return
    table = tables + tl.load(tile_sequences + tile).to(tl.int64) * tl.load(table_width)
    position = tl.load(positions + token)
    there = (rows // GP < count) & (rows % GP < GROUP)
    where = (token + rows // GP).to(tl.int64)
    head = (kv_head * GROUP + rows % GP) * D
    valid = there[:, None] & (dims < D)[None, :]
    q = tl.load(qkv + (where * ldq + head)[:, None] + dims[None, :], mask=valid, other=0)
    at_row = position + tl.minimum(rows // GP, count - 1)  # each row's position
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    stop = position + count
    first = 0
    full = 0
    if WINDOWED:
        first = tl.maximum(0, position + 1 - window) // BN * BN
        full = first
    else:
        full = (position + 1) // BN * BN  # tiles of keys that every row sees whole
    for at in tl.range(first, full, BN, num_stages=STAGES):
        mask = (keys >= 0)[:, None] & (dims < D)[None, :]
        k = _cached(k_cache, table, at + keys, kv_head, dims, mask, KV_HEADS, D, BLOCK, T, D != DP)
        v = _cached(v_cache, table, at + keys, kv_head, dims, mask, KV_HEADS, D, BLOCK, T, D != DP)
        m, total, acc = _fold(q, k, v, keys, m, total, acc, scale, softcap, CAPPED, False)
    for at in tl.range(full, stop, BN, num_stages=STAGES):
        inside = at + keys < stop
        safe = tl.where(inside, at + keys, position)
        keep = at + keys[None, :] <= at_row[:, None]
        if WINDOWED:
            keep = keep & (at + keys[None, :] > at_row[:, None] - window)
        mask = inside[:, None] & (dims < D)[None, :]
        k = _cached(k_cache, table, safe, kv_head, dims, mask, KV_HEADS, D, BLOCK, T, True)
        v = _cached(v_cache, table, safe, kv_head, dims, mask, KV_HEADS, D, BLOCK, T, True)
        m, total, acc = _fold(q, k, v, keep, m, total, acc, scale, softcap, CAPPED, True)
    to = out + (where * (HEADS * D) + head)[:, None] + dims[None, :]
    tl.store(to, (acc / total[:, None]).to(T), mask=valid)
