"""Rows of a SamplingBatch: penalties' counts against counting, bans before min_tokens, drafts as if they were
sampled."""

import random
from collections import Counter

import numpy as np
import pytest

from hasten.engine.request import Request, SamplingParams, Sequence
from hasten.engine.sampling import Seen, greedy_batch, prepare, sampling_batch


def sequence(prompt: list[int], **params: object) -> Sequence:
    filled = SamplingParams(**params).with_defaults({})  # type: ignore[arg-type]
    request = Request("0", prompt, filled, None)
    request.sequences.append(Sequence(request, 0, 0, 77, 1000))
    prepare(request.sequences[0])
    return request.sequences[0]


@pytest.mark.parametrize("seed", range(10))
def test_seen_counts_equal_counting(seed: int) -> None:
    rng = random.Random(seed)
    prompt = [rng.randrange(300) for _ in range(rng.choice((1, 10, 200)))]
    seen, output = Seen(prompt), []
    for _ in range(150):
        output.append(rng.randrange(300))
        seen.add(output[-1])
        drafts = [rng.randrange(300) for _ in range(rng.randrange(4))]
        ids, counts = seen.counts_with(drafts)
        expected = Counter(output + drafts)
        known = {*prompt, *output, *drafts}
        assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {token: expected[token] for token in known}
        assert ids.dtype == counts.dtype == np.int32


def test_rows_of_drafts_are_those_without_speculation() -> None:
    def make() -> Sequence:
        return sequence(
            [1, 2, 3],
            temperature=0.7,
            top_k=5,
            frequency_penalty=0.5,
            min_tokens=3,
            logit_bias={9: 2.0},
            seed=4,
            logprobs=2,
        )

    speculative = make()
    speculative.stop_tokens = frozenset({5})
    speculative.tokens.append(8)
    speculative.seen.add(8)  # type: ignore[union-attr]
    speculative.drafts = [8, 7, 6]
    rows = sampling_batch([(speculative, i, -1) for i in range(4)])
    plain = make()
    plain.stop_tokens = frozenset({5})
    for i, token in enumerate((8, 8, 7, 6)):
        plain.tokens.append(token)
        plain.seen.add(token)  # type: ignore[union-attr]
        row = sampling_batch([(plain, 0, -1)])
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition", "presence", "frequency", "seeds",
        "counters",
                     "num_logprobs", "targets"):  # fmt: skip
            assert getattr(rows, name)[i] == getattr(row, name)[0], name
        seen, bias = slice(*rows.seen_offsets[i : i + 2]), slice(*rows.bias_offsets[i : i + 2])
        assert dict(zip(rows.seen_ids[seen], rows.seen_counts[seen], strict=True)) == dict(
            zip(row.seen_ids, row.seen_counts, strict=True)
        )
        assert dict(zip(rows.bias_ids[bias], rows.bias_values[bias], strict=True)) == dict(
            zip(row.bias_ids, row.bias_values, strict=True)
        )
        assert (5 in rows.bias_ids[bias]) == (i + 1 < 3)


def test_rows_that_score_a_prompt_draw_nothing() -> None:
    s = sequence([1, 2, 3], temperature=1.0, repetition_penalty=1.5, logit_bias={1: 1.0}, prompt_logprobs=4)
    rows = sampling_batch([(s, 0, 2), (s, 0, 3), (s, 0, -1)])
    assert rows.targets.tolist() == [2, 3, -1]
    assert rows.num_logprobs.tolist() == [4, 4, -1]
    assert rows.temperature.tolist() == [0, 0, 1]
    assert rows.seen_offsets.tolist() == [0, 0, 0, 3]
    assert rows.bias_offsets.tolist() == [0, 0, 0, 1]


def test_only_what_needs_it_is_special() -> None:
    assert not sequence([1]).special
    assert not sequence([1], top_p=0.5, seed=3).special  # greedy all the same
    for params in (
        {"temperature": 1.0},
        {"logprobs": 0},
        {"logit_bias": {1: 1.0}},
        {"min_tokens": 1},
        {"presence_penalty": 1.0},
    ):
        assert sequence([1], **params).special
    batch = greedy_batch(3)
    assert not batch.any_special
    assert len(batch.temperature) == len(batch.targets) == len(batch.seen_offsets) - 1 == 3
