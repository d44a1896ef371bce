"""Quality on held-out text: bits per byte, and divergence and agreement against the original on the same text.

Works on backends and windows of tokens (measure/text.py); knows no files, engines or formats. Logits are compared
in full, chunk by chunk, so that memory stays bounded: a distribution over 150,000 tokens is never kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hasten.backends.base import Backend, Batch
from hasten.errors import ModelError
from hasten.measure.statistics import Float64, ratio_interval, share_interval
from hasten.measure.text import Window
from hasten.receipt import Measurement, Quality

Float32 = NDArray[np.float32]

BLOCK_SIZE = 16  # slots of a KV block
_LOGITS_BYTES = 64 << 20  # at most, of one chunk of one model
_CACHE_ELEMENTS = 1 << 16  # rows are compared in runs of about this many logits, to stay in a core's own cache


@dataclass(frozen=True, slots=True)
class Scores:
    """Sums over each block of text (a window), arrays [B]: nll of the tokens in nats, divergence from the original in
    nats, agreements of the likeliest token, how often only the original's was the text's next (broken) and how often
    only the model's (mended); and how many tokens were predicted, spelling how many bytes."""

    nll: Float64
    divergence: Float64
    agreements: Float64
    broken: Float64
    mended: Float64
    num_tokens: Float64
    num_bytes: Float64


Model = tuple[Backend, str]  # loaded, and how it stores keys and values: "fp32", "bf16" or "int8"


