"""Attention over the paged KV cache, online softmax (Milakov and Gimelshein 2018; Dao et al. 2022).

The cache of a layer is [blocks, kv_heads, block_size, head_dim], one tensor for keys and one for values. A program
works for all query heads that share a KV head. `prefill` is tiles of tokens; single tokens are in decode.py.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hasten.backends.cuda.kernels.words import fetched

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
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HP: tl.constexpr,
    KP: tl.constexpr, ROT: tl.constexpr, LONG: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Rotate a token's queries in place, rotate and store its keys, store its values. Slot -1: no store. HP, KP: heads
    and KV heads rounded up to powers of two."""
    token = tl.program_id(0)
    dims, heads, kv_heads = tl.arange(0, DP), tl.arange(0, HP)[:, None], tl.arange(0, KP)[:, None]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = qkv + token.to(tl.int64) * ldq
    position = tl.load(positions + token)
    length = tl.load(lengths + token) if LONG else position
    angles = angles_of(rope, position, length, original_max, num_positions, ROT, LONG)
    T: tl.constexpr = qkv.dtype.element_ty
    if ROT > 0 or NORM:
        valid = (heads < HEADS) & (dims < D)[None, :]
        q = rotated(row, heads * D, q_norm, angles, dims, valid, eps, D, ROT, NORM, T)
        tl.debug_barrier()  # partners are read before they are overwritten
        tl.store(row + heads * D + dims[None, :], q, mask=valid)
    slot = tl.load(slots + token).to(tl.int64)
    at = ((slot // BLOCK * KV_HEADS + kv_heads) * BLOCK + slot % BLOCK) * D + dims[None, :]
    valid = (kv_heads < KV_HEADS) & (dims < D)[None, :] & (slot >= 0)
    k = rotated(row, (HEADS + kv_heads) * D, k_norm, angles, dims, valid, eps, D, ROT, NORM, T)
    tl.store(k_cache + at, k.to(k_cache.dtype.element_ty), mask=valid)
    v = tl.load(row + (HEADS + KV_HEADS + kv_heads) * D + dims[None, :], mask=valid, other=0)
    tl.store(v_cache + at, v.to(v_cache.dtype.element_ty), mask=valid)


@triton.jit
def capped(s, scale, softcap, CAPPED: tl.constexpr):
    """Products of queries and keys, and by what they are scores in units of log2. scale > 0."""
    unit = scale * LOG2E
    if CAPPED:
        s = softcap * (2 * tl.sigmoid(2 * s * scale / softcap) - 1)
        unit = LOG2E
    return s, unit


@triton.jit
def fold(s, unit, v, m, total, acc):
    """Scores s * unit of a tile of keys, whose values v are [BN, DP], into the running softmax: maximum m, sum total,
    weighted values acc. -inf: not seen."""
    top = tl.maximum(m, tl.max(s, 1) * unit)
    base = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(s * unit - base[:, None])
    shrink = tl.exp2(m - base)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return top, total, acc


@triton.jit
def cached(cache, table, positions, kv_head, dims, valid, KV_HEADS: tl.constexpr, D: tl.constexpr,
            BLOCK: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """Keys or values [BN, DP] at `positions` of a sequence, as T; zero where not `valid` [BN, DP]."""
    block = tl.load(table + positions // BLOCK).to(tl.int64)
    at = ((block * KV_HEADS + kv_head) * BLOCK + positions % BLOCK) * D
    return tl.load(cache + at[:, None] + dims[None, :], mask=valid, other=0.0).to(T)


@triton.jit
def blocks_of(table, at, last, BLOCK: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr):
    """Blocks of the positions at .. at + BN - 1, of those beyond `last` that of `last`. Loads of Triton's own would go
    through shared memory, in stages that keys then do not have."""
    found = ()
    for start in tl.static_range(0, BN, BLOCK):
        found += (fetched(table + tl.minimum(at + start, last) // BLOCK, ASM),)
    return found


@triton.jit
def tile_of(
    k_cache, v_cache, blocks, at, last, keys, kv_head, dims, KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, BN: tl.constexpr, T: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Keys and values [BN, DP] at positions at + keys [BN], which lie in `blocks`, as T; where not WHOLE, for positions
    beyond `last` those at `last`. at is a multiple of BN, and BN and BLOCK are powers of two."""
    first = tl.zeros([BN], tl.int64) + (blocks[0].to(tl.int64) * KV_HEADS + kv_head) * BLOCK
    for i in tl.static_range(1, BN // BLOCK):
        first = tl.where(keys < i * BLOCK, first, (blocks[i].to(tl.int64) * KV_HEADS + kv_head) * BLOCK)
    if WHOLE:
        first += at & (BLOCK - 1)
        inside = keys % BLOCK
    else:
        inside = tl.minimum(at + keys, last) & (BLOCK - 1)
    here = (first + inside) * D
    mask, other = None if D == DP else (dims < D)[None, :], None if D == DP else 0.0
    k = tl.load(k_cache + here[:, None] + dims[None, :], mask=mask, other=other)
    v = tl.load(v_cache + here[:, None] + dims[None, :], mask=mask, other=other)
    return k.to(T), v.to(T)


@triton.jit
def prefill(
    qkv, k_cache, v_cache, out, tile_tokens, tile_counts, tile_sequences, positions, tables, table_width, ldq,
    scale, softcap, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GP: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [T, heads * D]: attention of tiles of up to BM / GP successive tokens; program (tile, kv_head).

    Tile i is tile_counts[i] (0: nothing to do) tokens from tile_tokens[i] on, of the sequence in row tile_sequences[i]
    of `tables`. Row r of the tile is token r // GP and query head r % GP of the group. Keys and values are in the
    cache already.
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
    at_row = (position + tl.minimum(rows // GP, count - 1))[:, None]  # each row's position
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    last = position + count - 1
    first, full = 0, (position + 1) // BN * BN  # tiles of keys that every row sees whole
    if WINDOWED:
        first = tl.maximum(0, position + 1 - window) // BN * BN
        full = first
    blocks = blocks_of(table, first, last, BLOCK, BN, ASM)
    for at in tl.range(first, full, BN, num_stages=STAGES):
        k, v = tile_of(k_cache, v_cache, blocks, at, last, keys, kv_head, dims, KV_HEADS, D, DP, BLOCK, BN, T, True)
        blocks = blocks_of(table, at + BN, last, BLOCK, BN, ASM)  # of the next, which wait for nothing then
        s, unit = capped(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, CAPPED)
        m, total, acc = fold(s, unit, v, m, total, acc)
    for at in tl.range(full, last + 1, BN, num_stages=STAGES):
        k, v = tile_of(k_cache, v_cache, blocks, at, last, keys, kv_head, dims, KV_HEADS, D, DP, BLOCK, BN, T, False)
        blocks = blocks_of(table, at + BN, last, BLOCK, BN, ASM)
        s, unit = capped(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, CAPPED)
        seen = at + keys[None, :] <= at_row
        if WINDOWED:
            seen = seen & (at + keys[None, :] > at_row - window)
        m, total, acc = fold(tl.where(seen, s, float("-inf")), unit, v, m, total, acc)
    to = out + (where * (HEADS * D) + head)[:, None] + dims[None, :]
    tl.store(to, (acc / total[:, None]).to(T), mask=valid)
