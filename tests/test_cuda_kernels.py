"""The CUDA backend's kernels in Triton's interpreter on a CPU: products against float64, models against the reference,
sampling against the numpy sampler. On a GPU tests/gpu does the same at real sizes."""

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on the GPU here: see tests/gpu", allow_module_level=True)

import attention_tools  # noqa: E402
import cpu_tools  # noqa: E402
from attention_tools import check_attention, make_spec  # noqa: E402
from cpu_tools import BLOCK, NUM_BLOCKS, table  # noqa: E402
from cuda_tools import batch, check_composed, check_normed, check_product, fetched, load, make_linear, pieces  # noqa: E402
from sampling_tools import check_draws, check_sampling  # noqa: E402

from hasten.backends.base import StepLimits  # noqa: E402
from hasten.backends.cuda import CudaBackend  # noqa: E402
from hasten.backends.cuda import device as cuda_device  # noqa: E402
from hasten.backends.cuda.attention import Attention  # noqa: E402
from hasten.backends.cuda.device import open_device  # noqa: E402
from hasten.backends.cuda.inputs import MAX_PROGRAMS, MAX_SPLITS, Sizes, share_keys  # noqa: E402
from hasten.backends.cuda.linear import Linear  # noqa: E402
from hasten.backends.cuda.ops import Ops  # noqa: E402
from hasten.backends.cuda.tuning import decode_tile, prefill_rows, prefill_tile, share_quantum  # noqa: E402
from hasten.backends.reference import ReferenceBackend  # noqa: E402
from hasten.errors import ResourceError  # noqa: E402
from hasten.model.checkpoint import open_checkpoint  # noqa: E402
from hasten.model.formats import Format, quantize, sparsify  # noqa: E402

FORMATS = {
    "fp32": (Format("fp32"), "fp32", 1e-6),
    "fp16": (Format("fp16"), "fp16", 1e-3),
    "int8": (Format("int8"), "fp32", 1e-6),
    "int8_g32": (Format("int8", 32), "fp32", 1e-6),
    "int4": (Format("int4"), "fp32", 1e-6),
    "int4_g32": (Format("int4", 32), "fp32", 1e-6),
    "int4_g64_asymmetric": (Format("int4", 64, False), "fp32", 1e-6),
    "fp8": (Format("fp8"), "fp32", 1e-6),
    "fp8_g64": (Format("fp8", 64), "fp32", 1e-6),
}


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("name", FORMATS)
def test_product(name: str, rows: int) -> None:
    format, dtype, tolerance = FORMATS[name]
    check_product("cpu", format, dtype, rows, 70, 320, rows == 3, tolerance, rows)


@pytest.mark.parametrize(("group", "symmetric"), [(0, True), (32, True), (64, False), (128, True), (0, False)])
def test_one_row_of_int4(group: int, symmetric: bool) -> None:
    """Its own kernel, with the input's norm in it, for bfloat16; the result is rounded to 8 bits."""
    format = Format("int4", group, symmetric)
    check_product("cpu", format, "bf16", 1, 12, 384, group == 128, 6e-3, 5)
    check_normed(format, group != 128)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_model_equals_the_reference(family: str, tiny_model: Callable[..., Path]) -> None:
    """Chunks, single tokens, and both in one step; the rest of the families run on a GPU."""
    path = tiny_model(family, num_hidden_layers=2)
    tokens = np.random.default_rng(0).integers(3, 300, 30).astype(np.int32)
    checkpoint = open_checkpoint(path)
    reference = ReferenceBackend()
    reference.load(checkpoint.spec, checkpoint.weights())
    reference.allocate(NUM_BLOCKS, BLOCK, "fp32")
    first, second = table(1), table(0)
    second = np.array([b for b in second if b not in first[:2]], np.int32)[: len(first) - 2]
    first = first[: len(second)]
    want = reference.forward(batch([(tokens, 0, first)]))
    backend = load(path, "cpu")
    got = pieces(backend, tokens, [20, 1, 4], first)
    mixed = fetched(backend, batch([(tokens[:7], 0, second), (tokens[25:26], 25, first)]))
    assert np.abs(np.concatenate((got, mixed[7:])) - want[:26]).max() < 1e-5 * np.abs(want).max()
    assert np.abs(mixed[:7] - want[:7]).max() < 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("least_k", [0, 1])
def test_sampling_equals_the_reference(least_k: int) -> None:
    check_sampling("cpu", 24, 211, least_k)


