"""The reference backend's promises: rows do not depend on their batch, blocks can lie anywhere, caches may be rounded,
and sampling is what its contract says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten.backends.base import Batch, SamplingBatch
from hasten.backends.reference import ReferenceBackend
from hasten.backends.reference_sampling import philox, uniform
from hasten.errors import ModelError, ResourceError
from hasten.model.checkpoint import open_checkpoint

BLOCK = 16


def loaded(path: Path, dtype: str = "fp32", blocks: int = 24) -> ReferenceBackend:
    checkpoint = open_checkpoint(path)
    backend = ReferenceBackend()
    backend.load(checkpoint.spec, checkpoint.weights())
    backend.allocate(blocks, BLOCK, dtype)
    return backend


def step(backend: ReferenceBackend, parts: list[tuple[list[int], int, list[int]]]) -> list[np.ndarray]:
    """Run (tokens, how many came before, blocks) for each sequence in one batch; logits of all tokens of each."""
    tables = np.full((len(parts), 8), 999, np.int32)
    positions = [np.arange(start, start + len(tokens)) for tokens, start, _ in parts]
    for row, (_, _, blocks) in enumerate(parts):
        tables[row, : len(blocks)] = blocks
    slots = [tables[row][p // BLOCK] * BLOCK + p % BLOCK for row, p in enumerate(positions)]
    lens = [len(tokens) for tokens, _, _ in parts]
    logits = backend.forward(
        Batch(
            tokens=np.concatenate([tokens for tokens, _, _ in parts]).astype(np.int32),
            positions=np.concatenate(positions).astype(np.int32),
            slots=np.concatenate(slots).astype(np.int32),
            query_lens=np.array(lens, np.int32),
            context_lens=np.array([start + n for (_, start, _), n in zip(parts, lens, strict=True)], np.int32),
            block_tables=tables,
            rows=np.arange(sum(lens), dtype=np.int32),
        )
    )
    return np.split(logits, np.cumsum(lens)[:-1])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_neox"])
def test_a_row_does_not_depend_on_its_batch(family: str, dtype: str, tiny_model: Callable[..., Path]) -> None:
    path, rng = tiny_model(family), np.random.default_rng(0)
    texts = [rng.integers(3, 300, length).tolist() for length in (21, 5, 34)]
    alone = [step(loaded(path, dtype), [(text, 0, [7, 3, 9])])[0] for text in texts]
    backend = loaded(path, dtype)
    blocks = [[5, 11], [2], [1, 20, 13]]
    together = step(backend, [(text[:-1], 0, table) for text, table in zip(texts, blocks, strict=True)])
    for got, want in zip(together, alone, strict=True):
        np.testing.assert_array_equal(got, want[:-1])
    order = [2, 0, 1]
    last = step(backend, [([texts[i][-1]], len(texts[i]) - 1, blocks[i]) for i in order])
    for got, i in zip(last, order, strict=True):
        np.testing.assert_array_equal(got[0], alone[i][-1])


def test_rounded_caches_are_close(tiny_model: Callable[..., Path]) -> None:
    path, tokens = tiny_model("llama"), np.random.default_rng(0).integers(3, 300, 40).tolist()
    exact = step(loaded(path), [(tokens, 0, [0, 1, 2])])[0]
    for dtype, most in (("bf16", 0.02), ("int8", 0.05)):
        error = np.abs(step(loaded(path, dtype), [(tokens, 0, [0, 1, 2])])[0] - exact).max() / np.abs(exact).max()
        assert 0 < error < most


def test_block_bytes(tiny_model: Callable[..., Path]) -> None:
    backend = loaded(tiny_model("llama"))  # 3 layers, 2 kv heads of 12 dims
    assert backend.block_bytes(16, "fp32") == 2 * 3 * 2 * 12 * 16 * 4
    assert backend.block_bytes(16, "bf16") == backend.block_bytes(16, "fp32") // 2
    assert backend.block_bytes(16, "int8") == 2 * 3 * 2 * 16 * (12 + 4)
    with pytest.raises(ResourceError, match="dtype 'fp8' is not supported"):
        backend.block_bytes(16, "fp8")
    with pytest.raises(ResourceError, match="multiple of 16"):
        backend.allocate(4, 24, "fp32")


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_copied_blocks_continue_alike(dtype: str, tiny_model: Callable[..., Path]) -> None:
    backend = loaded(tiny_model("llama"), dtype)
    tokens = np.random.default_rng(0).integers(3, 300, 20).tolist()
    step(backend, [(tokens, 0, [4, 6])])
    backend.copy_blocks([(6, 8)])
    a, b = step(backend, [([50], 20, [4, 6]), ([50], 20, [4, 8])])
    np.testing.assert_array_equal(a, b)


def test_using_it_too_early() -> None:
    with pytest.raises(ModelError, match="no model is loaded"):
        ReferenceBackend().block_bytes(16, "fp32")


def params(rows: int, **changes: Any) -> SamplingBatch:
    """Plain greedy rows but for the changes; lists become arrays of the field's type."""
    floats = {"temperature": 0, "top_p": 1, "min_p": 0, "repetition": 1, "presence": 0, "frequency": 0}
    ints = {"top_k": 0, "num_logprobs": -1, "targets": -1}
    longs = {"seeds": 0, "counters": 0}
    fields: dict[str, Any] = {"any_special": changes.pop("any_special", True)}
    for group, dtype in ((floats, np.float32), (ints, np.int32), (longs, np.uint64)):
        for name, value in group.items():
            fields[name] = np.broadcast_to(np.array(changes.pop(name, value), dtype), rows).copy()
    for name in ("seen", "bias"):
        entries: list[dict[int, Any]] = changes.pop(name, [{}] * rows)
        fields[f"{name}_offsets"] = np.cumsum([0, *map(len, entries)]).astype(np.int32)
        fields[f"{name}_ids"] = np.array([i for entry in entries for i in entry], np.int32)
        values = [v for entry in entries for v in entry.values()]
        key, dtype = ("seen_counts", np.int32) if name == "seen" else ("bias_values", np.float32)
        fields[key] = np.array(values, dtype)
    return SamplingBatch(**fields, **changes)


