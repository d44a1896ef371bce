"""Compressed forms on the GPU at real sizes: experts, 2:4, low rank, against float64."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from cpu_tools import BLOCK, NUM_BLOCKS  # noqa: E402
from cuda_tools import batch, check_experts, check_low_rank, check_normed, check_product, composed, fetched, pieces  # noqa: E402

from hasten.backends.cuda import CudaBackend  # noqa: E402
from hasten.model.formats import Format  # noqa: E402


@pytest.mark.parametrize("rows", [1, 7, 64, 100])
@pytest.mark.parametrize("format", [Format("bf16"), None, Format("int8"), Format("int4", 128)], ids=str)
@pytest.mark.parametrize("sizes", [(4096, 896, 16, 4, 1), (2048, 512, 64, 6, 1), (1024, 256, 12, 3, 0)], ids=str)
def test_experts(format: Format | None, sizes: tuple[int, int, int, int, int], rows: int) -> None:
    check_experts("cuda", format, "bf16", rows, sizes, 0.06 if format is None and rows > 1 else 1e-2)


@pytest.mark.parametrize("rows", [1, 8, 40, 200])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["bf16", "int8", "fp8"])
def test_two_of_four(kind: str, gated: bool, rows: int) -> None:
    format = Format(kind, sparse24=True)  # type: ignore[arg-type]
    check_product("cuda", format, "bf16", rows, 1536, 4096, gated, 6e-3, rows)
    check_product("cuda", format, "bf16", rows, 1003, 14336, gated, 6e-3, rows)
    check_product("cuda", format, "fp16" if kind == "fp8" else "bf16", rows, 200, 1076, gated, 6e-3, rows)


@pytest.mark.parametrize("k", [1076, 4096, 14336])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["bf16", "int8", "fp8"])
def test_one_row_of_two_of_four_with_its_norm(kind: str, gated: bool, k: int) -> None:
    check_normed(Format(kind, sparse24=True), gated, "cuda", 203, k, 4e-3)  # type: ignore[arg-type]


def test_low_rank() -> None:
    check_low_rank("cuda", [1, 3, 70, 1], 1e-4)


@pytest.mark.parametrize("rows", [33, 65, 200, 1030])
def test_int8_by_int8(rows: int) -> None:
    """Inputs rounded to int8, a scale a row."""
    format = Format("int8", activations="int8")
    for n, k in ((1536, 4096), (1003, 1156), (4096, 14336)):
        check_product("cuda", format, "bf16", rows, n, k, False, 0.02, rows)
        check_product("cuda", format, "bf16", rows, n, k, True, 0.02, rows)


@pytest.mark.parametrize("sequences", [1, 3])
def test_graphs_equal_single_kernels(sequences: int, tiny_model: Callable[..., Path]) -> None:
    """Steps of a model with experts and low rank, whose experts are read from the device in a graph, too."""
    spec, weights = composed(tiny_model("qwen3", num_hidden_layers=2))
    backend = CudaBackend()
    backend.load(spec, weights)
    backend.allocate(NUM_BLOCKS, BLOCK, "fp32")
    tokens = np.random.default_rng(3).integers(3, 300, 30).astype(np.int32)
    each = NUM_BLOCKS // sequences
    shares = np.arange(each * sequences, dtype=np.int32).reshape(sequences, each)
    length = min(len(shares[0]) * BLOCK - 1, 20)
    for blocks in shares:
        pieces(backend, tokens[:length], [length], blocks)
    step = batch([(tokens[length + i : length + i + 1], length, shares[i]) for i in range(sequences)])
    want = fetched(backend, step)
    for _ in range(40):
        assert np.abs(fetched(backend, step) - want).max() < 1e-5 * np.abs(want).max()
    backend.finish_captures()
    assert np.abs(fetched(backend, step) - want).max() < 1e-5 * np.abs(want).max()
