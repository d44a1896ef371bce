"""What the tuner of kernels keeps, and which tiles it tries; the tuning itself runs on a GPU (tests/gpu)."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import count, product
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on the GPU here: see tests/gpu", allow_module_level=True)

from cpu_tools import BLOCK, NUM_BLOCKS  # noqa: E402
from cuda_tools import check_experts, composed, load, make_linear  # noqa: E402

from hasten.backends.cuda import CudaBackend, measured, tuner  # noqa: E402
from hasten.backends.cuda import backend as module  # noqa: E402
from hasten.backends.cuda import linear as linears  # noqa: E402
from hasten.backends.cuda.device import open_device  # noqa: E402
from hasten.backends.cuda.linear import DENSE, FP8, INT4, INT8, Linear  # noqa: E402
from hasten.backends.cuda.measured import Measured, measured_path, read_measured, write_measured  # noqa: E402
from hasten.backends.cuda.tuner import (  # noqa: E402
    Steps,
    _worth_a_try,
    all_dense,
    compare_with_dense,
    measure_few_rows,
    signature,
    tune_tiles,
)
from hasten.backends.cuda.tuning import Tile, skinny_tile, tile_key  # noqa: E402
from hasten.errors import ModelError, ResourceError  # noqa: E402
from hasten.model.formats import Format, quantize  # noqa: E402

GPU = "NVIDIA H200"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_what_ships_serves_who_has_measured_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, shipped = (Measured({"gemv 0 0 1 64 64": Tile(rows, 512)}) for rows in (4, 8))
    monkeypatch.setattr(measured, "_SHIPPED", tmp_path / "shipped")
    assert read_measured(GPU) == Measured()
    (tmp_path / "shipped").mkdir()
    write_measured(GPU, shipped).rename(tmp_path / "shipped" / measured_path(GPU).name)
    assert read_measured(GPU) == shipped
    write_measured(GPU, own)
    assert read_measured(GPU) == own


def test_tables_that_ship_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [json.loads(path.read_text()) for path in measured._SHIPPED.glob("*.json")]
    assert GPU in [table["gpu"] for table in tables]
    for table in tables:
        monkeypatch.setattr("triton.__version__", table["triton"])
        assert read_measured(table["gpu"]).tiles.keys() == table["tiles"].keys()
    monkeypatch.setattr("triton.__version__", "3.6.0")
    assert tile_key("skinny", 0, 0, 64, 14336, 4096, True) in read_measured(GPU).tiles


def test_what_is_written_is_read(cache: Path) -> None:
    assert read_measured("NVIDIA H000") == Measured()
    found = Measured({"gemv 0 0 1 64 64": Tile(4, 512, 1, 2, 3)}, {"int4 64x64": {1: (0.5, 1.0), 64: (3.0, 2.0)}})
    assert write_measured(GPU, found) == measured_path(GPU) == cache / "hasten" / "kernels-nvidia-h200.json"
    found.few_rows["int4 64x64"] = {"int4-g128": 128}
    write_measured(GPU, found)
    assert read_measured(GPU) == found
    assert list((cache / "hasten").iterdir()) == [measured_path(GPU)]


def test_another_compiler_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    write_measured(GPU, Measured({"a": Tile(1, 2)}))
    monkeypatch.setattr("triton.__version__", "0.0")
    assert read_measured(GPU) == Measured()


@pytest.mark.parametrize("text", ["", "[]", "{nonsense"])
def test_a_damaged_file_is_named(text: str) -> None:
    measured_path(GPU).parent.mkdir(parents=True)
    measured_path(GPU).write_text(text)
    with pytest.raises(ResourceError, match="delete it"):
        read_measured(GPU)


@pytest.mark.parametrize("format", [Format("bf16"), Format("int4", 32)], ids=str)
def test_measured_tiles_go_before_the_table(format: Format) -> None:
    values = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    linear = make_linear([quantize(values, format)], open_device("cpu"), "bf16")
    for rows in (1, 5, 64):
        key, default = linear.tile_of(rows)
        tries = list(_worth_a_try(linear, rows, default))
        assert tries
        assert all(tile.rows & (tile.rows - 1) == 0 for tile in tries)
        linear.device.tiles[key] = tries[0]
        width = 1 if rows == 1 else linear._width(rows)
        assert linear._tile(linear.matrices[0], width, 64, 2, False, rows == 1) == tries[0]


def test_tuning_walks_a_model(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock by which everything is faster than what was before: tiles are kept, where there are any to try."""
    times = (1 / n for n in count(1))
    monkeypatch.setattr(tuner, "graph_ms", lambda run: next(times))
    backend = load(tiny_model("qwen3", num_hidden_layers=1), "cpu")
    assert backend._decoder is not None
    assert backend._sampler is not None
    assert backend._stager is not None
    steps = Steps(backend._decoder, backend._sampler, backend._stager, NUM_BLOCKS, BLOCK)
    said: list[str] = []
    found = tune_tiles(steps, (1, 8), said.append)
    assert found["8 after"] < found["8 before"]
    assert len(said) == 2 * len(backend._decoder.shapes())
    assert all(key.startswith("skinny") for key in backend._device.tiles)  # one row is too narrow for any other tile
    assert backend._device.tiles
    assert signature(backend._decoder).startswith("dense ")
    (pair,) = compare_with_dense(backend._decoder, (1,)).values()
    assert pair[0] > pair[1]


