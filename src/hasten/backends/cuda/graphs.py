"""Steps as CUDA graphs, each padded to a bucket: decode steps, with one token of each sequence (long: of few with
many keys); runs, with few of each (drafts that are verified), in which keys are stored before attention; and other
small ones, with prompts.

A bucket runs kernel by kernel at first, so no token waits for a capture: captures are made by a thread of their own, on
a stream of its own, while steps go on; the one after a capture replays it. Where a larger bucket has a graph already,
that one stands in, and one that comes often is captured without ever running kernel by kernel, which takes a host up to
ten times as long as the device. Large steps need no graph: the device takes longer for them than the host does to
launch them.
"""

import threading
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from hasten.backends.base import Batch
from hasten.backends.cuda.decoder import Decoder, Hidden
from hasten.backends.cuda.device import CAPTURING
from hasten.backends.cuda.inputs import Inputs, Sizes, Stager, is_decode, is_short
from hasten.backends.cuda.linear import MAX_SKINNY
from hasten.backends.cuda.rehearsal import Rehearsals
from hasten.backends.cuda.sampling import Sampler
from hasten.backends.cuda.tuning import FEW_SEQUENCES

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
_LAUNCH_FLOPS = 24e12  # what a device does in the time that slow hosts take to launch a step's kernels
_MOST_TOKENS = 8192
# Steps that a larger bucket's graph runs before a bucket gets its own, by kind: padding costs steps with prompts most.
_STAND_INS = {"decodes": 24, "long": 24, "runs": 24, "any": 1}
_MOST_PROMPTS = 64  # in a step with other than single tokens


@dataclass
class _Bucket:
    """logits of a step of decodes or runs, else hidden: of all its tokens. Both lie where other graphs write too."""

    sizes: Sizes
    inputs: Inputs
    graph: torch.cuda.CUDAGraph | None = None
    logits: torch.Tensor | None = None
    hidden: Hidden | None = None
    asked: bool = False
    ran: bool = False  # kernel by kernel
    must_run: bool = False  # before it can be captured
    uses: int = 0


