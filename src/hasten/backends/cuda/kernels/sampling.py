"""The draw of base.SamplingBatch in one pass over the logits: groups of ids race, ids of the winner are walked. In
double, with the random numbers of reference_sampling.py (Philox 4x32-10, Salmon et al. 2011)."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hasten.backends.base import DRAW_GROUP

GROUP = tl.constexpr(DRAW_GROUP)
NEVER = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _weights(logits, groups, top, temperature, least, V, FILTERED: tl.constexpr):
    """exp(logit / temperature - top) of all ids of `groups` [B], float64 [B, GROUP]; 0 where an id may not be drawn."""
    ids = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(logits + ids, mask=ids < V, other=float("-inf"))
    weights = tl.exp(x.to(tl.float64) / temperature - top)
    if FILTERED:
        bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # no -0
        bits ^= (bits >> 31) & 0x7FFFFFFF
        key = (bits.to(tl.int64) << 32) + (V - 1 - ids)
        weights = tl.where(key >= least, weights, 0.0)
    return weights


@triton.jit
def race(
    logits, sampled, numbers, least, best, best_groups, counters, V, M,
    PIECES: tl.constexpr, B: tl.constexpr, ROUNDS: tl.constexpr, FILTERED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """sampled[row], the id of the row's largest logit, becomes a drawn id, but stays where it is -1; program (entry,
    piece of ROUNDS * B groups).

    numbers int64 [4, M]: of each entry the row, the bits of its temperature (float64), seed and counter. least int64
    [M] (FILTERED): the key, see sampling.keys, of the last id that may be drawn. best, best_groups: [M, PIECES].
    counters: zeros [M], and zeros again afterwards.
    """
    entry, piece = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.load(numbers + entry)
    temperature = tl.load(numbers + M + entry).to(tl.float64, bitcast=True)
    seed, counter = tl.load(numbers + 2 * M + entry), tl.load(numbers + 3 * M + entry)
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    token = tl.load(sampled + row)
    floor = tl.load(least + entry) if FILTERED else low.to(tl.int64)
    logits += row * V
    top = tl.load(logits + tl.maximum(token, 0)).to(tl.float64) / temperature
    zero = tl.zeros([B], tl.uint32)
    value = temperature * 0 - 1  # top may be NaN
    winner = piece * 0
    for i in tl.range(0, ROUNDS):
        groups = (piece * ROUNDS + i) * B + tl.arange(0, B)
        weights = _weights(logits, groups, top, temperature, floor, V, FILTERED)
        a, b, c, d = tl.philox(seed, zero + low, zero + high, (groups // 4 + 1).to(tl.uint32), zero, 10)
        word = tl.where(groups % 4 < 2, tl.where(groups % 4 == 0, a, b), tl.where(groups % 4 == 2, c, d))
        rival = -tl.log((word.to(tl.float64) + 0.5) * 2.3283064365386963e-10)
        score = tl.where(groups * GROUP < V, tl.sum(weights, 1) / rival, -1.0)
        its = tl.max(score)
        its_group = tl.min(tl.where(score == its, groups, NEVER))
        winner = tl.where(its > value, its_group, winner)
        value = tl.maximum(its, value)
    tl.store(best + entry * PIECES + piece, value)
    tl.store(best_groups + entry * PIECES + piece, winner)
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + entry, 1, sem="acq_rel")
    if arrived == PIECES - 1:
        tl.store(counters + entry, 0)
        pieces = tl.arange(0, triton.next_power_of_2(PIECES))
        there = pieces < PIECES
        values = tl.load(best + entry * PIECES + pieces, mask=there, other=-2.0, cache_modifier=".cg")
        winners = tl.load(best_groups + entry * PIECES + pieces, mask=there, other=NEVER, cache_modifier=".cg")
        first = tl.min(tl.where(values == tl.max(values), winners, NEVER))
        first = tl.minimum(first, (V - 1) // GROUP)  # of a row with NaN there may be none
        weights = _weights(logits, first + tl.arange(0, 1), top, temperature, floor, V, FILTERED)
        one = tl.zeros([1, 1], tl.uint32)
        a, b, c, d = tl.philox(seed, one + low, one + high, one, one, 10)
        uniform = (((a.to(tl.uint64) << 32) | b.to(tl.uint64)) >> 11).to(tl.float64) * 1.1102230246251565e-16
        cumulative = tl.cumsum(weights, 1)
        passed = tl.sum((cumulative <= uniform * tl.max(cumulative)).to(tl.int32))
        last = tl.max(tl.where(weights > 0, tl.arange(0, GROUP)[None, :], 0))
        tl.store(sampled + row, tl.where(token < 0, token, first * GROUP + tl.minimum(passed, last)))
