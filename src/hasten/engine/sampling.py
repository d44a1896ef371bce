"""SamplingParams of many sequences -> the rows of one SamplingBatch, with the counts that penalties need.

Knows how rows are described, not how they are drawn (the backend does that). Row i of a sequence with drafts d0, d1, ..
is described as if d0 .. d(i-1) had been sampled: its counter, its penalties and its min_tokens are those of the token
that would be drawn there without speculation. So the same token is drawn there, on or off.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from hasten.backends.base import Float32, Int32, SamplingBatch
from hasten.engine.request import SamplingParams, Sequence

_NO_IDS = np.zeros(0, np.int32)
_NO_VALUES = np.zeros(0, np.float32)


class Seen:
    """Distinct tokens of one sequence and how often each occurs in its output (0: only in its prompt)."""

    __slots__ = ("_counts", "_ids", "_index")

    def __init__(self, prompt: list[int]) -> None:
        distinct = np.unique(np.array(prompt, np.int32))
        self._index = {token: i for i, token in enumerate(distinct.tolist())}
        self._ids = np.resize(distinct, 2 * len(distinct) + 64)
        self._counts = np.zeros(len(self._ids), np.int32)

    def add(self, token: int) -> None:
        """`token` was sampled."""
        at = self._index.setdefault(token, len(self._index))
        if at == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[at] = token
        self._counts[at] += 1

    def counts_with(self, drafts: list[int]) -> tuple[Int32, Int32]:
        """Ids and counts as if `drafts` had been sampled too."""
        num = len(self._index)
        ids, counts = self._ids[:num], self._counts[:num].copy()
        new: dict[int, int] = {}
        for token in drafts:
            at = self._index.get(token)
            if at is None:
                new[token] = new.get(token, 0) + 1
            else:
                counts[at] += 1
        if new:
            ids = np.concatenate([ids, np.array(list(new), np.int32)])
            counts = np.concatenate([counts, np.array(list(new.values()), np.int32)])
        return ids, counts


def prepare(sequence: Sequence) -> None:
    """Set what sampling keeps on a new sequence. Its params are complete (with_defaults) and stop_tokens is set."""
    params = sequence.request.params
    assert params.temperature is not None
    if (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0):
        sequence.seen = Seen(sequence.tokens)
    sequence.plain = params.logprobs is None and sequence.seen is None and params.min_tokens == 0
    sequence.special = not sequence.plain or params.temperature > 0 or bool(params.logit_bias)


@dataclass(slots=True)
class _Csr:
    """Rows of (ids, values) under construction."""

    ids: list[NDArray[np.int32]] = field(default_factory=list)
    values: list[NDArray[np.generic]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=lambda: [0])

    def append(self, ids: NDArray[np.int32], values: NDArray[np.generic]) -> None:
        if len(ids):
            self.ids.append(ids)
            self.values.append(values)
        self.offsets.append(self.offsets[-1] + len(ids))

    def arrays(self, empty: NDArray[np.generic]) -> tuple[Int32, Int32, NDArray[np.generic]]:
        offsets = np.array(self.offsets, np.int32)
        if not self.ids:
            return offsets, _NO_IDS, empty
        return offsets, np.concatenate(self.ids), np.concatenate(self.values)


# Columns of what a row asks for: temperature, top_k, top_p, min_p, repetition, presence, frequency, num_logprobs.
_Columns = tuple[float, int, float, float, float, float, float, int]
_SCORING: _Columns = (0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0)


def _columns(params: SamplingParams) -> _Columns:
    return (
        params.temperature or 0.0,
        params.top_k or 0,
        1.0 if params.top_p is None else params.top_p,
        params.min_p or 0.0,
        params.repetition_penalty or 1.0,
        params.presence_penalty,
        params.frequency_penalty,
        -1 if params.logprobs is None else params.logprobs,
    )


def sampling_batch(rows: list[tuple[Sequence, int, int]]) -> SamplingBatch:
    """Describe rows, each (sequence, i, target). target >= 0: a prompt position whose next token is `target`, nothing
    is drawn. target -1: the draw after the sequence's tokens and its first i drafts."""
    seen, bias = _Csr(), _Csr()
    columns: list[_Columns] = []
    for sequence, i, target in rows:
        params = sequence.request.params
        if target >= 0:
            columns.append((*_SCORING[:-1], params.prompt_logprobs or 0))
            seen.append(_NO_IDS, _NO_IDS)
            bias.append(_NO_IDS, _NO_VALUES)
        else:
            columns.append(_columns(params))
            seen.append(*(sequence.seen.counts_with(sequence.drafts[:i]) if sequence.seen else (_NO_IDS, _NO_IDS)))
            bias.append(*_bias(sequence, i))
    return _assemble(
        columns,
        seeds=np.array([sequence.seed for sequence, _, _ in rows], np.uint64),
        counters=np.array([sequence.num_output + i for sequence, i, _ in rows], np.uint64),
        targets=np.array([target for _, _, target in rows], np.int32),
        seen=seen,
        bias=bias,
    )


