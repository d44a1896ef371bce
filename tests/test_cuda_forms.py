"""Compressed forms on the CUDA backend, in Triton's interpreter: experts, low rank, 2:4 and W8A8 against float64. On a
GPU tests/gpu/test_forms.py does the same at real sizes."""

import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on the GPU here: see tests/gpu", allow_module_level=True)

from cuda_tools import check_experts, check_low_rank, check_normed, check_product, make_linear  # noqa: E402

from hasten.backends.cuda import linear  # noqa: E402
from hasten.backends.cuda.device import open_device  # noqa: E402
from hasten.backends.cuda.kernels import experts as kernels  # noqa: E402
from hasten.model.formats import Format, dequantize, quantize  # noqa: E402


@pytest.mark.parametrize(
    ("format", "sizes", "tolerance"),
    [
        (Format("fp32"), (96, 40, 5, 2, 1), 1e-6),  # nothing a power of two
        (Format("fp32"), (128, 64, 4, 1, 0), 1e-6),
        (Format("int8"), (64, 48, 4, 2, 1), 1e-6),
        (Format("int8", 32), (64, 48, 4, 2, 1), 1e-6),  # groups reach over experts: all are computed
        (Format("int4", 64), (256, 256, 3, 2, 1), 1e-6),
        (Format("fp8"), (64, 32, 4, 2, 1), 1e-6),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_experts(format: Format, sizes: tuple[int, int, int, int, int], tolerance: float, rows: int) -> None:
    check_experts("cpu", format, "fp32", rows, sizes, tolerance)


@pytest.mark.parametrize("rows", [32, 40, 64, 70])
def test_experts_whose_inputs_may_be_rounded(rows: int) -> None:
    """W8A8: as long as experts are left out inputs are not rounded, as that product leaves none out."""
    sizes = (64, 48, 4, 2, 1)
    check_experts("cpu", Format("int8", activations="int8"), "fp32", rows, sizes, 1e-6 if rows <= 64 else 0.05)


def test_experts_that_are_all_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "EXPERT_ROWS", 0)
    check_experts("cpu", Format("fp32"), "fp32", 3, (96, 40, 5, 2, 1), 1e-6)


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [("bf16", "bf16", 6e-3), ("fp16", "fp16", 1e-3), ("int8", "fp16", 1e-3), ("fp8", "fp16", 1e-3)],
)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_two_of_four(kind: str, dtype: str, tolerance: float, rows: int) -> None:
    """Without their zeros: one row, a few, and many, for which they are put back."""
    if dtype == "bf16" and rows == 3:
        pytest.skip("the interpreter's dot takes the bits of bfloat16 for integers")
    format = Format(kind, sparse24=True)  # type: ignore[arg-type]
    check_product("cpu", format, dtype, rows, 70, 404, rows == 3, tolerance, rows)
    check_product("cpu", format, dtype, rows, 6, 1024, rows == 1, tolerance, rows)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_one_row_of_two_of_four_with_its_norm(kind: str) -> None:
    """In bfloat16, to which the interpreter cuts where a GPU rounds."""
    check_normed(Format(kind, sparse24=True), kind == "bf16", tolerance=1e-2)  # type: ignore[arg-type]


def test_low_rank() -> None:
    check_low_rank("cpu", [1, 3, 66], 2e-5)


def test_int8_by_int8() -> None:
    """Rows of x rounded to int8 beforehand, in passing, or by the product, which then is exact."""
    rng = np.random.default_rng(0)
    weight = quantize(rng.standard_normal((200, 208)).astype(np.float32), Format("int8", activations="int8"))
    device = open_device("cpu")
    product = make_linear([weight], device, "fp32")
    assert product.takes_eight(32) is None
    assert product.takes_eight(70) == torch.int8
    x = torch.from_numpy(rng.standard_normal((70, 208)).astype(np.float32))
    x[3] = 0
    rows, scales = product.ops.quantize_rows(x, torch.int8)
    exact = x.numpy() / np.maximum(np.abs(x.numpy()).max(1, keepdims=True), 1e-12) * 127
    assert np.abs(rows.numpy() - exact).max() <= 0.5 + 1e-4
    want = scales[:, None].numpy() * rows.numpy().astype(np.float64) @ dequantize(weight).T
    for got in (product(x), product(rows, x_scales=scales, dtype=torch.float32)):
        assert np.abs(got.numpy() - want).max() < 1e-5 * np.abs(want).max()


def test_a_row_of_nan_takes_no_more_experts_than_others() -> None:
    """As padding may hold: grids are made for so many experts a row, and the others' must be among them."""
    device = open_device("cpu")
    x, router = torch.randn(2, 32), torch.randn(16, 32)
    x[1] = float("nan")
    running, taken = torch.zeros(17, dtype=torch.int32), torch.zeros(64, 16, dtype=torch.int8)
    kernels.route[(16, 2)](
        x, router, x, device.workspace, running, taken, device.counters, 2, 16, 32, 2, 0.0,
        NORM=False, EP=16, BT=2, BK=32, PDL=False,
    )  # fmt: skip
    assert taken[:2].sum(1).tolist() == [2, 2]
    assert set((x[:1] @ router.T).topk(2).indices[0].tolist()) <= set(running[1 : 1 + int(running[0])].tolist())
    assert int(running[0]) <= 4
