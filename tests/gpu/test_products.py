"""Products on the GPU at real sizes, every format and number of rows, against float64."""

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from cuda_tools import check_normed, check_product  # noqa: E402

from hasten.model.formats import Format  # noqa: E402

FORMATS = {
    "bf16": Format("bf16"),
    "fp8": None,
    "int8": Format("int8"),
    "int8_g128": Format("int8", 128),
    "int4_g32": Format("int4", 32),
    "int4_g128": Format("int4", 128),
    "int4_g64_asymmetric": Format("int4", 64, False),
}


@pytest.mark.parametrize("rows", [1, 5, 16, 33, 64, 200])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_product(name: str, gated: bool, rows: int) -> None:
    # fp8 products of several rows round the activations too: to 3 bits after the point.
    tolerance = 0.05 if name == "fp8" and rows > 1 else 6e-3
    check_product("cuda", FORMATS[name], "bf16", rows, 1536, 4096, gated, tolerance, rows)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 7])
def test_odd_sizes(name: str, rows: int) -> None:
    check_product(
        "cuda",
        FORMATS[name],
        "bf16",
        rows,
        1003 if name != "fp8" else 1008,
        1152,
        False,
        0.05 if name == "fp8" and rows > 1 else 6e-3,
        3,
    )


@pytest.mark.parametrize("k", [1152, 4096, 14336])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("int4")])
def test_one_row_of_int4_with_its_norm(name: str, gated: bool, k: int) -> None:
    format = FORMATS[name]
    assert format is not None
    check_normed(format, gated, "cuda", 203, k)


@pytest.mark.parametrize("rows", [1, 9, 100])
def test_float16_and_float32(rows: int) -> None:
    check_product("cuda", Format("fp16"), "fp16", rows, 1024, 2048, True, 1e-3, 1)
    check_product("cuda", Format("int4", 128), "fp16", rows, 1024, 2048, True, 1e-3, 1)
    check_product("cuda", Format("fp32"), "fp32", rows, 1024, 2048, True, 2e-6, 1)