def _assemble(
    columns: list[_Columns],
    seeds: NDArray[np.uint64],
    counters: NDArray[np.uint64],
    targets: Int32,
    seen: _Csr,
    bias: _Csr,
) -> SamplingBatch:
    table = np.array(columns, np.float64)  # [R, 8]
    temperature, top_p, min_p, repetition, presence, frequency = table[:, [0, 2, 3, 4, 5, 6]].T.astype(np.float32)
    top_k, num_logprobs = table[:, [1, 7]].T.astype(np.int32)
    seen_offsets, seen_ids, seen_counts = seen.arrays(_NO_IDS)
    bias_offsets, bias_ids, bias_values = bias.arrays(_NO_VALUES)
    return SamplingBatch(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition=repetition,
        presence=presence,
        frequency=frequency,
        seeds=seeds,
        counters=counters,
        num_logprobs=num_logprobs,
        targets=targets,
        seen_offsets=seen_offsets,
        seen_ids=seen_ids,
        seen_counts=seen_counts.astype(np.int32, copy=False),
        bias_offsets=bias_offsets,
        bias_ids=bias_ids,
        bias_values=bias_values.astype(np.float32, copy=False),
        any_special=True,
    )


class DecodeSampling:
    """Sampling rows of steps in which every sequence runs its last token. While the same sequences do so, nothing
    changes but the counters, unless a penalty counts tokens or a ban on ending is about to be lifted."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self._batch = greedy_batch(0)
        self._num_prompt = np.zeros(0, np.int32)

    def build(self, sequences: list[Sequence], positions: Int32) -> SamplingBatch:
        """One row a sequence; positions [R] are those of their last tokens."""
        if sequences == self._sequences:
            if self._batch.any_special:
                counters = (positions - self._num_prompt).astype(np.uint64)
                self._batch = replace(self._batch, counters=counters)
            return self._batch
        if not any(sequence.special for sequence in sequences):
            batch = greedy_batch(len(sequences))
        else:
            batch = sampling_batch([(sequence, 0, -1) for sequence in sequences])
        steady = not any(s.seen is not None or s.num_output < s.request.params.min_tokens for s in sequences)
        self._sequences = sequences if steady else []
        self._batch = batch
        # The token that follows position p of a sequence is number p + 1 - num_prompt of its output.
        self._num_prompt = np.array([sequence.num_prompt - 1 for sequence in sequences], np.int32)
        return batch


@lru_cache(maxsize=64)
def greedy_batch(num_rows: int) -> SamplingBatch:
    """Plain greedy for every row. Shared, so nobody may write to it."""
    zeros, whole_zeros = np.zeros(num_rows, np.float32), np.zeros(num_rows, np.int32)
    ones, none = np.ones(num_rows, np.float32), np.full(num_rows, -1, np.int32)
    counters, offsets = np.zeros(num_rows, np.uint64), np.zeros(num_rows + 1, np.int32)
    for array in (zeros, whole_zeros, ones, none, counters, offsets):
        array.flags.writeable = False
    return SamplingBatch(
        temperature=zeros,
        top_k=whole_zeros,
        top_p=ones,
        min_p=zeros,
        repetition=ones,
        presence=zeros,
        frequency=zeros,
        seeds=counters,
        counters=counters,
        num_logprobs=none,
        targets=none,
        seen_offsets=offsets,
        seen_ids=_NO_IDS,
        seen_counts=_NO_IDS,
        bias_offsets=offsets,
        bias_ids=_NO_IDS,
        bias_values=_NO_VALUES,
        any_special=False,
    )


def _bias(sequence: Sequence, i: int) -> tuple[Int32, Float32]:
    """logit_bias, and before min_tokens a ban on what would end the sequence."""
    params = sequence.request.params
    bias = params.logit_bias
    if sequence.num_output + i < params.min_tokens:
        bias = {**bias, **dict.fromkeys(sequence.stop_tokens, -np.inf)}
    if not bias:
        return _NO_IDS, _NO_VALUES
    ids = np.array(sorted(bias), np.int32)
    return ids, np.array([bias[token] for token in ids.tolist()], np.float32)