def test_greedy_takes_the_lowest_id_and_reports_nan() -> None:
    logits = torch.randn(5, 3000)
    logits[1, [40, 2900]] = 50.0
    logits[2, 1700] = float("nan")
    logits[3] = float("-inf")
    sampled = torch.full((8,), 7, dtype=torch.int32)
    Ops(open_device("cpu"), False, 1e-5).argmax(logits, sampled)
    assert sampled[0] == logits[0].argmax()
    assert sampled[1:5].tolist() == [40, -1, 0, int(logits[4].argmax())]


@pytest.mark.parametrize("vocab", [5, 16, 1500, 9000])
def test_draws_are_those_of_the_reference(vocab: int) -> None:
    check_draws("cpu", vocab)


def test_padded_steps_equal_exact_ones(tiny_model: Callable[..., Path]) -> None:
    """What graphs run: steps padded to a bucket, in a buffer that is used again."""
    backend = load(tiny_model("qwen3", num_hidden_layers=1), "cpu")
    decoder, stager = backend._decoder, backend._stager
    assert decoder is not None
    assert stager is not None
    tokens = np.random.default_rng(1).integers(3, 300, 40).astype(np.int32)
    tables = [np.arange(4 * i, 4 * i + 4, dtype=np.int32) for i in range(4)]
    fetched(backend, batch([(tokens[:20], 0, tables[0]), (tokens[:9], 0, tables[1])]))
    any_step, decode = Sizes(32, 8, 6, 32, 8), Sizes(4, 4, 0, 4, 4)
    buffer = torch.full((max(stager.room(sizes, 4) for sizes in (any_step, decode)),), 7, dtype=torch.int32)
    mixed = batch([(tokens[20:21], 20, tables[0]), (tokens[:17], 0, tables[2]), (tokens[9:10], 9, tables[1])])
    single = batch([(tokens[20:21], 20, tables[0]), (tokens[9:10], 9, tables[1])])
    for step, sizes in ((mixed, any_step), (single, decode)):
        want = fetched(backend, step)
        inputs = stager.fixed(sizes, 4, buffer)
        assert stager.refill(step, sizes, 4, buffer)
        hidden = decoder.hidden(inputs)
        rows = None if inputs.rows is None else inputs.rows[: len(step.rows)]
        got = decoder.logits(hidden, rows)[: len(want)].numpy()
        np.testing.assert_allclose(got, want, atol=1e-5)
    long = batch([(tokens[:33], 0, tables[2])])
    assert not stager.refill(long, any_step, 4, buffer)


