"""The native sampler against the numpy reference, and its draws against the probabilities that they should have."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

_core = pytest.importorskip("hasten._core", reason="the compiled core is not built: run scripts/build.sh")

from hasten.backends.base import Sampled, SamplingBatch  # noqa: E402
from hasten.backends.cpu import CpuBackend  # noqa: E402
from hasten.backends.reference_sampling import sample_rows, uniform  # noqa: E402

ISAS = pytest.mark.parametrize("isa", _core.isas())


def params(rows: int, **changes: Any) -> SamplingBatch:
    """Plain sampling at temperature 1 for every row, but for `changes`."""
    defaults: dict[str, Any] = {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition": 1.0, "presence": 0.0,
        "frequency": 0.0, "seeds": 5, "counters": np.arange(rows), "num_logprobs": -1, "targets": -1,
        "seen_offsets": np.zeros(rows + 1), "seen_ids": [], "seen_counts": [], "bias_offsets": np.zeros(rows + 1),
        "bias_ids": [], "bias_values": [], "any_special": True,
    }  # fmt: skip
    values: dict[str, Any] = {}
    for field in fields(SamplingBatch):
        value = changes.get(field.name, defaults[field.name])
        if field.name == "any_special":
            values[field.name] = value
            continue
        kind = str(field.type)
        dtype = np.uint64 if "uint64" in kind else np.float32 if "float32" in kind else np.int32
        array = np.asarray(value, dtype)
        values[field.name] = np.full(rows, array) if array.ndim == 0 else np.ascontiguousarray(array)
    return SamplingBatch(**values)


def sample(logits: np.ndarray, batch: SamplingBatch, isa: str | None = None) -> Sampled:
    before = logits.copy()
    out = CpuBackend(2, isa).sample(logits, batch)
    assert np.array_equal(logits, before, equal_nan=True)
    return out


def test_uniform_equals_the_reference() -> None:
    for seed, counter in [(0, 0), (1, 2), (2**64 - 1, 2**64 - 1), (12345678901234567890, 9876543210)]:
        assert _core.philox_uniform(seed, counter) == uniform(seed, counter)


@ISAS
@pytest.mark.parametrize("vocab", [5, 307, 40000])
def test_greedy_takes_the_lowest_of_the_best(vocab: int, isa: str) -> None:
    logits = np.random.default_rng(vocab).normal(size=(9, vocab)).astype(np.float32)
    logits[1, [vocab - 1, 3]] = 50.0
    logits[2] = -np.inf
    logits[3, vocab - 1] = np.inf
    logits[4, vocab // 2] = np.nan
    for special in (False, True):
        tokens = sample(logits, params(9, temperature=0.0, any_special=special), isa).tokens
        want = np.argmax(logits, axis=1)
        want[4] = -1
        assert tokens.tolist() == want.tolist()
    for row in range(9):
        assert sample(logits[row : row + 1].copy(), params(1, any_special=False), isa).tokens[0] == want[row]


@ISAS
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 2000},
        {"top_p": 0.9},
        {"top_p": 0.01},
        {"min_p": 0.1},
        {"top_k": 50, "top_p": 0.8, "min_p": 0.02, "temperature": 1.7},
        {"top_p": 0.999, "temperature": 5.0},
    ],
    ids=str,
)
def test_tokens_equal_the_reference(settings: dict[str, Any], isa: str) -> None:
    rng = np.random.default_rng(3)
    rows, vocab = 200, 3001
    logits = (3 * rng.normal(size=(rows, vocab))).astype(np.float32)
    logits[::2] = np.round(logits[::2])  # many ties
    batch = params(rows, seeds=rng.integers(0, 2**63, rows), **settings)
    assert sample(logits, batch, isa).tokens.tolist() == sample_rows(logits.copy(), batch).tokens.tolist()


@ISAS
def test_what_is_cut_off_or_hardly_differs_equals_the_reference(isa: str) -> None:
    """Logits of -inf, as masks leave them, and differences near the ends of the range of floats."""
    rng = np.random.default_rng(8)
    few = np.full((40, 512), -np.inf, np.float32)
    few[:, 100:400:30] = rng.normal(size=(40, 10))
    close = np.where(rng.random((40, 512)) < 0.5, 0.0, -1e-38).astype(np.float32)
    wide = np.where(rng.random((40, 512)) < 0.1, 3e38, -3e38).astype(np.float32)
    one = np.full((40, 512), -np.inf, np.float32)
    one[:, 77] = -5.0
    seeds = rng.integers(0, 2**63, 40)
    for logits in (few, close, wide, one):
        for settings in (
            {"top_k": 50, "top_p": 0.9},
            {"top_k": 3, "top_p": 0.5},
            {"top_k": 512, "top_p": 0.9},
            {"top_k": 50, "min_p": 0.1},
            {"top_p": 0.9, "num_logprobs": 20},
            {"top_p": 0.9, "min_p": 0.05, "temperature": 3.0},
            {},
        ):
            batch = params(40, seeds=seeds, **settings)
            got, want = sample(logits, batch, isa), sample_rows(logits.copy(), batch)
            assert got.tokens.tolist() == want.tokens.tolist(), settings
            if logits is not wide and got.top_logprobs is not None and want.top_logprobs is not None:
                np.testing.assert_allclose(got.top_logprobs, want.top_logprobs, atol=2e-6)


def test_one_sampler_takes_vocabularies_of_any_size_in_turn() -> None:
    backend = CpuBackend(2)
    for vocab in (300, 70_000, 5, 40_000):
        logits = np.random.default_rng(vocab).normal(size=(5, vocab)).astype(np.float32)
        batch = params(5, top_p=0.9, num_logprobs=3, bias_offsets=np.arange(6), bias_ids=[1] * 5, bias_values=[2.0] * 5)
        assert backend.sample(logits, batch).tokens.tolist() == sample_rows(logits.copy(), batch).tokens.tolist()


@ISAS
def test_penalties_bias_and_logprobs_equal_the_reference(isa: str) -> None:
    rng = np.random.default_rng(4)
    rows, vocab = 64, 501
    logits = (2 * rng.normal(size=(rows, vocab))).astype(np.float32)
    seen = [np.sort(rng.choice(vocab, 30, replace=False)) for _ in range(rows)]
    biased = [np.sort(rng.choice(vocab, 5, replace=False)) for _ in range(rows)]
    batch = params(
        rows,
        temperature=np.where(np.arange(rows) % 3 == 0, 0.0, 0.8),
        repetition=1.3,
        presence=0.4,
        frequency=0.2,
        seen_offsets=np.arange(rows + 1) * 30,
        seen_ids=np.concatenate(seen),
        seen_counts=rng.integers(0, 4, rows * 30),
        bias_offsets=np.arange(rows + 1) * 5,
        bias_ids=np.concatenate(biased),
        bias_values=rng.normal(size=rows * 5) * 5,
        num_logprobs=np.arange(rows) % 8 - 1,
        targets=np.arange(rows) % 5 - 1,
    )
    got, want = sample(logits, batch, isa), sample_rows(logits.copy(), batch)
    assert got.tokens.tolist() == want.tokens.tolist()
    assert got.top_ids is not None
    assert want.top_ids is not None
    assert got.top_ids.tolist() == want.top_ids.tolist()
    for field in ("logprobs", "target_logprobs", "top_logprobs"):
        np.testing.assert_allclose(getattr(got, field), getattr(want, field), atol=2e-6)


@ISAS
def test_draws_follow_the_probabilities(isa: str) -> None:
    """Chi-square over 20,000 counters below its 0.9999 quantile (50.8 for 19 degrees of freedom, 23.5 for 4)."""
    logits = np.linspace(-2, 2, 20).astype(np.float32)
    rows = 20000
    for settings, kept, limit in [({}, 20, 50.8), ({"top_k": 5}, 5, 23.5)]:
        tokens = sample(np.tile(logits, (rows, 1)), params(rows, **settings), isa).tokens
        weights = np.exp(logits[-kept:].astype(np.float64))
        expected = rows * weights / weights.sum()
        counts = np.bincount(tokens, minlength=20)
        assert counts[:-kept].sum() == 0
        assert ((counts[-kept:] - expected) ** 2 / expected).sum() < limit


def test_models_that_nearly_agree_draw_the_same() -> None:
    """Two tokens of a race part with a chance of at most 2 TV / (1 + TV), where a walk over all ids would part far more
    often; groups cost a little more."""
    rng = np.random.default_rng(8)
    logits = (3 * rng.normal(size=(4000, 3001))).astype(np.float32)
    other = logits + (0.1 * rng.normal(size=logits.shape)).astype(np.float32)
    p, q = (np.exp(x - x.max(1, keepdims=True)) for x in (logits, other))
    distance = 0.5 * np.abs(p / p.sum(1, keepdims=True) - q / q.sum(1, keepdims=True)).sum(1).mean()
    batch = params(4000, seeds=rng.integers(0, 2**63, 4000))
    parted = (sample(logits, batch).tokens != sample(other, batch).tokens).mean()
    assert 0.03 < distance < 0.06
    assert distance <= parted < 1.3 * 2 * distance / (1 + distance)


@ISAS
def test_a_row_does_not_depend_on_its_batch(isa: str) -> None:
    rng = np.random.default_rng(6)
    logits = rng.normal(size=(7, 50000)).astype(np.float32)
    together = sample(logits, params(7, top_p=0.95, counters=np.arange(7)), isa).tokens
    for row in range(7):
        assert (
            sample(logits[row : row + 1].copy(), params(1, top_p=0.95, counters=[row]), isa).tokens[0] == together[row]
        )


def test_arrays_of_another_type_are_refused_not_converted() -> None:
    logits = np.zeros((2, 10), np.float32)
    with pytest.raises(TypeError):
        CpuBackend(1).sample(logits.astype(np.float64), params(2))
    with pytest.raises(TypeError, match="top_k is not"):
        CpuBackend(1).sample(logits, replace(params(2), top_k=np.zeros(2, np.int64)))
    with pytest.raises(ValueError, match="min_p has 3 entries, expected 2"):
        CpuBackend(1).sample(logits, replace(params(2), min_p=np.zeros(3, np.float32)))


def test_token_outside_the_vocabulary_is_refused() -> None:
    logits = np.zeros((1, 10), np.float32)
    for changes in (
        {"bias_offsets": [0, 1], "bias_ids": [10], "bias_values": [1.0]},
        {"seen_offsets": [0, 1], "seen_ids": [-1], "seen_counts": [1]},
        {"targets": 10},
    ):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            sample(logits, params(1, **changes))