def test_philox_known_answers() -> None:
    """From the Random123 distribution's kat_vectors."""
    top = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((top,) * 4, (top,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    assert uniform(0, 0) == (0x6627E8D5E169C58D >> 11) * 2.0**-53


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = np.array([[1, 3, 3, 0], [2, 2, 2, 2]], np.float32)
    for special in (False, True):
        assert ReferenceBackend().sample(logits.copy(), params(2, any_special=special)).tokens.tolist() == [1, 0]


def test_draws_follow_the_probabilities() -> None:
    logits = np.array([0.0, 1.0, 2.0, -1.0, 0.5], np.float32)
    rows, temperature = 20000, 0.7
    tokens = (
        ReferenceBackend()
        .sample(np.tile(logits, (rows, 1)), params(rows, temperature=temperature, seeds=7, counters=np.arange(rows)))
        .tokens
    )
    want = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    found = np.bincount(tokens, minlength=5)
    assert (np.square(found - rows * want) / (rows * want)).sum() < 18.5  # chi-squared, 4 degrees, 0.1 %


def test_draws_depend_on_seed_and_counter_alone() -> None:
    logits = np.random.default_rng(0).standard_normal((8, 100)).astype(np.float32)
    both = params(8, temperature=1, seeds=[1, 1, 2, 3, 4, 5, 6, 7], counters=5)
    tokens = ReferenceBackend().sample(logits.copy(), both).tokens
    for row in range(8):
        lone = params(1, temperature=1, seeds=int(both.seeds[row]), counters=5)
        assert ReferenceBackend().sample(logits[row : row + 1].copy(), lone).tokens[0] == tokens[row]


@pytest.mark.parametrize(
    "options",
    [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 12, "top_p": 0.8, "min_p": 0.05}, {"top_p": 1e-6}],
    ids=str,
)
def test_filters_keep_what_transformers_keeps(options: dict[str, float]) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    logits = 2 * np.random.default_rng(0).standard_normal((1, 40)).astype(np.float32)
    scores = torch.from_numpy(logits) / 0.8
    for name, warper in (
        ("top_k", transformers.TopKLogitsWarper), ("top_p", transformers.TopPLogitsWarper),
        ("min_p", transformers.MinPLogitsWarper),
    ):  # fmt: skip
        if name in options:
            scores = warper(options[name])(None, scores)
    allowed = set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())
    many = params(3000, temperature=0.8, seeds=1, counters=np.arange(3000), **options)
    drawn = set(ReferenceBackend().sample(np.tile(logits, (3000, 1)), many).tokens.tolist())
    assert drawn <= allowed
    probabilities = torch.softmax(scores[0], 0).numpy()
    assert {i for i in allowed if probabilities[i] > 0.005} <= drawn


