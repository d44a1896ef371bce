"""The native decoder against Transformers for every family and instruction set, and its promise on bits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

_core = pytest.importorskip("hasten._core", reason="the compiled core is not built: run scripts/build.sh")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny_models  # noqa: E402
from cpu_tools import BLOCK, NUM_BLOCKS, batch, load, run, table  # noqa: E402

from hasten.backends.cpu import CpuBackend  # noqa: E402
from hasten.model.checkpoint import open_checkpoint  # noqa: E402
from hasten.model.formats import Weight  # noqa: E402

TOKENS = np.random.default_rng(0).integers(3, tiny_models.VOCAB, 100).astype(np.int32)
Build = Callable[..., Path]


@pytest.fixture(scope="module")
def expected() -> Callable[[str], np.ndarray]:
    known: dict[str, np.ndarray] = {}

    def logits(family: str) -> np.ndarray:
        if family not in known:
            with torch.no_grad():
                known[family] = tiny_models.make(family)(torch.tensor(TOKENS)[None].long()).logits[0].numpy()
        return known[family]

    return logits


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_logits_equal_transformers(
    family: str, isa: str, tiny_model: Build, expected: Callable[[str], np.ndarray]
) -> None:
    want = expected(family)
    got = run(load(tiny_model(family), isa), TOKENS, [len(TOKENS)], table(1))
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mistral", "olmo2", "gpt2"])
def test_chunks_do_not_change_bits(family: str, isa: str, kv: str, tiny_model: Build) -> None:
    """One prefill, chunks, and token by token; each with another number of threads."""
    whole = run(load(tiny_model(family), isa, 2, kv), TOKENS, [100], table(1))
    chunks = run(load(tiny_model(family), isa, 1, kv), TOKENS, [1, 30, 17, 5, 47], table(2))
    single = run(load(tiny_model(family), isa, 3, kv), TOKENS, [1] * 100, table(3))
    assert np.array_equal(whole, chunks)
    assert np.array_equal(whole, single)


@pytest.mark.parametrize("isa", _core.isas())
def test_batch_does_not_change_bits(isa: str, tiny_model: Build) -> None:
    """A sequence alone, and beside a prefill, a decode and a verification of other lengths."""
    backend = load(tiny_model("qwen3"), isa, kv="bf16")
    blocks = [table(0, 40)[i * 8 : i * 8 + 8] for i in range(4)]
    want = run(backend, TOKENS[:60], [59, 1], blocks[0])[-1]
    others = [TOKENS[::-1].copy(), TOKENS[40:].copy(), TOKENS[5:].copy()]
    backend.forward(
        batch([(TOKENS[:59], 0, blocks[0]), (others[0][:33], 0, blocks[1]), (others[1][:20], 0, blocks[2])])
    )
    mixed = batch(
        [
            (others[2][:21], 0, blocks[3]),
            (others[0][33:34], 33, blocks[1]),
            (TOKENS[59:60], 59, blocks[0]),
            (others[1][20:25], 20, blocks[2]),
        ],
        rows=[20, 21, 22, 27],
    )
    assert np.array_equal(backend.forward(mixed)[2], want)


def test_longrope_switches_with_the_length(tiny_model: Build, expected: Callable[[str], np.ndarray]) -> None:
    """Short factors up to original_max (48 here), long ones beyond, as Transformers does for a whole forward pass."""
    backend = load(tiny_model("phi3_longrope"))
    with torch.no_grad():
        want = tiny_models.make("phi3_longrope")(torch.tensor(TOKENS[:48])[None].long()).logits[0].numpy()
    got = run(backend, TOKENS[:48], [48], table(1))
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    assert np.abs(got - expected("phi3_longrope")[:48]).max() > 0.1


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("isa", _core.isas())
def test_stale_nan_in_a_reused_block_is_not_seen(isa: str, kv: str, tiny_model: Build) -> None:
    """A sequence of NaN fills blocks that another one then gets."""
    checkpoint = open_checkpoint(tiny_model("llama"))
    backend = CpuBackend(2, isa)
    backend.load(checkpoint.spec, ((name, _spoil(name, weight)) for name, weight in checkpoint.weights()))
    backend.allocate(NUM_BLOCKS, BLOCK, kv)
    tokens = np.where(TOKENS == 7, 8, TOKENS)[:37]
    want = run(backend, tokens, [37], table(1))
    assert np.isnan(run(backend, np.full(48, 7, np.int32), [48], table(1))).all()
    assert np.array_equal(run(backend, tokens, [20, 1, 16], table(1)), want)


def _spoil(name: str, weight: Weight) -> Weight:
    """Token 7 becomes NaN."""
    if name != "embed":
        return weight
    data = np.array(weight.data)
    data[7] = np.nan
    return replace(weight, data=data)


def test_copied_block_continues_alike(tiny_model: Build) -> None:
    backend = load(tiny_model("llama3"), kv="int8")
    first, second = table(1), table(1).copy()
    second[1] = next(b for b in range(40) if b not in first)
    want = run(backend, TOKENS[:30], [24, 6], first)[24:]
    run(backend, TOKENS[:24], [24], first)
    backend.copy_blocks([(int(first[1]), int(second[1]))])
    got = backend.forward(batch([(TOKENS[24:30], 24, second)]))
    assert np.array_equal(got, want)


def test_only_wanted_rows(tiny_model: Build) -> None:
    backend = load(tiny_model("gemma3"))
    every = run(backend, TOKENS, [100], table(1))
    some = backend.forward(batch([(TOKENS, 0, table(1))], rows=[0, 41, 99]))
    assert np.array_equal(some, every[[0, 41, 99]])
    assert backend.forward(batch([(TOKENS, 0, table(1))], rows=[])).shape == (0, tiny_models.VOCAB)
