"""A Step of the scheduler -> the packed arrays of a Batch. Knows nothing of sampling.

Block tables are kept between steps, only new blocks are written. A step in which every sequence runs one token, as most
are, has a short path (`_decode`); `_general` gives the same arrays for any step, and a test compares them.
"""

import numpy as np

from hasten.backends.base import Batch, Int32
from hasten.engine.request import Sequence
from hasten.engine.scheduler import Step


class BatchBuilder:
    """Turns steps into batches; owns the block tables [max_sequences, max_blocks] that batches view."""

    def __init__(self, block_size: int, max_sequences: int, max_blocks: int) -> None:
        self.block_size = block_size
        self._tables = np.zeros((max_sequences, max_blocks), np.int32)
        self._held: list[list[int]] = [[] for _ in range(max_sequences)]  # the block list that each row mirrors
        self._written = [0] * max_sequences  # how many of its blocks are in the row
        self._ranges = [np.arange(i, dtype=np.int32) for i in range(max_sequences + 1)]
        self._ones = [np.ones(i, np.int32) for i in range(max_sequences + 1)]

    def build(self, step: Step) -> Batch:
        """The step's batch. Arrays are valid until the next call."""
        tables = self._update_tables(step.sequences)
        if all(s.num_computed + 1 == len(s.tokens) < s.limit and not s.drafts for s in step.sequences):
            return self._decode(step.sequences, tables)
        return self._general(step, tables)

    def _update_tables(self, sequences: list[Sequence]) -> Int32:
        held, written = self._held, self._written
        for row, sequence in enumerate(sequences):
            blocks = sequence.blocks  # grows at its end only; a sequence that is preempted gets a new list
            if held[row] is not blocks:
                held[row], written[row] = blocks, 0
            start, end = written[row], len(blocks)
            if start != end:
                self._tables[row, start:end] = blocks[start:]
                written[row] = end
        return self._tables[: len(sequences)]

    def _decode(self, sequences: list[Sequence], tables: Int32) -> Batch:
        """Every sequence runs its last token, and a token is sampled from each."""
        size, num = self.block_size, len(sequences)
        positions = [s.num_computed for s in sequences]
        slots = [s.blocks[p // size] * size + p % size for s, p in zip(sequences, positions, strict=True)]
        places = np.array(positions, np.int32)
        return Batch(
            tokens=np.array([s.tokens[-1] for s in sequences], np.int32),
            positions=places,
            slots=np.array(slots, np.int32),
            query_lens=self._ones[num],
            context_lens=places + 1,
            block_tables=tables,
            rows=self._ranges[num],
        )

    def _general(self, step: Step, tables: Int32) -> Batch:
        size = self.block_size
        tokens: list[int] = []
        positions: list[Int32] = []
        slots: list[Int32] = []
        rows: list[int] = []
        for index, (sequence, count) in enumerate(zip(step.sequences, step.query_lens, strict=True)):
            start = sequence.num_computed
            rows += (len(tokens) + position - start for position in wanted_positions(sequence, count))
            if sequence.drafts:
                tokens += sequence.tokens[start:] + sequence.drafts
            else:
                tokens += sequence.tokens[start : start + count]
            places = np.arange(start, start + count, dtype=np.int32)
            positions.append(places)
            slots.append(tables[index, places // size] * size + places % size)
        starts = [sequence.num_computed for sequence in step.sequences]
        query_lens = np.array(step.query_lens, np.int32)
        return Batch(
            tokens=np.array(tokens, np.int32),
            positions=np.concatenate(positions),
            slots=np.concatenate(slots),
            query_lens=query_lens,
            context_lens=np.array(starts, np.int32) + query_lens,
            block_tables=tables,
            rows=np.array(rows, np.int32),
        )


def wanted_positions(sequence: Sequence, count: int) -> list[int]:
    """Positions whose logits are wanted when the sequence runs `count` tokens: those that score the prompt, then its
    last token's and its drafts' if a token is to be sampled."""
    start, num_tokens = sequence.num_computed, len(sequence.tokens)
    end = start + count
    scored = range(max(start, sequence.score_from), min(end, sequence.num_prompt - 1))
    sampled = range(num_tokens - 1, end) if num_tokens < sequence.limit else range(0)
    return [*scored, *sampled]
