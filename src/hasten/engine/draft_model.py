"""Drafts from a smaller model: a compressed or distilled copy, or any other that shares the vocabulary.

Its KV cache has the blocks of the main one, number for number: where the main model's keys of a token are in its cache,
the drafter's are in its own. So block tables, prefix reuse, preemption and eviction are the scheduler's alone. What the
drafter has not run yet (a prompt, tokens that came while drafting rested) it catches up on before it drafts.

Drafts are drawn as the tokens will be: with the request's own parameters and, for the same position, the same random
number. Two models that agree then draw the same token, and a seeded request repeats. Verification is engine.py's.
"""

import time

from hasten.backends.base import Backend, Pending, SamplingBatch
from hasten.engine.batch import BatchBuilder
from hasten.engine.config import EngineConfig
from hasten.engine.request import Acceptance, Sequence
from hasten.engine.sampling import greedy_batch, sampling_batch
from hasten.engine.scheduler import Scheduler
from hasten.engine.speculate import StepCost

_CHANGE = 2.0  # times what drafts are expected to take; more may be compiling, less shows that what was seen was that


class Mirror:
    """What the drafter's cache holds of one sequence: its first num_computed tokens, and after them `guesses`, which
    may since have turned out wrong. Of no use once the sequence has another block list."""

    __slots__ = ("blocks", "guesses", "num_computed")

    def __init__(self, blocks: list[int], num_computed: int, guesses: list[int]) -> None:
        self.blocks = blocks
        self.num_computed = num_computed
        self.guesses = guesses


