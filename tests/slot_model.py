"""A small deterministic language model over paged slots: a Backend whose tokens come from what is in its cache.

Each token writes a number made of itself and its position into its slot. A row's logits are hashes of every number that
its block table leads to, so one wrong slot, position, table entry or copied block changes the tokens. It also checks
what the contract promises of a batch. Its hashes lean on the last two tokens, which makes text that repeats itself
enough for speculation to find something. Sampling is the reference backend's.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from hasten.backends.base import Batch, DeviceMemory, Sampled, SamplingBatch, StepLimits
from hasten.backends.reference_sampling import sample_rows
from hasten.model.formats import Weight
from hasten.model.spec import ModelSpec

M = np.uint64(0x9E3779B97F4A7C15)


def scatter(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser over uint64."""
    x = np.asarray(x, np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SlotModel:
    """See the file's docstring. `forwards` counts steps, `most_rows` is the largest R seen."""

    kv_dtypes: tuple[str, ...] = ("fp32",)
    overlaps = False
    usual = StepLimits(max_tokens=512, max_sequences=64, max_rows=128)

    def beside(self) -> "SlotModel":
        raise AssertionError("not asked for")

    def __init__(self, vocab_size: int = 96, wildness: float = 0.6) -> None:
        self.vocab_size, self.wildness = vocab_size, wildness
        self.forwards = self.most_rows = self.most_tokens = self.copies = 0

    def load(self, spec: ModelSpec, weights: Iterable[tuple[str, Weight]]) -> None:
        raise AssertionError("has no weights")

    def memory(self, limits: StepLimits) -> DeviceMemory:
        return DeviceMemory(1 << 30, 1 << 30)

    def block_bytes(self, block_size: int, dtype: str) -> int:
        return 8 * block_size

    def allocate(self, num_blocks: int, block_size: int, dtype: str) -> None:
        self.block_size = block_size
        self.cache = scatter(np.arange(num_blocks * block_size))  # garbage, so that reading what was not written shows

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        cache = self.cache.reshape(-1, self.block_size)
        for source, destination in pairs:
            cache[destination] = cache[source]
            self.copies += 1

    def forward(self, batch: Batch) -> np.ndarray:
        self.check(batch)
        self.forwards += 1
        self.most_rows = max(self.most_rows, len(batch.rows))
        self.most_tokens = max(self.most_tokens, len(batch.tokens))
        with np.errstate(over="ignore"):
            self.cache[batch.slots] = scatter(batch.tokens.astype(np.uint64) * M + batch.positions.astype(np.uint64))
            owner = np.repeat(np.arange(len(batch.query_lens)), batch.query_lens)
            return (
                np.stack([self.row(batch, owner[row], row) for row in batch.rows])
                if len(batch.rows)
                else np.zeros((0, self.vocab_size), np.float32)
            )

    def row(self, batch: Batch, sequence: int, row: int) -> np.ndarray:
        places = np.arange(batch.positions[row] + 1)
        slots = batch.block_tables[sequence][places // self.block_size] * self.block_size + places % self.block_size
        seen = self.cache[slots]
        ids = np.arange(self.vocab_size, dtype=np.uint64)
        everything = scatter(np.bitwise_xor.reduce(scatter(seen)) + ids * M)
        # Position is part of what is stored: take it out again by asking which token would have written this.
        stored = scatter(ids[:, None] * M + places[-2:].astype(np.uint64))
        last = (stored == seen[-2:]).argmax(0).astype(np.uint64)
        recent = scatter(scatter(np.sum(last * np.array([1009, 9176][: len(last)], np.uint64))) + ids * M)
        mixed = recent.astype(np.float64) + self.wildness * everything.astype(np.float64)
        return (mixed / 2.0**60).astype(np.float32)

    def check(self, batch: Batch) -> None:
        size = self.block_size
        for name in ("tokens", "positions", "slots", "query_lens", "context_lens", "block_tables", "rows"):
            array = getattr(batch, name)
            assert array.dtype == np.int32, name
            assert array.flags.c_contiguous, name
        assert batch.query_lens.sum() == len(batch.tokens) == len(batch.positions) == len(batch.slots)
        assert (batch.query_lens > 0).all()
        assert len(batch.block_tables) == len(batch.query_lens) == len(batch.context_lens)
        assert len(set(batch.slots.tolist())) == len(batch.slots), "two tokens write one slot"
        assert (np.diff(batch.rows) > 0).all()
        assert ((batch.tokens >= 0) & (batch.tokens < self.vocab_size)).all()
        start = 0
        for i, (count, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
            places = np.arange(context - count, context)
            assert (batch.positions[start : start + count] == places).all()
            wanted = batch.block_tables[i][places // size] * size + places % size
            assert (batch.slots[start : start + count] == wanted).all()
            start += count

    def fetch(self, logits: np.ndarray) -> np.ndarray:
        return logits

    def sample(self, logits: np.ndarray, params: SamplingBatch) -> Sampled:
        assert len(params.temperature) == len(logits)
        return sample_rows(logits, params)
