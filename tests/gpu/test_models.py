"""Whole models on the GPU: families against Transformers, graphs against eager steps, batches against each alone."""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

import tiny_models  # noqa: E402
import triton  # noqa: E402
from cpu_tools import table  # noqa: E402
from cuda_tools import batch, fetched, load, pieces  # noqa: E402

from hasten.backends.cuda import kernels  # noqa: E402
from hasten.backends.cuda.device import open_device  # noqa: E402

TOKENS = np.random.default_rng(0).integers(3, tiny_models.VOCAB, 100).astype(np.int32)
Build = Callable[..., Path]


def expected(family: str, tokens: np.ndarray) -> np.ndarray:
    model = tiny_models.make(family)
    model.set_attn_implementation("eager")  # others leave out Gemma 2's soft cap in some versions
    with torch.no_grad():
        return model(torch.tensor(tokens)[None].long()).logits[0].numpy()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_logits_equal_transformers(family: str, tiny_model: Build) -> None:
    """A prefill in chunks, then single tokens: eager, captured, replayed."""
    # Where the rotary factors change with the length, only whole prompts compare.
    sizes = [100] if family == "phi3_longrope" else [57, 1, 33, 5, 1, 1, 1, 1]
    want = expected(family, TOKENS)
    got = pieces(load(tiny_model(family), "cuda"), TOKENS, sizes, table(1))
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "olmo2", "gpt_neox"])
@pytest.mark.parametrize("kv", ["bf16", "fp8"])
def test_bfloat16_is_close(family: str, kv: str, tiny_model: Build) -> None:
    path = tiny_model(family, dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        want = model(torch.tensor(TOKENS)[None].long()).logits[0].numpy()
    got = pieces(load(path, "cuda", kv), TOKENS, [90, *[1] * 10], table(1))
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < (0.03 if kv == "bf16" else 0.1)


@pytest.mark.parametrize("kind", ["decodes", "runs", "any"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_graph_equals_eager(family: str, kind: str, tiny_model: Build) -> None:
    backend = load(tiny_model(family, dtype="bfloat16"), "cuda", "bf16")
    pieces(backend, TOKENS[:40], [40], table(1))
    others = [b for b in range(40) if b not in table(1)]
    count = {"decodes": 1, "runs": 5, "any": 30}[kind]
    step = batch(
        [
            (TOKENS[40:41], 40, table(1)),
            (TOKENS[41 : 41 + count], 0, np.int32(others[:10])),
            (TOKENS[42:43], 0, np.int32(others[10:20])),
        ]
    )
    eager = fetched(backend, step)
    backend.finish_captures()
    assert backend._graphs is not None
    assert any(key[0] == kind and bucket.graph for key, bucket in backend._graphs._buckets.items())
    for _ in range(2):
        assert np.array_equal(eager, fetched(backend, step))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_kernels_of_new_steps_are_compiled_before_they_run(
    family: str, deterministic: bool, tiny_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, early = [], []

    def compiled(fn: object, is_manual_warmup: bool, **_: object) -> None:
        (early if is_manual_warmup else late).append(fn.name)

    for name in [found.name for found in pkgutil.walk_packages(kernels.__path__, kernels.__name__ + ".")]:
        for kernel in vars(importlib.import_module(name)).values():
            if isinstance(kernel, triton.JITFunction):
                kernel.device_caches.clear()
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", compiled)
    backend = load(tiny_model(family, dtype="bfloat16"), "cuda", "bf16", deterministic=deterministic)
    pieces(backend, TOKENS[:33], [30, 1, 1, 1], table(1))
    assert early
    assert not late


def test_an_interrupted_rehearsal_leaves_triton_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    device = open_device("cuda")
    with monkeypatch.context() as patch:
        patch.setattr(triton.AsyncCompileMode, "__exit__", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            device.rehearse(lambda: None)
    device.rehearse(lambda: None)


def test_prompts_alone_give_the_same_every_time(tiny_model: Build) -> None:
    """No program of decode attention has anything to do then, and what follows must still wait for what was before."""
    backend = load(tiny_model("qwen3", dtype="bfloat16", num_key_value_heads=1), "cuda", "bf16")
    step = batch([(TOKENS[:90], 0, table(1))])
    first = fetched(backend, step)
    backend.finish_captures()
    for _ in range(300):
        assert np.array_equal(first, fetched(backend, step))


def test_steps_go_on_while_graphs_are_captured(tiny_model: Build) -> None:
    """Buckets one after the other, none waited for: every result is that of the first step of so many tokens, up to
    what a larger bucket's tiles round otherwise."""
    backend = load(tiny_model("qwen3", dtype="bfloat16"), "cuda", "bf16")
    first: dict[int, np.ndarray] = {}
    for _ in range(4):
        for count in (20, 1, 33, 50, 7, 64, 90):
            got = fetched(backend, batch([(TOKENS[:count], 0, table(1))]))
            want = first.setdefault(count, got)
            assert np.abs(got - want).max() < 2e-2 * np.abs(want).max()
    backend.finish_captures()


@pytest.mark.parametrize("kind", ["decodes", "any"])
def test_a_graph_that_never_ran_equals_eager_steps(kind: str, tiny_model: Build) -> None:
    """Larger buckets stand in for the small one until it has its own graph, captured without a step of its own."""
    backend = load(tiny_model("qwen3", dtype="bfloat16"), "cuda", "bf16")
    tables = [np.array([i], np.int32) for i in range(40)]
    large, small = (24, 12) if kind == "decodes" else (1, 1)
    lengths = (1, 1) if kind == "decodes" else (60, 35)

    def step(count: int, length: int):
        return batch([(TOKENS[i : i + length], 0, table(1) if length > 1 else tables[i]) for i in range(count)])

    graphs, backend._graphs = backend._graphs, None
    want = fetched(backend, step(small, lengths[1]))
    backend._graphs = graphs
    assert graphs is not None
    fetched(backend, step(large, lengths[0]))
    backend.finish_captures()
    for _ in range(30):
        got = fetched(backend, step(small, lengths[1]))
    backend.finish_captures()
    got = fetched(backend, step(small, lengths[1]))
    (bucket,) = [b for (what, _), b in graphs._buckets.items() if what == kind and not b.ran]
    assert bucket.graph is not None
    assert np.abs(got - want).max() < 2e-2 * np.abs(want).max()


def test_tuned_kernels_give_the_same(tiny_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tiny_model("qwen3", dtype="bfloat16", num_hidden_layers=1)
    backend = load(path, "cuda", "bf16")
    want = pieces(backend, TOKENS, [57, 1, 42], table(1))
    found = backend.tune_kernels(lambda line: None, batches=(1,))
    assert found["step_ms"]["1 after"] <= found["step_ms"]["1 before"]  # type: ignore[index]
    later = load(path, "cuda", "bf16")
    assert later._device.tiles == backend._device.tiles
    assert all(ratio > 1 for ratio in later.slower_than_dense().values())
    for each in (backend, later):
        got = pieces(each, TOKENS, [57, 1, 42], table(1))
        assert np.abs(got - want).max() < 3e-2 * np.abs(want).max()
        each.finish_captures()
        assert each._graphs is not None
        assert all(bucket.graph is not None for bucket in each._graphs._buckets.values() if bucket.asked)


def test_a_format_is_compared_with_bf16_once(
    tiny_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tiny_model("qwen3", dtype="bfloat16", num_hidden_layers=1)
    backend = load(path, "cuda", "bf16", format="fp8")
    assert backend.slower_than_dense() == {}
    backend.compare_with_dense()
    (times,) = backend._device.measured.products.values()
    assert all(0 < milliseconds < 1 for pair in times.values() for milliseconds in pair)
    assert load(path, "cuda", "bf16", format="fp8")._device.measured == backend._device.measured
    dense = load(path, "cuda", "bf16")
    dense.compare_with_dense()
    assert dense.slower_than_dense() == {}


@pytest.mark.parametrize("count", [2, 9, 40])
def test_batch_agrees_with_each_alone(count: int, tiny_model: Build) -> None:
    backend = load(tiny_model("qwen3"), "cuda")
    tables = [np.array([i % 40], np.int32) for i in range(count)]
    starts = [(i * 7) % 14 + 1 for i in range(count)]
    parts = [(TOKENS[i : i + starts[i]], 0, tables[i]) for i in range(count)]
    fetched(backend, batch(parts))
    for _ in range(3):
        backend.finish_captures()
        together = fetched(backend, batch([(TOKENS[i : i + 1], starts[i], tables[i]) for i in range(count)]))
    for i in range(count):
        tokens = np.append(TOKENS[i : i + starts[i]], TOKENS[i])
        alone = pieces(load_once(tiny_model), tokens, [starts[i] + 1], table(i))
        assert np.abs(together[i] - alone[-1]).max() < 1e-5 * np.abs(alone).max()


_loaded: dict[str, object] = {}


def load_once(tiny_model: Build):
    if "backend" not in _loaded:
        _loaded["backend"] = load(tiny_model("qwen3"), "cuda")
    return _loaded["backend"]


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2"])
def test_deterministic_bits_do_not_depend_on_the_batch(family: str, tiny_model: Build) -> None:
    backend = load(tiny_model(family, dtype="bfloat16"), "cuda", "bf16", deterministic=True)
    whole = pieces(backend, TOKENS, [100], table(1))
    chunks = pieces(backend, TOKENS, [1, 30, 17, 5, 46, 1], table(2))
    assert np.array_equal(whole, chunks)
    blocks = [table(0, 40)[i * 8 : i * 8 + 8] for i in range(4)]
    want = pieces(backend, TOKENS[:60], [59, 1], blocks[0])[-1]
    pieces(backend, TOKENS[:59], [59], blocks[0])
    mixed = batch([(TOKENS[5:26], 0, blocks[3]), (TOKENS[59:60], 59, blocks[0]), (TOKENS[20:25], 0, blocks[2])])
    assert np.array_equal(fetched(backend, mixed)[21], want)
