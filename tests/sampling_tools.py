"""Sampling on a device against the numpy sampler, token for token."""

from dataclasses import replace

import numpy as np
import torch

from hasten.backends.base import SamplingBatch
from hasten.backends.cuda.device import open_device
from hasten.backends.cuda.ops import Ops
from hasten.backends.cuda.sampling import Sampler
from hasten.backends.reference_sampling import sample_rows


def sampling(rows: int, vocab: int, rng: np.random.Generator) -> SamplingBatch:
    """Everything that rows may ask for, of each something else."""
    seen = [rng.choice(vocab, 6, replace=vocab < 6) for _ in range(rows)]
    return SamplingBatch(
        temperature=np.where(np.arange(rows) % 4 == 0, 0, rng.uniform(0.5, 2, rows)).astype(np.float32),
        top_k=rng.integers(0, 20, rows).astype(np.int32) * (np.arange(rows) % 3 == 1),
        top_p=np.where(np.arange(rows) % 2, 0.8, 1).astype(np.float32),
        min_p=np.where(np.arange(rows) % 5 == 2, 0.1, 0).astype(np.float32),
        repetition=np.full(rows, 1.3, np.float32),
        presence=np.full(rows, 0.2, np.float32),
        frequency=np.full(rows, 0.1, np.float32),
        seeds=rng.integers(0, 2**64, rows, dtype=np.uint64),
        counters=np.arange(rows, dtype=np.uint64),
        num_logprobs=(np.arange(rows) % 4 - 1).astype(np.int32),
        targets=np.where(np.arange(rows) % 2, 5, -1).astype(np.int32),
        seen_offsets=np.arange(rows + 1, dtype=np.int32) * 6,
        seen_ids=np.concatenate(seen).astype(np.int32),
        seen_counts=rng.integers(0, 3, 6 * rows).astype(np.int32),
        bias_offsets=np.arange(rows + 1, dtype=np.int32),
        bias_ids=rng.integers(0, vocab, rows).astype(np.int32),
        bias_values=rng.standard_normal(rows).astype(np.float32),
        any_special=True,
    )


def make_sampler(device: str) -> tuple[Sampler, torch.device]:
    opened = open_device(device)
    sampled = torch.full((64,), 7, dtype=torch.int32, device=opened.handle)
    return Sampler(Ops(opened, False, 1e-5), sampled), opened.handle


def check_sampling(device: str, rows: int, vocab: int, least_k: int) -> None:
    """least_k 1: every row is cut to its best ids, which are then found without a sort."""
    rng = np.random.default_rng(4)
    logits = 3 * rng.standard_normal((rows, vocab)).astype(np.float32)
    logits[7] = np.round(logits[7])  # ties
    logits[7, ::3] = -0.0
    params = sampling(rows, vocab, rng)
    params = replace(params, top_k=np.maximum(params.top_k, least_k))
    sampler, handle = make_sampler(device)
    got = sampler(torch.from_numpy(logits.copy()).to(handle), params).result()
    want = sample_rows(logits, params)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.top_ids, want.top_ids)
    for name in ("logprobs", "target_logprobs", "top_logprobs"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=1e-5)


def check_draws(device: str, vocab: int, rows: int = 9) -> None:
    """Seeds and counters of all bits, words of one group and of many, a row of which only one id may be drawn."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((rows, vocab)).astype(np.float32)
    logits[3, 1:] = -np.inf
    logits[4, 0] = np.nan
    zeros, none, no_ids = np.zeros(rows, np.int32), np.full(rows, -1, np.int32), np.zeros(0, np.int32)
    params = replace(
        sampling(rows, vocab, rng), temperature=np.linspace(0.3, 3, rows).astype(np.float32), top_k=zeros,
        top_p=np.ones(rows, np.float32), min_p=np.zeros(rows, np.float32), num_logprobs=none, targets=none,
        counters=rng.integers(0, 2**64, rows, dtype=np.uint64), seen_ids=no_ids, bias_ids=no_ids,
        seen_offsets=np.zeros(rows + 1, np.int32), bias_offsets=np.zeros(rows + 1, np.int32),
    )  # fmt: skip
    sampler, handle = make_sampler(device)
    got = sampler(torch.from_numpy(logits.copy()).to(handle), params).result().tokens
    want = sample_rows(np.nan_to_num(logits, nan=0.0, neginf=-np.inf), params).tokens
    assert got[4] == -1
    filtered = replace(params, min_p=np.full(rows, 0.1, np.float32))
    for least_k in (0, 2):
        filtered = replace(filtered, top_k=np.full(rows, least_k, np.int32))
        assert sampler(torch.from_numpy(logits.copy()).to(handle), filtered).result().tokens[4] == -1
    assert np.array_equal(np.delete(got, 4), np.delete(want, 4))
