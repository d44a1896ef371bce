"""A Step of the scheduler -> the packed arrays of a Batch. Knows nothing of sampling.

Block tables are kept between steps, only new blocks are written. A step in which every sequence runs one token, as most
do, has a short path (`_decode`); `general` gives the same arrays for any step, and a test compares them.
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
        self._range = np.arange(max_sequences, dtype=np.int32)
        self._ones = np.ones(max_sequences, np.int32)
        # The last step, if every sequence ran its last token: which, where the first of them was, and for how many
        # tokens more the arrays only count up.
        self._last: Batch | None = None
        self._decoding: list[Sequence] = []
        self._place = self._left = 0

    def build(self, step: Step) -> Batch:
        """The step's batch. Arrays are valid until the next call."""
        return self._decode(step.sequences) if step.decodes else self.general(step)

    def general(self, step: Step) -> Batch:
        """Any step's batch."""
        starts = [sequence.num_computed for sequence in step.sequences]
        runs: list[list[int]] = []
        rows: list[int] = []
        num_tokens = 0
        for sequence, start, count in zip(step.sequences, starts, step.query_lens, strict=True):
            rows += (num_tokens + position - start for position in wanted_positions(sequence, count))
            run = sequence.tokens[start : start + count]
            runs.append(run + sequence.drafts if sequence.drafts else run)
            num_tokens += count
        return self.pack(step.sequences, starts, runs, rows)

    def pack(self, sequences: list[Sequence], starts: list[int], runs: list[list[int]], rows: list[int]) -> Batch:
        """Sequence i runs the tokens runs[i] from position starts[i] on; logits are wanted of `rows`, counted over the
        tokens of all. A token that is not known yet is ~row of the last sample() (see Sequence)."""
        size = self.block_size
        tables = self._update_tables(sequences)
        query_lens = np.array([len(run) for run in runs], np.int32)
        first = np.array(starts, np.int32)
        ends = np.cumsum(query_lens, dtype=np.int32)
        owner = np.repeat(self._range[: len(runs)], query_lens)
        positions = np.arange(len(owner), dtype=np.int32) + np.repeat(first - (ends - query_lens), query_lens)
        tokens, sampled_from = _split([token for run in runs for token in run])
        return Batch(
            tokens=tokens,
            positions=positions,
            slots=tables[owner, positions // size] * size + positions % size,
            query_lens=query_lens,
            context_lens=first + query_lens,
            block_tables=tables,
            rows=np.array(rows, np.int32),
            sampled_from=sampled_from,
        )

    def _decode(self, sequences: list[Sequence]) -> Batch:
        """Every sequence runs its last token, and a token is sampled from each."""
        last = self._last
        if last is not None and self._left and sequences == self._decoding:
            # A step that was built and not run (an interrupt) leaves all where they were.
            ahead = sequences[0].num_computed - self._place
            if ahead:
                for array in (last.positions, last.slots, last.context_lens):
                    array += ahead
                self._place += ahead
                self._left -= ahead
        else:
            last = self._begin_decode(sequences)
        tokens, sampled_from = _split([sequence.tokens[-1] for sequence in sequences])
        return Batch(
            tokens,
            last.positions,
            last.slots,
            last.query_lens,
            last.context_lens,
            last.block_tables,
            last.rows,
            sampled_from,
        )

    def _begin_decode(self, sequences: list[Sequence]) -> Batch:
        """Arrays for these sequences (but no tokens), which serve as long as none of them begins a block."""
        size, num = self.block_size, len(sequences)
        tables = self._update_tables(sequences)
        positions = np.array([sequence.num_computed for sequence in sequences], np.int32)
        offsets = positions % size
        slots = tables[self._range[:num], positions // size] * size + offsets
        none = self._range[:0]
        self._last = Batch(none, positions, slots, self._ones[:num], positions + 1, tables, self._range[:num])
        self._decoding = sequences
        self._place = int(positions[0])
        self._left = size - 1 - int(offsets.max())
        return self._last

    def _update_tables(self, sequences: list[Sequence]) -> Int32:
        self._last = None
        held, written = self._held, self._written
        for row, sequence in enumerate(sequences):
            blocks = sequence.blocks
            if held[row] is not blocks or written[row] != len(blocks):
                self._update_row(row, blocks)
        return self._tables[: len(sequences)]

    def _update_row(self, row: int, blocks: list[int]) -> None:
        """`blocks` grows at its end only; a sequence that is preempted gets a new list."""
        if self._held[row] is not blocks:
            self._held[row], self._written[row] = blocks, 0
        start = self._written[row]
        self._tables[row, start : len(blocks)] = blocks[start:]
        self._written[row] = len(blocks)


def _split(tokens: list[int]) -> tuple[Int32, Int32 | None]:
    """Tokens and where those come from that are not known yet."""
    array = np.array(tokens, np.int32)
    if min(tokens) >= 0:
        return array, None
    return np.maximum(array, 0), np.where(array < 0, ~array, np.int32(-1))


def wanted_positions(sequence: Sequence, count: int) -> list[int]:
    """Positions whose logits are wanted when the sequence runs `count` tokens: those that score the prompt, then its
    last token's and its drafts' if a token is to be sampled."""
    start, num_tokens = sequence.num_computed, len(sequence.tokens)
    end = start + count
    scored = range(max(start, sequence.score_from), min(end, sequence.num_prompt - 1))
    sampled = range(num_tokens - 1, end) if num_tokens < sequence.limit else range(0)
    return [*scored, *sampled]
