"""Choosing a token from logits, in numpy: penalties, temperature, top-k, top-p, min-p, and a counter-based draw.

The order and the meaning of every part, the draw's too, are those of backends.base.SamplingBatch. Two tokens of equal
logit rank by id, the lower first.
"""

import numpy as np
from numpy.typing import NDArray

from hasten.backends.base import DRAW_GROUP, Float32, Int32, Sampled, SamplingBatch

Float64 = NDArray[np.float64]
_MASK = 0xFFFFFFFF


def sample_rows(logits: Float32, params: SamplingBatch) -> Sampled:
    """One token for each row of logits [R, V], and the log-probabilities that its row asks for."""
    rows = len(logits)
    if not params.any_special:
        return Sampled(np.array([np.argmax(row) for row in logits], np.int32).reshape(rows))
    logprobs = np.stack([log_softmax(row) for row in logits]) if rows else logits.astype(np.float64)
    tokens = np.array([_sample_row(logits[row], params, row) for row in range(rows)], np.int32)
    return _with_logprobs(tokens, logprobs, params)


def uniform(seed: int, counter: int) -> float:
    """A number in [0, 1) that depends on the two 64-bit numbers only: the first 53 bits of Philox 4x32-10 (Salmon et
    al. 2011), key (seed low, seed high), counter (counter low, counter high, 0, 0)."""
    high, low = philox((counter & _MASK, counter >> 32, 0, 0), (seed & _MASK, seed >> 32))[:2]
    return ((high << 32 | low) >> 11) * 2.0**-53


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox 4x32 with ten rounds: four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def log_softmax(row: Float32) -> Float64:
    """Log-probabilities of one row of logits, in double."""
    shifted = row.astype(np.float64) - float(row.max())
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def _sample_row(logits: Float32, params: SamplingBatch, row: int) -> int:
    adjusted = _adjust(logits, params, row)
    temperature = float(params.temperature[row])
    if temperature == 0:
        return int(np.argmax(adjusted))
    scaled = adjusted.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities[~_kept(adjusted, probabilities, params, row)] = 0
    return draw(probabilities, int(params.seeds[row]), int(params.counters[row]))


def draw(weights: Float64, seed: int, counter: int) -> int:
    """One id, in proportion to its weight [V]: a race of groups, then a walk through the winner."""
    count = -(-len(weights) // DRAW_GROUP)
    groups = np.zeros((count, DRAW_GROUP))
    groups.reshape(-1)[: len(weights)] = weights
    winner = int(np.argmax(groups.sum(axis=1) / exponentials(seed, counter, count)))
    cumulative = np.cumsum(groups[winner])
    within = np.searchsorted(cumulative, uniform(seed, counter) * cumulative[-1], side="right")
    return winner * DRAW_GROUP + int(min(within, np.flatnonzero(groups[winner])[-1]))


def exponentials(seed: int, counter: int, count: int) -> Float64:
    """`count` exponential numbers that depend on the two 64-bit numbers and their index only: -log((w + 1/2) / 2^32)
    of the words w of Philox at (counter low, counter high, 1, 0), (.., 2, 0) and so on."""
    low, shift = np.uint64(_MASK), np.uint64(32)
    blocks = np.arange(1, -(-count // 4) + 1, dtype=np.uint64)
    c0, c1 = (np.full_like(blocks, part) for part in (counter & _MASK, counter >> 32))
    c2, c3 = blocks, np.zeros_like(blocks)
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    words = np.stack([c0, c1, c2, c3], axis=1).reshape(-1)[:count]
    return -np.log((words.astype(np.float64) + 0.5) * 2.0**-32)


def _adjust(logits: Float32, params: SamplingBatch, row: int) -> Float32:
    """Penalties for tokens already seen, then biases."""
    out = logits.copy()
    seen = slice(int(params.seen_offsets[row]), int(params.seen_offsets[row + 1]))
    ids, counts = params.seen_ids[seen], params.seen_counts[seen]
    values = out[ids]
    values = np.where(values > 0, values / params.repetition[row], values * params.repetition[row])
    values = values - params.presence[row] * (counts > 0) - params.frequency[row] * counts
    out[ids] = values.astype(np.float32)
    bias = slice(int(params.bias_offsets[row]), int(params.bias_offsets[row + 1]))
    out[params.bias_ids[bias]] += params.bias_values[bias]
    return out


def _kept(logits: Float32, probabilities: Float64, params: SamplingBatch, row: int) -> NDArray[np.bool_]:
    """Which tokens may be drawn: each filter works on what the one before has left."""
    # Falling, ties by id. By logit: of logits that differ, temperature and exp may make equal probabilities.
    order = np.argsort(-logits, kind="stable")
    top_k, top_p, min_p = int(params.top_k[row]), float(params.top_p[row]), float(params.min_p[row])
    if top_k > 0:
        order = order[:top_k]
    if top_p < 1:
        cumulative = np.cumsum(probabilities[order])
        before = cumulative - probabilities[order]
        order = order[(before < top_p * cumulative[-1]) | (np.arange(len(order)) == 0)]
    if min_p > 0:
        order = order[probabilities[order] >= min_p * probabilities[order[0]]]
    kept = np.zeros(len(probabilities), np.bool_)
    kept[order] = True
    return kept


def _with_logprobs(tokens: Int32, logprobs: Float64, params: SamplingBatch) -> Sampled:
    rows = np.arange(len(tokens))
    chosen = targets = top_ids = top_logprobs = None
    if (params.num_logprobs >= 0).any():
        chosen = logprobs[rows, tokens].astype(np.float32)
        top_ids, top_logprobs = _top(logprobs, params.num_logprobs)
    if (params.targets >= 0).any():
        wanted = np.maximum(params.targets, 0)
        targets = np.where(params.targets >= 0, logprobs[rows, wanted], -np.inf).astype(np.float32)
    return Sampled(tokens, chosen, targets, top_ids, top_logprobs)


def _top(logprobs: Float64, counts: Int32) -> tuple[Int32, Float32]:
    width = max(int(counts.max()), 0)
    ids = np.full((len(logprobs), width), -1, np.int32)
    values = np.full((len(logprobs), width), -np.inf, np.float32)
    for row, count in enumerate(counts):
        best = np.argsort(-logprobs[row], kind="stable")[: max(int(count), 0)]
        ids[row, : len(best)] = best
        values[row, : len(best)] = logprobs[row, best]
    return ids, values
