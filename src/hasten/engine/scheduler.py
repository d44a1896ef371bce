"""Which tokens run in the next step: continuous batching over paged KV blocks. Pure policy: knows no device, no text.

A sequence is never "in prefill" or "in decode": it has tokens that are not computed yet, and gets as many of them into
the step as the budgets allow. One token left is decoding; the prompt, a chunk of it, or everything again after a
preemption are the same thing. Order of service is Sequence.key: priority, then arrival.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from hasten.engine.blocks import BlockPool, block_hash
from hasten.engine.request import Sequence

_MOST_PASSED = 32  # sequences that are looked at in a step, though one before them waits


@dataclass(slots=True)
class Step:
    """What runs now: the i-th sequence runs its next query_lens[i] tokens (drafts come last). Before that, the KV
    blocks `copies` (source, destination) must be copied. decodes: every sequence runs its last token, without drafts,
    and a token is sampled from each."""

    sequences: list[Sequence] = field(default_factory=list)
    query_lens: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    decodes: bool = True


class Scheduler:
    """Sequences that wait, sequences that run, and the blocks they hold.

    max_tokens: tokens of a step; at least max_sequences, so that every decode fits. max_sequences: running at once.
    max_extra_rows: rows of logits of a step beyond one a sequence (drafts, scored prompts); bounds the logits' memory.
    """

    def __init__(self, pool: BlockPool, max_tokens: int, max_sequences: int, max_extra_rows: int) -> None:
        self.pool = pool
        self.max_tokens = max(max_tokens, max_sequences)
        self.max_sequences = max_sequences
        self.max_extra_rows = max_extra_rows
        self.running: list[Sequence] = []  # in order of service
        self._waiting: list[tuple[tuple[int, int, int], Sequence]] = []  # by order of service
        self._copies: list[tuple[int, int]] = []  # due before the next forward; kept until confirm_copies()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        insort(self._waiting, (sequence.key, sequence))

    def schedule(self) -> Step:
        """Admit what fits, give each running sequence its share of the step's budgets, preempt where blocks run out."""
        if self._waiting:
            self._admit()
        step = Step()
        running, sequences, query_lens = self.running, step.sequences, step.query_lens
        size = self.pool.block_size
        num_decoding = sum([sequence.num_computed + 1 == len(sequence.tokens) for sequence in running])
        budget = self.max_tokens - num_decoding  # for prompts and drafts: decodes are never held up
        extra_rows = self.max_extra_rows
        index = 0
        while index < len(running):  # shrinks from its end by preemption
            sequence = running[index]
            index += 1
            num_tokens = len(sequence.tokens)
            if sequence.num_computed + 1 == num_tokens and not sequence.drafts:
                if num_tokens == sequence.limit:
                    if sequence.tokens[-1] < 0:
                        continue  # its last token is on its way
                    step.decodes = False  # nothing is sampled
                if len(sequence.blocks) * size >= num_tokens or self._grow(sequence, num_tokens):
                    sequences.append(sequence)
                    query_lens.append(1)
                continue
            count, extra, rows = self._share(sequence, budget, extra_rows)
            if count and self._grow(sequence, sequence.num_computed + count):
                budget -= extra
                extra_rows -= rows
                step.decodes = False
                sequences.append(sequence)
                query_lens.append(count)
        step.copies = self._copies
        return step

    def _share(self, sequence: Sequence, budget: int, extra_rows: int) -> tuple[int, int, int]:
        """Tokens that a prompt or a sequence with drafts runs; how many of them, and of their rows, are out of the
        budgets."""
        if sequence.drafts:
            self._clip_drafts(sequence, min(budget, extra_rows))
            extra = len(sequence.drafts)
            return 1 + extra, extra, extra
        count = min(len(sequence.tokens) - sequence.num_computed, budget)
        unwanted = sequence.score_from - sequence.num_computed  # tokens without a row of logits
        count = min(count, unwanted + extra_rows)
        return count, count, max(0, count - unwanted)

    def make_room(self, sequence: Sequence, num_drafts: int) -> int:
        """Give a running sequence blocks for so many tokens after its own, taking none from others; how many fit."""
        size = self.pool.block_size
        while len(sequence.blocks) * size < len(sequence.tokens) + num_drafts:
            block = self.pool.allocate()
            if block is None:
                break
            sequence.blocks.append(block)
        return max(0, min(num_drafts, len(sequence.blocks) * size - len(sequence.tokens)))

    def confirm_copies(self) -> None:
        """The copies of the last step have been made."""
        self._copies = []

    def advance(self, sequence: Sequence, num_computed: int) -> None:
        """Tokens up to `num_computed` are in the cache now; full blocks become available for reuse."""
        sequence.num_computed = num_computed
        size = self.pool.block_size
        while (sequence.num_published + 1) * size <= num_computed:
            index = sequence.num_published
            self._extend_hashes(sequence, index + 1)
            self.pool.publish(sequence.blocks[index], sequence.hashes[index])
            sequence.num_published += 1

    def remove(self, sequence: Sequence) -> None:
        """The sequence is finished or cancelled; its blocks are given up."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            del self._waiting[bisect_left(self._waiting, sequence.key, key=lambda entry: entry[0])]
        self._release(sequence)

    def clear(self) -> None:
        """Drop every sequence and forget the cache."""
        self.running, self._waiting, self._copies = [], [], []
        self.pool.clear()

    def check(self) -> None:
        """Assert that every block is accounted for. For tests."""
        assert all(not sequence.blocks for _, sequence in self._waiting), "a waiting sequence holds blocks"
        assert [s.key for s in self.running] == sorted(s.key for s in self.running)
        size = self.pool.block_size
        assert all(len(s.blocks) * size >= s.num_computed for s in self.running)
        self.pool.check([sequence.blocks for sequence in self.running])

    def _admit(self) -> None:
        """Move sequences from waiting to running, in order, while the step has budget for their tokens.

        A sequence is admitted with blocks for all its tokens at once. One that does not fit may push out running
        sequences of a lower priority (a higher number), never its peers; and none behind it is admitted before it. One
        that waits for blocks which a running sequence is computing is passed over: those behind it take neither its
        place nor its blocks, and push out nobody.
        """
        passed, kept = 0, 0  # sequences passed over, and blocks that they will need
        while passed < min(len(self._waiting), _MOST_PASSED):
            sequence = self._waiting[passed][1]
            if self._planned(sequence.key) >= self.max_tokens:
                return
            # One token more than it has, or it would be back in the queue a step later.
            num_blocks = -(-min(len(sequence.tokens) + 1, sequence.limit) // self.pool.block_size)
            if self._waits_for_first(sequence):
                passed, kept = passed + 1, kept + num_blocks - self._num_usable(sequence)
                continue
            if len(self.running) + passed >= self.max_sequences and (passed or not self._preempt_lower(sequence)):
                return
            matched = self._match(sequence)
            if self._is_coming(sequence, len(matched)):
                self.pool.release(matched)
                passed, kept = passed + 1, kept + num_blocks
                continue
            needed = num_blocks - len(matched) + kept
            while self.pool.num_available < needed and not passed and self._preempt_lower(sequence):
                pass
            if self.pool.num_available < needed:
                self.pool.release(matched)
                return
            del self._waiting[passed]
            self._start(sequence, matched)

    def _planned(self, key: tuple[int, int, int]) -> int:
        """Tokens of the next step that go to running sequences before one with this key does: all that is left of those
        served earlier, and every decode."""
        left = [(s.key < key, len(s.tokens) - s.num_computed) for s in self.running]
        return sum([count for earlier, count in left if earlier or count == 1])

    def _start(self, sequence: Sequence, matched: list[int]) -> None:
        size = self.pool.block_size
        sequence.blocks = matched
        sequence.num_computed = len(matched) * size
        sequence.num_published = len(matched)
        while len(sequence.blocks) * size < len(sequence.tokens):
            block = self.pool.allocate()
            assert block is not None, "admitted without enough blocks"
            sequence.blocks.append(block)
        self._fork(sequence)
        if sequence.num_output == 0:
            sequence.request.metrics.num_cached_tokens += sequence.num_computed
        insort(self.running, sequence, key=_key)

    def _fork(self, sequence: Sequence) -> None:
        """Take over what the request's first continuation has of the prompt beyond the full blocks that are shared: its
        partly filled block is copied, and only the prompt's last token is left to run."""
        first = sequence.request.sequences[0]
        known = sequence.num_prompt - 1
        block, rest = divmod(known, self.pool.block_size)
        if first is sequence or sequence.num_output or rest == 0 or not first.blocks or first.num_computed < known:
            return
        if len(sequence.blocks) > block and sequence.num_computed == known - rest:
            self._copies.append((first.blocks[block], sequence.blocks[block]))
            sequence.num_computed = known

    def _waits_for_first(self, sequence: Sequence) -> bool:
        """Continuations 1 .. n - 1 wait while the first is computing the prompt that they share."""
        first = sequence.request.sequences[0]
        return first is not sequence and first in self.running and first.num_computed < first.num_prompt - 1

    def _match(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the sequence's tokens, now held by it."""
        num_usable = self._num_usable(sequence)
        self._extend_hashes(sequence, num_usable)
        return self.pool.match(sequence.hashes[:num_usable])

    def _is_coming(self, sequence: Sequence, num_matched: int) -> bool:
        """A running sequence is computing the next block that this one could share: better wait than compute it
        twice."""
        if num_matched == self._num_usable(sequence):
            return False
        wanted = sequence.hashes[num_matched]
        return any(
            other.num_computed + 1 < len(other.tokens) and wanted in other.hashes[num_matched : num_matched + 1]
            for other in self.running
        )

    def _num_usable(self, sequence: Sequence) -> int:
        """Leading blocks that may come from the cache. At least the last token must run, to give logits; and tokens
        whose successors are still to be scored must run too."""
        return min(len(sequence.tokens) - 1, sequence.score_from) // self.pool.block_size

    def _extend_hashes(self, sequence: Sequence, count: int) -> None:
        size = self.pool.block_size
        for index in range(len(sequence.hashes), count):
            parent = sequence.hashes[-1] if sequence.hashes else b""
            sequence.hashes.append(block_hash(parent, sequence.tokens[index * size : (index + 1) * size]))

    def _clip_drafts(self, sequence: Sequence, most: int) -> None:
        """Drafts never cost another sequence its blocks."""
        size = self.pool.block_size
        slots = (len(sequence.blocks) + self.pool.num_available) * size
        del sequence.drafts[max(0, min(most, slots - len(sequence.tokens))) :]

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence blocks for `num_tokens` tokens, preempting the last in order of service, if need be
        itself."""
        blocks = sequence.blocks
        while len(blocks) * self.pool.block_size < num_tokens:
            block = self.pool.allocate()
            if block is not None:
                blocks.append(block)
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt_lower(self, sequence: Sequence) -> bool:
        """Preempt the last running sequence if its priority is lower than this one's."""
        if not self.running or self.running[-1].key[0] <= sequence.key[0]:
            return False
        self._preempt(self.running[-1])
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to waiting; its tokens are computed again later, less what is then still cached."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.request.metrics.num_preemptions += 1
        self.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        if self._copies:
            self._copies = [pair for pair in self._copies if pair[1] not in sequence.blocks]
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.drafts = []
        sequence.num_computed = sequence.num_published = 0


def _key(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.key
