"""A device that works by itself, made of a backend that does not: its calls run in order on a thread of their own.

Tokens that Batch.sampled_from names are filled in there, from what the thread has sampled last. Arguments are copied
before a call returns: the engine writes to the same arrays in the next step.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

import numpy as np

from hasten.backends.base import Backend, Batch, DeviceMemory, Sampled, SamplingBatch, StepLimits


class Waiting:
    """A Pending. Tells its device when it is asked."""

    def __init__(self, future: "Future[Sampled]", device: "Overlapped") -> None:
        self._future, self._device = future, device

    def result(self) -> Sampled:
        self._device.note_result(self)
        return self._future.result()


class Overlapped:
    """See the file's docstring. most_ahead: the largest number of steps that were given before a result was asked for.
    num_filled: tokens that the host did not know. before: called on the thread before each step."""

    overlaps = True

    def __init__(self, inner: Backend, before: Callable[[], None] = lambda: None) -> None:
        self.inner, self.before = inner, before
        self.kv_dtypes, self.usual = inner.kv_dtypes, inner.usual
        self.most_ahead = self.num_filled = self.forwards = 0
        self._thread = ThreadPoolExecutor(1)
        self._tokens = np.zeros(0, np.int32)  # sampled last; the thread's
        self._pending: list[Waiting] = []

    def beside(self) -> "Overlapped":
        return Overlapped(self.inner.beside())

    def load(self, *arguments: Any) -> None:
        self.inner.load(*arguments)

    def memory(self, limits: StepLimits) -> DeviceMemory:
        return self.inner.memory(limits)

    def block_bytes(self, block_size: int, dtype: str) -> int:
        return self.inner.block_bytes(block_size, dtype)

    def allocate(self, num_blocks: int, block_size: int, dtype: str) -> None:
        self._thread.submit(self.inner.allocate, num_blocks, block_size, dtype).result()

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        self._thread.submit(self.inner.copy_blocks, list(pairs))

    def forward(self, batch: Batch) -> "Future[Any]":
        self.forwards += 1
        own = copied(batch)
        if batch.sampled_from is not None:
            assert batch.sampled_from.dtype == np.int32
            assert (batch.sampled_from >= 0).any()
        return self._thread.submit(self._forward, own)

    def _forward(self, batch: Batch) -> Any:
        self.before()
        if batch.sampled_from is not None:
            known = batch.sampled_from < 0
            self.num_filled += int((~known).sum())
            tokens = np.where(known, batch.tokens, self._tokens[np.maximum(batch.sampled_from, 0)])
            batch = replace(batch, tokens=np.maximum(tokens, 0).astype(np.int32), sampled_from=None)
        return self.inner.forward(batch)

    def sample(self, logits: "Future[Any]", params: SamplingBatch) -> Waiting:
        own = copied(params)
        pending = Waiting(self._thread.submit(self._sample, logits, own), self)
        self._pending.append(pending)
        self.most_ahead = max(self.most_ahead, len(self._pending))
        return pending

    def _sample(self, logits: "Future[Any]", params: SamplingBatch) -> Sampled:
        sampled = self.inner.sample(logits.result(), params).result()
        self._tokens = sampled.tokens
        return sampled

    def fetch(self, logits: "Future[Any]") -> Any:
        return self.inner.fetch(logits.result())

    def note_result(self, pending: Waiting) -> None:
        """Results come in order; those before were dropped."""
        if pending in self._pending:
            del self._pending[: self._pending.index(pending) + 1]


def copied(batch: Any) -> Any:
    """The dataclass with its arrays copied."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: v.copy() for name, v in values.items() if isinstance(v, np.ndarray)})