def score(
    models: Mapping[str, Model],
    windows: Sequence[Window],
    vocab_size: int,
    progress: Callable[[int, int, str], None] | None = None,
    threads: int = 1,
) -> dict[str, Scores]:
    """Run every window through every model; the first is the original that the others are compared with.

    The backends' KV caches are made anew for it. Two models may share a backend. threads: that compare logits. Raises
    ModelError where a model gives logits that are not numbers.
    """
    sums = np.zeros((len(models), 5, len(windows)))
    num_blocks = max(-(-len(window.tokens) // BLOCK_SIZE) for window in windows)
    for backend, kv_cache in models.values():
        backend.allocate(num_blocks, BLOCK_SIZE, kv_cache)
    with ThreadPoolExecutor(threads) as pool:
        for index, window in enumerate(windows):
            sums[:, :, index] = _read_window(models, window, num_blocks, vocab_size, pool)
            if progress is not None:
                progress(index + 1, len(windows), "windows of text")
    tokens = np.array([len(window.tokens) - 1 for window in windows], np.float64)
    num_bytes = np.array([window.num_bytes for window in windows], np.float64)
    return {
        name: Scores(found[0], found[1], found[2], found[3], found[4], tokens, num_bytes)
        for name, found in zip(models, sums, strict=True)
    }


def _read_window(
    models: Mapping[str, Model], window: Window, num_blocks: int, vocab_size: int, pool: ThreadPoolExecutor
) -> Float64:
    """Sums over the window's tokens, [models, 5], as compare_rows has them."""
    shared = len({id(backend) for backend, _ in models.values()}) < len(models)
    # Where models overwrite one cache in turn, each reads its window in one piece.
    step = len(window.tokens) if shared else max(1, _LOGITS_BYTES // (4 * vocab_size))
    sums = np.zeros((len(models), 5))
    for batch, targets in _batches(window, step):
        original: Float32 | None = None
        for index, (name, (backend, kv_cache)) in enumerate(models.items()):
            if shared:
                backend.allocate(num_blocks, BLOCK_SIZE, kv_cache)
            logits = backend.fetch(backend.forward(batch))[: len(targets)]
            rows = _compare(original, logits, targets, pool)
            if not np.isfinite(rows).all():
                raise ModelError(f"{name} gives logits that are not numbers: a weight is damaged or overflowed")
            sums[index] += rows.sum(axis=1)
            if original is None:
                original = logits.copy() if shared else logits
    return sums


def _compare(original: Float32 | None, other: Float32, targets: NDArray[np.int32], pool: ThreadPoolExecutor) -> Float64:
    """compare_rows on the pool's threads, in runs of rows that stay in a core's own cache. original None: itself."""
    step = max(1, _CACHE_ELEMENTS // other.shape[1])

    def work(start: int) -> Float64:
        rows = slice(start, start + step)
        logits = other[rows]
        return compare_rows(logits if original is None else original[rows], logits, targets[rows])

    return np.concatenate(list(pool.map(work, range(0, len(other), step))), axis=1)


def summarize(scores: Scores, original: Scores | None = None, confidence: float = 0.95) -> Quality:
    """Totals with intervals over blocks; relative to `original`, on the same windows, where it is given."""
    bits = _not_below_0(ratio_interval(scores.nll / np.log(2), scores.num_bytes, "bits/byte", confidence))
    nll = _not_below_0(ratio_interval(scores.nll, scores.num_tokens, "nats/token", confidence))
    middle, low, high = (float(np.exp(min(value, 700))) for value in (nll.median, nll.low, nll.high))
    quality = Quality(
        bits_per_byte=bits,
        perplexity=Measurement(middle, low, high, nll.n, "perplexity"),
        num_tokens=int(scores.num_tokens.sum()),
        num_bytes=int(scores.num_bytes.sum()),
        num_blocks=len(scores.nll),
        confidence=confidence,
    )
    if original is None:
        return quality
    return replace(
        quality,
        loss=ratio_interval(scores.nll - original.nll, original.nll, "relative", confidence),
        divergence=_not_below_0(ratio_interval(scores.divergence, scores.num_tokens, "nats/token", confidence)),
        top1_agreement=share_interval(scores.agreements, scores.num_tokens, "share", confidence),
        flips=share_interval(scores.broken + scores.mended, scores.num_tokens, "share", confidence),
        broken=share_interval(scores.broken, scores.num_tokens, "share", confidence),
        mended=share_interval(scores.mended, scores.num_tokens, "share", confidence),
    )


def _not_below_0(found: Measurement) -> Measurement:
    return replace(found, low=max(found.low, 0.0))


def compare_rows(original: Float32, other: Float32, targets: NDArray[np.int32]) -> Float64:
    """Per row of logits [R, V]: -log q(target), KL(p || q), whether both have one argmax, and whether only p's, or only
    q's, is the target; float64 [5, R].

    p is `original`'s distribution, q `other`'s. With the same array twice the KL is exactly 0.
    """
    out = np.empty((5, len(other)))
    log_q, _ = _log_sum_exp(other)
    out[0] = log_q - np.take_along_axis(other, targets[:, None], 1)[:, 0]
    if original is other:
        out[1:] = np.array([0, 1, 0, 0])[:, None]
        return out
    log_p, weights = _log_sum_exp(original)
    total = weights.sum(axis=1)
    # log p - log q, with what they have in common taken off first: in float32 only the small rest is summed.
    weights *= original - other - (log_p - log_q)[:, None].astype(np.float32)
    out[1] = np.maximum(weights.sum(axis=1) / total, 0)  # below 0 only by rounding
    before, after = original.argmax(axis=1), other.argmax(axis=1)
    out[2] = before == after
    out[3] = (before == targets) & (after != targets)
    out[4] = (before != targets) & (after == targets)
    return out


def _log_sum_exp(logits: Float32) -> tuple[Float64, Float32]:
    """log(sum(exp)) [R], and exp(logits - max) [R, V]."""
    peak = logits.max(axis=1)
    weights = np.exp(logits - peak[:, None])
    return peak + np.log(weights.sum(axis=1, dtype=np.float64)), weights


def _batches(window: Window, step: int) -> Iterator[tuple[Batch, NDArray[np.int32]]]:
    """The window in chunks of `step` tokens, with the tokens that each chunk's rows are to predict."""
    tokens = window.tokens
    length = len(tokens) - 1  # the last token is only predicted
    table = np.arange(-(-len(tokens) // BLOCK_SIZE), dtype=np.int32)[None]
    for start in range(0, length, step):
        end = min(start + step, length)
        places = np.arange(start, end, dtype=np.int32)
        batch = Batch(
            tokens=np.ascontiguousarray(tokens[start:end]),
            positions=places,
            slots=places,
            query_lens=np.array([end - start], np.int32),
            context_lens=np.array([end], np.int32),
            block_tables=table,
            rows=np.arange(end - start, dtype=np.int32),
        )
        yield batch, tokens[start + 1 : end + 1]