def test_penalties_and_bias() -> None:
    logits = np.array([[2.0, -2.0, 1.9, 0.0]] * 6, np.float32)
    asked = params(
        6,
        repetition=[1, 2, 1, 1, 1, 2],
        presence=[0, 0, 0.5, 0, 0, 0],
        frequency=[0, 0, 0, 0.04, 0, 0],
        seen=[{}, {0: 0}, {0: 1}, {0: 3}, {}, {0: 0, 2: 1}],
        bias=[{}, {}, {}, {}, {1: 10.0}, {3: 0.5}],
        num_logprobs=0,
    )
    found = ReferenceBackend().sample(logits.copy(), asked)
    assert found.tokens.tolist() == [0, 2, 2, 2, 1, 0]
    want = logits[0] - np.log(np.exp(logits[0]).sum())
    np.testing.assert_allclose(found.logprobs, want[found.tokens], rtol=1e-6)  # of the model's own distribution
    prompt_only = params(1, presence=5, frequency=5, seen=[{0: 0}])
    assert ReferenceBackend().sample(logits[:1].copy(), prompt_only).tokens.tolist() == [0]


def test_repetition_penalty_is_that_of_transformers() -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    logits = np.random.default_rng(0).standard_normal((1, 30)).astype(np.float32)
    seen = [3, 8, 8, 21]
    want = transformers.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), torch.from_numpy(logits.copy()))
    from hasten.backends.reference_sampling import _adjust

    got = _adjust(logits[0], params(1, repetition=1.7, seen=[dict.fromkeys(seen, 1)]), 0)
    np.testing.assert_allclose(got, want[0].numpy(), rtol=1e-6)


def test_logprobs() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 12)).astype(np.float32)
    want = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    found = ReferenceBackend().sample(logits.copy(), params(3, num_logprobs=[2, -1, 4], targets=[-1, 7, 0]))
    assert found.logprobs is not None
    assert found.target_logprobs is not None
    assert found.top_ids is not None
    assert found.top_logprobs is not None
    np.testing.assert_allclose(found.logprobs, want[np.arange(3), found.tokens], rtol=1e-5)
    np.testing.assert_allclose(found.target_logprobs[1:], [want[1, 7], want[2, 0]], rtol=1e-5)
    assert found.top_ids.shape == (3, 4)
    assert found.top_ids[0].tolist() == [*np.argsort(-logits[0])[:2].tolist(), -1, -1]
    assert found.top_ids[2].tolist() == np.argsort(-logits[2])[:4].tolist()
    np.testing.assert_allclose(found.top_logprobs[2], np.sort(want[2])[::-1][:4], rtol=1e-5)
    assert np.isneginf(found.top_logprobs[1]).all()
    plain = ReferenceBackend().sample(logits.copy(), params(3))
    assert plain.logprobs is None
    assert plain.target_logprobs is None
    assert plain.top_ids is None
