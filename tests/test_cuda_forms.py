"""Compressed forms on the CUDA backend, in Triton's interpreter: experts, low rank, 2:4 and W8A8 against float64. On a
GPU tests/gpu/test_forms.py does the same at real sizes."""

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on the GPU here: see tests/gpu", allow_module_level=True)

from cuda_tools import check_experts, check_product  # noqa: E402

from hasten.model.formats import Format  # noqa: E402


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