@pytest.mark.parametrize(
    "lengths", [[1], [5000], [7, 300, 2000, 64], [641] * 64, [300, 900] * 32, [900] * 300, [1] * 700]
)
def test_keys_are_shared_evenly(lengths: list[int]) -> None:
    counts = share_keys(np.array(lengths, np.int32), 66)
    assert (counts >= 1).all()
    if len(lengths) + max(66, len(lengths)) > MAX_PROGRAMS:
        assert (counts == 1).all()
        return
    assert counts.sum() <= len(lengths) + max(66, len(lengths))
    assert counts.max() <= MAX_SPLITS
    share, keys = -(-np.array(lengths) // counts), share_quantum(len(lengths))
    tiles = max(-(-sum(lengths) // (66 * keys)), -(-max(lengths) // (keys * MAX_SPLITS)))
    assert share.max() <= max(1, tiles + (tiles // 4 if counts.sum() <= max(66, len(lengths)) else 0)) * keys


@pytest.mark.parametrize(
    ("lengths", "programs"),
    [
        ([640] * 64, 64), ([641] * 64, 64), ([641] * 63 + [725], 64), ([641] * 32, 64), ([640] * 48, 48),
        ([320] * 40, 80), ([290], 10), ([3074], 25), ([193] * 64, 128), ([300, 900] * 32, 96),
    ],
)  # fmt: skip
def test_a_few_keys_too_many_make_no_programs(lengths: list[int], programs: int) -> None:
    """Parts with up to a quarter more, where they are as many as keep the device busy; else even ones."""
    assert share_keys(np.array(lengths, np.int32), 66).sum() == programs


def test_few_tokens_of_each_sequence_as_decodes(tiny_model: Callable[..., Path]) -> None:
    """What graphs of drafts run: every token a decode of its own, keys stored first, the rest of the buffer padding."""
    backend = load(tiny_model("qwen3", num_hidden_layers=2), "cpu")
    tokens = np.random.default_rng(1).integers(3, 300, 40).astype(np.int32)
    first, second = np.array_split(np.arange(NUM_BLOCKS, dtype=np.int32), 2)
    fetched(backend, batch([(tokens[:9], 0, first), (tokens[9:11], 0, second)]))
    step = batch([(tokens[20:25], 9, first), (tokens[30:31], 2, second), (tokens[31:34], 3, second)])
    want = fetched(backend, step)
    stager, decoder = backend._stager, backend._decoder
    assert stager is not None
    assert decoder is not None
    sizes = Sizes(16, 16, 0, 16, 16, runs=True)
    buffer = torch.zeros(stager.room(sizes, len(first)), dtype=torch.int32)
    inputs = stager.fixed(sizes, len(first), buffer)
    assert stager.refill(step, sizes, len(first), buffer)
    got = decoder(inputs)[: len(step.tokens)].numpy()
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_low_rank_experts_and_widths_of_their_own(family: str, tiny_model: Callable[..., Path]) -> None:
    tokens = np.random.default_rng(2).integers(3, 300, 12).astype(np.int32)
    check_composed("cpu", tiny_model(family, num_hidden_layers=2), tokens, 2e-5)


@pytest.mark.parametrize("kind", ["fp32", "int8", "int4", "fp8"])
def test_two_of_four_are_expanded(kind: str) -> None:
    """What is loaded of a 2:4 matrix stands for the same numbers, zeros among them."""
    values = np.random.default_rng(0).standard_normal((24, 16, 4)).astype(np.float32)
    values[:, :, :2] = 0
    whole = quantize(values.reshape(24, 64), Format(kind, 32 if kind == "int4" else 0))  # type: ignore[arg-type]
    device = open_device("cpu")
    x = torch.randn(3, 64)
    got, want = (make_linear([weight], device, "fp32")(x) for weight in (sparsify(whole), whole))
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("kind", "runs"),
    [
        ("long", [(1, 1), (200, 1), (65, 1)]),
        ("decodes", [(20 * i + 1, 1) for i in range(9)]),
        ("runs", [(40, 3), (17, 2)]),
        ("general", [(33, 20), (70, 1)]),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "kv", "head_dim", "window", "softcap"),
    [("fp32", "fp32", 24, 0, 0.0), ("fp32", "bf16", 16, 18, 4.0)],
)
def test_attention(
    dtype: str, kv: str, head_dim: int, window: int, softcap: float, kind: str, runs: list[tuple[int, int]]
) -> None:
    """More sizes on a GPU, see tests/gpu/test_attention.py."""
    check_attention(
        "cpu",
        runs,
        heads=6,
        kv_heads=2,
        head_dim=head_dim,
        dtype=dtype,
        kv=kv,
        window=window,
        softcap=softcap,
        kind=kind,
    )


@pytest.mark.parametrize("heads", [2, 6, 8])
@pytest.mark.parametrize(
    ("head_dim", "window", "softcap", "normed"), [(24, 0, 0.0, False), (16, 70, 4.0, False), (32, 0, 0.0, True)]
)
def test_attention_of_few(heads: int, head_dim: int, window: int, softcap: float, normed: bool) -> None:
    """Without tensor cores: sequences of one key, of several tiles, cut into parts."""
    check_attention(
        "cpu", [(1, 1), (300, 1), (64, 1)], heads=heads, head_dim=head_dim, window=window, softcap=softcap,
        kind="decodes", normed=normed,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["decodes", "long", "runs", "general"])
def test_attention_with_normed_heads(kind: str) -> None:
    check_attention("cpu", [(9, 1), (70, 1)], head_dim=16, dtype="fp32", kv="fp32", kind=kind, normed=True)


@pytest.mark.parametrize("key_bytes", [64, 128, 256, 512, 1024])
def test_tiles_of_attention_fit_any_gpu(key_bytes: int) -> None:
    """Keys and values of a tile in 64 KB: with what is beside them, less than the 99 KB of the smallest."""
    for sequences, itemsize, group in product((1, 64, 256), (1, 2, 4), (1, 4, 64)):
        dims = key_bytes // itemsize
        tile = decode_tile(sequences, dims, itemsize, group)
        assert tile.keys & (tile.keys - 1) == 0
        assert 2 * tile.keys * key_bytes <= 64 << 10
        assert tile.at_once == 1 or tile.at_once * group * dims <= 1024 * tile.warps  # in registers


@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("block", [32, 128])
def test_attention_over_larger_blocks(block: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (attention_tools, cpu_tools):
        monkeypatch.setattr(module, "BLOCK", block)
    runs = [(150, 150), (300, 1), (17, 17), (260, 40)]
    check_attention("cpu", runs, head_dim=24, dtype="fp32", kv="fp32", window=window)


@pytest.mark.parametrize(("query", "key"), [(2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4)])
def test_tiles_of_prefill_attention_fit_any_gpu(query: int, key: int) -> None:
    for shared, dims in product((99 << 10, 163 << 10, 227 << 10), (16, 64, 128, 256)):
        for rows in (prefill_rows(dims * query), 64):  # as many where a group has many query heads
            keys, stages = prefill_tile(rows, dims, query, key, shared)
            assert keys in (16, 32, 64)
            assert (rows * query + 2 * stages * keys * key) * dims <= shared


def test_tiles_of_prefill_attention() -> None:
    """As measured on an H200, and one that any GPU takes."""
    assert prefill_tile(64, 128, 2, 2, 227 << 10) == (64, 3)  # two programs
    assert prefill_tile(64, 256, 2, 2, 227 << 10) == (64, 3)  # one
    assert prefill_tile(64, 128, 2, 2, 163 << 10) == (64, 2)
    assert prefill_tile(64, 256, 2, 2, 99 << 10) == (32, 2)


def test_steps_that_do_not_fit_are_refused_in_one_line(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = load(tiny_model("qwen3", num_hidden_layers=1), "cpu")
    with pytest.raises(ResourceError, match=r"8192 sequences .* 8448 rows of logits, expected at most 4096 on a GPU"):
        backend.memory(StepLimits(8192, 8192, 8448))
    with pytest.raises(ResourceError, match="KV block size is 48, expected a power of two from 16 on"):
        backend.allocate(4, 48, "fp32")

    def full(*args: object) -> None:
        raise torch.cuda.OutOfMemoryError("a page of torch's")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 80 * 10**9))
    monkeypatch.setattr(backend._decoder, "attention", full)
    with pytest.raises(ResourceError, match=r"step of 3 rows does not fit .* 1.0 of 80.0 GB are free: lower memory"):
        backend.forward(batch([(np.arange(3, dtype=np.int32), 0, table(0))]))


@pytest.mark.parametrize("kv", ["fp32", "fp8"])
def test_blocks_are_copied_in_order(kv: str) -> None:
    device = open_device("cpu")
    attention = Attention(device, make_spec(2, 1, 16, "fp32", 0, 0.0), 6, BLOCK, kv)
    (cache,) = attention._caches
    for block in range(6):
        cache[:, block] = block
    attention.copy_blocks([])
    attention.copy_blocks([(1, 4), (1, 5), (2, 3)])
    assert cache[:, :, 0, 0, 0].float().tolist() == [[0, 1, 2, 2, 1, 1]] * 2
    attention.copy_blocks([(0, 1), (1, 2)])
    assert cache[1, :, 0, -1, -1].float().tolist() == [0, 0, 0, 2, 1, 1]


def test_gpus_without_8_bit_floats_say_so(tiny_model: Callable[..., Path]) -> None:
    old = replace(open_device("cpu"), fp8=False)
    with pytest.raises(ResourceError, match=r"format fp8 needs a GPU of compute capability 8.9 or newer: use int8"):
        CudaBackend(format="fp8", device=old)
    assert CudaBackend(device=old).kv_dtypes == ("fp32", "bf16")
    with pytest.raises(ResourceError, match=r"a folder of 8-bit floats needs a GPU of compute capability 8.9"):
        make_linear([quantize(np.ones((8, 16), np.float32), Format("fp8"))], old, "fp32")


def test_a_gpu_that_others_have_filled_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 MiB.\nA page of advice")

    monkeypatch.setattr(torch.cuda, "init", full)
    with pytest.raises(ResourceError, match=r"cannot be used: CUDA out of memory. Tried .* 64 MiB.: see nvidia-smi"):
        open_device("cuda")


def test_parts_fit_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide and of few rows, a product would be cut into more parts than there is room for their sums."""
    parts = []
    whole = Linear._splits

    def watched(self: Linear, *arguments: Any) -> int:
        parts.append((arguments[0].splits, whole(self, *arguments)))
        return parts[-1][1]

    monkeypatch.setattr(Linear, "_splits", watched)
    monkeypatch.setattr(cuda_device, "_WORKSPACE_BYTES", 4 * 16 * 64)
    check_product("cpu", Format("fp32"), "fp32", 5, 32, 4096, False, 1e-4, 1)
    assert parts[-1][0] > parts[-1][1] == 2