class ModelDrafter:
    """A Drafter over a backend that is loaded and has as many blocks as the engine's, whose config is given."""

    def __init__(self, backend: Backend, config: EngineConfig) -> None:
        self._backend = backend
        self._batches = BatchBuilder(config.block_size, config.max_sequences, config.max_blocks)
        self._max_step_tokens = config.max_step_tokens
        self._content: list[bytes | None] = [None] * config.num_blocks  # hash of what its cache has in each block
        self._cost = StepCost()
        self._acceptance = Acceptance()  # of all sequences, for those that have hardly shown theirs

    def seconds(self, num_sequences: int) -> float | None:
        return self._cost.seconds(num_sequences)

    def rate(self, sequence: Sequence) -> float:
        return sequence.acceptance.rate(self._acceptance.rate(0.5))

    def learns(self, sequence: Sequence) -> bool:
        return True

    def verified(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        for acceptance in (sequence.acceptance, self._acceptance):
            acceptance.record(num_drafted, num_accepted)

    def propose(self, wanted: list[tuple[Sequence, int]], scheduler: Scheduler, usual: float | None) -> None:
        room = [(sequence, scheduler.make_room(sequence, depth)) for sequence, depth in wanted]
        room = [(sequence, depth) for sequence, depth in room if depth > 0]
        if not room:
            return
        sequences = [sequence for sequence, _ in room]
        starts = self._catch_up(sequences)
        start = time.perf_counter()
        drafts = self._draft(room, starts)
        taken = (time.perf_counter() - start) / max(depth for _, depth in room)
        if usual is not None:  # a first draft may compile, and may have where it took longer than a whole step
            self._cost.record(len(room), taken, most=usual, outlier=_CHANGE)
        for sequence, tokens in zip(sequences, drafts, strict=True):
            sequence.drafts = tokens
            self._end(sequence, tokens)

    def _known(self, sequence: Sequence) -> int:
        """How many of the sequence's tokens are in the drafter's cache, at most all but the last."""
        mirror, size = sequence.mirror, self._batches.block_size
        if mirror is not None and mirror.blocks is sequence.blocks:
            known = mirror.num_computed
            for guess in mirror.guesses:
                if known == len(sequence.tokens) or sequence.tokens[known] != guess:
                    break
                known += 1
        else:
            known = 0
            for block, name in zip(sequence.blocks, sequence.hashes, strict=False):
                if self._content[block] != name:
                    break
                known += size
        return min(known, len(sequence.tokens) - 1)

    def _write_down(self, sequence: Sequence, count: int) -> None:
        """That the cache holds the sequence's first `count` tokens."""
        num_full = min(count // self._batches.block_size, len(sequence.hashes))
        for block, name in zip(sequence.blocks[:num_full], sequence.hashes, strict=False):
            self._content[block] = name

    def _end(self, sequence: Sequence, drafts: list[int]) -> None:
        """Write down what the drafter's cache holds now. The last draft was drawn and not run."""
        sequence.mirror = Mirror(sequence.blocks, len(sequence.tokens), drafts[:-1])
        self._write_down(sequence, len(sequence.tokens))

    def _catch_up(self, sequences: list[Sequence]) -> list[int]:
        """Of each sequence how many tokens are in the cache: all but the last, after what was missing is run, or but
        two, as drafts leave it that were all right. What follows is taken for lost until `_end`. Waited for, so that
        drafts are timed by themselves. No step writes to a block twice, which sequences may share."""
        starts: list[int] = []
        missing: list[tuple[Sequence, int, list[int]]] = []
        written: set[int] = set()  # by the first step of drafts, before the last tokens
        for sequence in sequences:
            start, end = self._known(sequence), len(sequence.tokens) - 1
            later = sequence.blocks[start // self._batches.block_size :]
            sequence.mirror = None
            for block in later:
                self._content[block] = None
            if end - start == 1 and later[0] not in written:
                written.add(later[0])
            else:
                for first in range(start, end, self._max_step_tokens):
                    missing.append((sequence, first, sequence.tokens[first : min(end, first + self._max_step_tokens)]))
                start = end
                self._write_down(sequence, end)
            starts.append(start)
        try:
            for sequence, first, run in missing[:-1]:
                self._backend.forward(self._batches.pack([sequence], [first], [run], []))
            for sequence, first, run in missing[-1:]:
                self._step([sequence], [first], [run], 0).result()
        except BaseException:
            self._content = [None] * len(self._content)  # not all that was written down has run
            raise
        return starts

    def _draft(self, room: list[tuple[Sequence, int]], starts: list[int]) -> list[list[int]]:
        """Draw one token for each sequence, run it, draw the next, until its depth is reached. A device that works by
        itself is not waited for in between, unless a penalty counts the drafts."""
        chained = self._backend.overlaps and not any(sequence.seen is not None for sequence, _ in room)
        drafts: list[list[int]] = [[] for _ in room]
        drawn: list[tuple[list[int], Pending]] = []
        members = list(range(len(room)))
        runs = [sequence.tokens[start:] for (sequence, _), start in zip(room, starts, strict=True)]
        depth = 0
        while members:
            sequences = [room[member][0] for member in members]
            pending = self._step(sequences, [starts[member] for member in members], runs, depth)
            drawn.append((members, pending))
            if not chained:
                _take(drawn, drafts)
                for sequence, member in zip(sequences, members, strict=True):
                    sequence.drafts = drafts[member]  # penalties count them
            rows = {member: row for row, member in enumerate(members)}
            starts = [len(sequence.tokens) + depth for sequence, _ in room]
            depth += 1
            members = [member for member in members if room[member][1] > depth and (chained or drafts[member][-1] >= 0)]
            runs = [[~rows[member] if chained else drafts[member][-1]] for member in members]
        _take(drawn, drafts)
        return [tokens[: tokens.index(-1)] if -1 in tokens else tokens for tokens in drafts]

    def _step(self, sequences: list[Sequence], starts: list[int], runs: list[list[int]], depth: int) -> Pending:
        """Run `runs` and draw the token after each: the sequence's own ones and `depth` drafts come before it."""
        rows, num_tokens = [], 0
        for run in runs:
            num_tokens += len(run)
            rows.append(num_tokens - 1)
        logits = self._backend.forward(self._batches.pack(sequences, starts, runs, rows))
        return self._backend.sample(logits, _sampling(sequences, depth))


def _sampling(sequences: list[Sequence], depth: int) -> SamplingBatch:
    if not any(sequence.special for sequence in sequences):
        return greedy_batch(len(sequences))
    return sampling_batch([(sequence, depth, -1) for sequence in sequences])


def _take(drawn: list[tuple[list[int], Pending]], drafts: list[list[int]]) -> None:
    """Add what was drawn to the drafts of its members, and empty the list."""
    for members, pending in drawn:
        for member, token in zip(members, pending.result().tokens.tolist(), strict=True):
            drafts[member].append(token)
    drawn.clear()
