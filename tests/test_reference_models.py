"""The reference backend against Transformers in float32, for every family: a prompt at once, and in chunks."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from hasten.backends.base import Batch
from hasten.backends.reference import ReferenceBackend
from hasten.model.checkpoint import open_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BLOCK = 16


def run(backend: ReferenceBackend, tokens: list[int], start: int, blocks: list[int]) -> np.ndarray:
    """Logits of every token of one sequence whose first `start` tokens are already in the cache."""
    positions = np.arange(start, start + len(tokens), dtype=np.int32)
    table = np.array([blocks], np.int32)
    slots = table[0][positions // BLOCK] * BLOCK + positions % BLOCK
    return backend.forward(
        Batch(
            tokens=np.array(tokens, np.int32),
            positions=positions,
            slots=slots.astype(np.int32),
            query_lens=np.array([len(tokens)], np.int32),
            context_lens=np.array([start + len(tokens)], np.int32),
            block_tables=table,
            rows=np.arange(len(tokens), dtype=np.int32),
        )
    )


def loaded(path: Path) -> ReferenceBackend:
    checkpoint = open_checkpoint(path)
    backend = ReferenceBackend()
    backend.load(checkpoint.spec, checkpoint.weights())
    backend.allocate(16, BLOCK, "fp32")
    return backend


def expected(path: Path, tokens: list[int]) -> np.ndarray:
    # "eager", because Transformers' other attention functions leave out Gemma 2's soft cap.
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_logits_equal_transformers(family: str, tiny_model: Callable[..., Path]) -> None:
    path = tiny_model(family)
    tokens = np.random.default_rng(1).integers(3, tiny_models.VOCAB, 45).tolist()
    backend = loaded(path)
    got = run(backend, tokens, 0, [5, 2, 9])
    want = expected(path, tokens)
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)
    chunked = np.concatenate([run(backend, tokens[a:b], a, [3, 1, 0]) for a, b in ((0, 20), (20, 44), (44, 45))])
    np.testing.assert_array_equal(chunked, got)


def test_long_factors_apply_once_the_original_length_is_exceeded(tiny_model: Callable[..., Path]) -> None:
    path = tiny_model("phi3_longrope")
    tokens = np.random.default_rng(2).integers(3, tiny_models.VOCAB, 60).tolist()
    got = run(loaded(path), tokens, 0, [0, 1, 2, 3])
    np.testing.assert_allclose(got, expected(path, tokens), atol=1e-4, rtol=1e-4)
