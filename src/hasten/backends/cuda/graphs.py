"""Steps of few tokens as CUDA graphs, one for each bucket of sizes, captured when a bucket comes a second time.

A decode step has one token of each sequence; others (drafts that are verified, short prompts) have graphs of their own,
in which keys are stored before attention.

A step of a bucket that has no graph runs kernel by kernel, so the first token never waits for a capture.
"""

from dataclasses import dataclass
from typing import Any

import torch

from hasten.backends.base import Batch
from hasten.backends.cuda.decoder import Decoder
from hasten.backends.cuda.inputs import Inputs, Stager, is_short
from hasten.backends.cuda.sampling import Sampler

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)


@dataclass
class _Bucket:
    buffer: torch.Tensor
    inputs: Inputs
    graph: torch.cuda.CUDAGraph | None = None
    logits: torch.Tensor | None = None
    uses: int = 0


class DecodeGraphs:
    """Runs steps of up to BUCKETS[-1] tokens, few of each sequence, of up to max_blocks blocks."""

    def __init__(self, decoder: Decoder, sampler: Sampler, stager: Stager, max_blocks: int) -> None:
        self._decoder = decoder
        self._sampler = sampler
        self._stager = stager
        self._max_blocks = max_blocks
        self._buckets: dict[tuple[int, bool], _Bucket] = {}
        self._pool: Any = None

    def fits(self, batch: Batch) -> bool:
        """A step without rows does not fit: it must leave what was sampled last where it is."""
        few = len(batch.rows) > 0 and len(batch.tokens) <= BUCKETS[-1]
        return few and batch.block_tables.shape[1] <= self._max_blocks and is_short(batch)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Logits float32 [T, V] of all tokens, overwritten by the next step; their best tokens are where Sampler.greedy
        puts them."""
        count = len(batch.tokens)
        size = next(bucket for bucket in BUCKETS if bucket >= count)
        runs = count > len(batch.query_lens)
        bucket = self._buckets.get((size, runs))
        if bucket is None:
            buffer, inputs = self._stager.fixed(size, self._max_blocks, runs)
            bucket = self._buckets[size, runs] = _Bucket(buffer, inputs)
        self._stager.refill(batch, size, bucket.buffer)
        bucket.uses += 1
        if bucket.graph is None and bucket.uses < 2:
            return self._run(bucket)[:count]
        if bucket.graph is None:
            self._capture(bucket)
        assert bucket.graph is not None
        assert bucket.logits is not None
        bucket.graph.replay()
        return bucket.logits[:count]

    def _run(self, bucket: _Bucket) -> torch.Tensor:
        logits = self._decoder(bucket.inputs)
        self._sampler.greedy(logits)
        return logits

    def _capture(self, bucket: _Bucket) -> None:
        """Record the step; nothing runs yet. Kernels are compiled, for the bucket has run before."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            bucket.logits = self._run(bucket)
        self._pool = graph.pool()
        bucket.graph = graph