class Graphs:
    """Runs steps that fit a bucket: of up to BUCKETS[-1] sequences of up to max_blocks blocks; max_rows rows of logits
    in a step. tile_tokens: of an attention tile."""

    def __init__(
        self,
        decoder: Decoder,
        sampler: Sampler,
        stager: Stager,
        max_blocks: int,
        max_rows: int,
        tile_tokens: int,
        few_keys: int,
        rehearse: Rehearsals,
    ) -> None:
        self._decoder = decoder
        self._sampler = sampler
        self._stager = stager
        self._max_blocks = max_blocks
        self._max_rows = max_rows
        self._tile_tokens = tile_tokens
        self._few_keys = few_keys
        self._rehearse = rehearse
        self._max_tokens = most_tokens(decoder)
        self._buckets: dict[tuple[str, int], _Bucket] = {}
        largest = [self._sizes("runs", BUCKETS[-1]), self._sizes("any", self._max_tokens)]
        room = max(stager.room(sizes, max_blocks) for sizes in largest)
        # One buffer for all: the device fills and reads it in the order of steps.
        self._buffer = torch.zeros(room, dtype=torch.int32, device=decoder.device.handle)
        self._thread = ThreadPoolExecutor(1, "capture")
        self._jobs: list[Future[None]] = []
        self._stream: Any = None
        self._pool: Any = None
        self._closed = threading.Event()

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, bool] | None:
        """Logits float32 [R, V], overwritten by the next step, and whether their best tokens are where Sampler.greedy
        puts them. None where no bucket fits."""
        count = len(batch.tokens)
        kind, size = "any", self._token_bucket(count)
        if count <= BUCKETS[-1] and is_short(batch):
            kind, size = self._decodes(batch) if is_decode(batch) else "runs", _decode_bucket(count)
        if size is None or batch.block_tables.shape[1] > self._max_blocks:
            return None
        bucket = self._chosen(kind, size)
        if not self._stager.refill(batch, bucket.sizes, self._max_blocks, self._buffer):
            return None
        if bucket.graph is not None:
            bucket.graph.replay()
            logits, hidden = bucket.logits, bucket.hidden
        else:
            if not bucket.ran:
                self._compile(bucket, batch)
            logits, hidden = self._run(bucket)
            bucket.ran = True
            self._ask(bucket)
        if logits is not None:
            return self._rows(logits[:count], batch)
        assert hidden is not None
        assert bucket.inputs.rows is not None
        return self._decoder.logits(hidden, bucket.inputs.rows[: len(batch.rows)]), False

    def _decodes(self, batch: Batch) -> str:
        """The kind of a step in which each of these sequences decodes."""
        is_long = len(batch.query_lens) <= FEW_SEQUENCES and batch.context_lens.sum() > self._few_keys
        return "long" if is_long else "decodes"

    def _compile(self, bucket: _Bucket, batch: Batch) -> None:
        """Have its kernels compiled, and those of the decodes that follow, which the engine launches before it reads
        this step's tokens."""
        step = bucket.inputs, None if bucket.inputs.rows is None else bucket.inputs.rows[: len(batch.rows)]
        follows = _decode_bucket(len(batch.query_lens))
        if follows is None or is_decode(batch):
            self._rehearse(step)
        else:  # what takes the compiler longest, decode attention, first
            self._rehearse((self._bucket(self._decodes(batch), follows).inputs, None), step)

    def _rows(self, logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, bool]:
        """Of logits of all tokens those that are wanted."""
        if len(batch.rows) == len(logits):
            return logits, True
        rows = torch.from_numpy(batch.rows.copy()).pin_memory().to(logits.device, non_blocking=True)
        return logits.index_select(0, rows), False

    def finish(self) -> None:
        """Wait for the captures that are under way. Raises what went wrong in one."""
        for job in self._jobs:
            job.result()
        self._jobs.clear()

    def forget(self) -> None:
        """Drop what was captured, for kernels have new tiles."""
        self.finish()
        self._buckets.clear()
        self._pool = None  # torch takes no graph into a pool that none is left in

    def close(self) -> None:
        """Captures that have not begun never will; one that is under way is waited for. Not where the caller holds the
        lock that it needs: a backend may be collected anywhere."""
        self._closed.set()
        is_free = CAPTURING.acquire(timeout=1.0)
        if is_free:
            CAPTURING.release()
        self._thread.shutdown(wait=is_free, cancel_futures=True)

    def _sizes(self, kind: str, size: int) -> Sizes:
        if kind != "any":
            return Sizes(size, size, 0, size, size, kind == "runs", kind == "long")
        tiles = -(-size // self._tile_tokens) + min(size, _MOST_PROMPTS)
        return Sizes(size, BUCKETS[-1], tiles, self._max_rows, BUCKETS[-1])

    def _chosen(self, kind: str, size: int) -> _Bucket:
        """The bucket of a step, or one that stands in for it."""
        bucket = self._bucket(kind, size)
        bucket.uses += 1
        if bucket.graph is not None:
            return bucket
        alike = {at[1]: other for at, other in self._buckets.items() if at[0] == kind}
        if kind == "long" and ("decodes", size) in self._buckets:  # slower then, but right
            alike[size] = self._buckets["decodes", size]
        others = [at for at, other in alike.items() if size <= at <= 2 * size and other.graph is not None]
        if others and bucket.uses > _STAND_INS[kind] and not bucket.asked:
            if bucket.must_run or not any(other.ran for at, other in alike.items() if _way(at) == _way(size)):
                return bucket
            self._ask(bucket)
        return alike[min(others)] if others else bucket

    def _bucket(self, kind: str, size: int) -> _Bucket:
        bucket = self._buckets.get((kind, size))
        if bucket is None:
            sizes = self._sizes(kind, size)
            inputs = self._stager.fixed(sizes, self._max_blocks, self._buffer)
            bucket = self._buckets[kind, size] = _Bucket(sizes, inputs)
        return bucket

    def _token_bucket(self, count: int) -> int | None:
        """Eight sizes for every power of two."""
        step = max(16, 1 << max(0, (count - 1).bit_length() - 4))
        size = -(-count // step) * step
        return size if size <= self._max_tokens else None

    def _run(self, bucket: _Bucket) -> tuple[torch.Tensor | None, Hidden | None]:
        hidden = self._decoder.hidden(bucket.inputs)
        if bucket.sizes.tiles:
            return None, hidden
        logits = self._decoder.logits(hidden, None)
        self._sampler.greedy(logits)
        return logits, None

    def _ask(self, bucket: _Bucket) -> None:
        """Have the bucket captured: what its kernels need is there, for it has run, or one that goes the same way."""
        if not bucket.asked:
            bucket.asked = True
            job = self._thread.submit(self._capture, bucket)
            job.add_done_callback(_warn_of_failure)
            self._jobs = [other for other in self._jobs if not other.done() or other.exception()] + [job]

    @torch.inference_mode()
    def _capture(self, bucket: _Bucket) -> None:
        """Record the step; nothing runs. By hand rather than by torch.cuda.graph, which would wait for the device and
        give back the memory that steps use."""
        if self._closed.is_set():
            return
        device = self._decoder.device
        if self._stream is None:
            torch.cuda.set_device(device.handle)
            with CAPTURING:
                self._stream = _capture_stream(device.handle)
                with torch.cuda.stream(self._stream):
                    self._decoder.warm_products()
                self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with CAPTURING, torch.cuda.stream(self._stream):
                if self._closed.is_set():
                    return
                logits, hidden = self._record(bucket, graph)
        except Exception:
            if bucket.ran:
                raise
            bucket.must_run, bucket.asked = True, False
            return
        # Not kept from graphs that are captured later: results are read before another one runs, and those of all
        # buckets side by side would be gigabytes.
        bucket.logits = None if logits is None else _borrowed(logits)
        if hidden is not None:
            delta = None if hidden.delta is None else _borrowed(hidden.delta)
            bucket.hidden = Hidden(_borrowed(hidden.x), delta, hidden.post)
        self._pool = graph.pool()
        bucket.graph = graph

    def _record(self, bucket: _Bucket, graph: torch.cuda.CUDAGraph) -> tuple[torch.Tensor | None, Hidden | None]:
        # Relaxed: a kernel that no bucket has had in just this form yet is compiled and loaded on the way.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local" if bucket.ran else "relaxed")
        try:
            return self._run(bucket)
        finally:
            graph.capture_end()


@cache
def _capture_stream(device: torch.device) -> Any:
    """One for all models of the process: cuBLAS keeps a workspace, 32 MiB of it on an H100, for each stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Memory:
    """Bytes on a device, as other libraries lend them to torch."""

    __cuda_array_interface__: dict[str, Any]


def _borrowed(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in the same place, which the allocator may give to others."""
    if not tensor.is_contiguous():
        return tensor
    memory = {"shape": (tensor.nbytes,), "typestr": "|u1", "data": (tensor.data_ptr(), False), "version": 2}
    flat = torch.as_tensor(_Memory(memory), device=tensor.device)
    return flat.view(tensor.dtype).view(tensor.shape)


def _warn_of_failure(job: Future[None]) -> None:
    """Such steps go on kernel by kernel, which is right but slow: not in silence."""
    error = None if job.cancelled() else job.exception()
    if error is not None:
        warnings.warn(f"a CUDA graph was not captured, its steps run kernel by kernel: {error}", stacklevel=2)


def _way(rows: int) -> int:
    """Which kernels multiply so many rows, more or less: one, few or many. A capture may compile others on the way."""
    return (rows > 1) + (rows > MAX_SKINNY)


def _decode_bucket(count: int) -> int | None:
    return next((bucket for bucket in BUCKETS if bucket >= count), None)


def most_tokens(decoder: Decoder) -> int:
    """Tokens of the largest step that the host would launch more slowly than the device runs it; a power of two."""
    tokens = int(_LAUNCH_FLOPS / (2 * max(1, decoder.num_weights)))
    return min(_MOST_TOKENS, max(64, 1 << (tokens.bit_length() - 1)))