@pytest.mark.parametrize(("slower_from", "few"), [(0, 8), (100, 96), (1000, 256)])
def test_our_own_kernels_run_up_to_where_they_lose(
    slower_from: int, few: int, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that charges our kernels more from so many rows on; the products themselves follow what is found."""
    backend = load(tiny_model("qwen3", num_hidden_layers=1), "cpu")
    decoder = backend._decoder
    assert decoder is not None

    def clock(linears: list[Linear], rows: int) -> float:
        ours = all(linear.fuses_residual(rows) for linear in linears)
        return 2.0 if ours and rows >= slower_from else 1.0

    monkeypatch.setattr(tuner, "_products_ms", clock)
    assert measure_few_rows(decoder) == {"dense": few}
    qkv = decoder.products()[0]
    assert qkv.fuses_residual(few)
    assert not qkv.fuses_residual(few + 1)


def test_what_was_found_holds_for_such_models(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for others, and experts go on being left out where rows are few."""
    path = tiny_model("qwen3", num_hidden_layers=1)
    decoder = load(path, "cpu")._decoder
    assert decoder is not None
    assert decoder.products()[0].fuses_residual(64)
    for name, rows in ((signature(decoder), 8), ("another", 64)):
        device = replace(open_device("cpu"), measured=Measured(few_rows={name: {"dense": 8}}))
        monkeypatch.setattr(module, "open_device", lambda name, device=device: device)
        linear = load(path, "cpu")._decoder.products()[0]  # type: ignore[union-attr]
        assert linear.fuses_residual(rows)
        assert linear.fuses_residual(9) == (rows > 8)


def test_experts_are_left_out_whatever_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "FEW_ROWS", dict.fromkeys(linears.FEW_ROWS, 8))
    check_experts("cpu", Format("fp32"), "fp32", 12, (96, 40, 5, 2, 1), 1e-6)


def test_what_is_compared_is_named(tiny_model: Callable[..., Path]) -> None:
    """Low rank and experts, too."""
    spec, weights = composed(tiny_model("qwen3", num_hidden_layers=2))
    backend = CudaBackend(device="cpu")
    backend.load(spec, weights)
    assert backend._decoder is not None
    name = signature(backend._decoder)
    assert "dense in 4 " in name
    assert name.count(" 2 of 4") == 2
    assert not all_dense(backend._decoder)


def test_where_a_format_loses_is_told() -> None:
    backend = CudaBackend(device="cpu")
    assert backend.slower_than_dense() == {}
    with pytest.raises(ModelError, match="on a GPU"):
        backend.tune_kernels(lambda line: None)


@pytest.mark.parametrize("shared", [101_376, 166_912, 232_448])
def test_tiles_fit_the_shared_memory_of_a_gpu(shared: int) -> None:
    for kind, itemsize in ((DENSE, 2), (DENSE, 4), (FP8, 1), (INT8, 1), (INT4, 2)):
        for rows, x_itemsize, gated in product((16, 32, 64), (1, 2, 4), (False, True)):
            tile = skinny_tile(kind, itemsize, x_itemsize, rows, 4096, 4096, 0, gated, 132, shared)
            parts = 4 if kind == INT4 else 1
            weights = tile.rows * itemsize * (2 if gated else 1)
            assert tile.stages * tile.columns * (weights + parts * rows * x_itemsize) <= shared
            assert tile.rows >= 16
